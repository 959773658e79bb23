"""Weights of each format give the outputs that the library which wrote them gives."""

import dataclasses
import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from medfast.data.tokens import Tokenizer
from medfast.models import PRESETS
from medfast.models.pair import ImageTextModel
from medfast.models.pretrained import load, load_pretrained, pretrained_tokenizer
from medfast.models.pretrained.files import Weights

# The presets' shapes, made small: two layers, two heads, a grid of 4 x 4 patches.
WIDTH, VOCAB, END, D = 64, 60, 59, 32
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 4 * WIDTH,
}
IMAGE = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2}
# open_clip takes the feature at the greatest id.
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END}
IDS = torch.tensor([[1, 7, 8, 9, END, 0], [1, 7, END, 0, 0, 0]])
MASK = IDS != 0


def _preset(name, **changes):
    preset = PRESETS[name]
    small = {"image_size": 64, "context_length": 12, "embed_dim": D, "image_args": IMAGE}
    return dataclasses.replace(preset, text={**preset.text, **TEXT}, **{**small, **changes})


def _model(name, vocab=VOCAB, local=False, **changes):
    torch.manual_seed(1)
    return ImageTextModel(_preset(name, **changes), vocab, SPECIAL, local).eval()


@torch.no_grad()
def _random(model, seed=0):
    """Return a source without a weight that is 0 or 1, so that none can be missed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def _images(size=64):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)


def _pixels(model, images):
    return (images - model.image_tower.mean) / model.image_tower.std


def _clip(layers=2, activation="quick_gelu", context=12, size=64, vocab=VOCAB):
    shape = {**TEXT, "num_hidden_layers": layers, "hidden_act": activation}
    text = {**shape, **SPECIAL, "vocab_size": vocab, "max_position_embeddings": context}
    vision = {**shape, "image_size": size, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=D)
    return _random(transformers.CLIPModel(config))


OPEN_CLIP = {
    "embed_dim": D,
    "vision_cfg": {
        "image_size": 64,
        "layers": 2,
        "width": WIDTH,
        "patch_size": 16,
        "head_width": WIDTH // 2,
    },
    "text_cfg": {
        "context_length": 12,
        "vocab_size": VOCAB,
        "width": WIDTH,
        "heads": 2,
        "layers": 2,
    },
}


def _bert(kind=transformers.BertModel, config=transformers.BertConfig, **changes):
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 12, **TEXT, **changes}
    return _random(kind(config(**shape)))


@torch.no_grad()
def _assert_same(model, image=None, text=None):
    """Compare global features with a source's functions of pixels, or of ids and mask."""
    if image is not None:
        want = F.normalize(image(_pixels(model, _images())), dim=-1)
        torch.testing.assert_close(model.encode_image(_images())[0], want, rtol=0, atol=1e-5)
    if text is not None:
        want = F.normalize(text(IDS, MASK), dim=-1)
        torch.testing.assert_close(model.encode_text(IDS, MASK)[0], want, rtol=0, atol=1e-5)


def _image_of(clip):
    return lambda pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output)


def _text_of(clip):
    return lambda ids, mask: clip.text_projection(clip.text_model(ids, mask).pooler_output)


def _names(model, *starts):
    return {name for name in model.state_dict() if name.startswith(starts)}


# transformers CLIP


@pytest.mark.parametrize("files", ["safetensors", "sharded", "bin"])
def test_transformers_clip_gives_the_same_features(tmp_path, files):
    clip, model = _clip(), _model("vit_b16_clip_quickgelu")
    clip.save_pretrained(tmp_path, max_shard_size="100KB" if files == "sharded" else "1GB")
    if files == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    assert (files == "sharded") == (tmp_path / "model.safetensors.index.json").exists()
    loaded = load_pretrained(model, str(tmp_path))
    _assert_same(model, _image_of(clip), _text_of(clip))
    assert model.logit_scale.item() == clip.logit_scale.item()
    assert (loaded.format, loaded.source) == ("transformers CLIP", str(tmp_path))
    assert set(loaded.loaded) == set(model.state_dict())
    assert (loaded.fitted, loaded.new, loaded.skipped) == ((), (), ())


