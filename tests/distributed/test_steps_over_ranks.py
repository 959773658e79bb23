"""A step over several processes: the losses and gradients of one process with all pairs."""

import dataclasses
import itertools

import pytest
import torch
from launch import run
from test_step import TINY, VIT
from torch import nn

from medfast.data import read_split
from medfast.data.loader import Loader
from medfast.data.tokens import Tokenizer
from medfast.distributed import Ring
from medfast.distributed.batch_norm import synchronize_batch_norm
from medfast.methods import METHODS, method_class
from medfast.models.pair import build_model
from medfast.step import Step

# Equal batches, and such as damaged samples leave; a rank may have a single pair.
SIZES = [(13, 11), (9, 14, 1), (6, 6, 6, 6)]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process is to take a step of."""

    method: str
    impl: str
    preset: str
    parts: int = 1
    group_positives: bool = False


def cases(sizes):
    """Return what is tried of these sizes: of two processes all, of more what differs there."""
    found = [Case(key, "auto", "tiny") for key in METHODS]
    if len(sizes) == 2:
        found += [Case(key, "reference", "tiny") for key in METHODS]
        # Batch norm in a tower would see parts; the heads see the whole batch.
        found += [Case(key, "auto", "vit", parts=2) for key in METHODS]
        found += [Case(key, "auto", "vit", group_positives=True) for key in ("declip", "local")]
    return found


def make_step(case, tokenizer, ring=None):
    torch.manual_seed(0)
    method = method_class(case.method)(case.impl, case.group_positives)
    # The first has batch norm in its image tower.
    preset = {"tiny": TINY, "vit": VIT}[case.preset]
    model = build_model(preset, tokenizer, method.needs_tokens)
    method.add_heads(model, preset.head_width)
    if case.method == "declip":
        method.bank.push(nn.functional.normalize(torch.randn(7, preset.embed_dim), dim=-1))
    method.ring = ring
    if ring is not None:
        for module in (model, method):
            synchronize_batch_norm(module, ring)
    return Step(model.train(), method.train(), torch.device("cpu"), "fp32")


def make_batch(phantom, tokenizer, case, pairs):
    records = read_split("roco", phantom, "train").records[:pairs]
    extra = method_class(case.method).extra
    (batch,) = Loader(records, tokenizer, 32, pairs, crop=0.8, extra=extra).epoch(0)
    return dataclasses.replace(batch, group=batch.index % 5)


def rows_of(part, rows):
    """Return a batch, or a part of one, of some of its pairs."""
    if isinstance(part, torch.Tensor):
        return part[rows]
    if isinstance(part, tuple):
        return tuple(rows_of(item, rows) for item in part)
    if dataclasses.is_dataclass(part):
        items = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return dataclasses.replace(part, **{k: rows_of(v, rows) for k, v in items.items()})
    return part


def outcome(step, batches):
    """Return losses, gradients and buffers of a step, by name."""
    losses = step.backward(batches)
    found = {f"loss {name}": value for name, value in losses.items()}
    for module in (step.model, step.method):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad
        found |= {f"buffer {name}": x for name, x in module.named_buffers()}
    return {name: value.detach().clone().numpy() for name, value in found.items()}


def _steps(rank, sizes, phantom, folder):
    tokenizer, ring = Tokenizer.load(folder, 48), Ring()
    start = sum(sizes[:rank])
    found = {}
    for case in cases(sizes):
        batch = make_batch(phantom, tokenizer, case, sum(sizes))
        own = range(start, start + sizes[rank])
        ends = [own.start + len(own) * part // case.parts for part in range(case.parts + 1)]
        batches = [rows_of(batch, slice(*span)) for span in itertools.pairwise(ends)]
        found[case] = outcome(make_step(case, tokenizer, ring), batches)
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_step_is_that_of_one_process_with_all_pairs(tmp_path, phantom, tokenizer, sizes):
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    first, *others = run(len(sizes), _steps, tmp_path, sizes, phantom, folder)
    for case in cases(sizes):
        batch = make_batch(phantom, tokenizer, case, sum(sizes))
        expected = outcome(make_step(case, tokenizer), [batch])
        assert first[case].keys() == expected.keys()
        scale = max(abs(x).max() for name, x in expected.items() if "gradient" in name)
        for name, want in expected.items():
            got, want = torch.from_numpy(first[case][name]), torch.from_numpy(want)
            error, size = (got - want).double().norm(), want.double().norm()
            # Where a gradient is all rounding, as that of a bias before a norm, so is its error.
            assert error <= 5e-5 * size + 1e-6 * scale * want.numel() ** 0.5, f"{case}: {name}"
            for other in others:
                assert (other[case][name] == first[case][name]).all(), f"{case}: {name}"


def _unsound(rank, phantom, folder):
    """Return what a step says of ranks, as first none, then rank 1, then all are not finite."""
    tokenizer, ring = Tokenizer.load(folder, 48), Ring()
    case = Case("clip", "auto", "vit")
    step, batch = make_step(case, tokenizer, ring), make_batch(phantom, tokenizer, case, 4)
    found = []
    for ranks in ((), (1,), (0, 1)):
        if rank in ranks:
            step.model.image_projection.weight.data.fill_(torch.nan)
        step.backward([batch])
        found.append(step.unsound.tolist())
    return found


def test_the_rank_is_known_that_was_first_not_finite(tmp_path, phantom, tokenizer):
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    first = [[False, False], [False, True], [False, True]]
    assert run(2, _unsound, tmp_path, phantom, folder) == [first, first]


def _beside_open_clip(rank, phantom, folder):
    from open_clip import ClipLoss
    from torch.nn.parallel import DistributedDataParallel

    tokenizer, ring = Tokenizer.load(folder, 48), Ring(comm="ring")
    case = Case("clip", "auto", "vit")
    batch = rows_of(make_batch(phantom, tokenizer, case, 24), slice(12 * rank, 12 * rank + 12))
    ours = outcome(make_step(case, tokenizer, ring), [batch])
    model = make_step(case, tokenizer).model
    parallel = DistributedDataParallel(model)
    features = parallel(batch.images, batch.ids, batch.mask)
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=2)
    loss(features.image, features.text, features.logit_scale).backward()
    theirs = {f"gradient of {name}": p.grad.numpy() for name, p in model.named_parameters()}
    return ours, theirs


def test_a_step_is_that_of_open_clips_loss_under_ddp(tmp_path, phantom, tokenizer):
    pytest.importorskip("open_clip")
    folder = tmp_path / "tokenizer"
    tokenizer.save(folder)
    for ours, theirs in run(2, _beside_open_clip, tmp_path, phantom, folder):
        assert {name for name in ours if "gradient" in name} == theirs.keys()
        for name, want in theirs.items():
            got, want = torch.from_numpy(ours[name]), torch.from_numpy(want)
            assert (got - want).norm() <= 2e-5 * want.norm() + 1e-7, name
