import pytest
import torch

from medfast.ops import tiles


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 1000, 4097])
@pytest.mark.parametrize("most", [1, 64, 1024])
def test_blocks_cover_all_in_order_and_are_about_equal(length, most):
    found = list(tiles.blocks(length, most))
    assert [i for b in found for i in range(b.start, b.stop)] == list(range(length))
    sizes = [b.stop - b.start for b in found]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shape", [(3, 4), (100, 100), (1, 1)])
@pytest.mark.parametrize("offset", [0, 3, -5, 100])
def test_tiles_are_the_logits_and_know_their_own_entries(monkeypatch, shape, offset):
    monkeypatch.setattr(tiles, "tile_shape", lambda x, y: shape)
    torch.manual_seed(0)
    rows, columns = torch.randn(10, 4), torch.randn(13, 4)
    found = torch.full((10, 13), torch.nan)
    own = torch.full((10,), torch.nan)
    for tile in tiles.tiles(rows, columns, 2.0):
        found[tile.rows, tile.columns] = tile.logits
        own[tile.own_rows(offset)] = tile.own(tile.logits, offset)
    want = 2 * rows @ columns.T
    torch.testing.assert_close(found, want)
    has_own = (torch.arange(10) + offset >= 0) & (torch.arange(10) + offset < 13)
    torch.testing.assert_close(own[has_own], want.diagonal(offset))
    assert own[~has_own].isnan().all()


@pytest.mark.parametrize("megabytes", ["0.0001", "1", "64"])
@pytest.mark.parametrize("count", [1, 1000, 100_000])
def test_tiles_fit_the_workspace(monkeypatch, megabytes, count):
    monkeypatch.setenv("MEDFAST_WORKSPACE_MB", megabytes)
    features = torch.empty(count, 1)
    height, width = tiles.tile_shape(features, features)
    assert height >= 1
    assert width >= 1
    assert 2 * height * width * 4 <= max(8, float(megabytes) * 2**20)
