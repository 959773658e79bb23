"""The benchmarks measure what they say, and `benchmarks.gpu` runs where there is no GPU."""

import json
import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import errors, gpu, memory, results, targets
from benchmarks.compare import bind, compare, failures, fastest
from benchmarks.conditions import conditions, machine
from benchmarks.measure import Run, Timing, interleave, mm_rates
from benchmarks.ops import OPS, clip_truth, evaluate, paired_rank_truth, pairs
from benchmarks.ops import errors as errors_of
from benchmarks.peers import PACKAGES, Variant, topk_ranks, variants, why_not
from benchmarks.targets import Target
from benchmarks.worker import CallError, LostError, Worker
from medfast.ops import matmul
from medfast.ops.clip import reference as clip_reference
from medfast.ops.cyclip import reference as cyclip_reference
from medfast.ops.siglip import reference as siglip_reference

ROOT = Path(__file__).parents[2]


def _python(*arguments, **options):
    # Else a pytest within would take itself for one of this pytest's workers.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    options = {"env": environment, **options}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


def _generator():
    return torch.Generator().manual_seed(0)


def test_percentiles_are_those_of_the_calls():
    timing = Timing.of([float(n) for n in range(11)])
    assert (timing.median, timing.p20, timing.p80, timing.rounds) == (5, 2, 8, 11)


def test_variants_take_turns_and_begin_in_turn():
    calls = []
    runs = {name: Run(lambda name=name: calls.append(name)) for name in "abc"}
    interleave(runs, seconds=0, least=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_medians_are_those_of_known_sleeps():
    runs = {name: Run(lambda s=s: time.sleep(s)) for name, s in (("short", 0.01), ("long", 0.03))}
    timings = interleave(runs, seconds=0.2)
    assert timings["short"].rounds == timings["long"].rounds >= 3
    for name, slept in (("short", 0.01), ("long", 0.03)):
        assert slept <= timings[name].p20 <= timings[name].median < slept + 0.02


def test_what_is_set_up_is_not_timed():
    run = Run(lambda x: x, setup=lambda: (time.sleep(0.05) or 7,))
    assert run() == 7
    assert interleave({"a": run}, seconds=0)["a"].median < 0.04


def test_products_are_timed_by_shape():
    rates = mm_rates([(64, 32, 16), (64, 32, 16)], torch.float32, "cpu", seconds=0.01)
    assert list(rates) == [(64, 32, 16)]
    assert rates[64, 32, 16] > 0


def _allocate(megabytes):
    return memory.resident_growth(lambda: bytearray(megabytes * 2**20).find(b"x"))


def test_peak_memory_is_that_of_the_call():
    for megabytes in (64, 16):
        grown = memory.in_fresh_process(_allocate, megabytes)
        assert abs(grown - megabytes * 2**20) < 4 * 2**20


def test_a_process_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="_exit ended its process"):
        memory.in_fresh_process(__import__("os")._exit, 1)


@pytest.mark.parametrize(
    ("name", "definition"),
    [
        ("clip_loss", clip_reference.clip_loss),
        ("siglip_loss", siglip_reference.siglip_loss),
        ("cyclip_loss", lambda x, y: _weighted(cyclip_reference.cyclip_loss(x, y))),
    ],
)
def test_the_truth_is_the_definition(monkeypatch, name, definition):
    monkeypatch.setattr("benchmarks.ops._TILE", 200)  # several tiles
    op = OPS[name]
    arguments = tuple(x.double() for x in op.inputs((33, 16), _generator()))
    want = evaluate(definition, arguments)
    for found in errors_of(op, op.truth(*arguments), want).values():
        assert found < 1e-10


def _weighted(terms):
    return terms[0] + 2 * terms[1]


def test_the_truth_keeps_what_a_won_diagonal_leaves():
    image, _ = pairs((16, 512), _generator())
    loss = clip_truth(image, image, torch.tensor(100.0))[0]
    assert 0 < loss < 1e-30


