import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.protocol import FinishRequest, Lease
from warmcore.spec import CheckpointRef, GrowthSpec
from workers.run import Ending, Options, execute


class _After:
    """A drain flag that goes up when it was looked at `looks` times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture
def run(fake, client) -> Callable[..., Ending]:
    def run(lease: Lease, *, checkpoint_seconds: float = 1e9, **kwargs) -> Ending:
        options = Options(checkpoint_seconds=checkpoint_seconds)
        return execute(lease, client, options=options, **kwargs)

    return run


def _refs(written) -> tuple[CheckpointRef, ...]:
    newest_first = reversed(written.checkpoints)
    return tuple(CheckpointRef(uri=c.uri, hash=c.hash) for c in newest_first)


def _losses(written) -> dict[int, float | None]:
    return {m.step: m.loss_nats for m in written.curve}


def _path(uri: str) -> Path:
    return Path(urlsplit(uri).path)


def test_a_run_reports_its_whole_curve_one_measurement_per_step(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=20))
    assert run(written.lease) == "succeeded"
    assert [m.step for m in written.curve] == [0, 5, 10, 15, 20]
    assert [m.evaluation for m in written.curve] == [None, 1, 2, 3, 4]
    assert all(m.val_loss_nats for m in written.curve)
    assert written.curve[-1].val_loss_nats < written.curve[0].val_loss_nats


def test_a_finished_run_says_what_it_was_made_with(fake, make_lease, run) -> None:
    written = fake.offer(make_lease())
    run(written.lease)
    finish: FinishRequest = written.finish
    assert finish.outcome == "succeeded"
    assert finish.val_loss_nats == written.curve[-1].val_loss_nats
    assert len(finish.provenance.code_hash) == len(finish.provenance.data_hash) == 64
    assert {"torch", "python", "numpy"} <= finish.provenance.packages.keys()
    assert finish.provenance.num_threads == 1
    assert finish.timing.train_seconds > 0
    assert finish.timing.first_step_at < finish.timing.last_step_at
    seconds = sum(m.train_seconds or 0 for m in written.curve)
    assert seconds == pytest.approx(finish.timing.train_seconds)


def test_the_final_checkpoint_stands_before_the_run_is_finished(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=7))
    run(written.lease)
    (final,) = written.checkpoints
    assert final.final
    assert (final.step, final.tokens) == (7, 7 * 128)
    assert final.uri == f"{written.lease.artifact_uri}/step-00000007"
    assert _path(final.uri).is_dir()


def test_every_measurement_up_to_a_checkpoint_is_accepted_before_it(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=20, train={"log_every": 2}))
    run(written.lease, checkpoint_seconds=0.0)
    assert len(written.checkpoints) > 10
    measured = {0, *range(2, 21, 2), 5, 15}
    for checkpoint, steps in zip(written.checkpoints, written.steps_at_checkpoint, strict=True):
        assert steps == {step for step in measured if step <= checkpoint.step}
    assert [m.step for m in written.curve] == sorted(measured)


def test_a_resumed_run_ends_with_the_same_curve_bit_for_bit(fake, make_lease, run) -> None:
    whole = fake.offer(make_lease(num_steps=20, train={"log_every": 1}))
    run(whole.lease)
    first = fake.offer(make_lease(num_steps=20, train={"log_every": 1}))
    assert run(first.lease, draining=_After(8)) == "released"
    assert first.finish.outcome == "released"
    rest = fake.offer(
        make_lease(num_steps=20, train={"log_every": 1}, attempt=2, resume_from=_refs(first))
    )
    assert run(rest.lease) == "succeeded"
    assert _losses(first) | _losses(rest) == _losses(whole)
    assert not _losses(first).keys() & _losses(rest).keys()
    assert rest.finish.val_loss_nats == whole.finish.val_loss_nats


@pytest.mark.parametrize("damage", ["corrupt", "missing"])
def test_a_run_falls_back_to_the_next_older_checkpoint(fake, make_lease, run, damage) -> None:
    first = fake.offer(make_lease(num_steps=20, train={"log_every": 1}))
    run(first.lease, checkpoint_seconds=0.0, draining=_After(8))
    newest, *_ = _refs(first)
    if damage == "corrupt":
        weights = _path(newest.uri) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    else:
        _path(newest.uri).rename(_path(newest.uri).with_name("elsewhere"))
    second = fake.offer(make_lease(num_steps=20, train={"log_every": 1}, resume_from=_refs(first)))
    assert run(second.lease) == "succeeded"
    assert min(_losses(second)) == first.checkpoints[-2].step + 1


def test_without_a_usable_checkpoint_a_run_starts_again(fake, make_lease, run) -> None:
    gone = CheckpointRef(uri="file:///nowhere/step-1", hash="0" * 64)
    written = fake.offer(make_lease(resume_from=(gone,)))
    assert run(written.lease) == "succeeded"
    assert written.curve[0].step == 0


def test_a_run_whose_finish_was_lost_finishes_from_its_final_checkpoint(
    fake, make_lease, run
) -> None:
    first = fake.offer(make_lease(num_steps=10))
    run(first.lease)
    again = fake.offer(make_lease(num_steps=10, attempt=2, resume_from=_refs(first)))
    assert run(again.lease) == "succeeded"
    assert again.curve == []
    assert again.finish.val_loss_nats == first.finish.val_loss_nats


def test_a_target_grows_from_its_base_and_says_which(fake, make_lease, run) -> None:
    base = fake.offer(make_lease())
    run(base.lease)
    (ref,) = _refs(base)
    lease = make_lease()
    spec = lease.spec.model_copy(
        update={
            "model": lease.spec.model.model_copy(update={"width": 32, "base_width": 16}),
            "growth": GrowthSpec(base=ref),
        }
    )
    written = fake.offer(lease.model_copy(update={"spec": spec, "kind": "target", "arm": "warm"}))
    assert run(written.lease) == "succeeded"
    assert written.finish.provenance.base_hash == ref.hash


def test_a_pruned_run_stops_at_the_evaluation_and_keeps_its_curve(fake, make_lease, run) -> None:
    lease = make_lease(num_steps=3_000, train={"evaluations": 300})
    written = fake.offer(lease, prune_at_evaluation=2)
    assert run(written.lease) == "pruned"
    assert written.finish.outcome == "pruned"
    assert written.finish.val_loss_nats in {m.val_loss_nats for m in written.curve}
    assert written.curve[-1].step < 3_000
    assert written.checkpoints == []


def test_a_cancelled_run_stops_quietly(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=3_000, train={"evaluations": 300}))
    written.decision = "cancel"
    assert run(written.lease) == "cancelled"
    assert written.finish is None


def test_a_run_whose_lease_is_stale_writes_nothing_more(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=3_000, train={"evaluations": 300}))
    fake.stale.add(written.lease.run_id)
    assert run(written.lease) == "stale"
    assert written.curve == written.checkpoints == []
    assert written.finish is None


def test_a_diverged_run_says_why(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=300, train={"lr": 1e6, "grad_clip": None}))
    assert run(written.lease) == "diverged"
    assert written.finish.outcome == "diverged"
    assert "nan" in written.finish.error or "loss" in written.finish.error


def test_superseded_checkpoints_are_deleted(fake, make_lease, run, tmp_path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "checkpoint.json").write_text("{}")
    written = fake.offer(make_lease(), superseded=(old.as_uri(), "file:///not/there"))
    assert run(written.lease) == "succeeded"
    assert not old.exists()


def test_a_run_survives_an_outage(fake, make_lease, run) -> None:
    written = fake.offer(make_lease(num_steps=40))
    fake.away = True
    back = threading.Timer(1.0, lambda: setattr(fake, "away", False))
    back.start()
    assert run(written.lease) == "succeeded"
    back.join()
    assert [m.step for m in written.curve] == list(range(0, 41, 5))


def test_a_spec_that_cannot_run_is_a_value_error(fake, make_lease, run, tmp_path) -> None:
    lease = make_lease()
    data = lease.spec.data.model_copy(update={"source": str(tmp_path / "nothing")})
    spec = lease.spec.model_copy(update={"data": data})
    written = fake.offer(lease.model_copy(update={"spec": spec}))
    with pytest.raises(ValueError, match="nothing"):
        run(written.lease)
