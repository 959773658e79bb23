"""csrc's CUDA kernels of clip_loss on a CPU: their own source, with a stand-in for instructions."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compiled(source):
    """Return the library of one file of tests/csrc."""
    return _compiled(str(source))


@functools.cache
def _compiled(source):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = Path(tempfile.mkdtemp(prefix="medfast-"))
    target = folder / "kernels.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-shared", "-fPIC"]
    # The stand-in goes before what it stands for.
    command += [f"-I{ROOT / 'tests' / 'csrc'}", f"-I{ROOT / 'csrc'}"]
    command += [str(ROOT / "tests" / "csrc" / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return library


def _structure(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": [(f, ctypes.c_int64) for f in fields]})


class Emulated:
    """Has what the module medfast._CUDA has for clip_loss; the stream goes unused.

    Args:
        by_groups: As on sm_90, else as on all others.
        is_lazy: Whether work that may be done at any time is done late, else early.
        seed: Of the order in which threads run.
    """

    ClipLossFeatures = _structure(
        "ClipLossFeatures", "rows", "columns", "dtype", "scale", "M", "N", "D", "offset"
    )
    ClipLossSpan = _structure(
        "ClipLossSpan", "row_start", "row_stop", "column_start", "column_stop", "parts"
    )
    ClipLossUpstream = _structure(
        "ClipLossUpstream", "row_lse", "column_lse", "d_own", "d_rows", "d_columns"
    )

    def __init__(self, by_groups, is_lazy=True, seed=0):
        self._library = compiled("clip_loss.cpp")
        self._by_groups = by_groups
        self._library.choose(is_lazy, seed)

    def clip_loss_blocks_at_a_time(self):
        return 1 if self._by_groups else 2

    def clip_loss_sums(self, features, span, row_partials, row_stride, column_partials, stream):
        self._call(
            "clip_loss_sums",
            ctypes.c_bool(self._by_groups),
            *(features, span, row_partials, row_stride, column_partials),
        )

    def clip_loss_ends(self, features, span, *addresses):
        self._call("clip_loss_ends", features, span, *addresses[:-1])

    def clip_loss_online(self, features, *addresses):
        self._call("clip_loss_online", features, *addresses[:-1])

    def clip_loss_range(self, features, upstream, boost, normalisers, stream):
        self._call("clip_loss_range", features, upstream, ctypes.c_float(boost), normalisers)

    def clip_loss_gradient(self, features, span, upstream, *addresses):
        self._call(
            "clip_loss_gradient",
            ctypes.c_bool(self._by_groups),
            *(features, span, upstream, *addresses[:-1]),
        )

    def _call(self, name, *arguments):
        function = getattr(self._library, name)
        function.restype = ctypes.c_char_p
        given = (
            ctypes.byref(a)
            if isinstance(a, ctypes.Structure)
            else ctypes.c_int64(a)
            if isinstance(a, int)
            else a
            for a in arguments
        )
        failed = function(*given)
        assert failed is None, failed.decode()
