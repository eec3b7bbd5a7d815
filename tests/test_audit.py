"""The audit fails on a known vulnerability, and reports look-ups that did not happen."""

import importlib.util
import json
from pathlib import Path

_FILE = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
_SPEC = importlib.util.spec_from_file_location("audit", _FILE)
audit = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(audit)

GOOD = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


def judge_packages(*packages):
    return audit.judge_report(json.dumps({"dependencies": list(packages)}), "")


def test_a_known_vulnerability_fails_and_is_named_with_its_remedy():
    code, text = judge_packages(GOOD, BAD, UNKNOWN)
    assert code == 1
    assert "b 2: CVE-1 (fixed in 3)" in text


def test_what_was_looked_up_is_counted():
    assert judge_packages(GOOD, UNKNOWN) == (
        0,
        "audit: done, nothing known against 1 of 2 packages",
    )


def test_an_index_without_advisories_is_no_clean_bill():
    """pip-audit once skipped all 138 packages and printed 'No known vulnerabilities found'."""
    code, text = judge_packages(UNKNOWN, UNKNOWN)
    assert (code, "NOT DONE" in text) == (0, True)


def test_an_index_that_is_away_is_no_failure_and_no_clean_bill():
    code, text = audit.judge_report("", "ERROR:pip_audit: connection refused\n")
    assert code == 0
    assert "NOT DONE" in text
    assert "connection refused" in text