@pytest.mark.parametrize("part", ["image", "text"])
def test_one_part_leaves_the_other_as_it_was(tmp_path, part):
    clip, model = _clip(), _model("vit_b16_clip_quickgelu")
    clip.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = load_pretrained(model, str(tmp_path), part)
    own = _names(model, f"{part}_tower", f"{part}_projection")
    changed = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
    assert changed == own == set(loaded.loaded)
    _assert_same(model, **{part: {"image": _image_of, "text": _text_of}[part](clip)})
    assert "logit_scale" in loaded.skipped
    assert loaded.new == ()


@pytest.mark.parametrize(
    ("kind", "part", "projected"),
    [
        (transformers.CLIPVisionModel, "image", False),
        (transformers.CLIPVisionModelWithProjection, "image", True),
        (transformers.CLIPTextModel, "text", False),
        (transformers.CLIPTextModelWithProjection, "text", True),
    ],
)
@pytest.mark.parametrize("old_prefix", [False, True])
def test_a_clip_tower_alone_is_found_under_any_prefix(tmp_path, kind, part, projected, old_prefix):
    config = _clip().config
    config = {"image": config.vision_config, "text": config.text_config}[part]
    config.projection_dim = D
    tower, model = _random(kind(config)), _model("vit_b16_clip_quickgelu")
    tower.save_pretrained(tmp_path)
    if old_prefix and not projected:
        # Before version 5 transformers saved these below "vision_model." and "text_model.".
        prefix = {"image": "vision_model.", "text": "text_model."}[part]
        file = tmp_path / "model.safetensors"
        save_file({prefix + name: value for name, value in load_file(file).items()}, file)
    loaded = load_pretrained(model, str(tmp_path), part)
    if part == "image":
        inner = getattr(tower, "vision_model", tower)
        want, got = inner(_pixels(model, _images())).pooler_output, model.image_tower(_images())[0]
    else:
        inner = getattr(tower, "text_model", tower)
        want, got = inner(IDS, MASK).pooler_output, model.text_tower(IDS, MASK)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert loaded.new == (() if projected else (f"{part}_projection.weight",))
    assert loaded.skipped == ()


def test_half_precision_becomes_the_dtype_of_the_model(tmp_path):
    clip, model = _clip(), _model("vit_b16_clip_quickgelu")
    clip.half().save_pretrained(tmp_path)
    load_pretrained(model, str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    _assert_same(model, _image_of(clip.float()), _text_of(clip))


# open_clip


def _save_open_clip(folder, source, config, file):
    tensors = source.state_dict()
    if file == "open_clip_model.safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / file)
    elif file == "epoch_3.pt":
        wrapped = {f"module.{name}": value for name, value in tensors.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": wrapped}, folder / file)
    else:
        torch.save(tensors, folder / file)
    if file.startswith("open_clip"):
        preprocess = {"mean": PRESETS["vit_b16_clip"].mean, "std": PRESETS["vit_b16_clip"].std}
        whole = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return str(folder if file.startswith("open_clip") else folder / file)


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_open_clip_gives_the_same_features(tmp_path, file, custom_text, quick):
    config = {**OPEN_CLIP, **({"quick_gelu": True} if quick else {})}
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    source, model = _random(kind(**config)), _model(f"vit_b16_clip{'_quickgelu' * quick}")
    loaded = load_pretrained(model, _save_open_clip(tmp_path, source, config, file))
    _assert_same(model, source.encode_image, lambda ids, mask: source.encode_text(_full(ids)))
    assert model.logit_scale.item() == source.logit_scale.item()
    assert loaded.format == "open_clip"
    assert set(loaded.loaded) == set(model.state_dict())
    assert (loaded.fitted, loaded.new, loaded.skipped, loaded.notes) == ((), (), (), ())


def _full(ids):
    """Return ids padded to open_clip's context, which takes no shorter ones."""
    return F.pad(ids, (0, 12 - ids.shape[1]))


def test_a_training_checkpoint_of_open_clip_is_read_from_below_module(tmp_path):
    source, model = _random(open_clip.CLIP(**OPEN_CLIP)), _model("vit_b16_clip")
    load_pretrained(model, _save_open_clip(tmp_path, source, OPEN_CLIP, "epoch_3.pt"))
    _assert_same(model, source.encode_image, lambda ids, mask: source.encode_text(_full(ids)))


class _Biomed(torch.nn.Module):
    """An open_clip model of timm's ViT and transformers' BERT, as BiomedCLIP is one.

    open_clip itself would ask the hub for BERT's configuration.
    """

    def __init__(self, mlp):
        super().__init__()
        with torch.device("meta"):
            self.visual = open_clip.timm_model.TimmModel(
                "vit_base_patch16_224", D, image_size=64, pool="", proj="linear"
            )
        trunk = timm.create_model("vit_base_patch16_224", img_size=64, num_classes=0, **IMAGE)
        self.visual.trunk = trunk
        self.visual.head.proj = torch.nn.Linear(WIDTH, D, bias=False)
        self.text = torch.nn.Module()
        self.text.transformer = transformers.BertModel(
            transformers.BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **TEXT),
            add_pooling_layer=False,
        )
        layers = [torch.nn.Linear(WIDTH, 48, bias=False), torch.nn.GELU()]
        last = torch.nn.Linear(48 if mlp else WIDTH, D, bias=False)
        self.text.proj = torch.nn.Sequential(*layers, last) if mlp else last
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))


