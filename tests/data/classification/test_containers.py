import io
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from medfast.data.classification.labelled import LabelledRecords
from medfast.data.containers import (
    Hdf5Images,
    ImageRow,
    NpzImages,
    ParquetImages,
    npz_array,
)
from medfast.data.decode import decode
from medfast.data.records import Record
from medfast.errors import UsageError

N = 150
GREY = np.random.default_rng(0).integers(0, 256, (N, 6, 5), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (N, 7, 4, 3), np.uint8)


def _npz(folder, pixels, save=np.savez_compressed):
    save(folder / "a.npz", images=pixels)
    return NpzImages(folder / "a.npz", "images")


def _hdf5(folder, pixels):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset("x", data=pixels, chunks=(1, *pixels.shape[1:]), compression="gzip")
    return Hdf5Images(folder / "a.h5", "x")


def _parquet(folder, pixels, row_group_size=37):
    encoded = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    table = pyarrow.table({"image": encoded})
    parquet.write_table(table, folder / "a.parquet", row_group_size=row_group_size)
    return ParquetImages(folder / "a.parquet")


MAKERS = [_npz, _hdf5, _parquet]


def _pixels(container, row):
    return np.asarray(decode(container.read(row)))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("pixels", [GREY, GREY[..., None], COLOUR])
def test_rows_come_back_bit_for_bit_in_any_order(tmp_path, make, pixels):
    container = make(tmp_path, pixels)
    assert len(container) == N
    grey = pixels.reshape(N, *pixels.shape[1:3], -1)
    order = [0, 1, 36, 37, 38, 149, 3, 149, 74, 0, *range(100, 140), 5]
    for row in order:
        expected = np.broadcast_to(grey[row], (*grey.shape[1:3], 3))
        assert np.array_equal(_pixels(container, row), expected), row


def test_an_uncompressed_archive_is_read_too(tmp_path):
    container = _npz(tmp_path, COLOUR, np.savez)
    assert np.array_equal(_pixels(container, 101), COLOUR[101])


@pytest.mark.parametrize("make", MAKERS)
def test_threads_and_processes_may_share_a_container(tmp_path, make):
    container = make(tmp_path, COLOUR)
    container.read(100)
    rows = [*range(N)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: _pixels(container, row), rows))
    assert np.array_equal(np.stack(found), COLOUR)
    assert np.array_equal(_pixels(pickle.loads(pickle.dumps(container)), 7), COLOUR[7])


def test_a_forked_process_opens_the_file_itself(tmp_path, monkeypatch):
    """With the parent's it would move the place at which the parent reads."""
    container = _npz(tmp_path, COLOUR)
    opened, real = [], container._open
    monkeypatch.setattr(container, "_open", lambda: opened.append(os.getpid()) or real())
    container.read(149)
    child = os.fork()
    if child == 0:
        right = np.array_equal(_pixels(container, 0), COLOUR[0])
        os._exit(0 if right and opened == [os.getppid(), os.getpid()] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(_pixels(container, 0), COLOUR[0])
    assert opened == [os.getpid()]


def test_in_order_an_archive_is_inflated_once(tmp_path, monkeypatch):
    container = _npz(tmp_path, COLOUR)
    opened = []
    real = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile,
        "read",
        lambda self, n=-1: opened.append(n) or real(self, n),
    )
    for row in range(N):
        container.read(row)
    # The header, and each block of rows.
    assert sum(n for n in opened if n > 0) < 1.1 * COLOUR.nbytes


def test_records_keep_rows_and_files_apart(tmp_path):
    Image.fromarray(COLOUR[3]).save(tmp_path / "a.png")
    container = _npz(tmp_path, COLOUR)
    records = LabelledRecords(
        [
            ImageRow("row", container.path, "x", origin="patient 1", container=container, row=9),
            Record("file", tmp_path / "a.png", "y"),
        ]
    )
    row, file = pickle.loads(pickle.dumps(records))
    assert np.array_equal(decode(row.read()), COLOUR[9])
    assert np.array_equal(decode(file.read()), COLOUR[3])
    assert row.place == f"{container.path}, row 9"
    assert (row.key, row.caption, row.origin) == ("row", "x", "patient 1")
    assert file.place == str(tmp_path / "a.png")
    assert [record.key for record in records[:2]] == ["row", "file"]
    assert np.array_equal(decode(records[-2].read()), COLOUR[9])