def test_rank_bounds_hold_the_rank():
    query, gallery, target = OPS["retrieval_rank"].inputs((40, 300, 8), _generator())
    scores = query.double() @ gallery.double().T
    own = scores[torch.arange(40), target]
    ranks = (scores > own[:, None]).sum(1)
    (bounds,) = OPS["retrieval_rank"].truth(query, gallery, target)
    assert torch.equal(bounds[0], ranks)
    assert torch.equal(bounds[1], ranks)
    assert errors_of(OPS["retrieval_rank"], [ranks + 1], [bounds]) == {"ranks": 1.0}
    assert torch.equal(topk_ranks(query, gallery, target), ranks.clamp(max=200))
    assert len(paired_rank_truth(query, gallery[:40])) == 2


def test_every_peer_says_why_it_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for package in PACKAGES:
        assert why_not(package, "cuda") == f"not installed; pip install {package}"
    for name, shape in (("clip_loss", (8, 4)), ("siglip_loss", (8, 4))):
        for variant in variants(name, shape, "cpu"):
            assert variant.own or variant.skip


def test_a_comparison_has_everything():
    comparison = compare("clip_loss", (48, 16), seconds=0.01, without=("*compiled",))
    assert failures(comparison) == []
    for row in comparison["rows"]:
        assert ("skipped" in row) != ("median_s" in row)
        if "median_s" in row:
            assert row["p20_s"] <= row["median_s"] <= row["p80_s"]
            assert row["tflops"] > 0
            assert row["percent_of_mm"] > 0
            assert row["peak_bytes"] >= 0
            assert set(row["errors"]) == set(OPS["clip_loss"].results)
    json.dumps(comparison)
    loss, *_ = fastest(comparison)()
    assert torch.is_tensor(loss)


@pytest.mark.parametrize("passes", ["forward", "backward", "both"])
def test_passes_are_timed_alone(passes):
    op, calls = OPS["clip_loss"], []

    def function(*arguments):
        calls.append("forward")
        return op.call(*arguments, impl="torch")

    run = bind(op, Variant("one", function), op.inputs((9, 4), _generator()), passes)
    prepared = run.setup()
    assert calls == (["forward"] if passes == "backward" else [])
    result = run.timed(*prepared)
    assert calls == ["forward"]
    assert len(result) == 3 if passes != "forward" else result.dim() == 0


def test_plain_pytorch_takes_no_product_of_ours(monkeypatch):
    if not matmul.multiplies_bf16():
        pytest.skip("csrc's products are used with AMX")
    taken, multiply = [], matmul._products
    monkeypatch.setattr(matmul, "_products", lambda *given: (taken.append(1), multiply(*given)))
    arguments = OPS["siglip_loss"].inputs((8, 4), torch.Generator().manual_seed(0))
    for variant in variants("siglip_loss", (8, 4), "cpu"):
        if variant.own and variant.skip is None:
            taken.clear()
            features = [x.to(variant.dtype) if x.dim() else x for x in arguments]
            bind(OPS["siglip_loss"], variant, tuple(features), "both")()
            assert bool(taken) == ("medfast cpu" in variant.name), variant.name


def test_a_wrong_result_is_not_timed(monkeypatch):
    right = OPS["clip_loss"].call
    monkeypatch.setitem(
        OPS,
        "clip_loss",
        OPS["clip_loss"].__class__(
            **{
                **vars(OPS["clip_loss"]),
                "call": lambda *a, impl: right(*a, impl=impl) * (1.001 if impl == "torch" else 1),
            }
        ),
    )
    comparison = compare(
        "clip_loss", (48, 16), seconds=0.01, only=("medfast torch fp32",), with_memory=False
    )
    assert "median_s" not in comparison["rows"][0]
    assert "medfast torch fp32: errors at [48, 16]" in failures(comparison)[0]
    assert fastest(comparison) is None


