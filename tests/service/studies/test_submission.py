"""A submission lists its source once, and refuses it before anything is written."""

import pytest
from sqlalchemy import func, select

from service.client import ServiceError
from service.database.tables import Study
from service.problems import Problem
from service.specs.study import StudySpec
from service.studies import submission
from service.studies.submission import list_source, submit_study
from tests.by_hand import EVERYWHERE
from warmcore.corpus import inspection
from warmcore.corpus.inspection import inspect_corpus
from warmcore.specs.data import DataSpec


@pytest.fixture
def listings(monkeypatch):
    """The sources that this process listed."""
    sources, list_files = [], submission.list_files

    def counted(source):
        sources.append(source)
        return list_files(source)

    monkeypatch.setattr(submission, "list_files", counted)
    monkeypatch.setattr(inspection, "list_files", counted)
    return sources


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_a_source_is_listed_once(shared_api, study_spec, corpus, listings, tokenizer):
    data = {"source": str(corpus), "context": 32, "tokenizer": tokenizer}
    spec = StudySpec.model_validate(study_spec(data=data))
    with shared_api.sessions() as session:
        study = submit_study(session, EVERYWHERE, spec, (corpus,), None)
        assert study.spec["data"]["hash"] is not None
        session.rollback()
    assert listings == [str(corpus)]


def test_the_process_that_inspects_reads_the_files_that_were_checked(corpus):
    """A file that appears after the check is not read unchecked."""
    # `bpe:300` needs a library: the corpus is inspected in a process of its own.
    data = DataSpec(source=str(corpus), context=32, tokenizer="bpe:300")
    files = list_source(data, (corpus,))
    before = inspect_corpus(data)
    (corpus / "late.txt").write_text("not checked\n" * 40)
    assert inspect_corpus(data, files) == before
    assert inspect_corpus(data) != before


def test_a_data_set_by_name_is_not_listed_here(listings):
    assert list_source(DataSpec(source="hf:owner/name"), ()) is None
    assert listings == []


def test_nothing_outside_of_the_roots_is_listed(listings, tmp_path):
    with pytest.raises(Problem, match="WARMSCALE_DATA_ROOTS"):
        list_source(DataSpec(source="/etc"), (tmp_path,))
    assert listings == []


def test_a_refused_submission_writes_nothing(shared_api, study_spec, corpus):
    other = {"source": str(corpus), "context": 32, "hash": "0" * 64}
    count = select(func.count()).select_from(Study)
    with shared_api.sessions() as session:
        before = session.scalar(count)
    with pytest.raises(ServiceError, match="the corpus has hash"):
        shared_api.client.post("/v1/studies", study_spec(data=other))
    with shared_api.sessions() as session:
        assert session.scalar(count) == before
