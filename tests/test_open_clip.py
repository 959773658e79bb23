"""The drop-in promise: open_clip's code runs on, unchanged, with medfast's losses in its place."""

import inspect
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from torch.nn.utils import parameters_to_vector

import medfast

PAIRS = [(medfast.ClipLoss, open_clip.ClipLoss), (medfast.SigLipLoss, open_clip.loss.SigLipLoss)]


@pytest.mark.parametrize("method", ["__init__", "forward", "get_logits", "get_ground_truth"])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_signatures_are_open_clips(ours, theirs, method):
    def parameters(cls):
        found = inspect.signature(getattr(cls, method)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    want, got = parameters(theirs), parameters(ours)
    assert got[: len(want)] == want
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in got[len(want) :])


def test_older_versions_arguments_are_accepted():
    medfast.SigLipLoss(cache_labels=True, rank=0, world_size=1, bidir=False, use_horovod=False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_attributes_are_open_clips(ours, theirs):
    cache = {"prev_num_logits", "labels"}
    want = {k: v for k, v in vars(theirs()).items() if k[0] != "_" and k not in cache}
    assert want.items() <= vars(ours()).items()


def _inputs(dtype, shape=(), B=64, D=32):
    generator = torch.Generator().manual_seed(0)
    features = (F.normalize(torch.randn(B, D, generator=generator), dim=-1) for _ in range(2))
    image, text = (x.to(dtype).requires_grad_() for x in features)
    return {
        "image_features": image,
        "text_features": text,
        "logit_scale": torch.full(shape, 14.3, requires_grad=True),
        "logit_bias": torch.full(shape, -5.0, requires_grad=True),
    }


@pytest.mark.parametrize(
    ("dtype", "shape"),
    # A scale of one element promotes half features, which stops open_clip's product.
    [(torch.float32, ()), (torch.float32, (1,)), (torch.bfloat16, ()), (torch.float16, ())],
)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_values_and_gradients_are_open_clips(ours, theirs, dtype, shape):
    """To the rounding of a logit, which moves its exponential by as much as the logit is large."""
    inputs = _inputs(dtype, shape)
    found = []
    for loss in (theirs, ours):
        values = loss()(**inputs, output_dict=True)
        assert values.keys() == {"contrastive_loss"}
        value = values["contrastive_loss"]
        found.append([value.detach(), *torch.autograd.grad(value, list(inputs.values()))])
    tolerance = 14.3 * torch.finfo(dtype).eps
    for name, want, got in zip(["loss", *inputs], *found, strict=True):
        error = (got.float() - want.float()).norm()
        # A softmax does not change with a bias: what open_clip gets for it is rounding alone.
        size = 1 if name == "logit_bias" and ours is medfast.ClipLoss else want.float().norm()
        assert error <= tolerance * size, f"{name}: {error:.2e} of {size:.2e}"


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_logits_and_labels_are_open_clips(ours, theirs):
    inputs = _inputs(torch.float32)
    torch.testing.assert_close(ours().get_logits(**inputs), theirs().get_logits(**inputs))
    calls = [(64,)] if ours is medfast.ClipLoss else [(torch.float32, 64), (torch.half, 64, True)]
    for arguments in calls:
        got, want = (loss().get_ground_truth("cpu", *arguments) for loss in (ours, theirs))
        torch.testing.assert_close(got, want)


class _Pairs:
    """Batches of random images and texts, as open_clip's loaders give them."""

    num_batches, num_samples = 6, 6 * 16

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.num_batches):
            image = torch.randn(16, 3, 32, 32, generator=generator)
            yield image, torch.randint(1, 64, (16, 8), generator=generator)


def _train(siglip, precision, accum_freq):
    """Run open_clip's trainer for one epoch with the loss that open_clip makes.

    Returns:
        The loss of each step, and all parameters before and after, each as one vector.
    """
    args = SimpleNamespace(
        **{"model": "tiny", "siglip": siglip, "precision": precision, "accum_freq": accum_freq},
        **{"device": "cpu", "batch_size": 16, "grad_clip_norm": 1.0, "log_every_n_steps": 1},
        **{"rank": 0, "world_size": 1, "local_loss": False, "gather_with_grad": False},
        **{"horovod": False, "distill": False, "skip_scheduler": False, "wandb": False},
        loss_dist_impl=None,
    )
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
        text_cfg={"layers": 2, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 64},
        init_logit_bias=-5.0 if siglip else None,
        output_dict=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    before = parameters_to_vector(model.parameters()).detach().clone()
    losses = []
    train_one_epoch(
        model,
        {"train": SimpleNamespace(dataloader=_Pairs(), set_epoch=lambda epoch: None)},
        open_clip.create_loss(args),
        epoch=0,
        optimizer=optimizer,
        scaler=None,
        scheduler=cosine_lr(optimizer, 1e-3, 2, 6),
        dist_model=None,
        args=args,
        tb_writer=SimpleNamespace(
            add_scalar=lambda name, value, step: name == "train/loss" and losses.append(value)
        ),
    )
    return torch.tensor(losses), before, parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("accum_freq", [1, 2])
@pytest.mark.parametrize(
    ("precision", "loss_tolerance", "path_tolerance"),
    # AdamW divides by gradients that may be all rounding: the paths differ by more than the losses.
    [("fp32", 2e-6, 1e-4), ("amp_bf16", 2e-2, 1e-1)],
)
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_open_clips_trainer_trains_the_same(
    monkeypatch, ours, theirs, precision, loss_tolerance, path_tolerance, accum_freq
):
    arguments = (ours is medfast.SigLipLoss, precision, accum_freq)
    want_losses, before, want = _train(*arguments)
    used = []
    monkeypatch.setattr(
        open_clip.factory, theirs.__name__, lambda **k: used.append(ours(**k)) or used[0]
    )
    losses, start, found = _train(*arguments)
    assert len(used) == 1
    assert len(losses) == 6 // accum_freq
    assert torch.equal(start, before)
    torch.testing.assert_close(losses, want_losses, rtol=loss_tolerance, atol=0)
    assert (found - want).norm() <= path_tolerance * (want - before).norm()
