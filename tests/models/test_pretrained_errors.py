"""What cannot be loaded is refused in one sentence, and the model stays as it was."""

import dataclasses
import json
import pickle
import re
import shutil

import huggingface_hub
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from medfast.errors import UsageError
from medfast.models import PRESETS
from medfast.models.pair import ImageTextModel
from medfast.models.pretrained import load, load_pretrained, pretrained_tokenizer
from medfast.models.pretrained.files import Weights

TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
IMAGE = {"depth": 2, "embed_dim": 64, "num_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 59}


@pytest.fixture(autouse=True)
def few_presets(monkeypatch):
    """Look for a fitting preset among one alone: each that is looked at takes its time."""
    monkeypatch.setattr(load, "PRESETS", {"tiny": PRESETS["tiny"]})


def _model(name="vit_b16_clip"):
    torch.manual_seed(0)
    preset = PRESETS[name]
    text, image = {**preset.text, **TEXT}, {**preset.image_args, **IMAGE}
    small = dataclasses.replace(
        *(preset,), text=text, image_args=image, image_size=64, context_length=12, embed_dim=32
    )
    return ImageTextModel(small, 60, SPECIAL)


def _save_clip(folder, activation="gelu", patch=16, vocab=60, **changes):
    shape = {**TEXT, "hidden_act": activation, **changes}
    text = {**shape, **SPECIAL, "vocab_size": vocab, "max_position_embeddings": 12}
    vision = {**shape, "image_size": 4 * patch, "patch_size": patch}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    transformers.CLIPModel(config).save_pretrained(folder)
    return str(folder)


def _refused(source, model=None, part="both"):
    """Return the sentence with which a source is refused."""
    model = _model() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError) as error:
        load_pretrained(model, str(source), part)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    message = str(error.value)
    flag = {"both": "--pretrained", "image": "--pretrained-image", "text": "--pretrained-text"}
    assert message.startswith(f"{flag[part]} {source}")
    assert "\n" not in message
    return message


# Shapes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"num_hidden_layers": 3},
            r"image_tower.trunk.blocks.2.\S+ \[\d+(, \d+)?\] only the weights have",
        ),
        ({"num_hidden_layers": 1}, r"image_tower.trunk.blocks.1.\S+ \[\d+\] only the model has"),
        (
            {"hidden_size": 32, "intermediate_size": 128},
            r"image_tower.trunk.cls_token is \[1, 1, 32\], the model's \[1, 1, 64\]",
        ),
        (
            {"patch": 32},
            r"patch_embed.proj.weight is \[64, 3, 32, 32\], the model's \[64, 3, 16, 16\]",
        ),
        ({"num_attention_heads": 4}, "heads of the image tower: 4, the model's 2"),
    ],
)
def test_another_shape_is_refused_with_both_shapes(tmp_path, changes, named):
    message = _refused(_save_clip(tmp_path, **changes))
    assert re.search(named, message), message
    assert "None of medfast's models fits (tiny); give other weights" in message


def test_a_tower_that_does_not_fit_does_not_hide_one_that_does(tmp_path):
    source = _save_clip(tmp_path)
    config = tmp_path / "config.json"
    content = json.loads(config.read_text())
    content["text_config"]["num_attention_heads"] = 1
    config.write_text(json.dumps(content))
    assert "or load the image tower alone with --pretrained-image." in _refused(source)


@pytest.mark.parametrize("name", ["vit_b16", "tiny"])
def test_the_preset_that_fits_is_named(monkeypatch, name):
    with torch.device("meta"):
        activation = {"hidden_act": "gelu"}
        config = transformers.CLIPConfig(
            text_config=activation, vision_config={"patch_size": 16, **activation}
        )
        source = transformers.CLIPModel(config)
        model = ImageTextModel(PRESETS[name], 49408, {})
    weights = Weights("--pretrained x", source.state_dict(), config.to_dict())
    monkeypatch.setattr(load, "read", lambda *_: weights)
    monkeypatch.setattr(load, "PRESETS", PRESETS)
    with pytest.raises(UsageError, match=r"Use --model vit_b16_clip[.,]"):
        load_pretrained(model, "x")


# Settings that no shape shows


