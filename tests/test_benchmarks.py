"""The benchmarks run: what they print is in `benchmarks/README.md`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.throughput import machine

ROOT = Path(__file__).resolve().parents[1]


def test_both_sides_of_the_service_benchmark_go_through_their_cycles(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/service_throughput.py", "--quick", "--json", str(out)]
    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    calls = {name: len(times) for name, times in row["ours"]["calls"].items()}
    assert calls == {"lease": 4, "report": 12, "finish": 4}
    calls = {name: len(times) for name, times in row["theirs"]["calls"].items()}
    assert calls == {"ask": 4, "trial.report": 12, "tell": 4}
    assert "| 20 | 2 | none |" in done.stdout


@pytest.mark.parametrize("gone", [FileNotFoundError, ProcessLookupError])
def test_cpu_time_is_told_though_a_process_ends_while_it_is_read(monkeypatch, gone):
    def read(_):
        raise gone

    monkeypatch.setattr(Path, "read_text", read)
    assert machine.cpu_seconds([1]) == 0
