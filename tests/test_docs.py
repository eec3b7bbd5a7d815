"""What the documents name is there."""

import re
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"`((?:warmcore|service|workers)(?:\.\w+)+)`")


def found(name):
    """Whether a module, or what one defines, can be imported by its name."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(import_module(module), attribute) or bool(import_module(name))
    except ModuleNotFoundError:
        return False


def test_every_function_that_the_method_names_is_there():
    names = NAME.findall((ROOT / "docs" / "method.md").read_text())
    assert len(names) > 40
    assert not [name for name in names if not found(name)]


def test_a_name_that_is_not_there_is_seen():
    assert found("warmcore.mup.factors")
    assert not found("warmcore.mup.factor")
    assert not found("warmcore.mupp.factors")
