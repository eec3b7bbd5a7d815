"""Submitting a study: list its source, check the paths, inspect the corpus, pin, write."""

from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.access.paths import Roots, check_listed_files, check_named_paths
from service.database.tables import Study
from service.problems import bad_field
from service.specs.study import StudySpec
from service.studies import store
from warmcore.corpus.facts import CorpusFacts
from warmcore.corpus.inspection import inspect_corpus
from warmcore.corpus.sources import SourceFile, list_files
from warmcore.specs import DataSpec
from warmcore.specs.fields import FieldError
from warmcore.specs.sources import HubDataset


def submit_study(
    session: Session, caller: Caller, spec: StudySpec, roots: Roots, key: str | None
) -> Study:
    """Write a study after a check of its data; the same idempotency key gives the same study.

    Every fault of a study is reported here, and not when its first run starts an hour later.

    Raises:
        Problem: 422 for data that may not be read, are not there or do not fit the spec; 409 for a
            name that is taken, or for a key that was used with another spec.
    """
    files = list_source(spec.data, roots)
    # The listing that was checked is the listing that is inspected: a file that appears in between
    # is not read without a check.
    facts = _inspect_corpus(spec.data, files)
    return store.create_study(session, caller, pin_to_corpus(spec, facts), key)


def list_source(data: DataSpec, roots: Roots) -> list[SourceFile] | None:
    """Return the files of a source, all of which the service may read.

    Returns None for a data set given by name: the process that inspects it loads the library
    `datasets` and finds the files in that library's cache.

    Raises:
        Problem: 422 for a path outside of `roots`, or for a source that does not exist or is empty.
    """
    check_named_paths(data, roots)  # first: nothing outside of `roots` is read, not even listed
    if isinstance(data.parsed_source, HubDataset):
        return None
    try:
        files = list_files(data.source)
    except ValueError as error:
        raise bad_field("data.source", data.source, str(error)) from None
    check_listed_files(data, files, roots)
    return files


def _inspect_corpus(data: DataSpec, files: list[SourceFile] | None) -> CorpusFacts:
    try:
        facts = inspect_corpus(data, files)
    except FieldError as error:
        raise bad_field(f"data.{error.path}", error.value, str(error)) from None
    except ValueError as error:
        raise bad_field("data.source", data.source, str(error)) from None
    if facts.data_hash is not None and data.hash not in (None, facts.data_hash):
        raise bad_field("data.hash", data.hash, f"the corpus has hash {facts.data_hash}")
    return facts


def pin_to_corpus(spec: StudySpec, facts: CorpusFacts) -> StudySpec:
    """Return the study with the hashes of its corpus and its tokenizer.json.

    Every run of the study gets them, and refuses to train on other text. A corpus too large to be
    read while a request waits has no hash.
    """
    try:
        return spec.with_data(facts.pin_spec(spec.data))
    except FieldError as error:
        raise bad_field(error.path, error.value, str(error)) from None
