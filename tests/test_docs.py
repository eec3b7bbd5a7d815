"""Tests that every name in the documents exists."""

import re
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from sqlalchemy import create_engine

from service.observability import metrics
from service.operations import gauges
from service.webhooks import signing

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"`((?:warmcore|service|workers)(?:\.\w+)+)`")


def can_import(name):
    """Return whether a module, or an attribute of a module, can be imported by its name."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(import_module(module), attribute) or bool(import_module(name))
    except ModuleNotFoundError:
        return False


def test_every_function_that_the_method_names_is_there():
    names = NAME.findall((ROOT / "docs" / "method.md").read_text())
    assert len(names) > 40
    assert not [name for name in names if not can_import(name)]


def test_a_name_that_is_not_there_is_seen():
    assert can_import("warmcore.model.mup.factors")
    assert not can_import("warmcore.model.mup.factor")
    assert not can_import("warmcore.model.mupp.factors")


def test_the_list_of_metrics_is_that_of_the_exposition():
    rows = re.findall(
        r"^\| `(warmscale_\w+)` \| (\w+)(?:, database)? \| (.*?) \|",
        (ROOT / "docs" / "observability.md").read_text(),
        re.MULTILINE,
    )
    listed = {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert listed == {name: (kind, labels) for name, kind, labels in list_metrics()}
    assert len(listed) > 12


def list_metrics():
    """Yield name, type and labels of every metric that /metrics can expose."""
    for collector in metrics.registry._collector_to_names:
        for family in collector.describe():
            total = "_total" if family.type == "counter" else ""
            yield family.name + total, family.type, collector._labelnames
    session = SimpleNamespace(execute=lambda _: [])
    engine = create_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")
    for family in (*gauges._read_database(session), *gauges._read_pools({"service": engine})):
        yield family.name, family.type, tuple(family._labelnames)


def test_the_example_for_receivers_of_webhooks_verifies_ours_and_no_others():
    text = (ROOT / "docs" / "observability.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    example = {}
    exec(code, example)  # noqa: S102 - runs the example of the document
    secret, body, now = signing.create_secret(), b'{"type": "run.failed"}', int(time.time())
    headers = signing.sign_message(secret, "msg_1", now, body)
    verify = example["verify"]
    assert verify(secret, headers, body)
    both = headers["webhook-signature"] + " v1,b3RoZXI="
    assert verify(secret, headers | {"webhook-signature": both}, body)
    assert not verify(secret, headers, body + b" ")
    assert not verify(signing.create_secret(), headers, body)
    assert not verify(secret, headers | {"webhook-id": "msg_2"}, body)
    assert not verify(secret, signing.sign_message(secret, "msg_1", now - 600, body), body)
