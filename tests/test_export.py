"""An exported run gives its embeddings in open_clip, in transformers and in medfast again."""

import dataclasses
import json
import os
import re
import shlex
import shutil

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from open_clip.tokenizer import bytes_to_unicode
from PIL import Image
from safetensors.torch import load_file

from medfast import cli, evaluate, json_lines
from medfast.config import TrainConfig
from medfast.data.loader import PairDataset
from medfast.data.order import Draw
from medfast.data.records import Record
from medfast.data.tokens import Tokenizer
from medfast.evals.cache import weights_hash
from medfast.evals.models import load_encoder
from medfast.export import card
from medfast.export.__main__ import main
from medfast.export.trained import read_run
from medfast.methods import method_class
from medfast.models import PRESETS
from medfast.models.pair import build_model
from medfast.models.pretrained import load_pretrained

CPU = torch.device("cpu")
# Short, longer than the context, empty, with letters that a tokenizer may change.
TEXTS = [
    "a chest X-ray",
    " ".join(["an MR of the liver"] * 12),
    "",
    "Left kidney, 3 cysts",
    "Kopf é",
]
WIDTH = 32
SMALL = {"embed_dim": 24, "context_length": 20, "image_size": 32}
VIT = {"depth": 2, "embed_dim": WIDTH, "num_heads": 4}
LAYERS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 3 * WIDTH,
}
CLIPS = ("vit_b16_clip", "vit_b16_clip_quickgelu")


def _small(name, **changes):
    preset = PRESETS[name]
    changes = {"image_args": VIT, **SMALL, **changes}
    return dataclasses.replace(preset, text={**preset.text, **LAYERS}, **changes)


@pytest.fixture(scope="module", autouse=True)
def _small_presets():
    """The presets with few and narrow layers; and one whose timm model takes no arguments."""
    names = [name for name in PRESETS if name.startswith("vit_b16")]
    with pytest.MonkeyPatch.context() as patch:
        plain = _small("vit_b16", image="test_vit", image_args={}, image_size=160)
        for name, preset in {**{n: _small(n) for n in names}, "plain": plain}.items():
            patch.setitem(PRESETS, name, preset)
        yield


@torch.no_grad()
def _write_run(folder, tokenizer, model="vit_b16_clip", method="clip", name="epoch_3.pt", **more):
    """Write a run none of whose weights is 0 or 1, so that none can be missed."""
    config = TrainConfig(model=model, method=method, name=folder.name, **more)
    cls = method_class(method)
    torch.manual_seed(len(name))
    pair = build_model(config.preset, tokenizer, cls.needs_tokens)
    for parameter in pair.parameters():
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    for buffer in pair.buffers():
        # Of batch norms, whose variances stay positive.
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape))
    heads = cls()
    heads.add_heads(pair, 8)
    state = {
        **dict.fromkeys(("samples", "optimizer", "scaler", "random")),
        **{"epoch": 3, "epoch_step": 0, "step": 90, "world": 2, "name": folder.name},
        "data": {"pairs": 1234},
        "config": dataclasses.asdict(config),
        "state_dict": pair.state_dict(),
        "method": heads.state_dict(),
    }
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "checkpoints" / name)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture
def run(tmp_path, tokenizer):
    """Write the run of a preset."""

    def write(model="vit_b16_clip", **more):
        return _write_run(tmp_path / "run", tokenizer, model, **more)

    return write


@pytest.fixture
def export(tmp_path):
    """Export a run, and return the folder."""

    def command(run, *more, to="out"):
        main([str(run), "--hf-folder", str(tmp_path / to), *more])
        return tmp_path / to

    return command


@pytest.fixture
def refused(capsys):
    """Run the command, which must exit with code 2 and one sentence; return that."""

    def command(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in argv])
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "error:" in line] == lines[-1:]
        assert not any("Traceback" in line for line in lines)
        return lines[-1].removeprefix("medfast.export: error: ")

    return command


def _card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def _images(size, count=3):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def _pixels(encoder, images):
    tower = encoder.model.image_tower
    return (images - tower.mean) / tower.std


def _assert_same(got, want):
    """Compare features; that of the second input must differ from the first one's."""
    got, want = (F.normalize(x, dim=-1) for x in (got, want))
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert not torch.allclose(want[0], want[1], atol=1e-3)


