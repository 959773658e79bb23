import pytest
import torch
import torch.nn.functional as F

from medfast.methods.bank import FeatureBank
from medfast.ops import matmul
from medfast.ops.dispatch import why_not

D = 3


def _rows(start, count):
    """Return features that say which they are."""
    return torch.arange(start, start + count).float()[:, None].expand(count, D)


def _held(bank):
    """Return the numbers of the features that a bank holds."""
    return sorted(bank.features[: bank.pushed, 0].int().tolist())


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize(
    "counts", [[1] * 13, [2] * 7, [3, 3, 3], [5, 5], [4, 5, 6], [7, 1], [12], [1, 23, 2], [0, 3]]
)
def test_the_newest_are_kept_first_in_first_out(size, counts):
    bank, pushed = FeatureBank(size, D), 0
    for count in counts:
        bank.push(_rows(pushed + 1, count))
        pushed += count
        assert bank.pushed == pushed
        assert _held(bank) == list(range(max(0, pushed - size) + 1, pushed + 1))


def test_an_entry_stays_in_its_place_until_the_oldest_is_due():
    bank = FeatureBank(5, D)
    bank.push(_rows(1, 4))
    bank.push(_rows(5, 3))
    assert bank.features[:, 0].tolist() == [6, 7, 3, 4, 5]


def test_an_empty_bank_gives_the_query_back():
    query = F.normalize(torch.randn(4, D), dim=1)
    assert torch.equal(FeatureBank(5, D).nearest(query), query)


def test_places_that_are_still_free_are_not_found():
    """Their zeros are nearer to a query than what points away from it."""
    bank, query = FeatureBank(5, D), F.normalize(torch.randn(4, D), dim=1)
    bank.push(-query[:1])
    assert torch.equal(bank.nearest(query), -query[:1].expand(4, D))


@pytest.mark.parametrize("megabytes", ["256", "0.0001", "0.00001"])
@pytest.mark.parametrize("pushed", [1, 30, 41, 100])
def test_the_nearest_is_that_of_all_similarities(monkeypatch, megabytes, pushed):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", megabytes)
    generator = torch.Generator().manual_seed(0)
    features, query = (
        F.normalize(torch.randn(count, 8, generator=generator), dim=1) for count in (pushed, 17)
    )
    bank = FeatureBank(41, 8)
    for part in features.split(7):
        bank.push(part)
    newest = features[-41:]
    want = newest[(query @ newest.T).argmax(1)]
    assert torch.equal(bank.nearest(query), want)


def test_the_search_stays_within_the_workspace(monkeypatch):
    """All similarities would be 16 MB at once."""
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", "1")
    bank = FeatureBank(4000, D)
    bank.push(torch.randn(4000, D))
    found, multiply = [], matmul.matmul_into

    def watched(out, *args, **kwargs):
        found.append(out.numel() * out.itemsize)
        return multiply(out, *args, **kwargs)

    monkeypatch.setattr("medfast.ops.tiles.matmul_into", watched)
    bank.nearest(torch.randn(1000, D))
    assert len(found) > 16
    assert max(found) <= 2**20 / 2


def test_neither_search_nor_push_is_trained_through():
    bank = FeatureBank(5, D)
    features = torch.randn(5, D, requires_grad=True)
    bank.push(features)
    assert not bank.features.requires_grad
    assert not bank.nearest(features).requires_grad


def test_a_checkpoint_goes_on_where_the_bank_was():
    first, second = FeatureBank(5, D), FeatureBank(5, D)
    first.push(_rows(1, 7))
    second.load_state_dict(first.state_dict())
    for bank in (first, second):
        bank.push(_rows(8, 2))
    assert torch.equal(first.features, second.features)
    assert _held(second) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("in_hardware", [False, True])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
def test_a_bank_in_bf16_gives_features_of_the_querys_dtype(monkeypatch, query_dtype, in_hardware):
    if in_hardware and why_not("clip_loss", "cpu") is not None:
        pytest.skip(why_not("clip_loss", "cpu"))
    monkeypatch.setattr(matmul, "multiplies_bf16", lambda: in_hardware)
    bank = FeatureBank(5, D).to(torch.bfloat16)
    assert bank.pushed.dtype == torch.int64
    entries = torch.eye(D)
    bank.push(entries)
    found = bank.nearest((entries.flip(0) + 0.1).to(query_dtype))
    assert found.dtype == query_dtype
    assert torch.equal(found.float(), entries.flip(0))


def test_a_bank_in_bf16_counts_beyond_what_bf16_holds():
    bank = FeatureBank(1000, D).to(torch.bfloat16)
    for _ in range(3):
        bank.push(torch.ones(333, D))
    assert bank.pushed == 999
    assert bank.features[998].any()
    assert not bank.features[999].any()
