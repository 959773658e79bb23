import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medfast.ops import matmul
from medfast.ops.dispatch import why_not


class _Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return result


@pytest.fixture
def largest_tensor():
    """A context that yields an object whose `bytes` is the size of the largest tensor made."""

    @contextlib.contextmanager
    def watch():
        with _Largest() as largest:
            yield largest

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