@pytest.mark.parametrize(
    ("mlp", "pooler"),
    [(True, "cls_last_hidden_state_pooler"), (False, "cls_pooler"), (False, "mean_pooler")],
)
def test_towers_of_timm_and_transformers_within_open_clip(tmp_path, mlp, pooler):
    source, model = _random(_Biomed(mlp)), _model("vit_b16_bert", local=True)
    # A name that timm does not know: its own ViT of that name has more heads than this small one.
    vision = {"timm_model_name": "vit_small_test", "timm_pool": "", "image_size": 64}
    text = {"hf_model_name": "bert", "hf_pooler_type": pooler}
    config = {"embed_dim": D, "vision_cfg": vision, "text_cfg": text}
    file = "open_clip_pytorch_model.bin"
    loaded = load_pretrained(model, _save_open_clip(tmp_path, source, config, file))
    same = not mlp and pooler == "mean_pooler"

    def encode_text(ids, mask):
        tokens = source.text.transformer(ids, mask).last_hidden_state
        pooled = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return source.text.proj(pooled) if same else model.text_projection(pooled)

    _assert_same(model, source.visual, encode_text)
    local = {"patch_projection.weight", "token_projection.weight"}
    # A scale belongs to the space of both projections.
    unused = set() if same else {"text_projection.weight", "logit_scale"}
    assert set(loaded.new) == local | unused
    assert set(loaded.fitted) == {
        "text_tower.trunk.embeddings.position_embeddings.weight"  # 16 positions cut to 12
    }
    proj = {"text.proj.0.weight", "text.proj.2.weight"} if mlp else {"text.proj.weight"}
    assert set(loaded.skipped) == (set() if same else proj | {"logit_scale"})
    assert any(pooler in note for note in loaded.notes) == (not mlp and not same)


