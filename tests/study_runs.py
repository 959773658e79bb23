"""Run folders as training and evaluation leave them, without either."""

import json
from pathlib import Path

from medfast.methods import METHODS
from medfast.study.plan import BUDGETS, Study

TINY = {
    **{"phantom_pairs": 60, "epochs": 1, "batch_size": 16, "force_image_size": 32},
    **{"workers": 0, "warmup": 2, "loader": "torch"},
}
ORIGIN = {"medfast": "9.8.7", "torch": "6.5.4", "git": "abc"}


def write_run(place, validation=0.3, test=0.2, accuracies=(), speeds=(90.0, 100.0, 300.0)):
    place.mkdir(parents=True, exist_ok=True)
    ways = ("image_to_text_R@1", "text_to_image_R@1")
    metrics = [
        {"kind": "train", "step": i, "samples_per_s": s, "memory_mb": 500.0 + i}
        for i, s in enumerate(speeds)
    ]
    metrics += [
        {"kind": "validation", "step": step, "metrics": dict.fromkeys(ways, recall), "loss": loss}
        for step, recall, loss in ((1, 0.9 - validation, 3.0), (2, validation, 2.0))
    ]
    rows = [
        {
            **{"dataset": "phantom", "task": "retrieval", "name": "", "n": 50, **ORIGIN},
            "metrics": {ways[0]: test - 0.01, ways[1]: test + 0.01},
            "chance": dict.fromkeys(ways, 0.02),
            "ci95": {way: [0.1, 0.3] for way in ways},
        }
    ]
    rows += [
        {
            **{"dataset": "phantom", "task": task, "name": name, "n": 40, **ORIGIN},
            **{"metrics": {"accuracy": value}, "chance": {"accuracy": 0.5}},
            "ci95": {"accuracy": [0.0, 1.0]},
        }
        for task, name, value in accuracies
    ]
    for name, lines in (("metrics.jsonl", metrics), ("results.jsonl", rows)):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in lines))


def write_evaluation(place, key, task, value, chance=0.25, n=80):
    """Write the result of a data set and task of the suite into a run folder."""
    metric = {"image_to_text": "R@10", "text_to_image": "R@10"}.get(task, "accuracy")
    row = {
        **{"dataset": key, "task": task, "name": "", "split": "test", "seed": 0, "n": n, **ORIGIN},
        **{"model": place.name, "model_sha256": "x", "suite": "medical25", "overlaps": []},
        "metrics": {metric: value},
        "chance": {metric: chance},
        "ci95": {metric: [0.0, 1.0]},
        **{"notes": [], "skipped": {}, "command": "python -m medfast.evaluate", "seconds": 1.0},
    }
    folder = place / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{key}.{task}.json").write_text(json.dumps(row) + "\n")


def study_of(*methods, out=Path("out"), settings=BUDGETS["quick"], pretrained=None, suite=None):
    return Study(methods or tuple(METHODS), "quick", settings, out, pretrained, suite)


def names_of(runs):
    return [run.name for run in runs]


class Process:
    """One that has ended when it is first asked, as `start` returns it."""

    def __init__(self, returncode=0):
        self.returncode = returncode

    def poll(self):
        return self.returncode

    def terminate(self):
        raise AssertionError("it had ended")


class FakeRuns:
    """Stands in for the processes: writes run folders, and notes what was asked for."""

    def __init__(self):
        self.commands = []
        self.validation, self.test = {}, {}  # R@1 by the name of a run
        self.fails = set()
        self.suite = {}  # cells that an evaluation finds -> their values
        self.failed_sets = {}  # name of a run -> data set that fails

    def __call__(self, command, output, threads, lock):
        words = list(command)
        self.commands.append(words)
        if words[:2] == ["-m", "medfast.evaluate"]:
            return self._evaluate(Path(words[words.index("--checkpoint") + 1]), output)
        assert words[:2] == ["-m", "medfast.train"]
        name = words[words.index("--name") + 1]
        place = Path(words[words.index("--logs") + 1]) / name
        with output.open("a") as file:
            file.write(f"output of {name}\n")
        if "--resume" not in words:
            place.mkdir()
        if name in self.fails:
            return Process(3)
        write_run(place, self.validation.get(name, 0.3), self.test.get(name, 0.2))
        return Process()

    def _evaluate(self, place, output):
        fails = self.failed_sets.get(place.name)
        for (key, task), value in self.suite.items():
            if key != fails:
                write_evaluation(place, key, task, value)
        error = place / "evaluations" / f"{fails}.error.txt"
        if fails is None:
            for old in error.parent.glob("*.error.txt"):
                old.unlink()
            return Process()
        error.write_text("Traceback\n  lines\nOSError: it is damaged\n")
        output.write_text(f"medfast.evaluate: error: {fails} failed\n")
        return Process(1)

    @property
    def names(self):
        """Runs that were trained."""
        return [words[words.index("--name") + 1] for words in self.commands if "--name" in words]

    @property
    def evaluated(self):
        """Runs that were evaluated."""
        words = (words for words in self.commands if "--checkpoint" in words)
        return [Path(own[own.index("--checkpoint") + 1]).name for own in words]