def _comparison(B=8192, **changes):
    def row(variant, own, seconds, peak):
        return {
            "variant": variant,
            "own": own,
            "dtype": "float32",
            "median_s": seconds,
            "p20_s": seconds * 0.9,
            "p80_s": seconds * 1.1,
            "rounds": 3,
            "tflops": 0.25,
            "percent_of_mm": 80.0,
            "peak_bytes": peak,
        }

    return {
        "op": "clip_loss",
        "shape": [B, 512],
        "device": "cpu",
        "passes": "both",
        "clock": "wall",
        "allocator": "glibc 2.36, default settings",
        "rows": [
            row("medfast cpu fp32", True, B / 8192, 50_000_000),
            row("open_clip fp32", False, 3 * (B / 8192) ** 2, 10 * B**2),
            {"variant": "inf-cl fp32", "own": False, "dtype": "float32", "skipped": "needs a GPU"},
        ],
        "targets": [],
        **changes,
    }


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (
            Target("medfast *", 2.5, than="open_clip fp32"),
            (">= 2.5x open_clip fp32", "3.00x", "met"),
        ),
        (Target("medfast cpu fp32", 0.5), ("<= 500 ms", "1.00 s", "NOT MET")),
        (Target("medfast *", 6e7, key="peak_bytes"), ("<= 60.0 MB", "50.0 MB", "met")),
        (Target("medfast *", 2, than="inf-cl fp32"), (">= 2x inf-cl fp32", "-", "needs a GPU")),
        (Target("medfast cuda*", 1.0), ("<= 1.00 s", "-", "not measured")),
    ],
)
def test_targets_are_judged(target, says):
    found = targets.judge(target, _comparison())
    assert targets.line(found)[1:] == says


def test_a_target_against_nobody_is_a_mistake():
    with pytest.raises(ValueError, match="not compared with 'open_clp'"):
        targets.judge(Target("medfast *", 2, than="open_clp"), _comparison())


@pytest.mark.parametrize(
    ("value", "key", "text"),
    [
        (0.0123, "median_s", "12.3 ms"),
        (2.5e-6, "median_s", "2.50 µs"),
        (0.9999, "median_s", "1.00 s"),
        (123.4, "median_s", "123 s"),
        (268435456, "peak_bytes", "268 MB"),
        (0, "peak_bytes", "0.00 B"),
    ],
)
def test_quantities_have_three_digits(value, key, text):
    assert targets.quantity(value, key) == text


def _write(folder, name, date, **content):
    where = {**conditions(), "cpu": "Some(R) CPU @ 2.8GHz", "cores": 2, "date": date}
    return results.write(name, where, folder, **content)


def test_the_newest_result_is_taken(tmp_path):
    _write(tmp_path, "clip_loss", "2026-02-03T10:00:00+00:00", comparisons=["new"])
    path = _write(tmp_path, "clip_loss", "2026-01-03T10:00:00+00:00", comparisons=["old"])
    assert path.name == "clip_loss_some_cpu_2_8ghz_2_cores_2026-01-03.json"
    (key, result), *none = results.newest(tmp_path).items()
    assert not none
    assert key == ("clip_loss", "some_cpu_2_8ghz_2_cores")
    assert result["comparisons"] == ["new"]
    assert machine({"gpu": "NVIDIA H200"}) == "nvidia_h200"


def test_the_report_is_made_of_the_files_alone(tmp_path):
    wanted = Target("medfast *", 2.5, than="open_clip fp32")
    comparisons = [_comparison(1024), _comparison(8192)]
    comparisons[1]["targets"] = [targets.judge(wanted, comparisons[1])]
    date = "2026-02-03T10:00:00+00:00"
    _write(tmp_path, "clip_loss", date, comparisons=comparisons)
    rows = [
        {"scale": 14.3, "correlation": 0.3, "variant": "open_clip fp32", "errors": error}
        for error in [dict.fromkeys(OPS["clip_loss"].results, 2e-7)]
    ]
    _write(tmp_path, "errors", date, shape=[1024, 512], rows=rows)
    command = ["-m", "benchmarks.report", "--results", str(tmp_path)]
    first = _python(*command, check=True).stdout
    (svg,) = tmp_path.glob("*.svg")
    drawn = svg.read_bytes()
    assert "| medfast cpu fp32 | 1.00 s | 900 ms to 1.10 s | 3.00x | 0.25 | 80 | 50.0 MB |" in first
    assert "| open_clip fp32 | 46.9 ms | 3.00 s |" in first
    assert "| >= 2.5x open_clip fp32 | 3.00x | met |" in first
    assert "| 14.3 | 0.3 | 2.0e-07 |" in first
    for label in (
        "B [pairs]",
        "time [s]",
        "peak memory above the inputs [bytes]",
        "open_clip fp32",
    ):
        assert label.encode() in drawn
    assert _python(*command, check=True).stdout == first
    assert svg.read_bytes() == drawn