# timm


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("vit_b16")])
@pytest.mark.parametrize("published", [True, False])
def test_a_vit_of_timm_gives_the_same_features(tmp_path, name, published):
    preset = _preset(name)
    source = timm.create_model(preset.image, img_size=64, num_classes=10, **IMAGE)
    model = _model(name)
    _random(source)
    path = tmp_path
    if published:
        timm.models.save_for_hf(source, tmp_path, safe_serialization=True)
    else:
        path = tmp_path / "vit.pth"
        torch.save({"model": source.state_dict(), "epoch": 1}, path)
    loaded = load_pretrained(model, str(path), "image")
    with torch.no_grad():
        tokens = source.forward_features(_pixels(model, _images()))
        want = source.forward_head(tokens, pre_logits=True), tokens[:, 1:]
        for got, expected in zip(model.image_tower(_images()), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert loaded.format == "timm"
    assert set(loaded.loaded) == _names(model, "image_tower")
    assert loaded.new == ("image_projection.weight",)
    assert set(loaded.skipped) == {"head.weight", "head.bias"}
    # timm's weights of the plain ViT are for pixels from -1 to 1, as vit_b16 takes them.
    is_other = published and name == "vit_b16_bert"
    assert any("[0.5, 0.5, 0.5]" in note for note in loaded.notes) == is_other


def test_the_projection_of_timms_clip_is_its_classifier_with_a_bias_of_zeros(tmp_path):
    source = _random(
        timm.create_model("vit_base_patch16_clip_224", img_size=64, num_classes=D, **IMAGE)
    )
    source.head.bias.data.zero_()
    timm.models.save_for_hf(source, tmp_path, safe_serialization=True)
    model = _model("vit_b16_clip")
    loaded = load_pretrained(model, str(tmp_path))
    _assert_same(model, source)
    assert loaded.skipped == ()
    assert set(loaded.new) == _names(model, "text_", "logit_scale")


def test_a_resnet_comes_with_its_batch_statistics(tmp_path):
    preset = PRESETS["tiny"]
    source = _random(timm.create_model(preset.image, num_classes=10, **preset.image_args))
    for name, buffer in source.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    model = ImageTextModel(preset, 100, SPECIAL).eval()
    loaded = load_pretrained(model, str(tmp_path / "resnet.pth"), "image")
    with torch.no_grad():
        pixels = _pixels(model, _images(96))
        want = source.forward_head(source.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(model.image_tower(_images(96))[0], want, rtol=0, atol=1e-5)
    assert set(loaded.skipped) == {"fc.weight", "fc.bias"}


# BERT


@pytest.mark.parametrize("case", ["bert", "masked language model", "old names", "roberta"])
def test_a_bert_gives_the_same_features(tmp_path, case):
    if case == "roberta":
        shape = {"type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 14}
        ids = IDS.masked_fill(~MASK, 1)
        ids[:, 0] = 5  # 1 is padding here
        config = transformers.RobertaConfig
        source = _bert(transformers.RobertaForMaskedLM, config, **shape, layer_norm_eps=1e-12)
        inner = source.roberta
    elif case == "bert":
        source = inner = _bert()
        ids = IDS
    else:
        source, ids = _bert(transformers.BertForMaskedLM), IDS
        inner = source.bert
    source.save_pretrained(tmp_path)
    if case == "old names":
        file, old = tmp_path / "model.safetensors", {"weight": "gamma", "bias": "beta"}
        tensors = {
            n.replace(f"LayerNorm.{(end := n.rpartition('.')[2])}", f"LayerNorm.{old[end]}"): x
            for n, x in load_file(file).items()
        }
        assert any(name.endswith("LayerNorm.gamma") for name in tensors)
        save_file(tensors, file)
    model = _model("vit_b16_bert")
    loaded = load_pretrained(model, str(tmp_path), "text")
    with torch.no_grad():
        tokens = inner(input_ids=ids, attention_mask=MASK.long()).last_hidden_state
        want = (tokens * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
        torch.testing.assert_close(model.text_tower(ids, MASK)[0], want, rtol=0, atol=1e-5)
    assert loaded.format == "transformers text"
    assert loaded.new == ("text_projection.weight",)
    types = "text_tower.trunk.embeddings.token_type_embeddings.weight"
    assert loaded.fitted == ((types,) if case == "roberta" else ())
    assert all(name.startswith(("pooler.", "cls.", "lm_head.")) for name in loaded.skipped)


# medfast


def _run(folder, model, config, epochs=(2, 10)):
    (folder / "checkpoints").mkdir(parents=True)
    for epoch in epochs:
        state = {"epoch": epoch, "config": config, "state_dict": model.state_dict()}
        torch.save(state, folder / "checkpoints" / f"epoch_{epoch}.pt")
        _random(model, seed=epoch)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/epoch_10.pt"])
def test_a_run_of_medfast_comes_back_whole(tmp_path, place):
    first, model = _model("vit_b16_clip", local=True), _model("vit_b16_clip", local=True)
    run = tmp_path / "run"
    _run(run, _random(first), {"model": "nothing"})
    tokenizer = Tokenizer.train(["left lung", "right lung"], 300, 12)
    tokenizer.save(run / "tokenizer")
    loaded = load_pretrained(model, str(run / place))
    newest = torch.load(run / "checkpoints/epoch_10.pt", weights_only=True)["state_dict"]
    assert all(value.equal(newest[name]) for name, value in model.state_dict().items())
    assert loaded.format == "medfast"
    assert set(loaded.loaded) == set(newest)
    assert pretrained_tokenizer(str(run / place)) == run / "tokenizer"


def test_one_part_of_a_run_has_its_local_projection(tmp_path):
    first, model = _model("vit_b16_clip", local=True), _model("vit_b16_clip", local=True)
    _run(tmp_path / "run", _random(first), {}, epochs=(1,))
    loaded = load_pretrained(model, str(tmp_path / "run"), "image")
    assert set(loaded.loaded) == _names(model, "image_", "patch_")
    assert set(loaded.skipped) == _names(model, "text_", "token_", "logit_scale")


# Other resolutions, contexts and vocabularies


@pytest.mark.parametrize("format", ["transformers", "timm", "medfast"])
def test_position_embeddings_of_images_are_resampled_as_timm_does(tmp_path, format):
    model = _model("vit_b16_clip", image_size=96)
    if format == "transformers":
        source = _clip(activation="gelu")
        source.save_pretrained(tmp_path)
        positions = source.vision_model.embeddings.position_embedding.weight[None]
    elif format == "timm":
        source = _random(timm.create_model("vit_base_patch16_clip_224", img_size=64, **IMAGE))
        timm.models.save_for_hf(source, tmp_path, safe_serialization=True)
        positions = source.pos_embed
    else:
        source = _random(_model("vit_b16_clip"))
        _run(tmp_path / "run", source, {}, epochs=(1,))
        tmp_path = tmp_path / "run"
        positions = torch.load(tmp_path / "checkpoints/epoch_1.pt", weights_only=True)[
            "state_dict"
        ]["image_tower.trunk.pos_embed"]
    loaded = load_pretrained(model, str(tmp_path), "image")
    want = resample_abs_pos_embed(positions, [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(model.image_tower.trunk.pos_embed, want, rtol=0, atol=1e-6)
    assert loaded.fitted == ("image_tower.trunk.pos_embed",)
    assert model.encode_image(_images(96))[0].shape == (2, D)


@pytest.mark.parametrize("context", [8, 20])
@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_another_context_leaves_short_captions_as_they_were(tmp_path, context, kind):
    source = _clip() if kind == "clip" else _bert()
    source.save_pretrained(tmp_path)
    name = "vit_b16_clip_quickgelu" if kind == "clip" else "vit_b16_bert"
    same, other = _model(name), _model(name, context_length=context)
    load_pretrained(same, str(tmp_path), "text")
    table = f"text_tower.trunk.embeddings.position_embedding{'s' * (kind == 'bert')}.weight"
    before = other.state_dict()[table].clone()
    loaded = load_pretrained(other, str(tmp_path), "text")
    for got, want in zip(other.text_tower(IDS, MASK), same.text_tower(IDS, MASK), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert loaded.fitted == (table,)
    # What the source has not stays newly initialised.
    assert other.state_dict()[table][12:].equal(before[12:])


def test_tokens_added_to_the_vocabulary_are_new(tmp_path):
    clip, model = _clip(), _model("vit_b16_clip_quickgelu", vocab=VOCAB + 3)
    clip.save_pretrained(tmp_path)
    table = "text_tower.trunk.embeddings.token_embedding.weight"
    before = model.state_dict()[table].clone()
    loaded = load_pretrained(model, str(tmp_path))
    assert loaded.fitted == (table,)
    assert model.state_dict()[table][VOCAB:].equal(before[VOCAB:])
    _assert_same(model, _image_of(clip), _text_of(clip))


def test_a_projection_into_another_space_is_left_out(tmp_path):
    _clip().save_pretrained(tmp_path)
    model = _model("vit_b16_clip_quickgelu", embed_dim=D + 8)
    loaded = load_pretrained(model, str(tmp_path))
    spare = {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    assert set(loaded.skipped) == spare
    assert set(loaded.new) == {"image_projection.weight", *(spare - {"visual_projection.weight"})}
    assert len(loaded.notes) == 2


# The presets in full, without memory


def _published(monkeypatch, tensors, **config):
    """Let the reader find shapes, so that no weights are written."""
    weights = Weights("--pretrained x", tensors, **config)
    monkeypatch.setattr(load, "read", lambda *_: weights)


def _full_model(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        return ImageTextModel(preset, preset.vocab_size, {})


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
@pytest.mark.parametrize("quick", [False, True])
def test_clips_published_shape_is_the_presets(monkeypatch, kind, quick):
    with torch.device("meta"):
        if kind == "transformers":
            activation = {"hidden_act": "quick_gelu" if quick else "gelu"}
            config = transformers.CLIPConfig(
                text_config=activation, vision_config={"patch_size": 16, **activation}
            )
            source, config = transformers.CLIPModel(config), {"config": config.to_dict()}
        else:
            name = f"ViT-B-16{'-quickgelu' * quick}"
            source = open_clip.CLIP(**open_clip.get_model_config(name))
            config = {"open_clip": open_clip.get_model_config(name)}
    _published(monkeypatch, source.state_dict(), **config)
    model = _full_model(f"vit_b16_clip{'_quickgelu' * quick}")
    loaded = load_pretrained(model, "x")
    assert set(loaded.loaded) == set(model.state_dict())
    assert (loaded.fitted, loaded.new, loaded.skipped) == ((), (), ())
    _same_epsilons(model.image_tower.trunk, getattr(source, "vision_model", None))
    _same_epsilons(model.text_tower.trunk, getattr(source, "text_model", None))


def test_bert_bases_published_shape_is_the_presets(monkeypatch):
    config = transformers.BertConfig()
    with torch.device("meta"):
        source = transformers.BertForPreTraining(config)
    _published(monkeypatch, source.state_dict(), config=config.to_dict())
    model = _full_model("vit_b16_bert")
    loaded = load_pretrained(model, "x", "text")
    positions = "text_tower.trunk.embeddings.position_embeddings.weight"
    assert loaded.fitted == (positions,)  # 512 cut to 77
    assert loaded.new == ("text_projection.weight",)
    assert all(name.startswith(("bert.pooler.", "cls.")) for name in loaded.skipped)
    _same_epsilons(model.text_tower.trunk, source.bert)


def test_the_plain_vits_published_shape_is_the_presets(monkeypatch):
    with torch.device("meta"):
        source = timm.create_model("vit_base_patch16_224")
    config = {"architecture": "vit_base_patch16_224"}
    _published(monkeypatch, source.state_dict(), config=config)
    for name in ("vit_b16", "vit_b16_bert"):
        model = _full_model(name)
        loaded = load_pretrained(model, "x", "image")
        assert set(loaded.loaded) == _names(model, "image_tower")
        assert set(loaded.skipped) == {"head.weight", "head.bias"}


def test_biomedclips_published_shape_is_the_presets(monkeypatch):
    """As open_clip_config.json of microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224."""
    with torch.device("meta"):
        image = timm.create_model("vit_base_patch16_224", num_classes=0)
        bert = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    tensors = {f"visual.trunk.{name}": value for name, value in image.state_dict().items()}
    tensors |= {f"text.transformer.{name}": value for name, value in bert.state_dict().items()}
    for name, shape in (
        ("visual.head.proj.weight", (512, 768)),
        ("text.proj.0.weight", (640, 768)),
        ("text.proj.2.weight", (512, 640)),
        ("logit_scale", ()),
    ):
        tensors[name] = torch.zeros(shape, device="meta")
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    text = {"hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}
    config = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": text}
    _published(monkeypatch, tensors, open_clip=config)
    loaded = load_pretrained(_full_model("vit_b16_bert"), "x")
    assert set(loaded.new) == {"text_projection.weight", "logit_scale"}
    assert set(loaded.skipped) == {"text.proj.0.weight", "text.proj.2.weight", "logit_scale"}


def _same_epsilons(trunk, source):
    def epsilons(module):
        return {m.eps for m in module.modules() if isinstance(m, torch.nn.LayerNorm)}

    if source is not None:
        assert epsilons(trunk) == epsilons(source)


# What is said, and the tokenizer


def test_many_names_are_told_in_few_words(tmp_path):
    _clip().save_pretrained(tmp_path)
    loaded = load_pretrained(_model("vit_b16_clip_quickgelu", local=True), str(tmp_path))
    text = str(loaded)
    assert f"transformers CLIP weights of {tmp_path}" in text
    assert "image_tower.trunk.blocks.* (24)" in text
    assert "patch_projection.weight, token_projection.weight" in text
    assert max(map(len, text.splitlines())) < 600


def test_the_tokenizer_of_text_weights_is_the_one_beside_them(tmp_path):
    source = _bert()
    source.save_pretrained(tmp_path)
    assert pretrained_tokenizer(str(tmp_path)) is None
    # As older medical BERTs were published: no tokenizer.json.
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        assert pretrained_tokenizer(str(place)) == tmp_path
    ids = Tokenizer.load(tmp_path, 12)(["lung"]).ids
    assert ids.tolist() == [[2, 5, 3]]
