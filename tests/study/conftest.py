import pytest
import yaml
from study_runs import TINY, FakeRuns

from medfast.study import execute


@pytest.fixture
def budget(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "cache_dir": str(tmp_path / "cache")}))
    return path


@pytest.fixture
def argv(budget, tmp_path):
    def of(*methods, out="study", more=()):
        return [
            *("--methods", *methods, "--budget", str(budget), "--out", str(tmp_path / out)),
            *more,
        ]

    return of


@pytest.fixture
def fake(monkeypatch):
    runs = FakeRuns()
    monkeypatch.setattr(execute, "start", runs)
    monkeypatch.setattr(execute, "write_data", lambda study: None)
    return runs
