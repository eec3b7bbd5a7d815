"""Tests that every path in the guides exists and that the map lists every package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("service", "warmcore", "workers")
TOP = "service|warmcore|workers|tests|benchmarks|alembic|docs|demo|examples|\\.github|\\.ci"
PATH = re.compile(rf"(?<![\w./])(?:{TOP})/[\w./-]*\w/?|\b[A-Z]+\.md\b|\bMakefile\b")


def find_paths(text):
    return {match.group().rstrip("/") for match in PATH.finditer(text)}


def read_map():
    return (ROOT / "docs" / "architecture.md").read_text()


def list_places():
    """Yield every folder with code, and every file directly below a top-level package."""
    for package in (ROOT / name for name in PACKAGES):
        for path in sorted(package.rglob("*.py")):
            inside = path.relative_to(ROOT)
            if path.parent != package:
                yield str(inside.parent)
            elif path.name != "__init__.py":
                yield str(inside)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_path_that_a_guide_names_is_there(page):
    named = find_paths((ROOT / page).read_text())
    assert len(named) > 20
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


def test_the_map_has_a_row_for_every_package_and_top_file():
    rows = [line for line in read_map().splitlines() if line.startswith("|")]
    first_cells = {path for row in rows for path in find_paths("|".join(row.split("|")[:3]))}
    found = set(list_places())
    assert len(found) > 30
    assert found - first_cells == set()


def test_paths_are_found_in_prose_tables_and_links():
    text = "| `service/app.py` | in warmcore/growth/: tests/a_b.py and/or [x](docs/a.md). Makefile"
    assert find_paths(text) == {
        "service/app.py",
        "warmcore/growth",
        "tests/a_b.py",
        "docs/a.md",
        "Makefile",
    }
    assert find_paths("https://x.org/docs/a and my/service/app.py; README.md") == {"README.md"}
