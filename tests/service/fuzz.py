"""A run of schemathesis on a live service, and the statuses of its calls."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

CONFIG = Path(__file__).with_name("schemathesis.toml")
ROOT = CONFIG.parents[2]


def run_fuzzer(api, spec, folder, *options):
    """Run schemathesis; return its exit code, its output, and the statuses of each call."""
    log = folder / "calls.ndjson"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "--no-color"]
    command += ["run", f"{api.url}/openapi.json", "--header", f"Authorization: Bearer {api.key}"]
    command += ["--report", "ndjson", "--report-ndjson-path", log, *options]
    env = os.environ | {"WARMSCALE_FUZZ_SPEC": json.dumps(spec), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    return SimpleNamespace(code=done.returncode, output=output, statuses=count_statuses(log))


def count_statuses(log):
    """Return {call: Counter of its statuses}; status None is a call without an answer."""
    found = collections.defaultdict(collections.Counter)
    with log.open() as lines:
        for line in lines:
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
            for name, sent in recorder.get("interactions", {}).items():
                case = recorder["cases"][name]["value"]
                answer = sent.get("response") or {}
                found[f"{case['method']} {case['path']}"][answer.get("status_code")] += 1
    return found


def format_lines(statuses):
    """Yield a line for each call with its number and its statuses, then a line with the sums."""
    for call, counts in sorted(statuses.items()):
        answers = " ".join(f"{status}:{n}" for status, n in sorted(counts.items(), key=str))
        yield f"{counts.total():7d}  {call:50s} {answers}"
    everything = sum(statuses.values(), collections.Counter())
    failed = count_faults(statuses)
    text = f"in all, to {len(statuses)} calls; {failed} with 5xx or without an answer"
    yield f"{everything.total():7d}  {text}"


def count_faults(statuses):
    """Count the calls that were answered with 5xx, or not at all."""
    found = (item for counts in statuses.values() for item in counts.items())
    return sum(n for status, n in found if status is None or status >= 500)