def test_damage_in_the_middle_spares_what_is_before(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 256, (320, 16, 16, 3), np.uint8)
    container = _npz(tmp_path, pixels)
    data = bytearray(container.path.read_bytes())
    # A block of type 3, which deflate does not have, somewhere in the second half.
    data[len(data) // 2 : len(data) // 2 + 4096] = b"\xff" * 4096
    container.path.write_bytes(data)
    container = NpzImages(container.path, "images")
    assert np.array_equal(_pixels(container, 0), pixels[0])
    with pytest.raises(OSError, match="row 319 cannot be read"):
        container.read(319)
    # Known by now, so that it is not inflated again.
    with pytest.raises(OSError, match="damaged before it"):
        container.read(319)
    assert np.array_equal(_pixels(container, 1), pixels[1])


def test_a_row_without_an_image_is_its_own_damage(tmp_path):
    table = pyarrow.table(
        {
            "image": pyarrow.array(
                [{"bytes": b"x"}, {"bytes": None}, None],
                pyarrow.struct([("bytes", pyarrow.binary())]),
            )
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    container = ParquetImages(tmp_path / "a.parquet")
    assert container.read(0) == b"x"
    for row in (1, 2):
        with pytest.raises(OSError, match="holds no image"):
            container.read(row)


@pytest.mark.parametrize("make", MAKERS)
def test_a_file_that_is_replaced_by_another_is_damage(tmp_path, make):
    container = make(tmp_path, GREY)
    for change in (lambda: container.path.write_bytes(b"other"), container.path.unlink):
        change()
        with pytest.raises(OSError, match="row 5 cannot be read"):
            container.read(5)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("pickles-were-run",)


def test_pickles_in_an_archive_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    objects = np.array([_Bomb()], object)
    np.savez(tmp_path / "a.npz", images=objects, labels=objects)
    for reader in (NpzImages, npz_array):
        with pytest.raises(UsageError, match="holds objects"):
            reader(tmp_path / "a.npz", "images")
    assert not (tmp_path / "pickles-were-run").exists()


def test_an_array_that_declares_more_than_it_holds_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 8, 8)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + b"few")
    for reader in (NpzImages, npz_array):
        with pytest.raises(UsageError, match=r"must hold \d+ bytes, and holds 3"):
            reader(tmp_path / "a.npz", "images")


@pytest.mark.parametrize(
    "pixels", [GREY.astype(np.float32), GREY[0], COLOUR[..., :2], np.asfortranarray(COLOUR)]
)
def test_what_is_no_array_of_images_is_refused(tmp_path, pixels):
    with pytest.raises(UsageError, match=r"a\.npz.*whole copy"):
        _npz(tmp_path, pixels)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x89HDF\r\n\x1a\n", b"PAR1"])
def test_a_file_that_is_damaged_is_named(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    for reader in (
        lambda: NpzImages(path, "x"),
        lambda: Hdf5Images(path, "x"),
        lambda: ParquetImages(path),
    ):
        with pytest.raises(UsageError, match=r"cannot be read .*; get a whole copy"):
            reader()


def test_a_missing_array_is_named_with_those_that_are_there(tmp_path):
    _npz(tmp_path, GREY)
    with pytest.raises(UsageError, match="has no array 'x'; its arrays are: images"):
        NpzImages(tmp_path / "a.npz", "x")
    _hdf5(tmp_path, GREY)
    with pytest.raises(UsageError, match="has no data set 'y'; it has: x"):
        Hdf5Images(tmp_path / "a.h5", "y")
    parquet.write_table(pyarrow.table({"label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"must have a column 'image'.*it has: label"):
        ParquetImages(tmp_path / "b.parquet")


@pytest.mark.parametrize("how", ["external link", "soft link", "external data", "virtual"])
def test_hdf5_that_has_its_data_elsewhere_is_refused(tmp_path, how):
    _hdf5(tmp_path, GREY)
    (tmp_path / "secret").write_bytes(GREY.tobytes())
    with h5py.File(tmp_path / "b.h5", "w") as file:
        if how == "external link":
            file["x"] = h5py.ExternalLink(tmp_path / "a.h5", "x")
        elif how == "soft link":
            file["x"] = h5py.SoftLink("/y")
        elif how == "external data":
            places = [(str(tmp_path / "secret"), 0, GREY.nbytes)]
            file.create_dataset("x", GREY.shape, np.uint8, external=places)
        else:
            layout = h5py.VirtualLayout(GREY.shape, np.uint8)
            layout[:] = h5py.VirtualSource(tmp_path / "a.h5", "x", GREY.shape)
            file.create_virtual_dataset("x", layout)
    with pytest.raises(UsageError, match=r"no data set 'x'|must lie in this file itself"):
        Hdf5Images(tmp_path / "b.h5", "x")
