"""Rank 0 announces each act before it acts, and announces no run that it refuses."""

import pytest

from warmcore.checkpoint.checkpoint import MODEL, CheckpointCorruptError
from warmcore.training.leading import LeadingTraining
from warmcore.training.ranks import Beginning, Ranks
from warmcore.training.training import Training


@pytest.fixture
def log(monkeypatch):
    """Announcements and acts in their order, of a process that is alone."""
    log = []
    monkeypatch.setattr(Ranks, "announce_act", lambda _, act: log.append(("announced", act)))

    def record_calls_of(name):
        act = getattr(Training, name)

        def record_and_do(self, *arguments):
            log.append(("done", name))
            return act(self, *arguments)

        monkeypatch.setattr(Training, name, record_and_do)

    for name in ("__init__", "advance", "save"):
        record_calls_of(name)
    return log


def test_each_act_is_announced_before_it_is_done(run_spec, corpus, log, tmp_path):
    spec = run_spec(steps=1, evaluations=1)
    training = LeadingTraining.start(spec, corpus)
    list(training.train_to_end())
    path = training.save(tmp_path / "a").path
    LeadingTraining.resume(spec, corpus, path)
    acts = [("announced", "advance"), ("done", "advance")] * 3
    assert log == [
        ("announced", Beginning(how="start", spec=spec, checkpoint=None)),
        ("done", "__init__"),
        *acts,
        ("announced", "save"),
        ("done", "save"),
        ("announced", Beginning(how="resume", spec=spec, checkpoint=path)),
        ("done", "__init__"),
    ]


def test_a_run_that_is_refused_is_not_announced(run_spec, corpus, log, tmp_path):
    path = LeadingTraining.start(run_spec(), corpus).save(tmp_path / "a").path
    log.clear()
    with pytest.raises(ValueError, match="is of another run"):
        LeadingTraining.resume(run_spec(seed=1), corpus, path)
    with pytest.raises(ValueError, match="give both"):
        LeadingTraining.start(run_spec(), corpus, base=path)
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of 3 processes"):
        LeadingTraining.start(run_spec(), corpus, ranks=Ranks(size=3))
    (path / MODEL).write_bytes(b"")
    with pytest.raises(CheckpointCorruptError):
        LeadingTraining.resume(run_spec(), corpus, path)
    assert log == []


def test_a_training_that_follows_announces_nothing(run_spec, corpus, log, tmp_path):
    training = Training.start(run_spec(steps=1), corpus)
    list(training.train_to_end())
    training.save(tmp_path / "a")
    assert {kind for kind, _ in log} == {"done"}
