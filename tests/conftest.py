from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from medfast import train
from medfast.data.phantom import write_phantom
from medfast.data.tokens import Tokenizer

# Two epochs of six steps: enough to save, resume and evaluate.
SHORT_RUN = ["--epochs", "2", "--batch-size", "16", "--workers", "0", "--warmup", "2"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="takes long: make slow"))


@pytest.fixture(params=["baseline", "avx2", "avx512", "amx"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The compiled module, in each instruction set that this processor has."""
    _C = pytest.importorskip("medfast._C")
    if request.param not in _C.instruction_sets():
        pytest.skip(f"this processor does not have {request.param}")
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield _C
    _C.use_instruction_set(before)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small phantom in ROCO's layout. Read only: tests that damage it take `own_phantom`."""
    return write_phantom(tmp_path_factory.mktemp("data") / "phantom", pairs=120, seed=1)


@pytest.fixture
def own_phantom(phantom: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(phantom, tmp_path / "phantom"))


@pytest.fixture(scope="session")
def short_run(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished short run of the local method. Read only."""
    logs = tmp_path_factory.mktemp("logs")
    train.main(["--train-data", f"roco:{phantom}", "--logs", str(logs), "--name", "a", *SHORT_RUN])
    return logs / "a"


@pytest.fixture(scope="session")
def tokenizer(phantom: Path) -> Tokenizer:
    lines = (phantom / "train" / "radiology" / "captions.txt").read_text().splitlines()
    return Tokenizer.train([line.partition("\t")[2] for line in lines], 2048, 48)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run the train command, which must exit with code 2 and one sentence; return that."""

    def run(argv: list[str]) -> str:
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert not any("Traceback" in line for line in lines)
        assert [line for line in lines if "error:" in line] == lines[-1:]
        assert lines[-1].startswith("medfast.train: error: ")
        return lines[-1]

    return run
