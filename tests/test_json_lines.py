import json
from pathlib import Path

import pytest

from medfast import json_lines
from medfast.errors import UsageError


def test_rows_come_back_without_what_json_does_not_have(tmp_path):
    path = tmp_path / "a.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, [{"a": float("nan"), "b": [float("inf"), {"c": 1.5}]}])
    json_lines.append(path, [{"path": "\udce9 \u00e9"}])
    assert json_lines.read(path) == [
        {"a": None, "b": [None, {"c": 1.5}]},
        {"path": "\udce9 \u00e9"},
    ]


@pytest.mark.parametrize("whole", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"a": 2}\n'])
def test_a_half_written_row_is_left_out_and_can_be_cut_off(tmp_path, whole):
    path = tmp_path / "a.jsonl"
    path.write_bytes(whole + b'{"a": "\xc3')
    rows = [json.loads(line) for line in whole.splitlines()]
    assert json_lines.read(path) == rows
    # Whoever reads does not write: the run may be going on.
    assert path.read_bytes() != whole
    json_lines.mend(path)
    json_lines.append(path, [{"a": 9}])
    assert json_lines.read(path) == [*rows, {"a": 9}]
    assert path.read_bytes() == whole + b'{"a": 9}\n'


def test_a_full_disk_is_a_sentence():
    with pytest.raises(
        UsageError, match=r"/dev/full cannot be written \(No space left on device\)"
    ):
        json_lines.append(Path("/dev/full"), [{"a": 1}])


@pytest.mark.parametrize("line", ["{", "[]", "\0\0"])
def test_a_damaged_row_in_the_midst_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
    with pytest.raises(UsageError, match=r"line 2 of .*a\.jsonl is damaged"):
        json_lines.read(path)
