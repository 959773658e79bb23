"""What `pip install .` builds, with a compiler and without one."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _wheel(folder, **environment):
    """Build a wheel from a copy of the sources; return its unpacked folder and the build's log."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("medfast", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(folder), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked", done.stdout + done.stderr


def _implementation(folder):
    """Return what impl="auto" of an unpacked wheel runs."""
    code = (
        # An editable installation of medfast would hand in its own kernels.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import logging, torch; logging.basicConfig(level='INFO')\n"
        "import medfast; print(medfast.__file__)\n"
        "x = torch.eye(4); print(medfast.ClipLoss()(x, x, 1.0).item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    path, loss = done.stdout.split()
    assert Path(path).parent.parent == folder
    assert float(loss) == pytest.approx(0.7437, abs=1e-4)
    return done.stderr.partition("runs ")[2].split()[0].strip("'")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_wheel_holds_the_kernels_and_the_page_style(tmp_path):
    folder, _ = _wheel(tmp_path)
    assert list((folder / "medfast").glob("_C.*.so"))
    assert (folder / "medfast" / "report" / "style.css").exists()
    assert _implementation(folder) == "cpu"


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path):
    nothing = "/nonexistent/compiler"
    folder, log = _wheel(tmp_path, CC=nothing, CXX=nothing)
    assert not list((folder / "medfast").glob("_C.*.so"))
    assert log.count("medfast is installed without its C++ kernels") == 1
    assert _implementation(folder) == "torch"
