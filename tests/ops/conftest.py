import contextlib
from types import SimpleNamespace

import pytest
import torch

from medfast.ops import matmul
from medfast.ops.dispatch import why_not


@pytest.fixture
def largest_tensor():
    """A context that yields an object whose `bytes` is the size of the largest tensor made.

    A TorchDispatchMode would see what custom operators return, but not what they make inside.
    """

    @contextlib.contextmanager
    def watch():
        largest = SimpleNamespace(bytes=0)
        with torch.profiler.profile(profile_memory=True) as profile:
            yield largest
        largest.bytes = max(
            max(event.self_cpu_memory_usage, event.self_device_memory_usage)
            for event in profile.events()
        )

    return watch


@pytest.fixture
def uninitialised_is_nan():
    """Memory that is not written shows: torch fills what it does not initialise with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def bf16_products(monkeypatch):
    """bf16 is multiplied as such, as where it is fast; csrc's products can be had on any CPU."""
    reason = why_not("clip_loss", "cpu")
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(matmul, "multiplies_bf16", lambda: True)
