"""Every family of models gives the embeddings that its own library gives for the same input."""

import json
import os
import shutil

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from medfast import json_lines
from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.skipped import SkippedSamples
from medfast.data.tokens import Tokenizer
from medfast.errors import UsageError
from medfast.evals.features import LocalFeatures
from medfast.evals.models import OpenClipTokenizer, load_encoder
from medfast.evals.retrieval import retrieval

CPU = torch.device("cpu")
WIDTH, D = 32, 16
# The second needs the most tokens, the third is empty.
TEXTS = ["a chest x-ray!", "an MRI of the left knee, with a large effusion !! of it", "", "liver"]
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 64, **LAYERS}
# Neither CLIP's nor the half that other models take.
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def _images(size):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=generator)


def _pixels(size, mean=MEAN, std=STD):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    return (_images(size) / 255 - mean) / std


@torch.no_grad()
def _random(model):
    """Return a model none of whose weights is 0 or 1, so that none can be missed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def _assert_same(encoder, image, text):
    """Compare an encoder's features with those of the library, not yet of unit length."""
    for got, want in (
        (encoder.images(_images(encoder.image_size)), image),
        (encoder.texts(TEXTS, batch_size=3), text),
    ):
        want = F.normalize(want.detach(), dim=-1)
        torch.testing.assert_close(got.unit, want, rtol=0, atol=1e-5)
        assert not torch.allclose(want[0], want[1], atol=1e-4)  # else the test would see nothing


def _assert_parts(encoder, patches, channels):
    """Check what questions are answered from: patches, and as many tokens as the mask has."""
    with torch.no_grad():
        assert encoder.model.image_tower(_images(encoder.image_size))[1].shape == (
            *(3, patches),
            channels,
        )
        tokens = encoder.tokenizer(TEXTS)
        features = encoder.model.text_tower(tokens.ids, tokens.mask)[1]
    assert features.shape[:2] == tokens.ids.shape == tokens.mask.shape == tokens.word_mask.shape
    assert tokens.mask[:, :2].all()
    # The start and the end are no words, and the third text has none.
    assert (tokens.mask.sum(1) - tokens.word_mask.sum(1)).tolist() == [2, 2, 2, 2]
    assert tokens.word_mask[2].sum() == 0
    assert (tokens.word_mask.sum(1)[[0, 1, 3]] > 0).all()


# open_clip

VIT = {"image_size": 32, "layers": 2, "width": WIDTH, "patch_size": 16, "head_width": 16}
CLIP_TEXT = {"context_length": 24, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**CLIP_TEXT, "no_causal_mask": True, "pool_type": "last"}
BIOMED_TEXT = {
    "hf_proj_type": "mlp",
    "hf_pooler_type": "cls_last_hidden_state_pooler",
    "context_length": 24,
}
TIMM_VIT = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "image_size": 160}
OPEN_CLIP = {
    "clip": ({"vision_cfg": VIT, "text_cfg": CLIP_TEXT}, 4, WIDTH),
    "quick": ({"vision_cfg": VIT, "text_cfg": CLIP_TEXT, "quick_gelu": True}, 4, WIDTH),
    "resnet": (
        {
            "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
            "text_cfg": CLIP_TEXT,
        },
        *(4, 256),
    ),
    "siglip": (
        {
            "vision_cfg": {**TIMM_VIT, "timm_pool": "map", "timm_proj": "none"},
            "text_cfg": SIGLIP_TEXT,
            "init_logit_bias": -10,
            "custom_text": True,
            "embed_dim": 64,
        },
        *(100, 64),
    ),
    "biomed": (
        {
            "vision_cfg": {**TIMM_VIT, "timm_pool": "", "timm_proj": "linear"},
            "text_cfg": BIOMED_TEXT,
        },
        *(100, 64),
    ),
    "pooler": (
        {
            "vision_cfg": {**TIMM_VIT, "timm_model_name": "test_resnet", "timm_proj": "mlp"},
            "text_cfg": {**BIOMED_TEXT, "hf_pooler_type": "cls_pooler"},
        },
        *(25, 96),
    ),
}


