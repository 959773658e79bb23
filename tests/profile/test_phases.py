"""What a step is at: known times come back phase by phase, and nothing is lost between."""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from medfast.config import TrainConfig
from medfast.data.loader import Batch
from medfast.device import forget_peak_memory
from medfast.methods.base import Method
from medfast.models.pair import Features
from medfast.profile import phases as p
from medfast.trainer import Trainer

# Of each phase in a step; no sum of some is that of others. The loss calls and awaits an exchange.
TICKS = {
    p.DATA: 1,
    p.IMAGE_FORWARD: 20,
    p.IMAGE_BACKWARD: 300,
    p.TEXT_FORWARD: 4_000,
    p.TEXT_BACKWARD: 50_000,
    p.LOSS_FORWARD: 600_000,
    p.LOSS_BACKWARD: 7_000_000,
    p.COMMUNICATION: 80_000_000,
    p.OPTIMISER: 900_000_000,
    p.OTHER: 1_000_000_000,
}


class Clock:
    """Time that passes only where a step says so; or, by `unit` seconds a tick, real time."""

    def __init__(self, unit=0.0):
        self.now, self.unit = 0, unit

    def pass_by(self, ticks):
        self.now += ticks
        time.sleep(self.unit * ticks)

    def read(self, phase):
        return self.now

    def total(self, spans):
        return sum(end - begin for begin, end in spans)


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, there, back):
        ctx.clock, ctx.back = clock, back
        # Where activations are not kept, asking for it computes them again.
        ctx.save_for_backward(x)
        clock.pass_by(there)
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        assert ctx.saved_tensors
        ctx.clock.pass_by(ctx.back)
        return d_x, None, None, None


class _Tower(nn.Module):
    def __init__(self, clock, there, back, is_checkpointed=False):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.arguments = clock, there, back
        self.is_checkpointed = is_checkpointed

    def forward(self, x):
        if self.is_checkpointed:
            return checkpoint(self.run, x, use_reentrant=False)
        return self.run(x)

    def run(self, x):
        pooled = _Slow.apply(self.layer(x), *self.arguments)
        return pooled, pooled.unsqueeze(1)


class _Model(nn.Module):
    def __init__(self, clock, ticks, **towers):
        super().__init__()
        image, text = (
            (ticks[a], ticks[b])
            for a, b in ((p.IMAGE_FORWARD, p.IMAGE_BACKWARD), (p.TEXT_FORWARD, p.TEXT_BACKWARD))
        )
        self.image_tower = _Tower(clock, *image, **towers)
        self.text_tower = _Tower(clock, *text, **towers)
        self.image_projection, self.text_projection = nn.Linear(3, 3), nn.Linear(3, 3)
        self.patch_projection = self.token_projection = None
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def forward(self, images, ids, mask):
        image, _ = self.image_tower(images.flatten(1).float())
        text, _ = self.text_tower(ids.float())
        features = self.image_projection(image), self.text_projection(text)
        return Features(*features, None, None, self.logit_scale.exp())

    def clamp_logit_scale(self):
        pass


class _SlowMethod(Method):
    terms: ClassVar[dict[str, float]] = {"slow": 1.0}
    ops: ClassVar[tuple[str, ...]] = ()

    def __init__(self, clock, ticks):
        super().__init__()
        self.clock, self.ticks = clock, ticks
        self.head = _Tower(clock, 0, 0)

    def heads(self, features):
        return features.with_parts({**features.parts(), "image": self.head(features.image)[0]})

    def forward(self, features, batch):
        dist.all_reduce(features.image.detach(), async_op=True).wait()
        loss = (features.image * features.text).sum()
        there, back = self.ticks[p.LOSS_FORWARD], self.ticks[p.LOSS_BACKWARD]
        return {"slow": _Slow.apply(loss, self.clock, there, back)}


@dataclass(frozen=True)
class _SlowBatch(Batch):
    """A batch that takes its time to move, which belongs to nothing else."""

    pass_by: Callable[[], None] = lambda: None

    def to(self, device):
        self.pass_by()
        return self


class _Loader:
    def __init__(self, clock, ticks):
        self.clock, self.ticks = clock, ticks

    def __len__(self):
        return 100

    def epoch(self, epoch, start):
        for _ in range(100):
            self.clock.pass_by(self.ticks[p.DATA])
            ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
            number = torch.arange(2)
            images = torch.ones(2, 3, 1, 1, dtype=torch.uint8)
            to_move = partial(self.clock.pass_by, self.ticks[p.OTHER])
            yield _SlowBatch(images, ids, mask, mask, number, number, pass_by=to_move)


