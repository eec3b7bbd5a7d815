"""`warmscale demo` as a user runs it, on a small study."""

import json
import os
import subprocess
import sys

import psutil
import pytest
import yaml

pytestmark = pytest.mark.timeout(900)  # seconds, on a busy machine
DEMO = (sys.executable, "-m", "service.cli", "demo")


@pytest.fixture
def demo(home, study_spec):
    """Run the demo on a folder with a small spec.yaml."""
    spec = study_spec(name="small", warmstart={"seeds": 2})
    (home / "spec.yaml").write_text(yaml.safe_dump(spec))

    def run(*options):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("WARMSCALE_")}
        return subprocess.run(
            [*DEMO, "--folder", str(home), "--cpus", "2", *options],
            env=environment | {"XDG_CACHE_HOME": str(home / "cache")},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    return run


def test_it_leaves_a_verdict_and_a_page_and_nothing_running_and_runs_again(demo, home):
    names = []
    for options in ((), ("--json",)):
        done = demo(*options)
        assert done.returncode == 0, done.stdout + done.stderr
        results = json.loads((home / "results.json").read_text())
        names.append(results["study_name"])
        assert results["verdict"]["sentence"] in done.stdout
        assert results["verdict"]["seeds"] == 2
        assert 0 < results["fleet"]["utilization"] <= 1
        if options:
            assert json.loads(done.stdout.splitlines()[-1]) == results
        else:
            assert "lease to step" in done.stdout
        assert results["study_name"] in (home / "report.html").read_text()
        mine = [p.info for p in psutil.process_iter(["cmdline"])]
        assert not [p for p in mine if str(home) in " ".join(p["cmdline"] or [])]
    assert len(set(names)) == 2


def test_a_folder_without_a_spec_is_wrong_usage(demo, home):
    (home / "spec.yaml").unlink()
    refused = demo()
    assert refused.returncode == 2
    assert "spec.yaml cannot be read: No such file" in refused.stderr
