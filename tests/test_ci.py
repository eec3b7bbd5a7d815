"""Tests that CI and the commit hooks call only make, with targets of the Makefile."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def list_workflow_commands():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


def list_hook_commands():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    return [hook["entry"] for hook in local["hooks"]]


def list_targets():
    rows = (ROOT / "Makefile").read_text().splitlines()
    return {name for row in rows if row.startswith(".PHONY:") for name in row.split()[1:]}


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (list_workflow_commands, ["check", "audit", "test", "demo"]),
        (list_hook_commands, ["lint", "types", "imports"]),
    ],
)
def test_every_command_is_a_make_target(commands, expected):
    called = [command.split() for command in commands()]
    assert {words[0] for words in called} == {"make"}
    assert [words[-1] for words in called] == expected
    assert set(expected) <= list_targets()