def _write_open_clip(folder, name, tokenizer, file="open_clip_model.safetensors"):
    settings = json.loads(json.dumps({"embed_dim": D, **OPEN_CLIP[name][0]}))
    text = settings["text_cfg"]
    if "hf_proj_type" in text:
        tokenizer.save(folder)
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 24, **SHAPE}
        transformers.BertConfig(**shape, pad_token_id=0).save_pretrained(folder)
        # As published, with names on the hub; here they must be folders.
        text["hf_model_name"] = text["hf_tokenizer_name"] = str(folder)
    whole = {"model_cfg": settings, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    torch.manual_seed(0)
    model = _random(open_clip.create_model(f"local-dir:{folder}", pretrained_text=False))
    tensors = {key: x.contiguous() for key, x in model.state_dict().items()}
    if file.endswith("safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    return model


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_a_model_of_open_clip_gives_open_clips_embeddings(tmp_path, tokenizer, name):
    own = _write_open_clip(tmp_path, name, tokenizer)
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    with torch.no_grad():
        image, text = own.encode_image(_pixels(encoder.image_size)), own.encode_text(ids)
    _assert_same(encoder, image, text)
    assert encoder.model.logit_scale.item() == own.logit_scale.item()
    assert encoder.name == tmp_path.name
    assert encoder.library == f"open_clip_torch {open_clip.__version__}"
    assert encoder.preprocessing["mean"] == pytest.approx(MEAN)
    assert encoder.preprocessing["size"] == encoder.image_size
    if name != "siglip":  # its padding is not told from what it pads, nor does it need to be
        _assert_parts(encoder, *OPEN_CLIP[name][1:])


def test_weights_of_a_bin_file_are_the_same(tmp_path, tokenizer):
    own = _write_open_clip(tmp_path, "clip", tokenizer, "open_clip_pytorch_model.bin")
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    with torch.no_grad():
        want = own.encode_image(_pixels(32)), own.encode_text(open_clip.tokenize(TEXTS, 24))
    _assert_same(encoder, *want)


def test_a_text_tower_named_on_the_hub_is_built_from_the_files_beside_it(tmp_path, tokenizer):
    own = _write_open_clip(tmp_path, "biomed", tokenizer)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(TEXTS)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    for key in ("hf_model_name", "hf_tokenizer_name"):
        config["model_cfg"]["text_cfg"][key] = "nobody/has-this-model"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    with torch.no_grad():
        _assert_same(encoder, own.encode_image(_pixels(160)), own.encode_text(ids))


def test_a_pair_is_embedded_as_its_halves_are(tmp_path, tokenizer):
    _write_open_clip(tmp_path, "clip", tokenizer)
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    tokens = encoder.tokenizer(TEXTS[:3])
    with torch.no_grad():
        features = encoder.model(_images(32), tokens.ids, tokens.mask)
    assert torch.equal(features.image, encoder.images(_images(32)).unit)
    assert torch.equal(features.text, encoder.texts(TEXTS[:3]).unit)
    assert features.logit_scale.item() == pytest.approx(encoder.model.logit_scale.exp().item())


def test_a_text_may_end_with_what_also_pads(tmp_path, tokenizer):
    """As CLIP's own tokenizer does in transformers."""
    tokenizer.save(tmp_path)
    inner = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inner.pad_token = inner.eos_token
    inner.save_pretrained(tmp_path)
    library = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=24)
    assert library.tokenizer.pad_token_id == inner.eos_token_id
    want = Tokenizer.load(tmp_path, 24)(TEXTS)
    assert want.mask[1].all()  # it is cut
    short = [0, 2, 3]
    for trim, asked in ((False, range(4)), (True, short)):
        got = OpenClipTokenizer(library, 24, trim)([TEXTS[k] for k in asked])
        length = got.ids.shape[1]
        assert length == (want.mask[short].sum(1).max() if trim else 24)
        for part in ("ids", "mask", "word_mask"):
            assert torch.equal(getattr(got, part), getattr(want, part)[list(asked), :length])
    assert OpenClipTokenizer(library, 24, False)([]).ids.shape == (0, 0)


# transformers


def _clip(vocab):
    text = {**SHAPE, "vocab_size": vocab, "max_position_embeddings": 24, "hidden_act": "gelu"}
    ids = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    vision = {**SHAPE, "image_size": 32, "patch_size": 16}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**text, **ids}, vision_config=vision, projection_dim=D)
    )


def _siglip(vocab):
    text = {**SHAPE, "vocab_size": vocab, "max_position_embeddings": 24}
    vision = {**SHAPE, "image_size": 32, "patch_size": 16}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config=vision)
    )


def _joined(vocab):
    text = transformers.BertConfig(**SHAPE, vocab_size=vocab, max_position_embeddings=24)
    vision = transformers.ViTConfig(**SHAPE, image_size=32, patch_size=16)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, text, projection_dim=D
    )
    return transformers.VisionTextDualEncoderModel(config)