def _open_clip(folder):
    name = f"local-dir:{folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def _assert_open_clip_is_same(folder, encoder):
    model, _, tokenizer = _open_clip(folder)
    images = _images(encoder.image_size)
    with torch.no_grad():
        _assert_same(model.encode_image(_pixels(encoder, images)), encoder.images(images).unit)
        _assert_same(model.encode_text(tokenizer(TEXTS)), encoder.texts(TEXTS).unit)
    assert model.logit_scale.item() == encoder.model.logit_scale.item()
    assert model.logit_bias is None


# open_clip


@pytest.mark.parametrize("model", ["tiny", *(n for n in PRESETS if n != "tiny"), "plain"])
def test_open_clip_gives_the_embeddings_of_every_preset(run, export, model):
    source = run(model)
    encoder = load_encoder(str(source), CPU, "fp32")
    _assert_open_clip_is_same(export(source), encoder)


def test_a_trained_run_keeps_its_embeddings(short_run, export):
    encoder = load_encoder(str(short_run), CPU, "fp32")
    folder = export(short_run)
    _assert_open_clip_is_same(folder, encoder)
    tokenizer = _open_clip(folder)[2]
    # As the card says, and as readers of captions do.
    assert torch.equal(tokenizer(["a  mass\n in it "]), tokenizer(["a mass in it"]))


@pytest.mark.parametrize("model", ["tiny", "vit_b16_bert", "vit_b16"])
def test_a_folder_that_moved_is_told_its_new_place(run, export, tmp_path, model):
    source = run(model)
    old, new = export(source), tmp_path / "moved"
    old.rename(new)
    assert str(old) not in _card(new)
    settings = (new / "open_clip_config.json").read_text()
    (new / "open_clip_config.json").write_text(settings.replace(str(old), str(new)))
    _assert_open_clip_is_same(new, load_encoder(str(source), CPU, "fp32"))


def test_clips_shape_names_no_place_and_may_move(run, export, tmp_path):
    source = run()
    folder = export(source).rename(tmp_path / "moved")
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.[jm][sd]*"))
    _assert_open_clip_is_same(folder, load_encoder(str(source), CPU, "fp32"))


def test_a_name_on_the_hub_stands_where_a_place_does(run, export, tmp_path):
    folder = export(run("tiny"), "--hub-name", "some/name")
    settings = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    assert settings["vision_cfg"]["timm_model_name"] == "hf-hub:some/name"
    assert settings["text_cfg"]["hf_model_name"] == "some/name"
    assert settings["text_cfg"]["hf_tokenizer_name"] == "some/name"
    assert "`some/name` on the hub" in _card(folder)
    assert not any(str(tmp_path) in path.read_text() for path in folder.glob("*.json"))


def test_weights_are_safetensors_in_single_precision_alone(run, export):
    folder = export(run("vit_b16_clip", method="declip"))
    assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json", ".md", ".txt"}
    for path in folder.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert not list(folder.parent.glob(".out-*"))
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {folder.stat().st_mode & 0o666}


def test_a_shorter_context_cuts_texts_as_the_run_does(tmp_path, tokenizer, export):
    """Also where the tokenizer would take more, or fewer, tokens than the tower."""
    for number, (model, forced, own) in enumerate(
        [("vit_b16_clip", 12, 48), ("vit_b16_clip", None, 9), ("vit_b16_bert", None, 9)]
    ):
        source = _write_run(
            tmp_path / f"run{number}", tokenizer, model, force_context_length=forced
        )
        path = source / "tokenizer" / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": own}))
        encoder = load_encoder(str(source), CPU, "fp32")
        folder = export(source, to=f"out{number}")
        assert encoder.tokenizer(TEXTS).ids.shape[1] == min(forced or 20, own)
        _assert_open_clip_is_same(folder, encoder)
        if model in CLIPS:
            _assert_transformers_is_same(folder, encoder)


# The pixels that the libraries make of an image


def _medfast_pixels(image, encoder, tmp_path):
    """Return what medfast's evaluations make of an image."""
    path = tmp_path / "image.png"
    image.save(path)
    dataset = PairDataset([Record("a", path, "a")], encoder.image_size)
    sample = dataset[Draw(0, 0)]
    return _pixels(encoder, torch.tensor(sample.pixels[0]).permute(2, 0, 1)[None])


