"""Log lines: programs can parse them, they name their run or request, and contain no secret."""

import io
import json
import logging
import re
import shlex
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.observability import logs, request_context

KEY = "ws_" + "k" * 43


def format_record(record, form="json"):
    return logs.LineFormatter(form).format(record).split("\n")


def make_record(message="hello", *args, exc_info=None, **extra):
    return logging.getLogger("tests").makeRecord(
        "tests", logging.INFO, "file", 1, message, args, exc_info, extra=extra
    )


def parse_fields(line):
    """Parse a line of text as a program for logfmt does."""
    return {
        name: json.loads(value) if value.startswith('"') else value
        for name, value in re.findall(r'([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)', line)
    }


@given(st.text(), st.text())
def test_whatever_is_logged_is_one_line_and_reads_back(message, value):
    made = make_record("%s", message, value=value)
    (text,), (as_json,) = format_record(made, "text"), format_record(made)
    assert len(text.splitlines()) == len(as_json.splitlines()) == 1
    assert parse_fields(text)["message"] == json.loads(as_json)["message"] == message
    assert parse_fields(text)["value"] == json.loads(as_json)["value"] == value


def test_a_value_cannot_pose_as_another_field():
    (line,) = format_record(make_record(name_="x status=200"), "text")
    # Without quotes this would be two fields.
    assert shlex.split(line)[-1] == "name_=x status=200"


def test_a_trace_is_told_in_lines_that_all_say_the_run():
    try:
        raise ValueError("two\nlines")  # noqa: TRY301
    except ValueError as error:
        made = make_record(exc_info=(type(error), error, error.__traceback__))
    with logs.add_fields(run="run_1", attempt=2):
        found = [json.loads(line) for line in format_record(made)]
    assert len(found) > 3
    assert {(line["run"], line["attempt"]) for line in found} == {("run_1", 2)}
    assert [line["trace"] for line in found[-2:]] == ["ValueError: two", "lines"]


def test_what_a_process_is_about_is_on_the_lines_of_all_its_threads_and_ends():
    seen = []
    with logs.add_fields(run="run_1"):
        thread = threading.Thread(target=lambda: seen.extend(format_record(make_record())))
        thread.start()
        thread.join()
    assert json.loads(seen[0])["run"] == "run_1"
    assert "run" not in json.loads(format_record(make_record())[0])


def test_a_request_and_what_was_noted_of_it_are_on_its_lines():
    def ask():
        request_context.begin_request({"path_params": {"run_id": "run_1"}}, "id-1")
        request_context.note_facts(key_id="key_1", attempt=3)
        return json.loads(format_record(make_record())[0])

    from contextvars import copy_context

    line = copy_context().run(ask)
    assert [line[f] for f in ("request", "key", "run", "attempt")] == ["id-1", "key_1", "run_1", 3]
    assert "request" not in json.loads(format_record(make_record())[0])


@pytest.mark.parametrize(
    "secret", [KEY, "whsec_" + "A" * 32, "postgresql://user:hunter2@host/db?x=hunter2@"]
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_secret_in_the_words_of_others_is_redacted(secret, form):
    (line,) = format_record(make_record("failed with %s", secret, error=secret), form)
    # In the message and in the field.
    assert line.count("[redacted]") == 2
    assert KEY not in line
    assert "user:hunter2" not in line


def test_the_format_comes_from_the_environment_and_a_wrong_one_says_what_works():
    assert logs.read_format({}) == "text"
    assert logs.read_format({"WARMSCALE_LOG_FORMAT": "json"}) == "json"
    with pytest.raises(ValueError, match="one of text, json, not 'xml'"):
        logs.read_format({"WARMSCALE_LOG_FORMAT": "xml"})


def test_configured_logging_writes_to_its_stream():
    root, stream = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    try:
        logs.configure_logging("json", stream)
        logging.getLogger("any").info("hello")
    finally:
        logging.captureWarnings(capture=False)
        root.handlers, root.level = before, level
    assert json.loads(stream.getvalue())["message"] == "hello"