@pytest.mark.parametrize("format", ["transformers", "open_clip", "timm"])
@pytest.mark.parametrize("quick", [False, True])
def test_another_activation_is_refused(tmp_path, format, quick):
    names = ("gelu", "quick_gelu")
    if format == "transformers":
        source = _save_clip(tmp_path, activation=names[quick])
    elif format == "timm":
        name = f"vit_base_patch16_clip_{'quickgelu_' * quick}224"
        inner = timm.create_model(name, img_size=64, num_classes=0, **IMAGE)
        timm.models.save_for_hf(inner, tmp_path, safe_serialization=True)
        source = str(tmp_path)
    else:
        open_clip = pytest.importorskip("open_clip")
        vision = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
        text = {"context_length": 12, "vocab_size": 60, "width": 64, "heads": 2, "layers": 2}
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick}
        torch.save(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        source = str(tmp_path)
    message = _refused(source, _model(f"vit_b16_clip{'_quickgelu' * (not quick)}"), "image")
    assert (
        f"activation of the image tower: {names[quick]}, the model's {names[not quick]}" in message
    )
    load_pretrained(_model(f"vit_b16_clip{'_quickgelu' * quick}"), source, "image")


def test_the_preset_with_the_activation_is_named(monkeypatch):
    config = transformers.CLIPConfig(vision_config={"patch_size": 16})
    with torch.device("meta"):
        source = transformers.CLIPModel(config)
        model = ImageTextModel(PRESETS["vit_b16_clip"], 49408, {})
    weights = Weights("--pretrained x", source.state_dict(), config.to_dict())
    monkeypatch.setattr(load, "read", lambda *_: weights)
    monkeypatch.setattr(load, "PRESETS", PRESETS)
    with pytest.raises(UsageError, match=r"quick_gelu.*Use --model vit_b16_clip_quickgelu\."):
        load_pretrained(model, "x")


def test_a_run_with_another_activation_is_refused(tmp_path):
    state = {"config": {"model": "vit_b16_clip_quickgelu"}, "state_dict": _model().state_dict()}
    torch.save(state, tmp_path / "epoch_1.pt")
    assert "activation of the text tower: quick_gelu" in _refused(tmp_path, part="text")


def test_a_text_tower_that_looks_ahead_is_refused(tmp_path):
    config = {"text_cfg": {"no_causal_mask": True}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(
        {"text.token_embedding.weight": torch.zeros(60, 64)},
        tmp_path / "open_clip_model.safetensors",
    )
    assert "without a causal mask" in _refused(tmp_path)


# Vocabularies and parts


def test_weights_of_a_larger_vocabulary_ask_for_their_tokenizer(tmp_path):
    source = _save_clip(tmp_path, vocab=70)
    assert "knows 70 tokens, the tokenizer 60" in _refused(source)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert f"use --tokenizer {tmp_path}." in _refused(source)
    load_pretrained(_model(), source, "image")


@pytest.mark.parametrize(("part", "other"), [("image", "text"), ("text", "image")])
def test_a_part_that_is_not_there_is_refused(tmp_path, part, other):
    tower = _model().get_submodule(f"{other}_tower.trunk")
    prefix = "visual.trunk." if other == "image" else ""
    tensors = {prefix + name: value for name, value in tower.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    message = _refused(tmp_path, part=part)
    assert f"with the {other} tower alone; there is no {part} tower in it" in message


def test_foreign_weights_are_told_with_their_names_and_what_is_known(tmp_path):
    save_file({"speech.a": torch.zeros(2), "speech.b": torch.zeros(2)}, tmp_path / "x.safetensors")
    message = _refused(tmp_path / "x.safetensors")
    assert "2 tensors (speech.a, speech.b, ...)" in message
    for known in ("transformers", "open_clip", "timm", "medfast"):
        assert known in message


def test_two_text_towers_are_not_guessed_between(tmp_path):
    tensors = {f"{x}.embeddings.word_embeddings.weight": torch.zeros(60, 64) for x in "ab"}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "2 towers of one kind, under 'a.', 'b.'" in _refused(tmp_path)


# Files


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_never_run(tmp_path):
    trap = tmp_path / "ran"
    torch.save({"state_dict": {"x": _Code(trap)}}, tmp_path / "torch.pt")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"x": _Code(trap)}, protocol=2))
    for name in ("torch.pt", "plain.bin"):
        assert f"{name} cannot be read (UnpicklingError)" in _refused(tmp_path / name)
    assert not trap.exists()


def test_damaged_files_are_told(tmp_path):
    source = _save_clip(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors cannot be read (SafetensorError)" in _refused(source)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git lfs pull" in _refused(source)
    file.write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in _refused(source)
    (tmp_path / "notes.pt").write_text("not weights")
    assert "notes.pt cannot be read" in _refused(tmp_path / "notes.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert "empty.pt holds no weights" in _refused(tmp_path / "empty.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    assert "tensor.pt holds no weights" in _refused(tmp_path / "tensor.pt")


def test_a_folder_without_weights_is_told(tmp_path):
    assert "is an empty folder" in _refused(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    assert "holds no weights" in _refused(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "holds a tokenizer but no weights" in _refused(tmp_path)
    for name in "ab":
        torch.save({"x": torch.zeros(1)}, tmp_path / f"{name}.pt")
    assert "several files of weights; name one of them: a.pt, b.pt." in _refused(tmp_path)


def test_shards_outside_of_the_folder_or_missing_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", folder / "b.safetensors")
    index = folder / "model.safetensors.index.json"
    for weights, named in (
        ({"x": "../a.safetensors"}, "../a.safetensors, which is not in its folder"),
        ({"x": "gone.safetensors"}, "gone.safetensors, which is not in its folder"),
        ({"y": "b.safetensors"}, "names y, which its files do not hold"),
    ):
        index.write_text(json.dumps({"weight_map": weights}))
        assert named in _refused(folder)


# The hub


@pytest.mark.parametrize("source", ["/nothing/here", "weights", "org/name.pt", "./org/name"])
def test_a_path_that_is_not_there_is_no_hub_name(monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert "there is no such file or folder" in _refused(source)


def test_a_name_that_is_neither_here_nor_reachable_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = _refused("org/no-such-model")
    assert "is no local path, and the Hugging Face hub did not give it" in message
    assert "name its folder here" in message
    with pytest.raises(UsageError, match="org/no-such-model is no local path"):
        pretrained_tokenizer("org/no-such-model")


def test_a_name_on_the_hub_is_downloaded_and_a_local_folder_wins(monkeypatch, tmp_path):
    _save_clip(tmp_path / "hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, *allow_patterns))
        # The first pattern finds nothing but the configuration.
        return str(tmp_path / "hub") if len(asked) > 1 else str(tmp_path / "none")

    (tmp_path / "none").mkdir()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    loaded = load_pretrained(_model(), "org/name")
    assert (loaded.source, loaded.new) == ("org/name", ())
    assert [name for name, *_ in asked] == ["org/name", "org/name"]
    assert asked[1][1] == "model*.safetensors"
    shutil.copytree(tmp_path / "hub", tmp_path / "org" / "name")
    load_pretrained(_model(), "org/name")
    assert len(asked) == 2
