"""The lease protocol under every order of events that Hypothesis thinks of, on two replicas.

Rules act on one study over HTTP, many of them from several threads at once and through both
replicas; the model holds what may be answered. Whatever happened, the study can then be brought to
its end, and the one checker of what must always hold finds nothing.

A long run: WARMSCALE_STATEFUL_EXAMPLES=300 pytest tests/service/whole_service/test_stateful.py
"""

import functools
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus

import pytest
from hypothesis import HealthCheck, Phase, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, run_state_machine_as_test
from sqlalchemy import func, select, text, update

from service.client import Client, ServiceError, StaleLeaseError
from service.database.tables import Run
from service.lifecycle import (
    FINAL_RUN_STATES,
    FINAL_STUDY_STATES,
    LIVE_RUN_STATES,
    state_after_attempt,
)
from tests.by_hand import Worker, forget_presence
from tests.conftest import fresh_database, scratch, serving, settings_below, violations

EXAMPLES = int(os.environ.get("WARMSCALE_STATEFUL_EXAMPLES", "0"))
TRIALS, PARALLEL, MAX_ATTEMPTS = 5, 3, 3
OUTCOMES = ("succeeded", "pruned", "diverged", "failed", "released")
_names = itertools.count()

some = st.integers(0, 7)  # which of the leases: modulo how many there are
threads = st.integers(1, 6)
ends = st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=4)


def noted(step):
    """Keeps what a step of the machine fails by: threads may do otherwise when it is replayed."""

    @functools.wraps(step)
    def run(self, *arguments, **options):
        try:
            return step(self, *arguments, **options)
        except Exception as error:
            self.failures.append(error)
            raise

    return run


def rule(**strategies):
    return lambda step: stateful.rule(**strategies)(noted(step))


@dataclass
class Held:
    """A lease as the model sees it."""

    lease: object
    end: str | None = None  # the state that it led to; queued: another attempt has the run
    may_be_taken: bool = False  # its time was moved to its end

    @property
    def ended(self):
        return self.end is not None


@dataclass
class Finished:
    """An answer to a finish: the lease, what was said, and the state or the refusal."""

    held: Held
    outcome: str
    answer: object