def _picture(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_square_images_become_the_very_same_pixels(run, export, tmp_path):
    source = run()
    folder, encoder = export(source), load_encoder(str(source), CPU, "fp32")
    _, preprocess, _ = _open_clip(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    for side in (32, 100, 20):
        image = _picture(side, side)
        want = _medfast_pixels(image, encoder, tmp_path)
        torch.testing.assert_close(preprocess(image)[None], want, rtol=0, atol=1e-5)
        got = processor(image, return_tensors="pt").pixel_values
        # One of 255 values, by the other order of rounding.
        torch.testing.assert_close(got, want, rtol=0, atol=1.01 / 255 / 0.26)


def test_the_cut_of_other_images_is_nearly_the_same(short_run, phantom, export, tmp_path):
    """medfast cuts before it resizes, open_clip after."""
    encoder = load_encoder(str(short_run), CPU, "fp32")
    model, preprocess, _ = _open_clip(export(short_run))
    paths = sorted(phantom.glob("test/radiology/images/*.jpg"))[:8]
    assert len(paths) == 8
    for path, (width, height) in zip(paths, [(200, 150), (151, 333)] * 4, strict=True):
        image = Image.open(path).convert("RGB").resize((width, height))
        want, got = _medfast_pixels(image, encoder, tmp_path), preprocess(image)[None]
        assert got.shape == want.shape
        with torch.no_grad():
            one, two = model.encode_image(torch.cat([want, got]), normalize=True)
        assert one @ two > 0.98


# transformers


def _assert_transformers_is_same(folder, encoder):
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = _images(encoder.image_size)
    texts = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(
            input_ids=texts.input_ids,
            attention_mask=texts.attention_mask,
            pixel_values=_pixels(encoder, images),
        )
    image, text = encoder.images(images).unit, encoder.texts(TEXTS).unit
    _assert_same(found.image_embeds, image)
    _assert_same(found.text_embeds, text)
    want = encoder.model.logit_scale.exp().item() * image @ text.T
    torch.testing.assert_close(found.logits_per_image, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", CLIPS)
def test_transformers_gives_the_embeddings_and_logits_of_clips_shape(run, export, model, capfd):
    source = run(model)
    folder = export(source)
    capfd.readouterr()
    _assert_transformers_is_same(folder, load_encoder(str(source), CPU, "fp32"))
    said = "".join(capfd.readouterr())
    assert not re.search("(?i)missing|unexpected|newly init|not used", said), said


def test_the_processor_of_transformers_loads_too(run, export):
    processor = transformers.CLIPProcessor.from_pretrained(export(run()))
    found = processor(images=_picture(40, 50), text=TEXTS[:1], return_tensors="pt")
    assert found["pixel_values"].shape == (1, 3, 32, 32)
    assert found["input_ids"].shape[0] == 1


@pytest.mark.parametrize("model", ["tiny", "vit_b16", "vit_b16_bert", "plain"])
def test_other_shapes_are_for_open_clip_alone(run, export, model):
    folder = export(run(model))
    assert not (folder / "model.safetensors").exists()
    assert not (folder / "preprocessor_config.json").exists()
    assert "CLIPModel" not in _card(folder)


def _clip_tokenizer(folder):
    """Write a tokenizer as CLIP's own, whose padding is the token that ends a text."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= dict.fromkeys(("unk_token", "pad_token"), "<|endoftext|>")
    merges = [("l", "i"), ("li", "v"), ("e", "r</w>"), ("liv", "er</w>")]
    words += [*map("".join, merges), special["bos_token"], special["eos_token"]]
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder, 20)


def test_clips_own_tokenizer_gives_both_libraries_its_embeddings(tmp_path, export):
    tokenizer = _clip_tokenizer(tmp_path / "published")
    tokenizer.ensure_mask_token()  # as declip asks for it
    assert tokenizer.special_ids["pad_token_id"] == tokenizer.special_ids["eos_token_id"]
    assert len(tokenizer(["liver"]).ids[0]) == 3
    source = _write_run(tmp_path / "run", tokenizer, method="declip")
    folder, encoder = export(source), load_encoder(str(source), CPU, "fp32")
    _assert_open_clip_is_same(folder, encoder)
    _assert_transformers_is_same(folder, encoder)


def test_older_versions_of_transformers_can_read_the_tokenizer(run, export):
    folder = export(run())
    config, whole = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("tokenizer_config", "tokenizer")
    )
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    # They have their own default, whatever stands in the other file.
    assert config["add_prefix_space"] is whole["pre_tokenizer"]["add_prefix_space"]
    assert config["model_max_length"] == 20


# medfast


@pytest.mark.parametrize("model", ["tiny", *(n for n in PRESETS if n != "tiny")])
def test_a_run_can_begin_from_the_folder_with_all_of_its_weights(run, export, model):
    source = run(model, method="sparc")
    old = read_run(source)
    torch.manual_seed(7)
    new = build_model(old.config.preset, old.tokenizer, token_features=False)
    loaded = load_pretrained(new, str(export(source)))
    state = new.state_dict()
    assert set(loaded.loaded) == set(state)
    assert (loaded.fitted, loaded.new, loaded.skipped, loaded.notes) == ((), (), (), ())
    for name, value in state.items():
        assert torch.equal(value, old.model.state_dict()[name]), name


def test_the_suite_gives_the_folder_the_figures_of_the_run(short_run, phantom, export, tmp_path):
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "roco").symlink_to(phantom)
    common = ["--data-root", str(tmp_path / "sets"), "--workers", "0", "--device", "cpu"]
    common += ["--precision", "fp32", "--cache-dir", str(tmp_path / "cache")]
    # Wherever it was moved to since.
    moved = export(short_run).rename(tmp_path / "moved")
    for which in (["--checkpoint", str(short_run)], ["--model", str(moved)]):
        evaluate.main([*which, *common, "--out", str(tmp_path / which[0])])
    for task in ("image_to_text", "text_to_image"):
        (run,), (folder,) = (
            json_lines.read(tmp_path / flag / f"roco.{task}.json")
            for flag in ("--checkpoint", "--model")
        )
        for key in ("metrics", "ci95", "n", "chance", "preprocessing"):
            assert folder[key] == run[key]


# The model card


def _front(folder):
    _, matter, _ = _card(folder).split("---\n", 2)
    return yaml.safe_load(matter)


def _rows(words, head):
    """Return the cells of the table whose header line starts so."""
    rows = words.partition(f"\n| {head}")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]


def test_the_card_has_the_pairs_that_a_step_really_had(run, export):
    words = _card(export(run(batch_size=500, accum_freq=3)))
    # Of 1,234, two processes take 1,000 at a time, once.
    assert dict(_rows(words, "setting"))["pairs of a step"] == "1,000"


def test_the_card_says_what_the_weights_are(run, export):
    folder = export(run(method="declip", batch_size=32, accum_freq=3, lock_text=True))
    front, words = _front(folder), _card(folder)
    assert front["library_name"] == "open_clip"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["license"] == "unknown"
    assert "transformers" in front["tags"]
    assert "Not for clinical use" in words
    settings = dict(_rows(words, "setting"))
    assert "epoch of these weights" not in settings
    assert settings["method"] == "declip"
    assert settings["loss"] == "0.4 clip + 0.2 simsiam + 0.2 mlm + 0.2 multi_view + 0.2 nearest"
    assert settings["pairs of a step"] == "192"  # of two processes
    assert settings["length"] == "3 of 12 epochs, 90 steps"
    assert settings["weights at the start"] == "random"
    assert settings["locked"] == "text tower"
    assert "1,234 training pairs" in words
    assert "were not evaluated" in words
    assert "simsiam, masked_language, bank" in words
    assert card.PHANTOM in words


def test_the_card_has_the_figures_that_the_run_ended_with(short_run, export):
    words = _card(export(short_run))
    rows = {(row[1], row[4]): row for row in _rows(words, "data | task")}
    ended = json_lines.read(short_run / "results.jsonl")
    assert {row["name"] for row in ended} >= {"modality", "finding"}
    (zero_shot,) = (row for row in ended if row["name"] == "modality")
    found = rows["zero shot modality", "accuracy"]
    low, high = (100 * x for x in zero_shot["ci95"]["accuracy"])
    assert found[2:4] == ["test", str(zero_shot["n"])]
    assert found[5] == f"{100 * zero_shot['metrics']['accuracy']:.1f} %"
    assert found[6] == f"{low:.1f} to {high:.1f} %"
    assert ("retrieval", "text → image R@1") in rows
    assert f"medfast {zero_shot['medfast']}" in words


def test_the_card_has_evaluations_of_these_very_weights_alone(run, export):
    source = run()
    trained = read_run(source)
    row = {"dataset": "bach", "task": "zero_shot", "split": "test", "n": 77, "chance": {}}
    row |= {"metrics": {"accuracy": 0.5}, "ci95": {"accuracy": [0.4, 0.6]}}
    hashes = {"bach": weights_hash(trained.model), "pcam": "another's"}
    (source / "evaluations").mkdir()
    for name, digest in hashes.items():
        one = {**row, "dataset": name, "model_sha256": digest}
        json_lines.append(source / "evaluations" / f"{name}.zero_shot.json", [one])
    (found,) = _rows(_card(export(source)), "data | task")
    assert found[:4] == ["bach", "zero shot", "test", "77"]
    assert found[6] == "40.0 to 60.0 %"


def test_figures_are_not_given_to_another_checkpoint_than_theirs(short_run, export):
    words = _card(export(short_run / "checkpoints" / "epoch_1.pt"))
    assert "were not evaluated" in words
    assert "1 of 2 epochs" in words


def test_the_card_tells_the_licence_and_the_source_of_the_data(run, export, tmp_path, phantom):
    real, packed = tmp_path / "roco", tmp_path / "shards"
    real.mkdir()
    packed.mkdir()
    manifest = {"sources": ["mimic_cxr", "quilt2"], "credentialed": True}
    (packed / "pack.json").write_text(json.dumps(manifest))
    data = (f"roco:{real}", f"shards:{packed}", f"pmc_oa:{tmp_path / 'gone'}", f"csv:{phantom}")
    data += (f"folder:{tmp_path / 'none'}",)
    folder = export(run(train_data=data, train_data_weights=(1, 2, 3, 4, 5)))
    words = _card(folder)
    found = {row[0]: row[1:] for row in _rows(words, "data | licence")}
    assert found["ROCO: Radiology Objects in COntext"][0].startswith("the licence of each article")
    assert any(title.startswith("MIMIC-CXR") and "packed" in title for title in found)
    assert "Quilt-1M (in packed shards)" in found
    assert found["PMC-OA"][2].startswith("Lin et al. 2023")
    assert "Phantom, generated by medfast (in the layout of csv)" in found
    assert len(found) == 6
    assert _front(folder)["license"] == "other"
    assert re.search(r"derive from credentialed data: MIMIC-CXR", words)
    assert str(tmp_path) not in words
    assert dict(_rows(words, "setting"))["shares of the data"] == "1 : 2 : 3 : 4 : 5"


def test_what_shards_hold_is_told_as_far_as_it_is_known(run, export, tmp_path):
    words = _card(export(run(train_data=(f"shards:{tmp_path / 'gone'}",))))
    assert "not told what they hold" in words
    for number, (sources, private) in enumerate([(["shards"], True), ([], False)]):
        (tmp_path / str(number)).mkdir()
        manifest = json.dumps({"sources": sources, "credentialed": private})
        (tmp_path / str(number) / "pack.json").write_text(manifest)
        source = run(train_data=(f"shards:{tmp_path / str(number)}",))
        folder = export(source, to=f"out{number}")
        assert len(_rows(_card(folder), "data | licence")) == 1
        assert _front(folder)["license"] == ("other" if private else "unknown")
        assert ("derive from credentialed data" in _card(folder)) == private


@pytest.mark.parametrize("model", ["tiny", "vit_b16_clip"])
def test_the_code_of_the_card_runs(run, export, tmp_path, model):
    folder = export(run(model, force_context_length=30))
    words = _card(folder)
    _picture(50, 40).save(tmp_path / "image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", words, re.DOTALL)
    assert len(blocks) == 1 + (model in CLIPS)
    found = []
    for block in blocks:
        code = block.replace("FOLDER", str(folder)).replace(
            "image.jpg", str(tmp_path / "image.jpg")
        )
        names: dict = {}
        exec(code, names)
        assert names["probabilities"].sum().item() == pytest.approx(1)
        found.append(names["probabilities"])
    # The libraries round pixels in another order.
    torch.testing.assert_close(found[0], found[-1], rtol=0, atol=0.02)
    (commands,) = re.findall(r"```bash\n(.*?)```", words, re.DOTALL)
    commands = commands.replace("FOLDER", str(folder)).replace("DATA", str(tmp_path))
    first, second = (shlex.split(line)[3:] for line in commands.splitlines())
    (tmp_path / "roco").mkdir()
    assert cli.parse_evaluate(first).source == str(folder)
    config, _ = cli.parse_train(second)
    assert (config.model, config.force_context_length) == (model, 30)


# Which checkpoint


def test_the_best_epoch_of_a_run_that_stops_early_is_taken(tmp_path, tokenizer, export):
    source = _write_run(tmp_path / "run", tokenizer, early_stop=2)
    _write_run(source, tokenizer, name="best.pt", early_stop=2)
    best = load_encoder(str(source / "checkpoints" / "best.pt"), CPU, "fp32")
    folder = export(source)
    _assert_open_clip_is_same(folder, best)
    settings = dict(_rows(_card(folder), "setting"))
    assert settings["epoch of these weights"] == "3, the best"
    assert settings["early stop"].startswith("after 2 epochs")
    named = export(source / "checkpoints" / "epoch_3.pt", to="named")
    other = load_file(named / "model.safetensors")["visual_projection.weight"]
    assert not torch.allclose(other, best.model.image_projection.weight)
    assert "the best" not in _card(named)


def test_what_is_left_out_is_named(run, export, capsys):
    for method, names in (
        ("local", "patch_projection, token_projection"),
        ("slip", "head"),
        ("declip", "simsiam, masked_language, bank"),
        ("clip", None),
    ):
        export(run(method=method), to=method)
        said = re.findall(r"left out.*: (.*)", capsys.readouterr().err)
        assert said == ([names] if names else [])


# Mistakes


@pytest.mark.parametrize(
    ("method", "weights"), [("filip", ()), ("local", ("clip=0",)), ("sparc", ("clip=0",))]
)
def test_global_features_that_were_never_trained_are_refused(
    run, refused, tmp_path, method, weights
):
    said = refused(run(method=method, loss_weights=weights), "--hf-folder", tmp_path / "out")
    assert f"by {method} with the loss" in said
    assert "never trained" in said
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(refused, run, tmp_path, short_run):
    out = ("--hf-folder", tmp_path / "out")
    assert "there is no such run" in refused(tmp_path / "none", *out)
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in refused(tmp_path / "empty", *out)
    alone = tmp_path / "alone.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, alone)
    assert refused(alone, *out).startswith(f"RUN {alone} is not a checkpoint")
    source = shutil.copytree(short_run, tmp_path / "copy")
    last = source / "checkpoints" / "epoch_2.pt"
    last.write_bytes(last.read_bytes()[:2000])
    said = refused(source, *out)
    assert said.startswith(f"RUN {last} is damaged")
    assert "epoch_1.pt" in said
    shutil.rmtree(source / "tokenizer")
    assert "tokenizer" in refused(source / "checkpoints" / "epoch_1.pt", *out)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_free_is_refused(refused, run, export, tmp_path):
    source = run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "holds files" in refused(source, "--hf-folder", tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["file"]
    inside = tmp_path / "full" / "file" / "out"
    assert "can be written" in refused(source, "--hf-folder", inside)
    assert "can be written" in refused(source, "--hf-folder", tmp_path / "full" / "file")
    (tmp_path / "new").mkdir()
    assert (export(source, to="new") / "README.md").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused(refused, run, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "no permission" in refused(run(), "--hf-folder", tmp_path / "closed" / "out")


def test_a_full_disk_leaves_nothing_behind(refused, run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left" in refused(run(), "--hf-folder", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_towers_that_open_clip_has_not_are_refused(refused, run, tmp_path, monkeypatch):
    preset = PRESETS["vit_b16_clip"]
    out = ("--hf-folder", tmp_path / "out")
    odd = {**preset.text, "hidden_act": "quick_gelu"}
    monkeypatch.setitem(PRESETS, "vit_b16_clip", dataclasses.replace(preset, text=odd))
    assert "gelu and quick_gelu" in refused(run(), *out)
    electra = {"model_type": "electra", **LAYERS, "embedding_size": WIDTH}
    monkeypatch.setitem(PRESETS, "vit_b16_clip", dataclasses.replace(preset, text=electra))
    assert "electra" in refused(run(), *out)


def test_a_tokenizer_whose_padding_ends_texts_is_refused_for_bert(run, refused, tmp_path):
    source = run("vit_b16_bert")
    path = source / "tokenizer"
    inner = transformers.AutoTokenizer.from_pretrained(path)
    inner.pad_token = inner.eos_token
    inner.save_pretrained(path)
    assert "pads with the token" in refused(source, "--hf-folder", tmp_path / "out")


def test_a_name_that_the_hub_cannot_have_is_refused(refused, run, tmp_path):
    for name in ("name", "a/b/c", "a b/c"):
        said = refused(run(), "--hf-folder", tmp_path / "out", "--hub-name", name)
        assert "ORG/NAME" in said


class _Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


def test_nothing_is_unpickled_but_tensors(run, refused, tmp_path):
    source = run()
    path = source / "checkpoints" / "epoch_3.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "method": _Bomb(tmp_path / "went_off")}, path)
    assert "damaged" in refused(source, "--hf-folder", tmp_path / "out")
    assert not (tmp_path / "went_off").exists()
