"""The direction of imports: cli -> train -> methods -> losses -> ops -> torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import medfast

ROOT = Path(medfast.__file__).parent
# Room -> rooms of medfast it may import, beside errors.
ALLOWED = {
    "ops": {"ops", "_C", "_CUDA"},
    "losses": {"ops", "distributed"},
    "distributed": {"distributed", "ops", "_CUDA"},
    "data": {"data", "cli", "json_lines"},  # cli: for data's own command
    "models": {"models", "data"},
    "methods": {"methods", "models", "data", "ops", "distributed"},
    "evals": {
        *("evals", "models", "data", "ops", "device", "report", "__version__"),
        *("config", "methods", "checkpoint"),  # of the runs that are evaluated
        "cli",  # for the command that writes the suite's phantoms
    },
    "report": {"report"},
    "device": set(),
    "json_lines": set(),
    "checkpoint": set(),
}

LOSSES = [name for name in medfast.__all__ if name.endswith("Loss")]


def _imports(path):
    """Yield the rooms of medfast that a file imports, those for type checkers included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medfast"):
            parts = (node.module or "").split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("medfast."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else (ROOT / room).rglob("*.py")
    for path in files:
        wrong = set(_imports(path)) - ALLOWED[room] - {"errors"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import medfast", {"torch", "numpy"}),
        ("import medfast.config, medfast.cli", {"torch", "numpy", "yaml", "PIL"}),
    ],
)
def test_imports_stay_light(statement, forbidden):
    assert not forbidden & _modules_after(statement)


def test_the_losses_need_torch_alone():
    loaded = _modules_after(f"from medfast import {', '.join(LOSSES)}")
    more = {name.partition(".")[0] for name in loaded - _modules_after("import torch")}
    assert more - sys.stdlib_module_names == {"medfast"}


def test_the_losses_cost_little_beside_torch(tmp_path):
    """At most 50 ms, in the best of several runs: a busy machine only ever adds."""
    code = (
        "import sys, time, torch\n"
        # As installed: byte-compiled, which the first run does.
        f"sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False\n"
        "start = time.perf_counter()\n"
        "import medfast\n"
        "from medfast import ClipLoss, SigLipLoss\n"
        "print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", code], text=True)) for _ in range(4)
    ]
    assert min(seconds) <= 0.05, seconds


def _modules_after(statement):
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return set(shown.split())
