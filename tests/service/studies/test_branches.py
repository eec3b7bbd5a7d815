"""A target of several budgets, driven by hand: trunks, and the cooldowns that leave them."""

import contextlib
import json
import re
import threading

import pytest
from sqlalchemy import text

from service.cli.output.tables import make_results_parts, print_parts
from service.client import ServiceError
from service.leases import attempts, checkpoints
from service.protocol import CheckpointReport
from service.results.schemas import StudyResults
from service.specs.budgets import count_flops_with_branches
from service.specs.study import StudySpec
from service.studies import branches
from tests.by_hand import EVERYWHERE

BUDGETS = [2, 4]


@pytest.fixture
def api(shared_api):
    """A shared API; after each test its study is cancelled, with the runs started by hand."""
    yield shared_api
    for study in shared_api.client.get("/v1/studies", limit=1)["items"]:
        with contextlib.suppress(ServiceError):
            shared_api.client.post(f"/v1/studies/{study['id']}/cancel")


@pytest.fixture
def study(submit, worker):
    """A study of two budgets; its only trial has ended."""

    def study(**changes):
        spec = {
            "target": {"width": 64, "budgets": BUDGETS},
            "hpo": {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"},
            "warmstart": {"seeds": 2},
        }
        created = submit(**spec | changes)
        worker.complete(worker.lease_one(), 2.5)
        return created["name"]

    return study


@pytest.fixture
def view(api):
    return lambda name: api.client.get(f"/v1/studies/{name}")


def publish(worker, lease, step, *, final=False):
    return worker.publish(lease, step, final)


def checkpoint(lease, step):
    place = {"uri": f"{lease.artifact_uri}/step-{step:08d}", "hash": "0" * 64, "num_bytes": 1}
    return CheckpointReport(step=step, tokens=step * 256, **place)


def train_trunk(worker, lease):
    """Publish a checkpoint at every branch point, then finish."""
    steps = lease.spec.branch_steps
    for step in steps:
        publish(worker, lease, step, final=step == steps[-1])
    return worker.finish(lease, loss=2.2)


def test_the_last_trial_enqueues_a_trunk_for_each_arm_and_seed(study, worker, view):
    name = study()
    leases = worker.lease(8)
    assert sorted(lease.arm for lease in leases) == ["cold", "cold", "warm", "warm"]
    assert {lease.spec.branches for lease in leases} == {(2.0, 4.0)}
    assert {(lease.spec.growth is None) for lease in leases if lease.arm == "cold"} == {True}
    assert view(name)["progress"] == pytest.approx(1 / (1 + 4 * 3))


def test_each_branch_point_enqueues_its_run_where_it_is_published(study, worker, api):
    study()
    trunk = worker.lease_one()
    first, second = trunk.spec.branch_steps
    worker.lease(8)
    publish(worker, trunk, first - 1)
    assert worker.lease(8) == ()
    publish(worker, trunk, first)
    # Publish again, as a worker does when the answer was lost.
    publish(worker, trunk, first)
    (branch,) = worker.lease(8)
    assert (branch.kind, branch.arm, branch.params) == ("target", trunk.arm, trunk.params)
    assert branch.spec.trunk.uri == f"{trunk.artifact_uri}/step-{first:08d}"
    assert branch.spec.train.tokens_per_param == 2
    assert branch.spec.growth == trunk.spec.growth
    assert branch.spec.start_step == first
    run = api.client.get(f"/v1/runs/{branch.run_id}")
    assert (run["trunk_id"], run["branch"], run["step"]) == (trunk.run_id, 1, first)
    assert run["cost_flops"] == 0
    publish(worker, trunk, second, final=True)
    (last,) = worker.lease(8)
    assert last.spec.start_step == second


def test_a_branchs_checkpoint_is_kept_however_many_follow(study, worker, api):
    study()
    trunk = worker.lease_one()
    first, second = trunk.spec.branch_steps
    # Four checkpoints: the newest two are kept, and the first since a branch refers to it.
    replies = [publish(worker, trunk, s) for s in (first, first + 1, first + 2, first + 3)]
    superseded = [uri for reply in replies for uri in reply.superseded]
    assert superseded == [f"{trunk.artifact_uri}/step-{first + 1:08d}"]
    kept = api.client.get(f"/v1/runs/{trunk.run_id}/checkpoints")["items"]
    assert [row["step"] for row in kept] == [first + 3, first + 2, first]
    assert second > first + 3


def test_a_study_of_several_budgets_completes_with_its_last_branch(study, worker, view):
    name = study()
    for lease in worker.lease(8):
        assert train_trunk(worker, lease) == "succeeded"
    assert view(name)["state"] == "active"
    cooldowns = worker.lease(16)
    assert len(cooldowns) == 8
    for lease in cooldowns:
        assert view(name)["state"] == "active"
        publish(worker, lease, 2000, final=True)
        worker.finish(lease, loss=2.0)
    assert (view(name)["state"], view(name)["progress"]) == ("completed", 1.0)
    assert worker.lease(8) == ()


def test_a_trunk_that_skips_a_branch_point_has_not_succeeded(study, worker):
    study()
    trunk = worker.lease_one()
    first, second = trunk.spec.branch_steps
    publish(worker, trunk, second, final=True)
    with pytest.raises(ServiceError, match=f"publish the checkpoints at steps {first} of") as bad:
        worker.finish(trunk)
    assert bad.value.status == 422
    publish(worker, trunk, first)
    assert worker.finish(trunk) == "succeeded"


def test_the_next_attempt_of_a_trunk_does_not_branch_twice(study, worker, api):
    name = study()
    trunk = worker.lease_one()
    others = worker.lease(8)
    steps = trunk.spec.branch_steps
    publish(worker, trunk, steps[0])
    (branch,) = worker.lease(8)
    worker.finish(trunk, "released")
    (again,) = worker.lease(8)
    assert (again.run_id, again.attempt) == (trunk.run_id, 2)
    for step in steps:
        publish(worker, again, step, final=step == steps[-1])
    worker.finish(again)
    (second,) = worker.lease(8)
    assert {x.spec.start_step for x in (branch, second)} == set(steps)
    assert branch.spec.trunk.uri.startswith(trunk.artifact_uri)
    assert len(api.client.get("/v1/runs", study=name)["items"]) == 1 + 1 + len(others) + 2


def test_a_branch_that_fails_is_tried_again_from_its_trunk(study, worker):
    study()
    trunk = worker.lease_one()
    worker.lease(8)
    publish(worker, trunk, trunk.spec.branch_steps[0])
    (branch,) = worker.lease(8)
    worker.finish(branch, "released")
    (again,) = worker.lease(8)
    assert (again.run_id, again.spec, again.resume_from) == (branch.run_id, branch.spec, ())


def test_a_diverged_trunk_leaves_the_branches_that_it_has(study, worker, view):
    name = study(warmstart={"seeds": 1, "control": False})
    trunk = worker.lease_one()
    publish(worker, trunk, trunk.spec.branch_steps[0])
    worker.finish(trunk, "diverged", error="loss is nan")
    assert view(name)["state"] == "active"
    worker.finish(worker.lease_one(), loss=2.0)
    assert view(name)["state"] == "completed"


def test_a_study_whose_trunks_all_diverged_has_failed(study, worker, view):
    name = study(warmstart={"seeds": 1})
    for trunk in worker.lease(8):
        worker.finish(trunk, "diverged", error="loss is nan")
    assert (view(name)["state"], view(name)["reason"]) == ("failed", "no target run succeeded")


def test_a_paused_study_keeps_its_branches_until_it_goes_on(study, worker, api):
    name = study()
    trunk = worker.lease_one()
    worker.lease(8)
    api.client.post(f"/v1/studies/{name}/pause")
    publish(worker, trunk, trunk.spec.branch_steps[0])
    assert worker.lease(8) == ()
    api.client.post(f"/v1/studies/{name}/resume")
    assert len(worker.lease(8)) == 1


def test_a_cancelled_study_branches_no_more(study, worker, api):
    name = study()
    trunk = worker.lease_one()
    api.client.post(f"/v1/studies/{name}/cancel")
    assert publish(worker, trunk, trunk.spec.branch_steps[0]).decision == "cancel"
    assert {r["state"] for r in api.client.get("/v1/runs", study=name, kind="target")["items"]} == {
        "cancelled"
    }


def test_a_cancel_during_a_publish_misses_no_branch(study, worker, api):
    """The publish holds the study's lock: the cancel waits for it and sees the new branch."""
    name = study()
    trunk = worker.lease_one()
    step = trunk.spec.branch_steps[0]
    cancelled = threading.Thread(target=api.client.post, args=(f"/v1/studies/{name}/cancel",))
    with api.sessions.begin() as session:
        branches.lock_branching_study(session, trunk.run_id, step)
        run = attempts.renew_lease(session, EVERYWHERE, trunk.run_id, trunk.lease_token, 60)
        cancelled.start()
        _wait_for_a_waiting_lock(api)
        checkpoints.write_checkpoint(session, run, checkpoint(trunk, step))
    cancelled.join()
    found = api.client.get("/v1/runs", study=name, kind="target")["items"]
    assert {run["state"] for run in found} == {"cancelled"}
    assert {run["branch"] for run in found} == {0, 1}


def test_a_crash_in_the_middle_of_a_publish_leaves_neither_checkpoint_nor_branch(
    study, worker, api
):
    study()
    trunk = worker.lease_one()
    worker.lease(8)
    step = trunk.spec.branch_steps[0]
    # The exception rolls the transaction back, as a kill of the process does.
    with pytest.raises(ZeroDivisionError), api.sessions.begin() as session:
        branches.lock_branching_study(session, trunk.run_id, step)
        run = attempts.renew_lease(session, EVERYWHERE, trunk.run_id, trunk.lease_token, 60)
        checkpoints.write_checkpoint(session, run, checkpoint(trunk, step))
        raise ZeroDivisionError
    assert api.client.get(f"/v1/runs/{trunk.run_id}/checkpoints")["items"] == []
    assert worker.lease(8) == ()
    publish(worker, trunk, step)
    assert len(worker.lease(8)) == 1


def _wait_for_a_waiting_lock(api):
    query = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    with api.sessions() as session:
        while not session.scalar(query):
            session.rollback()


LOSSES = {("warm", 2): 2.0, ("cold", 2): 2.3, ("warm", 4): 1.9, ("cold", 4): 1.9}


@pytest.fixture
def found(study, worker, api):
    """The results of a study with a validation loss at every branch point of its trunks."""
    name = study()
    for trunk in worker.lease(8):
        for k, step in enumerate(trunk.spec.branch_steps, start=1):
            point = {"step": step, "tokens": step * 256, "val_loss_nats": 2.6 - k / 10}
            worker.report(trunk, point | {"evaluation": k})
        train_trunk(worker, trunk)
    # The branches: each ends at the step at which its budget is trained.
    for lease in worker.lease(16):
        total = lease.spec.num_tokens
        loss = LOSSES[lease.arm, lease.spec.train.tokens_per_param]
        worker.report(lease, {"step": total // 256, "tokens": total, "val_loss_nats": loss})
        publish(worker, lease, total // 256, final=True)
        worker.finish(lease, loss=loss)
    return StudyResults.model_validate(api.client.get(f"/v1/studies/{name}/results"))


def test_each_budget_has_a_verdict_of_its_own_and_the_largest_is_the_studys(found):
    first, second = found.budgets
    assert [b.tokens_per_param for b in found.budgets] == BUDGETS
    assert first.verdict.difference_nats == pytest.approx(-0.3)
    assert first.verdict.grow
    assert second.verdict.difference_nats == 0
    assert not second.verdict.grow
    assert (found.verdict, found.costs) == (second.verdict, second.costs)
    for budget in found.budgets:
        assert {pair.tokens for pair in budget.verdict.pairs} == {budget.num_tokens}


def test_a_budget_costs_its_own_run_whole_and_the_study_what_was_trained(found):
    trunks = [t for t in found.targets if t.is_trunk]
    cooldowns = [t for t in found.targets if t.branch]
    for budget in found.budgets:
        (alone,) = {t.alone_flops for t in cooldowns if t.budget == budget.tokens_per_param}
        assert budget.costs.warm_flops == budget.costs.cold_flops == pytest.approx(alone)
        per_token = trunks[0].cost_flops / trunks[0].tokens
        assert alone == pytest.approx(per_token * budget.num_tokens)
    spent = sum(t.cost_flops for t in (*trunks, *cooldowns))
    assert found.costs.targets_flops == pytest.approx(spent)
    assert found.costs.total_flops == pytest.approx(spent + found.costs.search_flops)
    assert found.costs.targets_alone_flops == pytest.approx(sum(t.alone_flops for t in cooldowns))
    assert spent < found.costs.targets_alone_flops


def test_what_a_study_will_spend_is_what_it_spent(found, api):
    spec = StudySpec.model_validate(api.client.get(f"/v1/studies/{found.study_name}")["spec"])
    # Two arms with two seeds: four trunks, each with its cooldowns.
    each = count_flops_with_branches(spec.rung_run(0, seed=0))
    assert found.costs.targets_flops == pytest.approx(4 * each)
    assert spec.num_target_runs == len(found.targets)


def test_a_branchs_curve_is_its_trunks_up_to_where_it_left(found):
    for run in found.targets:
        if run.branch:
            losses = [point.val_loss_nats for point in run.curve]
            assert losses == [*[2.5, 2.4][: run.branch], run.val_loss_nats]


def test_a_budget_waits_for_its_own_runs_alone(study, worker, api):
    name = study(warmstart={"seeds": 1})
    # Both trunks have only the first branch point: the first budget can be judged, the second not.
    warm, cold = sorted(worker.lease(8), key=lambda lease: lease.arm, reverse=True)
    for trunk in (warm, cold):
        publish(worker, trunk, trunk.spec.branch_steps[0])
    for lease in worker.lease(8):
        worker.finish(lease, loss=2.0)
    read = StudyResults.model_validate(api.client.get(f"/v1/studies/{name}/results"))
    first, second = read.budgets
    assert first.verdict is not None
    assert (
        second.pending
        == read.pending
        == (
            "2 of 2 target runs are unfinished: cold seed 0's trunk is leased, "
            "warm seed 0's trunk is leased"
        )
    )
    worker.finish(warm, "diverged", error="loss is nan")
    train_trunk(worker, cold)
    worker.finish(worker.lease_one(), loss=2.0)
    read = StudyResults.model_validate(api.client.get(f"/v1/studies/{name}/results"))
    assert read.budgets[0].verdict is not None
    assert "warm seed 0's trunk diverged" in (read.budgets[1].pending or "")


def test_a_target_of_several_budgets_can_be_started_by_hand(study, worker, api):
    name = study(target=None)
    path, target = f"/v1/studies/{name}/targets", {"width": 64, "budgets": BUDGETS}
    for budgets in ([4], [4, 2]):
        with pytest.raises(ServiceError) as refused:
            api.client.post(path, {"target": target | {"budgets": budgets}})
        assert refused.value.problem["errors"][0]["path"] == "target.budgets"
    started = api.client.post(path, {"target": target})["items"]
    assert len(started) == 4
    for trunk in worker.lease(8):
        train_trunk(worker, trunk)
    assert len(worker.lease(16)) == 8


def test_the_report_and_the_tables_show_the_gain_by_budget(found, api, capsys):
    page = api.client.request("GET", f"/v1/studies/{found.study_name}/report").text
    assert "Gain against tokens per parameter" in page
    assert "At 4 tokens per parameter" in page
    figures = re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    seeds, means = json.loads(figures)["budgets"]["data"]
    assert means["x"] == BUDGETS
    assert means["y"] == pytest.approx([-0.3, 0])
    assert len(seeds["x"]) == 4
    print_parts(*make_results_parts(found))
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 172,544 -0.3000 -0.3000 to -0.3000" in printed
    assert "warm at 2 tpp" in printed
    assert "the same without sharing" in printed
