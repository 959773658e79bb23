"""The kernel that merges vectors of ranks: its threads on a CPU one after the other, and on a GPU.

One GPU stands for all: W vectors of its memory.
"""

import ctypes

import pytest
import torch
from cuda_emulator import compiled

from medfast.distributed import symmetric

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
# More than a batch of sources; one entry; no whole piece of four.
WORLDS, LENGTHS = (1, 2, 8, 13), (1, 3, 4, 1027)


def _addresses(vectors):
    return [vector.data_ptr() for vector in vectors]


def _merge(device, sources, targets, length, is_log_sum_exp):
    """Merge the vectors at the addresses."""
    if device == "cuda":
        kernels = pytest.importorskip("medfast._CUDA", reason="the CUDA kernels are not built")
        stream = torch.cuda.current_stream().cuda_stream
        kernels.rank_merge(sources, targets, length, is_log_sum_exp, stream)
        return
    compiled("rank_merge.cpp").rank_merge(
        *((ctypes.c_size_t * len(sources))(*sources), len(sources)),
        *((ctypes.c_size_t * len(targets))(*targets), len(targets)),
        *(ctypes.c_int64(length), ctypes.c_bool(is_log_sum_exp)),
    )


def _parts(world, length, is_log_sum_exp):
    """Return what each rank has; of the exponentials, some or all have nothing in some places."""
    generator = torch.Generator().manual_seed(length)
    parts = 40 * torch.randn(world, length, generator=generator)
    if is_log_sum_exp:
        parts[0, ::3] = -torch.inf
        parts[:, 1::7] = -torch.inf
    return parts


def _whole(parts, is_log_sum_exp):
    return parts.double().logsumexp(0) if is_log_sum_exp else parts.double().sum(0)


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("is_log_sum_exp", [True, False])
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("world", WORLDS)
def test_vectors_become_one_in_every_target(world, length, first, is_log_sum_exp, device):
    """At 1 they are not aligned to 16 bytes. What lies around them stays."""
    parts = _parts(world, length, is_log_sum_exp).to(device)
    memory = torch.full((world, first + length + 12 - length % 4), torch.nan, device=device)
    memory[:, first : first + length] = parts
    results = torch.full((3, memory.shape[1]), 7.0, device=device)
    sources, targets = (_addresses(x[:, first:]) for x in (memory, results))
    _merge(device, sources, targets, length, is_log_sum_exp)
    assert (results[:, :first] == 7).all()
    assert (results[:, first + length :] == 7).all()
    found = results[:, first : first + length].clone()
    want = _whole(parts, is_log_sum_exp).expand(3, -1)
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=4e-5)
    results.fill_(7)
    _merge(device, sources, targets, length, is_log_sum_exp)
    assert torch.equal(results[:, first : first + length], found)


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_one_part_is_kept_to_the_bit(device):
    parts = _parts(3, 64, True).to(device)
    parts[1:] = -torch.inf
    found = torch.empty(64, device=device)
    _merge(device, _addresses(parts), [found.data_ptr()], 64, True)
    assert torch.equal(found, parts[0])


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_sums_are_added_in_the_order_of_the_sources(device):
    parts = torch.tensor([[1e8], [1.0], [-1e8], [1.0]], device=device)
    found = torch.empty(1, device=device)
    _merge(device, _addresses(parts), [found.data_ptr()], 1, False)
    assert found.item() == 1
    other_order = parts[[0, 2, 1, 3]]
    _merge(device, _addresses(other_order), [found.data_ptr()], 1, False)
    assert found.item() == 2


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
def test_nan_of_any_rank_is_nan_and_infinity_stays(device):
    parts = torch.zeros(3, 5, device=device)
    parts[0, 0] = parts[1, 1] = parts[2, 2] = torch.nan
    parts[0, 3] = parts[1, 3] = parts[2, 4] = torch.inf
    found = torch.empty(5, device=device)
    _merge(device, _addresses(parts), [found.data_ptr()], 5, True)
    assert found.isnan().tolist() == [True] * 3 + [False] * 2
    assert found.isposinf().tolist() == [False] * 3 + [True] * 2


def test_the_arithmetic_in_fp64_is_the_definition():
    log_sum_exp = compiled("rank_merge.cpp").log_sum_exp
    log_sum_exp.restype = ctypes.c_double
    for parts in ([3.0], [-1e3, 2.0, 5.0, -torch.inf], [700.0, 700.0], [-torch.inf] * 2, []):
        found = log_sum_exp((ctypes.c_double * len(parts))(*parts), len(parts))
        want = torch.tensor(parts, dtype=torch.float64).logsumexp(0).item()
        assert found == pytest.approx(want, rel=1e-15)


def test_the_launcher_knows_how_many_vectors_the_kernel_takes():
    assert compiled("rank_merge.cpp").most_ranks() == symmetric.MOST_RANKS


def test_more_vectors_than_it_takes_are_refused():
    kernels = pytest.importorskip("medfast._CUDA", reason="the CUDA kernels are not built")
    with pytest.raises(ValueError, match="more vectors than it takes"):
        kernels.rank_merge([0] * (symmetric.MOST_RANKS + 1), [0], 1, True, 0)
