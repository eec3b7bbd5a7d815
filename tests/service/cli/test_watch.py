import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from service.cli.output.eta import Pace, count_remaining_flops
from service.cli.output.watch import follow_study, format_clock, make_screen, watch_study
from service.client import Client, ServiceError
from service.specs.study import StudySpec
from service.studies.schemas import RunCounts, StudyView

HPO = {"trials": 2, "parallel": 2, "sampler": "random", "pruner": "none"}


@pytest.fixture
def script(worker):
    """Return a function that makes a `tick`: each call of the tick does the next step."""

    def make(*steps):
        left = list(steps)
        return lambda: left.pop(0)() if left else None

    return make


def finishing(worker, loss):
    """Return a step that completes the next trial with this loss."""

    def step():
        lease = worker.lease_one()
        worker.evaluate(lease, 1, loss)
        worker.complete(lease, loss=loss)

    return step


def test_plain_lines_tell_a_study_from_beginning_to_end(api, submit, worker, script, capsys):
    name = submit(hpo=HPO, target=None)["name"]
    tick = script(finishing(worker, 2.5), finishing(worker, 2.25))
    ended = watch_study(api.client, name, "plain", tick)
    lines = capsys.readouterr().out.splitlines()
    assert ended.state == "completed"
    assert lines[0] == "active | trials: none yet"
    assert lines[-1] == "completed | trials: 2 succeeded | best 2.2500 (trial 1)"


def test_a_run_that_was_seen_running_is_told_to_have_ended(api, submit, worker, capsys):
    name = submit(hpo=HPO, target=None)["name"]
    leases = list(worker.lease(2))
    moments = follow_study(api.client, name, lambda: None)
    assert {run.id for run in next(moments).running} == {lease.run_id for lease in leases}
    # The run ends between two polls.
    worker.complete(leases[0], loss=2.5)
    now = next(moments)
    assert [run.id for run in now.ended] == [leases[0].run_id]
    assert [run.id for run in now.running] == [leases[1].run_id]


def test_json_lines_are_printed_only_on_change(api, submit, worker, script, capsys):
    name = submit(hpo=HPO, target=None)["name"]
    # Several polls without a change: 12 ticks are more than two polls.
    nothing = [lambda: None] * 12
    tick = script(*nothing, finishing(worker, 2.5), *nothing, finishing(worker, 2.25))
    watch_study(api.client, name, "json", tick)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 3
    assert [line["trials"]["succeeded"] for line in lines] == [0, 1, 2]


class Flaky(Client):
    """A client that cannot reach the service for the next `failures` requests."""

    failures = 0

    def get(self, path, **params):
        if self.failures > 0:
            self.failures -= 1
            raise httpx.ConnectError("unreachable")
        return super().get(path, **params)


def test_a_watch_outlives_a_restart_of_the_service(api, submit, worker, capsys):
    name = submit(hpo=HPO, target=None)["name"]
    with Flaky(api.url, api.key, patience_seconds=0) as client:
        moments = follow_study(client, name, lambda: None)
        assert not next(moments).unreachable
        # Two polls fail, and the third succeeds again.
        client.failures = 2
        assert [next(moments).unreachable for _ in range(3)] == [True, True, False]


def test_a_study_that_is_not_there_is_no_restart(api):
    with pytest.raises(ServiceError):
        next(follow_study(api.client, "nope", lambda: None))


def test_a_tick_that_raises_ends_the_watch(api, submit):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch_study(api.client, submit()["name"], "plain", stop)


def test_the_live_picture_has_a_bar_for_each_running_run(api, submit, worker):
    name = submit(hpo=HPO, target=None)["name"]
    for lease in worker.lease(2):
        worker.evaluate(lease, 1, 2.5)
    now = next(follow_study(api.client, name, lambda: None))
    console = Console(width=160)
    with console.capture() as capture:
        console.print(make_screen(now, eta_seconds=75.0))
    shown = capture.get()
    assert shown.count("5/20") == 2
    assert "about 1:15 left" in shown


def view(trials=None, targets=None, cost=0.0, **changes):
    spec = {
        "name": "a-study",
        "data": {"source": "stdlib", "context": 32},
        "proxy": {"width": 32, "depth": 1, "head_dim": 16},
        "target": {"width": 64},
        "search_space": {"lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True}},
        "hpo": {"trials": 4},
    }
    return StudyView.model_validate(
        {
            "id": "st_1",
            "project": "default",
            "name": "a-study",
            "state": "active",
            "reason": None,
            "trials": trials or RunCounts(),
            "targets": targets or RunCounts(),
            "trials_budget": 4,
            "best_trial": None,
            "progress": 0.0,
            "cost_flops": cost,
            "warnings": (),
            "spec": StudySpec.model_validate(spec | changes),
            "created_at": "2026-01-01T00:00:00Z",
            "finished_at": None,
        }
    )


def test_a_fresh_study_has_all_of_its_flops_to_spend():
    study = view()
    # 4 trials, and 4 targets: two seeds, each warm and cold.
    trial, target = study.spec.trial_run(0).train_flops, study.spec.rung_run(0, 0).train_flops
    assert count_remaining_flops(study, []) == pytest.approx(4 * trial + 4 * target)


def test_a_finished_study_has_none():
    assert (
        count_remaining_flops(view(RunCounts(succeeded=3, pruned=1), RunCounts(succeeded=4)), [])
        == 0
    )


def test_a_ladder_counts_every_rung_and_one_cold_run_a_seed():
    study = view(RunCounts(succeeded=4), target=None, ladder=[{"width": 48}, {"width": 64}])
    low, high = (study.spec.rung_run(rung, 0).train_flops for rung in (0, 1))
    assert count_remaining_flops(study, []) == pytest.approx(2 * (low + 2 * high))


@given(st.floats(1e-3, 1e12), st.integers(6, 50))
def test_a_steady_pace_is_measured_exactly(speed, seconds):
    pace = Pace()
    for second in range(seconds):
        pace.note_cost(float(second), speed * second)
    assert pace.flops_per_second == pytest.approx(speed)


def test_a_pace_needs_time_and_progress():
    pace = Pace()
    assert pace.flops_per_second is None
    pace.note_cost(0.0, 0.0)
    pace.note_cost(1.0, 5.0)
    assert pace.flops_per_second is None
    # The cost stays at 5 FLOPs: without progress the pace has no speed.
    for second in range(2, 200):
        pace.note_cost(float(second), 5.0)
    assert pace.flops_per_second is None


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (75, "1:15"), (3723.4, "1:02:03")])
def test_a_clock_reads_as_people_read_it(seconds, shown):
    assert format_clock(seconds) == shown