class Protocol(RuleBasedStateMachine):
    def __init__(self, replicas, study_spec, failures):
        super().__init__()
        self.failures = failures
        self.replicas, self.turn = replicas, itertools.cycle(replicas)
        self.pool = ThreadPoolExecutor(8)
        self.held: list[Held] = []
        self.seen: dict[str, tuple] = {}
        self.cancelled = False
        self.spec = study_spec(
            name=f"stateful-{next(_names)}",
            hpo={"trials": TRIALS, "parallel": PARALLEL, "sampler": "random", "pruner": "none"},
            warmstart={"seeds": 1, "control": True},
            max_attempts=MAX_ATTEMPTS,
        )

    @property
    def sessions(self):
        return self.replicas[0].api.sessions

    @initialize(is_cancelled_at_the_end=st.booleans())
    def submit(self, is_cancelled_at_the_end):
        self.is_cancelled_at_the_end = is_cancelled_at_the_end
        study = next(self.turn).client.post("/v1/studies", self.spec)
        self.study, self.path = study["id"], f"/v1/studies/{study['id']}"

    def at_once(self, *calls):
        """Everything that `calls` return, or raise as a refusal; all of them sent at once."""
        return [future.result() for future in [self.pool.submit(_refusable, c) for c in calls]]

    def pick(self, which):
        return self.held[which % len(self.held)] if self.held else None

    # What is sent

    def lease_call(self, n=1):
        worker = next(self.turn).worker
        return lambda: worker.lease(n, study=self.study)

    def finish_call(self, held, outcome):
        worker = next(self.turn).worker
        return lambda: Finished(held, outcome, _refusable(lambda: _finish(worker, held, outcome)))

    def steer_call(self, verb):
        client = next(self.turn).client
        return lambda: client.post(f"{self.path}/{verb}")

    # What is made of the answers: ends first, for what was granted at once with them

    def learn(self, answers):
        for answer in answers:
            if isinstance(answer, Finished):
                self.learn_end(answer)
        grants = [one for a in answers if isinstance(a, tuple) for one in a]
        for lease in sorted(grants, key=lambda lease: (lease.run_id, lease.attempt)):
            self.learn_grant(lease)

    def learn_grant(self, lease):
        before = [h for h in self.held if h.lease.run_id == lease.run_id]
        assert lease.attempt == len(before) + 1, "attempts are counted without a gap"
        assert lease.lease_token not in {h.lease.lease_token for h in self.held}
        assert all(h.ended or h.may_be_taken for h in before), f"{lease.run_id} leased twice"
        for held in before:
            held.end = "queued"
        self.held.append(Held(lease))

    def learn_end(self, finished):
        if not isinstance(finished.answer, Exception):
            finished.held.end = finished.answer

    def check_ends(self, held, was_live, answers):
        """Ends of one attempt that were sent at once: one of them counted, and the rest agree."""
        said = [a for a in answers if isinstance(a, Finished)]
        states = {a.answer for a in said if not isinstance(a.answer, Exception)}
        refused = [a for a in said if isinstance(a.answer, Exception)]
        assert all(isinstance(a.answer, StaleLeaseError) for a in refused)
        assert len(states) <= 1, f"one attempt had several ends: {states}"
        if held.ended:
            assert states == {held.end} - {"queued"}, f"ended as {held.end}, and then as {states}"
            return
        if was_live:
            assert states, "a live lease was refused its end"
        for state in states & {"queued"}:
            assert len(said) - len(refused) == 1, f"{state} twice"
        for state in states - {"queued"}:
            assert not refused, f"an end as {state} was refused the second time"

    # Rules

    @rule(askers=threads, n=st.integers(1, 2))
    def ask(self, askers, n):
        self.learn(self.at_once(*(self.lease_call(n) for _ in range(askers))))

    @rule(which=some, outcomes=ends)
    def finish_at_once(self, which, outcomes):
        if (held := self.pick(which)) is None:
            return
        was_live = not (held.ended or held.may_be_taken)
        answers = self.at_once(*(self.finish_call(held, outcome) for outcome in outcomes))
        self.check_ends(held, was_live, answers)
        self.learn(answers)
        if was_live and len(outcomes) == 1:
            self.check_table(held, answers[0])

    def check_table(self, held, finished):
        run = self.replicas[0].client.get(f"/v1/runs/{held.lease.run_id}")
        expected = state_after_attempt(
            finished.outcome, retryable=True, failures=run["failures"], max_attempts=MAX_ATTEMPTS
        )
        assert finished.answer == ("cancelled" if self.cancelled else expected)

    @rule(which=some, askers=threads, outcome=st.sampled_from(OUTCOMES))
    def expire_against_a_finish_a_report_and_a_poll(self, which, askers, outcome):
        held = self.expire(which)
        if held is None:
            return
        report = self.report_call(held, 5)
        calls = [self.finish_call(held, outcome), report]
        answers = self.at_once(*calls, *(self.lease_call() for _ in range(askers)))
        self.check_ends(held, False, answers)
        self.learn(answers)

    def expire(self, which):
        held = self.pick(which)
        if held is None or held.ended:
            return None
        held.may_be_taken = True
        mine = (Run.id == held.lease.run_id, Run.lease_token == held.lease.lease_token)
        late = text("now() - interval '1 s'")
        with self.sessions.begin() as session:
            session.execute(
                update(Run).where(*mine, Run.state == "leased").values(lease_expires_at=late)
            )
        return held

    @rule(which=some)
    def a_lease_runs_out(self, which):
        self.expire(which)

    @rule(which=some, askers=threads, outcome=st.sampled_from(OUTCOMES))
    def a_worker_wakes_up_after_its_run_was_given_to_another(self, which, askers, outcome):
        self.ask(1, 1)
        if self.expire(which) is None:
            return
        self.ask(1, 1)  # takes it back
        self.every_retry_is_due()
        self.ask_while_what_is_queued_is_locked(1 + askers)
        self.ask(2, 1)
        for held in [h for h in self.held if self.is_superseded(h)]:
            self.refuse_every_write(held, outcome)

    def ask_while_what_is_queued_is_locked(self, askers):
        """Who reads a run without its lock has decided by the time that it can be written."""
        queued = select(Run.id).where(Run.study_id == self.study, Run.state == "queued")
        with self.sessions.begin() as session:
            session.execute(queued.with_for_update()).all()
            asked = [self.pool.submit(_refusable, self.lease_call()) for _ in range(askers)]
            time.sleep(0.1)
        self.learn([one.result() for one in asked])

    def is_superseded(self, held):
        mine = held.lease
        return any(
            (h.lease.run_id, h.lease.attempt) == (mine.run_id, mine.attempt + 1) for h in self.held
        )

    def refuse_every_write(self, held, outcome):
        """Nothing that a superseded attempt sends is taken, and nothing changes by it."""
        before, worker = self.on_record(held.lease.run_id), next(self.turn).worker
        finished = self.finish_call(held, outcome)().answer
        published = _refusable(lambda: worker.publish(held.lease, step=19, final=True))
        reported = _refusable(self.report_call(held, 19))
        for answer in (finished, published, reported):
            assert isinstance(answer, StaleLeaseError), f"a stale token was good for {answer}"
        assert self.on_record(held.lease.run_id) == before

    def on_record(self, run_id):
        client, path = self.replicas[0].client, f"/v1/runs/{run_id}"
        rows = [client.get(f"{path}/{what}") for what in ("measurements", "checkpoints")]
        with self.sessions() as session:
            run = session.get_one(Run, run_id)
            return client.get(path), rows, (run.lease_token, run.lease_expires_at)

    @rule()
    def every_retry_is_due(self):
        with self.sessions.begin() as session:
            queued = update(Run).where(Run.study_id == self.study, Run.state == "queued")
            session.execute(queued.values(available_at=func.now()))

    @rule(which=st.integers(0, 1))
    def a_replica_comes_back_from_an_absence(self, which):
        forget_presence(self.replicas[which].api)

    def report_call(self, held, step):
        worker = next(self.turn).worker
        return lambda: worker.report(
            held.lease, {"step": step, "tokens": step * 256, "loss_nats": float(held.lease.attempt)}
        )

    @rule(which=some, step=st.integers(1, 20), reporters=threads)
    def report_at_once(self, which, step, reporters):
        if (held := self.pick(which)) is None:
            return
        answers = self.at_once(*(self.report_call(held, step) for _ in range(reporters)))
        if held.ended:
            assert all(isinstance(a, StaleLeaseError) or a == "cancel" for a in answers), answers
        elif not held.may_be_taken:
            assert set(answers) == {"cancel" if self.cancelled else "continue"}

    @rule(which=some, step=st.integers(1, 20), final=st.booleans(), publishers=threads)
    def publish_at_once(self, which, step, final, publishers):
        if (held := self.pick(which)) is None:
            return
        worker = next(self.turn).worker
        call = lambda: worker.publish(held.lease, step=step, final=final).decision  # noqa: E731
        answers = self.at_once(*[call] * publishers)
        if held.ended:
            assert all(isinstance(a, StaleLeaseError) or a == "cancel" for a in answers), answers
        elif not held.may_be_taken:
            assert set(answers) == {"cancel" if self.cancelled else "continue"}

    @rule(verbs=st.lists(st.sampled_from(("pause", "resume")), min_size=1, max_size=4))
    def pause_and_resume_at_once(self, verbs):
        answers = self.at_once(*(self.steer_call(verb) for verb in verbs), self.lease_call(2))
        self.learn(answers)
        assert all(a.status == 409 for a in answers if isinstance(a, ServiceError)), answers

    @rule(which=some, outcome=st.sampled_from(OUTCOMES), really=st.integers(0, 3))
    def cancel_against_a_finish(self, which, outcome, really):
        if really or (held := self.pick(which)) is None:  # seldom: little can follow
            return
        was_live = not (held.ended or held.may_be_taken)
        answers = self.at_once(
            self.steer_call("cancel"), self.finish_call(held, outcome), self.lease_call()
        )
        if not isinstance(answers[0], Exception):
            self.cancelled = True
        self.check_ends(held, was_live, answers)
        self.learn(answers)
        if self.cancelled:
            for one in self.held:
                one.may_be_taken = True

    @rule(lr=st.sampled_from((0.002, 0.004)), senders=threads)
    def enqueue_with_a_key(self, lr, senders):
        client = next(self.turn).client
        body, key = {"params": {"lr": lr}}, f"lr {lr}"
        call = lambda: client.post(f"{self.path}/trials", body, idempotency_key=key)  # noqa: E731
        answers = self.at_once(*[call] * senders)
        assert all(a.status == 409 for a in answers if isinstance(a, ServiceError)), answers
        assert len({a["number"] for a in answers if not isinstance(a, Exception)}) <= 1

    @rule(senders=threads)
    def start_targets_with_a_key(self, senders):
        client, body = next(self.turn).client, {"target": {"width": 64}}
        call = lambda: client.post(f"{self.path}/targets", body, idempotency_key="k")  # noqa: E731
        answers = self.at_once(*[call] * senders)
        assert all(a.status == 409 for a in answers if isinstance(a, ServiceError)), answers
        started = [tuple(r["id"] for r in a["items"]) for a in answers if isinstance(a, dict)]
        assert len(set(started)) <= 1

    # What holds after every step

    @stateful.invariant()
    @noted
    def what_is_over_stays_and_what_counts_only_grows(self):
        if not hasattr(self, "study"):
            return
        with self.sessions() as session:
            runs = list(session.scalars(select(Run).where(Run.study_id == self.study)))
        tokens = {h.lease.lease_token for h in self.held}
        for run in runs:
            now = (run.attempt, run.failures, run.step)
            before = self.seen.get(run.id)
            if before is not None:
                state, counts, loss = before
                assert all(a >= b for a, b in zip(now, counts, strict=True)), run.id
                if state in FINAL_RUN_STATES:
                    assert (run.state, now, run.val_loss_nats) == (state, counts, loss)
            self.seen[run.id] = (run.state, now, run.val_loss_nats)
            assert run.state != "leased" or run.lease_token in tokens, "granted, and told nobody"
        live = [run.id for run in runs if run.state in LIVE_RUN_STATES]
        assert not (self.cancelled and live), f"{live} outlive their cancelled study"
        trials = [run for run in runs if run.kind == "trial"]
        assert len(trials) <= TRIALS
        assert sum(run.state in ("queued", "leased") for run in trials) <= PARALLEL
        own = [(r.arm, r.seed) for r in runs if r.kind == "target" and r.launch == 0]
        assert len(own) == len(set(own)) <= 2
        by_hand = {r.launch for r in runs if r.launch}
        assert len(by_hand) <= 1, "targets that were asked for with one key started twice"

    @noted
    def teardown(self):
        if hasattr(self, "study"):
            if self.is_cancelled_at_the_end:
                self.cancel_what_is_leased()
            self.bring_to_its_end()
            assert violations(self.replicas[0].api.engine) == ()
        self.pool.shutdown()

    def cancel_what_is_leased(self):
        """Every worker hears it, whatever it sends, and nothing is leased again."""
        _refusable(self.steer_call("resume"))
        self.ask(1, 2)
        live = [held for held in self.held if not (held.ended or held.may_be_taken)]
        answer = _refusable(self.steer_call("cancel"))
        if isinstance(answer, Exception):
            assert answer.status == HTTPStatus.CONFLICT
            return  # it has ended
        self.cancelled = self.cancelled or answer["state"] == "cancelled"
        self.what_is_over_stays_and_what_counts_only_grows()
        for held in live:
            worker = next(self.turn).worker
            assert self.report_call(held, 3)() == "cancel"
            assert worker.publish(held.lease, step=3, final=False).decision == "cancel"
            assert self.finish_call(held, "succeeded")().answer == "cancelled"
            held.end = "cancelled"
        assert self.lease_call(8)() == ()

    def bring_to_its_end(self):
        client, worker = self.replicas[0].client, self.replicas[1].worker
        _refusable(lambda: client.post(f"{self.path}/resume"))
        for held in self.held:
            if not held.ended:
                _refusable(lambda h=held: worker.complete(h.lease))
        for _ in range(8 * TRIALS):
            self.every_retry_is_due()
            for lease in worker.lease(8, study=self.study):
                worker.complete(lease)
            view = client.get(self.path)
            live = [view[k][s] for k in ("trials", "targets") for s in ("queued", "leased")]
            if view["state"] in FINAL_STUDY_STATES and not any(live):
                break
        assert view["state"] in FINAL_STUDY_STATES, view
        assert not any(live), view
        assert (view["state"] == "cancelled") <= self.cancelled
        if view["state"] == "completed":
            ended = [view["trials"][s] for s in ("succeeded", "pruned", "failed")]
            assert sum(ended) == TRIALS


