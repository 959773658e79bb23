"""The train command with each method: what it keeps, what it starts from, what it refuses."""

import json

import pytest
import torch
from torch import Tensor

from medfast import checkpoint, train
from medfast.evals.encode import Embeddings
from medfast.methods import METHODS

SHORT = ["--epochs", "2", "--batch-size", "16", "--workers", "0", "--warmup", "2"]
SMALL = ["--force-image-size", "32"]


def _argv(data, logs, *more, name="a"):
    return ["--train-data", f"roco:{data}", "--logs", str(logs), "--name", name, *SHORT, *more]


def _rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _state(run, name="epoch_2.pt"):
    return checkpoint.load(run / "checkpoints" / name)


def _assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict | list):
        names = [list(x) if isinstance(x, dict) else list(range(len(x))) for x in (a, b)]
        assert names[0] == names[1], where
        for key in names[0]:
            _assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def general(phantom, tmp_path_factory):
    """The folder of a short run of clip, to start from."""
    logs = tmp_path_factory.mktemp("logs")
    train.main(_argv(phantom, logs, "--method", "clip", *SMALL, name="general"))
    return logs / "general"


@pytest.mark.parametrize("method", ["slip", "declip"])
def test_heads_banks_and_batches_in_parts_are_resumed_bitwise(phantom, tmp_path, method):
    more = ("--method", method, "--batch-size", "8", "--accum-freq", "2", "--save-steps", "4")
    train.main(_argv(phantom, tmp_path, *more, *SMALL, "--keep-checkpoints", "9"))
    run = tmp_path / "a"
    whole = _state(run)
    assert whole["step"] == 12
    assert whole["samples"] == 192
    assert any("running_mean" in name for name in whole["method"])
    if method == "declip":
        assert whole["method"]["bank.pushed"] == 192
    (run / "checkpoints" / "epoch_2.pt").unlink()
    assert checkpoint.listing(run / "checkpoints")[-1].name == "epoch_1_step_8.pt"
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    resumed = _state(run)
    for part in ("state_dict", "method", "optimizer", "random"):
        _assert_same(whole[part], resumed[part], part)


def test_every_method_begins_alike_and_sees_the_same_pairs(phantom, general, tmp_path):
    """The same towers, order and main views: the loss that methods share is the same at step 1."""
    first = {}
    for method in METHODS:
        source = ["--pretrained", str(general)] if method == "lit" else []
        argv = _argv(phantom, tmp_path, "--method", method, "--epochs", "1", *SMALL, *source)
        train.main([*argv, "--name", method, "--log-every", "1"])
        rows = [row for row in _rows(tmp_path / method) if row["kind"] == "train"]
        first[method] = rows[0]["losses"]
        assert [row["samples"] for row in rows] == [16, 32, 48, 64, 80, 96]
    shared = {losses["clip"] for key, losses in first.items() if key not in ("lit", "filip")}
    assert len(shared) == 1


def test_lit_trains_all_but_the_image_tower(phantom, general, tmp_path, capsys):
    before = _state(general)["state_dict"]
    train.main(_argv(phantom, tmp_path, "--method", "lit", "--pretrained", str(general), *SMALL))
    said = capsys.readouterr().err
    assert "medfast weights of" in said
    after = _state(tmp_path / "a")["state_dict"]
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not {name for name in moved if name.startswith("image_tower.")}
    assert {"image_projection.weight", "text_projection.weight", "logit_scale"} <= moved
    assert any(name.startswith("text_tower.") for name in moved)
    # The words keep the ids by which the text tower was trained.
    ids = [
        (path / "tokenizer" / "tokenizer.json").read_text() for path in (general, tmp_path / "a")
    ]
    assert json.loads(ids[0])["model"] == json.loads(ids[1])["model"]


def test_a_partly_locked_run_goes_on_without_its_source(phantom, general, tmp_path):
    more = ("--method", "clip", "--pretrained", str(general), *SMALL)
    locks = ("--lock-image", "--lock-image-unlocked-groups", "2", "--lock-text")
    train.main(_argv(phantom, tmp_path, *more, *locks))
    run = tmp_path / "a"
    before, whole = _state(general)["state_dict"], _state(run)
    moved = {n for n, x in before.items() if not torch.equal(x, whole["state_dict"][n])}
    assert {name.split(".")[2] for name in moved if name.startswith("image_tower.")} == {
        "layer3",
        "layer4",
    }
    assert not any(name.startswith("text_tower.") for name in moved)
    (run / "checkpoints" / "epoch_2.pt").unlink()
    general.rename(general.with_name("elsewhere"))
    try:
        train.main(["--resume", "latest", "--logs", str(tmp_path)])
    finally:
        general.with_name("elsewhere").rename(general)
    _assert_same(whole["state_dict"], _state(run)["state_dict"])


