from medfast import env
from medfast.ops import dispatch


def test_every_op_and_implementation_has_a_line():
    shown = env.describe()
    for op, implementations in dispatch.IMPLEMENTATIONS.items():
        section = shown.partition(f"\n{op}\n")[2].partition("\n\n")[0]
        for name in dispatch.NAMES:
            (line,) = [row for row in section.splitlines() if row.split()[0] == name]
            runs = dispatch.why_not(op, name) is None
            assert runs == ("runs here" in line)
            assert runs or line.partition("no: ")[2]
            assert not runs or name in implementations


def test_missing_kernels_are_said(monkeypatch):
    monkeypatch.setattr(dispatch, "_CSRC_ERROR", "no module named _C")
    shown = env.describe()
    assert "cpu            no: the C++ kernels are not there (no module named _C)" in shown
    assert "torch          runs here, chosen by auto on a CPU" in shown


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    assert "no-such-package not installed" in env.describe()
