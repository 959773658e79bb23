"""What `pip install .` builds, with a compiler and without one, with nvcc and without."""

import os
import re
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
    folder, _ = _wheel(tmp_path, MEDFAST_CUDA="0")
    assert list((folder / "medfast").glob("_C.*.so"))
    assert not list((folder / "medfast").glob("_CUDA.*.so"))
    assert (folder / "medfast" / "report" / "style.css").exists()
    assert (folder / "medfast" / "report" / "sort.js").exists()
    assert _implementation(folder) == "cpu"


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path):
    nothing = "/nonexistent/compiler"
    folder, log = _wheel(tmp_path, CC=nothing, CXX=nothing)
    assert not list((folder / "medfast").glob("_C*.so"))
    assert log.count("medfast is installed without its C++ kernels") == 1
    assert log.count("medfast is installed without its CUDA kernels") == 1
    assert _implementation(folder) == "torch"


# Says that it is of some release; writes down how it is called and makes what is asked for.
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "compilation tools, release {release}, V{release}.1"; exit; fi
echo "$@" >> {log}
for word; do
  if [ "$last" = -o ]; then echo made > "$word"; fi
  last=$word
done
"""


@pytest.fixture
def build(tmp_path):
    """Build the modules with an nvcc that compiles nothing; return what was said and its calls."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "setup.py", source)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    calls = tmp_path / "calls"

    def run(release="13.0", **environment):
        home = tmp_path / f"cuda-{release}"
        if not home.exists():
            (home / "bin").mkdir(parents=True)
            nvcc = home / "bin" / "nvcc"
            nvcc.write_text(NVCC.format(release=release, log=calls))
            nvcc.chmod(0o755)
        calls.write_text("")
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
        done = subprocess.run(
            command,
            cwd=source,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("MEDFAST_")},
                "CUDA_HOME": str(home),
                # The C++ kernels are left out, to save their time.
                **dict.fromkeys(("CC", "CXX"), "/none"),
                **environment,
            },
            capture_output=True,
            text=True,
        )
        made = list((tmp_path / "lib").rglob("_CUDA.*"))
        for path in made:
            path.unlink()
        return done, calls.read_text().splitlines(), made

    return run


def _architectures(call):
    return re.findall(r"-gencode=arch=(\S+)", call)


def test_every_source_is_compiled_for_every_architecture_and_linked(build):
    done, calls, made = build()
    assert done.returncode == 0, done.stderr
    assert len(made) == 1
    sources = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    compiled = [call for call in calls if ".cu -o" in call]
    assert sorted(Path(call.split()[-3]).name for call in compiled) == sources
    for call in compiled:
        assert _architectures(call) == [
            *("compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_100,code=sm_100"),
            "compute_100,code=compute_100",  # PTX, for newer GPUs
        ]
        assert "-DMEDFAST_SM90A" in call
    link = calls[-1]
    assert "-shared -cudart static" in link
    assert link.count(".o") == len(sources) + 1


def test_the_list_of_architectures_is_the_users(build):
    _, calls, _ = build(MEDFAST_CUDA_ARCH="90a;120")
    call = next(call for call in calls if ".cu -o" in call)
    assert _architectures(call) == [
        *("compute_90a,code=sm_90a", "compute_120,code=sm_120", "compute_120,code=compute_120")
    ]
    _, calls, _ = build(MEDFAST_CUDA_ARCH="80")
    call = next(call for call in calls if ".cu -o" in call)
    assert _architectures(call) == ["compute_80,code=sm_80", "compute_80,code=compute_80"]
    assert "-DMEDFAST_SM90A" not in call


def test_only_what_changed_is_compiled_again(build, tmp_path):
    _, first, _ = build()
    _, again, made = build()
    assert len(made) == 1
    assert len(again) == 1
    assert "-shared" in again[0]
    source = tmp_path / "source" / "csrc" / "cuda" / "clip_loss.cu"
    os.utime(source, (2**32, 2**32))
    _, changed, _ = build()
    assert len(changed) == 2
    (tmp_path / "source" / "csrc" / "arithmetic" / "clip_loss.h").touch()
    os.utime(source, (0, 0))
    _, all_again, _ = build()
    assert len(all_again) == len(first)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"CUDA_HOME": "/none"}, "there is no nvcc (/none/bin/nvcc)"),
        ({"release": "12.7"}, "is of CUDA 12.7, older than 12.8"),
        ({"MEDFAST_CUDA_ARCH": "70"}, "MEDFAST_CUDA_ARCH must list architectures from 80 on"),
        ({"MEDFAST_CUDA_ARCH": ""}, "MEDFAST_CUDA_ARCH must list architectures from 80 on"),
    ],
)
def test_cuda_is_left_out_with_a_sentence_or_is_an_error(build, how, says):
    done, calls, made = build(**how)
    assert done.returncode == 0
    said = done.stdout + done.stderr
    assert said.count("medfast is installed without its CUDA kernels") == 1
    assert says in said
    assert not calls
    assert not made
    done, _, made = build(**how, MEDFAST_CUDA="1")
    assert done.returncode != 0
    assert says in done.stderr
    assert not made


def test_cuda_is_left_out_silently_where_it_is_asked(build):
    done, calls, made = build(MEDFAST_CUDA="0")
    assert done.returncode == 0
    assert "CUDA" not in done.stdout + done.stderr
    assert not calls
    assert not made