def _write_transformers(folder, build, tokenizer, half=False):
    model = _random(build(len(tokenizer)))
    (model.half() if half else model).save_pretrained(folder)
    tokenizer.save(folder)
    pixels = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model.float()


def _own_features(model, folder, pad):
    inner = transformers.AutoTokenizer.from_pretrained(folder)
    own = inner(TEXTS, padding=pad, truncation=True, max_length=24, return_tensors="pt")
    given = {"input_ids": own.input_ids}
    if pad is True:  # SigLIP's processor gives no mask
        given["attention_mask"] = own.attention_mask
    with torch.no_grad():
        found = model.get_image_features(pixel_values=_pixels(32)), model.get_text_features(**given)
    # transformers 4 gives the features alone.
    return [getattr(x, "pooler_output", x) for x in found]


@pytest.mark.parametrize(
    ("build", "pad"), [(_clip, True), (_siglip, "max_length"), (_joined, True)]
)
def test_a_model_of_transformers_gives_its_embeddings(tmp_path, tokenizer, build, pad, capfd):
    own = _write_transformers(tmp_path, build, tokenizer)
    capfd.readouterr()
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    assert capfd.readouterr() == ("", "")
    _assert_same(encoder, *_own_features(own, tmp_path, pad))
    assert encoder.image_size == 32
    assert encoder.model.logit_scale.item() == own.logit_scale.item()
    assert encoder.preprocessing["std"] == pytest.approx(STD)
    assert encoder.library == f"transformers {transformers.__version__}"
    _assert_parts(encoder, 4, WIDTH)


def test_half_precision_becomes_single(tmp_path, tokenizer):
    own = _write_transformers(tmp_path, _clip, tokenizer, half=True)
    encoder = load_encoder(str(tmp_path), CPU, "fp32")
    assert {p.dtype for p in encoder.model.parameters()} == {torch.float32}
    _assert_same(encoder, *_own_features(own, tmp_path, True))


def test_texts_may_be_none_and_are_split_among_batches(tmp_path, tokenizer):
    for build in (_clip, _siglip):
        folder = tmp_path / build.__name__
        folder.mkdir()
        _write_transformers(folder, build, tokenizer)
        encoder = load_encoder(str(folder), CPU, "fp32")
        one = [encoder.texts([text]).unit for text in TEXTS]
        torch.testing.assert_close(encoder.texts(TEXTS).unit, torch.cat(one), rtol=0, atol=1e-5)


# medfast


def test_a_run_gives_the_results_that_it_ended_with(short_run, phantom, tmp_path):
    encoder = load_encoder(str(short_run), CPU)
    records = read_split("roco", phantom, "test").records
    loader = Loader(records, encoder.tokenizer, encoder.image_size, batch_size=16)
    found = retrieval(encoder.pairs(loader, SkippedSamples(tmp_path / "skipped", 120, 0.1)))
    row = next(
        row for row in json_lines.read(short_run / "results.jsonl") if row["task"] == "retrieval"
    )
    assert found["n"] == row["n"]
    # The order of sums may differ from that of the run's batches.
    assert found["metrics"] == pytest.approx(row["metrics"], abs=1.01 / found["n"])
    assert (encoder.name, encoder.late_interaction, encoder.image_size) == ("a", False, 96)
    last = short_run / "checkpoints" / "epoch_2.pt"
    again = load_encoder(str(last), CPU)
    assert again.name == "a epoch_2"
    assert torch.equal(again.texts(TEXTS).unit, encoder.texts(TEXTS).unit)


@pytest.fixture
def own_run(short_run, tmp_path):
    return shutil.copytree(short_run, tmp_path / "run")


def _change(path, target, **settings):
    state = torch.load(path, weights_only=True)
    state["config"].update(settings)
    torch.save(state, target)
    return state


def test_of_a_run_that_stops_early_the_best_epoch_is_taken(own_run):
    checkpoints = own_run / "checkpoints"
    last = checkpoints / "epoch_2.pt"
    before = load_encoder(str(own_run), CPU).texts(TEXTS).unit
    state = torch.load(last, weights_only=True)
    for weights in state["state_dict"].values():
        if weights.is_floating_point():
            weights.mul_(0.9)
    torch.save(state, checkpoints / "best.pt")
    best = load_encoder(str(own_run), CPU).texts(TEXTS).unit
    assert not torch.allclose(best, before)
    assert torch.equal(best, load_encoder(str(checkpoints / "best.pt"), CPU).texts(TEXTS).unit)
    assert torch.equal(before, load_encoder(str(last), CPU).texts(TEXTS).unit)