def _refusable(call):
    """What a call returns, or how it was refused; anything else that goes wrong is raised."""
    try:
        return call()
    except ServiceError as error:
        if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return error
        raise


def _finish(worker, held, outcome):
    return worker.finish(held.lease, outcome, loss=2.0)


@dataclass
class Replica:
    api: object
    client: Client
    worker: Worker


@pytest.fixture
def replicas(postgres):
    """Two replicas on one database whose leases end only where a rule says so."""
    with (
        scratch() as home,
        fresh_database(postgres) as url,
        serving(_patient(home), url) as one,
        serving(_patient(home), url) as two,
    ):
        found = []
        for api in (one, two):
            client = Client(api.url, one.key, patience_seconds=0)
            found.append(Replica(api, client, Worker(client)))
        yield found
        for replica in found:
            replica.client.close()


def _patient(home):
    return settings_below(home).model_copy(update={"lease_seconds": 3600.0})


@pytest.mark.timeout(0 if EXAMPLES else 300)
def test_no_order_of_events_breaks_the_lease_protocol(replicas, study_spec):
    profile = settings(
        max_examples=EXAMPLES or 7,
        stateful_step_count=40 if EXAMPLES else 20,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        phases=(Phase.generate,),  # threads do not repeat themselves: shrinking would chase luck
        suppress_health_check=list(HealthCheck),
    )
    failures = []
    try:
        run_state_machine_as_test(
            lambda: Protocol(replicas, study_spec, failures), settings=profile
        )
    except Exception as error:
        raise (failures or [error])[0] from error