def test_the_largest_comparison_with_peers_is_shown_in_full(tmp_path):
    alone = _comparison(65536)
    alone["rows"] = [row for row in alone["rows"] if row["own"]]
    comparisons = [_comparison(1024), _comparison(8192), alone]
    _write(tmp_path, "clip_loss", "2026-02-03T10:00:00+00:00", comparisons=comparisons)
    shown = _python("-m", "benchmarks.report", "--results", str(tmp_path), check=True).stdout
    assert "### clip_loss 8,192 x 512" in shown
    assert "| B = 1,024 | B = 8,192 | B = 65,536 |" in shown


def test_a_report_of_nothing_is_refused(tmp_path):
    asked = _python("-m", "benchmarks.report", "--results", str(tmp_path))
    assert asked.returncode == 2
    assert "holds no results" in asked.stderr


def test_the_table_of_errors_shows_what_is_lost():
    rows = errors.table((64, 32), "cpu", scales=(100.0,), correlations=(0.0, 0.9))
    by_place = {(row["correlation"], row["variant"]): row["errors"] for row in rows}
    own = [errors for (_, variant), errors in by_place.items() if variant.endswith(" fp32")]
    assert own
    assert by_place[0.9, "open_clip fp32"]["d_image"] > 1e-2
    for (_, variant), found in by_place.items():
        if variant.startswith("medfast"):
            assert found["d_image"] < (1e-2 if "bf16" in variant else 1e-4)


def test_the_gpu_command_runs_without_one(tmp_path):
    out = tmp_path / "gpu.json"
    asked = _python("-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(out))
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = asked.stdout.splitlines()
    assert lines[-1] == f"wrote {out}"
    assert "clip_loss 65,536 x 512: medfast * bf16  " in asked.stdout
    result = json.loads(out.read_text())
    assert {row["op"] for row in result["checks"] if row["passed"]} == set(OPS)
    assert {one["op"] for one in result["comparisons"]} == set(OPS)
    assert set(result["peers"]) == set(PACKAGES)
    assert all(row["reason"] for row in result["checks"] if row["passed"] is None)


# A torch whose GPU fails every call, as after a kernel that read where it must not.
SPOILED = """
import sys, types
def synchronize(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
"""


def test_what_hangs_or_spoils_the_gpu_costs_its_own_process():
    with Worker() as worker:
        pids = [worker.call(60, os.getpid)]
        with pytest.raises(CallError, match="ZeroDivisionError: ") as raised:
            worker.call(60, operator.floordiv, 1, 0)
        assert not isinstance(raised.value, LostError)
        assert worker.call(60, os.getpid) == pids[0]
        for message, seconds, function, argument in (
            ("no answer within 1 s", 1, time.sleep, 600),
            ("ended its process with code 3", 60, os._exit, 3),
            ("RuntimeError: CUDA error: an illegal", 60, exec, SPOILED),
        ):
            with pytest.raises(LostError, match=message):
                worker.call(seconds, function, argument)
            pids.append(worker.call(60, os.getpid))
    assert len({os.getpid(), *pids}) == 5


def test_an_implementation_that_lost_a_process_is_asked_no_more():
    class Loses:
        def call(self, limit_s, ask, subject, shape):
            if subject.impl == "torch":
                raise LostError("no answer")

    losses = {}
    rows = list(gpu.run_checks("cpu", gpu.Budget(60), True, Loses(), losses))
    assert set(losses) == {(op.table, "torch") for op in OPS.values()}
    for key, reason in losses.items():
        asked = [row for row in rows if (OPS[row["op"]].table, row["impl"]) == key]
        assert [row["passed"] for row in asked].count(False) == 1
        assert any(row.get("reason") == reason for row in asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_is_said_in_one_sentence():
    asked = _python("-m", "benchmarks.gpu")
    assert asked.returncode == 2
    assert asked.stdout == ""
    assert asked.stderr.startswith("benchmarks.gpu: error: there is no GPU")
    assert len(asked.stderr.splitlines()) == 1


def test_benchmarks_run_only_when_asked():
    listed = ["-m", "pytest", "benchmarks", "--collect-only", "-q"]
    assert "bench_" not in _python(*listed).stdout
    asked = _python(*listed, "--benchmark-only").stdout
    assert "bench_clip_loss.py" in asked
    assert "very_large" not in asked
    assert "very_large" in _python(*listed, "--benchmark-only", "-m", "slow").stdout
