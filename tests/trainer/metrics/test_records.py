"""Records of metrics.jsonl are read whatever has become of other lines, by a resumed run and by the report alike."""

import json

import pytest

from trainer.metrics.log import keep_records
from trainer.report.run_records import read_run

STEP = {"kind": "step", "step": 10, "loss": 2.0, "seconds": {"data": 0.1}}
DAMAGED = {
    "a number": b"5",
    "null": b"null",
    "a list": b"[1]",
    "no kind": b"{}",
    "a step that is text": b'{"kind": "step", "step": "ten"}',
    "a loss that is text": b'{"kind": "step", "step": 10, "loss": "2.0"}',
    "a loss of thousands of digits": b'{"kind": "step", "step": 10, "loss": ' + b"9" * 1_000_000 + b"}",
    "a loss beyond floats": b'{"kind": "step", "step": 10, "loss": ' + b"9" * 400 + b"}",
    "seconds that are no mapping": b'{"kind": "step", "step": 10, "seconds": 3}',
    "an end without its steps": b'{"kind": "end", "step": 10}',
    "deep brackets": b"[" * 100_000,
    "not UTF-8": b'{"kind": "step", "step": 10, "\xff\xfe": 1}',
    "zeros": bytes(512),
    "torn": b'{"kind": "step", "st',
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_lines_are_left_out_and_counted(tmp_path, capsys, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(STEP).encode() + b"\n" + line)
    run = read_run(tmp_path)
    assert run.steps == [STEP] and run.end is None and run.unreadable == 2
    keep_records(path, 20)
    assert [json.loads(kept) for kept in path.read_text().splitlines()] == [STEP]
    assert capsys.readouterr().out.count("\n") == 1
    keep_records(path, 20)
    assert capsys.readouterr().out == ""
