"""A module in a process of its own sees this package, and nothing of the working directory."""

import json
import sys

import pytest

from warmcore.corpus import module_process
from warmcore.corpus.module_process import run_module

MODULE = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv[1:],
    "input": sys.stdin.read(),
    "folder": os.getcwd(),
    "path": sys.path,
    "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
}))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module that prints all that a process can see."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "mirror.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return "mirror"


def run(module, *arguments, **options):
    return run_module(module, arguments, seconds=60, too_slow="too slow", **options)


def test_arguments_input_and_environment_reach_the_module(module, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    seen = json.loads(run(module, "a b", "$x;", text="é\n").stdout)
    assert (seen["arguments"], seen["input"]) == (["a b", "$x;"], "é\n")
    assert seen["HF_HUB_OFFLINE"] is None
    assert json.loads(run(module, environment={"HF_HUB_OFFLINE": "1"}).stdout) == seen | {
        "arguments": [],
        "input": "",
        "HF_HUB_OFFLINE": "1",
    }


def test_the_exit_code_and_the_errors_come_back(module):
    assert run(module, environment={"CODE": "7"}).returncode == 7
    missing = run("no.such.module")
    assert (missing.returncode, "No module named" in missing.stderr) == (1, True)


def test_the_working_directory_gives_files_and_no_modules(module, tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    # With the folder on `sys.path`, `import json` would run this file.
    (folder / "json.py").write_text("raise SystemExit('a file passed for a module')")
    monkeypatch.chdir(folder)
    for options in ({}, {"folder": str(folder)}):
        seen = json.loads(run(module, **options).stdout)
        assert seen["folder"] == str(folder)
        assert not {"", str(folder)} & set(seen["path"])


def test_our_package_comes_before_every_other_of_its_name(module):
    # The package may be installed in another version: the child must run our code.
    path = json.loads(run(module).stdout)["path"]
    (own,) = {entry for entry in sys.path if module_process.__file__.startswith(f"{entry}/")}
    assert path[0] == own


def test_a_process_that_takes_too_long_is_an_error_in_the_callers_words():
    with pytest.raises(ValueError, match=r"^took over 0\.2 s$"):
        run_module(
            "timeit",
            ["-n1", "import time; time.sleep(60)"],
            seconds=0.2,
            too_slow="took over 0.2 s",
        )
