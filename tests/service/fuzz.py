"""schemathesis on a live service: what it is started with, and what came of every call."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

CONFIG = Path(__file__).with_name("schemathesis.toml")
ROOT = CONFIG.parents[2]


def run(api, spec, folder, *options):
    """Its exit code, what it said, and how often each call had each status."""
    log = folder / "calls.ndjson"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", CONFIG, "--no-color"]
    command += ["run", f"{api.url}/openapi.json", "--header", f"Authorization: Bearer {api.key}"]
    command += ["--report", "ndjson", "--report-ndjson-path", log, *options]
    env = os.environ | {"WARMSCALE_FUZZ_SPEC": json.dumps(spec), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    return SimpleNamespace(code=done.returncode, said=said, statuses=statuses(log))


def statuses(log):
    """{call: Counter of its statuses}."""
    found = collections.defaultdict(collections.Counter)
    with log.open() as lines:
        for line in lines:
            recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
            for name, sent in recorder.get("interactions", {}).items():
                case = recorder["cases"][name]["value"]
                answer = sent.get("response") or {}
                found[f"{case['method']} {case['path']}"][answer.get("status_code")] += 1
    return found


def table(statuses):
    """A line for each call: how many were sent, and what they had for an answer; then the sum."""
    for call, counts in sorted(statuses.items()):
        answers = " ".join(f"{status}:{n}" for status, n in sorted(counts.items(), key=str))
        yield f"{counts.total():7d}  {call:50s} {answers}"
    everything = sum(statuses.values(), collections.Counter())
    said = f"in all, to {len(statuses)} calls; {faults(statuses)} with 5xx or without an answer"
    yield f"{everything.total():7d}  {said}"


def faults(statuses):
    """How many were answered with 5xx, or not at all."""
    found = (item for counts in statuses.values() for item in counts.items())
    return sum(n for status, n in found if status is None or status >= 500)
