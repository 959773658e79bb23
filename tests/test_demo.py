"""What the default run promises, on the run itself. Minutes long; deselect with -m 'not demo'."""

import json
import subprocess
import sys
import time

import pytest
import torch

from medfast.device import has_bf16

pytestmark = pytest.mark.demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    argv = ["--method", "local", "--fused-loss"]
    own = ["--cache-dir", str(folder / "cache"), "--logs", str(folder / "logs")]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "medfast.train", *argv, *own], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "logs").iterdir()
    lines = (run / "results.jsonl").read_text().splitlines()
    results = {(row["task"], row["name"]): row for row in map(json.loads, lines)}
    return run, results, time.monotonic() - started, done.stderr


def test_it_ends_within_minutes_and_names_the_run_folder(demo):
    """Twice what two cores took at their slowest: 5 min with bf16, 0.8 s for a step in fp32."""
    run, _, seconds, said = demo
    assert seconds < (600 if has_bf16(torch.device("cpu")) else 1500)
    assert said.splitlines()[-1].endswith(str(run))


def test_it_finds_the_image_of_a_caption_50_times_better_than_chance(demo):
    row = demo[1]["retrieval", ""]
    assert row["n"] >= 500
    assert row["metrics"]["text_to_image_R@1"] >= 50 * row["chance"]["text_to_image_R@1"]


def test_it_tells_modalities_apart(demo):
    assert demo[1]["zero_shot", "modality"]["metrics"]["accuracy"] >= 0.9


def test_it_tells_findings_apart(demo):
    row = demo[1]["zero_shot", "finding"]
    assert row["ci95"]["accuracy"][0] > row["chance"]["accuracy"]


@pytest.mark.parametrize("detail", ["side", "size", "count", "all"])
def test_it_has_learned_details(demo, detail):
    assert demo[1]["two_choice", detail]["metrics"]["accuracy"] >= 0.8