class _Exchange:
    """An all-reduce that takes half of its time when called and half when awaited."""

    def __init__(self, clock, ticks):
        self.pass_by = lambda: clock.pass_by(ticks // 2)

    def __call__(self, values, async_op=False):
        self.pass_by()
        return self

    def wait(self):
        self.pass_by()


@pytest.fixture
def taken(monkeypatch):
    """Take steps whose phases have known lengths; return what a meter says of them."""

    def take(clock, ticks, meter, lock=(), steps=2, towers=None, **settings):
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        exchange = _Exchange(clock, ticks[p.COMMUNICATION])
        monkeypatch.setattr(dist, "all_reduce", exchange)
        model, method = _Model(clock, ticks, **(towers or {})), _SlowMethod(clock, ticks)
        for name in lock:
            getattr(model, name).requires_grad_(False)
        trainer = Trainer(
            config=TrainConfig(precision="fp32", **settings),
            model=model,
            method=method,
            loader=_Loader(clock, ticks),
            run=None,
            skipped=None,
            device=torch.device("cpu"),
            validate=dict,
        )
        trainer.optimizer.register_step_pre_hook(lambda *_: clock.pass_by(ticks[p.OPTIMISER]))
        found, batches = p.Phases(meter), trainer.steps()
        backward = trainer.one_step.backward
        with p.watched(trainer.one_step, found):
            for _ in range(steps):
                found.step()
                work = next(batches)
                found.switch(p.OTHER)
                trainer.train_step(work.batches)
            found.stop()
        assert trainer.one_step.backward == backward
        assert dist.all_reduce is exchange
        hooked = [m for m in (*model.modules(), *method.modules()) if m._forward_hooks]
        assert hooked == []
        return found.totals()

    return take


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_the_split_is_exact_and_adds_up(taken, is_checkpointed):
    clock = Clock()
    found = taken(clock, TICKS, clock, towers={"is_checkpointed": is_checkpointed})
    # What is computed again belongs to the backward.
    again = TICKS | {
        p.IMAGE_BACKWARD: TICKS[p.IMAGE_BACKWARD] + TICKS[p.IMAGE_FORWARD] * is_checkpointed,
        p.TEXT_BACKWARD: TICKS[p.TEXT_BACKWARD] + TICKS[p.TEXT_FORWARD] * is_checkpointed,
    }
    assert found == [again, again]
    assert sum(sum(step.values()) for step in found) == clock.now


def test_with_cached_features_the_towers_pass_twice_and_wait_for_every_part(taken):
    clock = Clock()
    (found,) = taken(clock, TICKS, clock, steps=1, accum_freq=3)
    twice = dict.fromkeys([p.IMAGE_FORWARD, p.TEXT_FORWARD, p.OTHER], 6)
    often = twice | dict.fromkeys([p.DATA, p.IMAGE_BACKWARD, p.TEXT_BACKWARD], 3)
    assert found == {phase: ticks * often.get(phase, 1) for phase, ticks in TICKS.items()}


@pytest.mark.parametrize(
    ("lock", "without"),
    [
        (["image_tower"], [p.IMAGE_BACKWARD]),
        (["image_tower", "text_tower"], [p.IMAGE_BACKWARD, p.TEXT_BACKWARD]),
        (
            ["image_tower", "text_tower", "image_projection", "text_projection"],
            [p.IMAGE_BACKWARD, p.TEXT_BACKWARD],
        ),
    ],
)
def test_what_is_locked_has_no_backward(taken, lock, without):
    clock = Clock()
    (found,) = taken(clock, TICKS, clock, steps=1, lock=lock)
    assert found == TICKS | dict.fromkeys(without, 0)


def test_known_sleeps_come_back_and_little_else(taken):
    # 2 to 10 ms each.
    ticks = {phase: 2 * (number + 1) for number, phase in enumerate(p.PHASES)} | {p.OTHER: 0}
    begin = time.perf_counter()
    found = taken(Clock(unit=1e-3), ticks, p.Stopwatch(), steps=3)
    elapsed = time.perf_counter() - begin
    for step in found:
        for phase, ms in ticks.items():
            assert step[phase] >= 1e-3 * ms, phase
    assert min(step[p.OTHER] for step in found) < 0.02
    total = sum(sum(step.values()) for step in found)
    assert 3e-3 * sum(ticks.values()) <= total <= elapsed


def test_the_peak_of_a_phase_is_its_own():
    device = torch.device("cpu")
    before = forget_peak_memory(device)
    found = p.Phases(p.PeakMemory(device))
    found.step()
    with found.within(p.IMAGE_FORWARD):
        # Not from malloc, which may have memory left of earlier tests.
        torch.frombuffer(mmap.mmap(-1, 50_000_000), dtype=torch.uint8).fill_(1)
    found.switch(p.OPTIMISER)
    found.stop()
    (peaks,) = found.totals()
    assert peaks[p.IMAGE_FORWARD] >= before + 45e6
    assert peaks[p.OPTIMISER] < peaks[p.IMAGE_FORWARD] - 40e6
    assert peaks[p.TEXT_FORWARD] == 0


def test_outside_of_steps_nothing_is_measured():
    clock = Clock()
    found = p.Phases(clock)
    with found.within(p.IMAGE_FORWARD):
        clock.pass_by(1)
    found.step()
    found.stop()
    found.switch(p.DATA)
    assert found.totals() == [dict.fromkeys(p.PHASES, 0)]
