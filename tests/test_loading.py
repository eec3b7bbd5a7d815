"""No code of ours can execute the data that it loads: no pickle and no similar format."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = frozenset(
    ["pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"]
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})


def find_offences(source):
    """List the places of a source that could execute loaded data."""
    return [
        f"line {node.lineno}: {why}"
        for node in ast.walk(ast.parse(source))
        for why in _iterate_offences(node)
    ]


def _iterate_offences(node):
    if isinstance(node, ast.Import):
        yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
        yield str(node.module)
    if isinstance(node, ast.Call):
        yield from _iterate_offences_of_call(node)


def _iterate_offences_of_call(call):
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    name = ast.unparse(call.func)
    if name in BUILTINS:
        yield name
    if name.endswith("torch.load") and not _is_constant(given.get("weights_only"), value=True):
        yield "torch.load without weights_only=True"
    if "allow_pickle" in given and not _is_constant(given["allow_pickle"], value=False):
        yield "allow_pickle"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name


def _is_constant(node, *, value):
    return isinstance(node, ast.Constant) and node.value is value


FILES = [p for folder in ("warmcore", "workers", "service") for p in (ROOT / folder).rglob("*.py")]


def test_no_file_of_ours_loads_what_can_run():
    assert len(FILES) > 100
    found = {str(p.relative_to(ROOT)): find_offences(p.read_text(encoding="utf-8")) for p in FILES}
    assert {path: why for path, why in found.items() if why} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from cloudpickle import loads", "import marshal as m", "eval('1')",
     "torch.load('x')", "torch.load('x', weights_only=False)", "np.load('x', allow_pickle=True)",
     "np.load('x', allow_pickle=flag)", "yaml.load(text, Loader)", "import os, shelve"],
)  # fmt: skip
def test_each_way_to_run_what_is_read_is_seen(source):
    assert find_offences(source)


@pytest.mark.parametrize(
    "source",
    ["yaml.safe_load(x)", "torch.load('x', weights_only=True)", "np.load('x', allow_pickle=False)",
     "model.eval()", "re.compile('x')"],
)  # fmt: skip
def test_what_is_harmless_is_let_be(source):
    assert find_offences(source) == []