def test_a_run_whose_method_scores_by_parts_is_scored_so(own_run):
    last = own_run / "checkpoints" / "epoch_2.pt"
    _change(last, last, method="filip")
    encoder = load_encoder(str(own_run), CPU)
    assert encoder.late_interaction
    assert isinstance(encoder.texts(TEXTS), LocalFeatures)


# Errors


def _refused(source, *words, flag="--model"):
    with pytest.raises(UsageError) as refused:
        load_encoder(str(source), CPU, flag=flag)
    message = str(refused.value)
    assert message.startswith(flag)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def test_what_is_no_model_is_refused_in_a_sentence(tmp_path, own_run, tokenizer):
    _refused(tmp_path / "none", "no such file", flag="--checkpoint")
    alone = tmp_path / "alone.pt"
    torch.save({"visual.proj": torch.ones(2)}, alone)
    _refused(alone, "open_clip_config.json")
    folder = tmp_path / "bert"
    folder.mkdir()
    transformers.BertModel(
        transformers.BertConfig(**SHAPE, vocab_size=9, max_position_embeddings=8)
    ).save_pretrained(folder)
    _refused(folder, "bert", "clip, siglip")
    last = own_run / "checkpoints" / "epoch_2.pt"
    _change(last, last, unheard_of=1)
    _refused(own_run, "unheard_of", "version", flag="--checkpoint")
    shutil.rmtree(own_run / "tokenizer")
    _refused(own_run, "tokenizer", flag="--checkpoint")


@pytest.mark.parametrize(
    ("file", "word"),
    [("preprocessor_config.json", "preprocessor_config.json"), ("tokenizer.json", "tokenizer")],
)
def test_a_part_that_a_model_of_transformers_lacks_is_named(tmp_path, tokenizer, file, word):
    _write_transformers(tmp_path, _clip, tokenizer)
    (tmp_path / file).unlink()
    _refused(tmp_path, word)


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_weights_that_are_not_all_there_are_refused(tmp_path, tokenizer, family):
    if family == "open_clip":
        _write_open_clip(tmp_path, "clip", tokenizer)
    else:
        _write_transformers(tmp_path, _clip, tokenizer)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    key = next(name for name in tensors if ("bias" in name and "layer" in name) or "ln_1.b" in name)
    save_file({name: x for name, x in tensors.items() if name != key}, file, {"format": "pt"})
    _refused(tmp_path, "lack", "bias")
    save_file({**tensors, "another.weight": torch.ones(2)}, file, {"format": "pt"})
    _refused(tmp_path, "another.weight")
    save_file({**tensors, key: torch.ones(2)}, file, {"format": "pt"})
    _refused(tmp_path)


def test_a_model_that_the_library_cannot_build_is_refused(tmp_path, tokenizer):
    _write_open_clip(tmp_path, "clip", tokenizer)
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    for change, word in (
        ({"multimodal_cfg": {}}, "multimodal_cfg"),
        ({"vision_cfg": {**VIT, "image_size": [32, 64]}}, ""),
    ):
        changed = {**config["model_cfg"], **change}
        path.write_text(json.dumps({**config, "model_cfg": changed}))
        _refused(tmp_path, word)


def test_a_shape_that_cannot_be_had_is_asked_for(tmp_path, tokenizer):
    _write_open_clip(tmp_path, "biomed", tokenizer)
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(tmp_path / "gone")
    path.write_text(json.dumps(config))
    (tmp_path / "config.json").unlink()
    _refused(tmp_path, "gone: if that cannot be had from the hub, put its config.json")


class _Bomb(nn.Module):
    """Writes a file when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "pytorch_model.bin"])
def test_nothing_is_unpickled_but_tensors(tmp_path, tokenizer, file):
    folder = tmp_path / "model"
    folder.mkdir()
    if file.startswith("open_clip"):
        _write_open_clip(folder, "clip", tokenizer)
    else:
        _write_transformers(folder, _clip, tokenizer)
    next(folder.glob("*.safetensors")).unlink()
    torch.save({"visual.proj": _Bomb(tmp_path / "went_off")}, folder / file)
    _refused(folder, "weights_only")
    assert not (tmp_path / "went_off").exists()