def test_a_run_stops_when_the_validation_loss_rises_and_takes_its_best_epoch(
    phantom, tmp_path, capsys, monkeypatch
):
    given = iter([3.0, 2.0, 2.5, 2.1, 1.0])
    monkeypatch.setattr(Embeddings, "loss", lambda self, scale: next(given))
    more = ("--method", "clip", "--epochs", "9", "--early-stop", "2", *SMALL)
    train.main(_argv(phantom, tmp_path, *more))
    run = tmp_path / "a"
    losses = [row["loss"] for row in _rows(run) if row["kind"] == "validation"]
    assert losses == [3.0, 2.0, 2.5, 2.1]
    assert "the weights of epoch 2 had the lowest validation loss" in capsys.readouterr().err
    best = _state(run, "best.pt")
    assert best["epoch"] == 2
    # The last checkpoint is that of the last epoch, from which the run could go on.
    last = _state(run, "epoch_4.pt")["state_dict"]
    assert not torch.equal(last["logit_scale"], best["state_dict"]["logit_scale"])
    results = (run / "results.jsonl").read_text()
    train.main(["--resume", "latest", "--logs", str(tmp_path)])
    assert [row["loss"] for row in _rows(run) if row["kind"] == "validation"] == losses
    again = (run / "results.jsonl").read_text()
    for first, second in zip(results.splitlines(), again.splitlines(), strict=True):
        assert json.loads(second)["metrics"] == json.loads(first)["metrics"]


@pytest.mark.parametrize("precision", ["amp", "pure_bf16"])
def test_every_precision_trains_to_a_report(phantom, tmp_path, precision):
    more = ("--method", "slip", "--precision", precision, "--grad-checkpointing", *SMALL)
    train.main(_argv(phantom, tmp_path, *more, "--epochs", "1", "--log-every", "1"))
    assert (tmp_path / "a" / "report.html").is_file()
    weights = _state(tmp_path / "a", "epoch_1.pt")["state_dict"]
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    assert weights["image_projection.weight"].dtype == dtype
    assert weights["logit_scale"].dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "lit"], "--method lit locks the image tower, whose weights would be random"),
        (["--lock-image"], "--lock-image locks the image tower, whose weights would be random"),
        (["--lock-text"], "--lock-text locks the text tower, whose weights would be random"),
        (["--lock-text-unlocked-layers", "1"], "for a locked tower; add --lock-text"),
        (["--lock-image-unlocked-groups", "1"], "for a locked tower; add --lock-image"),
        (["--loss-weights", "local=2"], "clip has no term 'local'; its terms are clip"),
        (["--optimizer", "apex_lamb"], "--optimizer apex_lamb"),
        (["--pretrained", "/nonexistent/x.pt"], "--pretrained"),
        (["--recipe", "studdy"], "Did you mean 'study'?"),
    ],
)
def test_what_does_not_fit_a_method_is_refused(phantom, tmp_path, refusal, flags, says):
    argv = ["--train-data", f"roco:{phantom}", "--logs", str(tmp_path / "logs"), *SHORT]
    assert says in refusal([*argv, "--method", "clip", *flags])
    assert not list(tmp_path.rglob("*.pt"))


def test_more_unlocked_groups_than_there_are_are_refused(phantom, general, tmp_path, refusal):
    locks = ("--lock-image", "--lock-image-unlocked-groups", "6")
    said = refusal(_argv(phantom, tmp_path, "--pretrained", str(general), *locks, *SMALL))
    assert "--lock-image-unlocked-groups must be at most 5, all groups of the image tower" in said


def test_weights_of_another_shape_are_refused_by_their_shapes(phantom, general, tmp_path, refusal):
    argv = _argv(phantom, tmp_path, "--model", "vit_b16_clip", "--pretrained-image", str(general))
    assert "the weights (medfast) do not fit the model" in (said := refusal(argv))
    assert "Use --model tiny" in said


@pytest.mark.parametrize("size", ["100", "8"])
def test_an_image_that_patches_do_not_fill_is_refused(phantom, tmp_path, refusal, size):
    argv = _argv(phantom, tmp_path, "--model", "vit_b16_clip", "--force-image-size", size)
    said = refusal([*argv, "--dry-run"])
    assert f"--force-image-size must be a multiple of the patch size 16; got {size}" in said


def test_a_context_beyond_the_tokenizers_is_refused(phantom, general, tmp_path, refusal):
    tokenizer = str(general / "tokenizer")
    argv = _argv(phantom, tmp_path, "--tokenizer", tokenizer, "--force-context-length", "60")
    assert "--force-context-length must be at most 48, the model_max_length" in refusal(argv)


def test_a_dry_run_shows_what_a_method_needs_and_costs(phantom, tmp_path, capsys):
    shown = {}
    for method in ("clip", "slip", "declip", "local"):
        more = ("--method", method, *SMALL, "--batch-size", "8", "--accum-freq", "3", "--dry-run")
        train.main(_argv(phantom, tmp_path, *more))
        shown[method] = capsys.readouterr().out
    assert "beyond the main view and the caption: nothing" in shown["clip"]
    assert "2 augmented view(s) of the image, flipped half the time" in shown["slip"]
    assert "heads (head)" in shown["slip"]
    for words in ("1 view(s) of the caption", "tokens masked", "heads (simsiam, masked_language)"):
        assert words in shown["declip"]
    assert "state of 34 MB" in shown["declip"]
    assert "projections of patches and words" in shown["local"]
    for text in shown.values():
        assert "4 steps of 24 pairs, in 3 parts" in text
        assert "GFLOP per pair" in text
        assert "memory    about" in text
    assert not list(tmp_path.iterdir())


def test_the_study_recipe_lies_under_the_flags(phantom, tmp_path, capsys):
    more = ("--recipe", "study", "--model", "tiny", "--dry-run")
    train.main(["--train-data", f"roco:{phantom}", "--logs", str(tmp_path), *more])
    shown = capsys.readouterr().out
    for line in ("lr: 5e-05", "warmup: 0", "batch_size: 512", "resize_short: 512", "model: tiny"):
        assert f"  {line}\n" in shown
