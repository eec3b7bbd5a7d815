"""Results of a study as the API reports them, from the first trial to the verdict."""

import pytest

from service.client import ServiceError
from service.results.schemas import StudyResults

STEPS, TOKENS_PER_STEP = 20, 256


@pytest.fixture
def train(worker):
    """Return a function that runs a lease to its end by hand, with a curve that ends at `loss`."""

    def run(lease, loss):
        # The curve falls by 0.1 nats per evaluation: loss + 0.3, + 0.2, + 0.1, + 0.
        for evaluation in (1, 2, 3, 4):
            worker.evaluate(lease, evaluation, loss + (4 - evaluation) / 10)
        return worker.complete(lease, loss=loss)

    return run


@pytest.fixture
def study(submit, worker, train):
    """Return the name of a study with two finished trials, at losses 2.5 and 2.4."""
    created = submit(
        hpo={"trials": 2, "parallel": 2, "sampler": "random", "pruner": "none"},
        warmstart={"seeds": 2},
    )
    for loss in (2.5, 2.4):
        train(worker.lease_one(), loss)
    return created["name"]


@pytest.fixture
def results(api):
    def read(name):
        return StudyResults.model_validate(api.client.get(f"/v1/studies/{name}/results"))

    return read


def test_a_study_without_trials_waits_for_them(submit, results):
    found = results(submit()["name"])
    assert found.verdict is None
    assert found.best_trial is None
    assert found.pending == "0 of 4 trials are finished; the target starts after the last"


def test_the_best_trial_is_the_one_that_targets_grow_from(study, results, worker):
    found = results(study)
    assert found.best_trial
    assert found.best_trial.val_loss_nats == 2.4
    assert found.best_trial.checkpoint
    warm = [t for t in found.targets if t.arm == "warm"]
    assert {t.base_hash for t in warm} == {found.best_trial.checkpoint.hash}
    assert {t.base_hash for t in found.targets if t.arm == "cold"} == {None}
    leases = worker.lease(4)
    bases = [x.spec.growth.base for x in leases if x.spec.growth is not None]
    assert bases == [found.best_trial.checkpoint] * 2


def test_there_is_no_verdict_until_the_last_target_run_has_ended(study, results, worker, train):
    # Two seeds with a warm and a cold run each.
    for remaining in (4, 3, 2, 1):
        pending = results(study).pending
        assert pending
        assert pending.startswith(f"{remaining} of 4 target runs are unfinished")
        lease = worker.lease_one()
        train(lease, 2.0 if lease.arm == "warm" else 2.2)
    found = results(study)
    assert found.pending is None
    assert found.verdict
    assert found.state == "completed"


def test_the_verdict_pairs_the_runs_that_share_a_seed(study, results, worker, train):
    losses = {("warm", 0): 2.0, ("cold", 0): 2.2, ("warm", 1): 1.9, ("cold", 1): 2.1}
    numbers = {t.run_id: t.seed_number for t in results(study).targets}
    for lease in worker.lease(4):
        train(lease, losses[lease.arm, numbers[lease.run_id]])
    verdict = results(study).verdict
    assert verdict
    pairs = {p.seed_number: (p.warm_loss_nats, p.cold_loss_nats) for p in verdict.pairs}
    assert pairs == {0: (2.0, 2.2), 1: (1.9, 2.1)}
    assert verdict.grow
    assert verdict.growth.g_width == 2.0


def test_costs_add_up(study, results, worker, train):
    for lease in worker.lease(4):
        train(lease, 2.0)
    costs = results(study).costs
    assert costs.warm_flops
    assert costs.cold_flops == costs.warm_flops
    assert costs.base_flops
    assert costs.warm_base_counted_flops == costs.warm_flops + costs.base_flops
    # Both trials train equally long, and the base is one of them.
    assert costs.search_flops == pytest.approx(2 * costs.base_flops)
    assert costs.total_flops == pytest.approx(costs.search_flops + 4 * costs.warm_flops)


def test_a_diverged_target_is_shown_as_one(study, results, worker, train):
    first, *others = worker.lease(4)
    worker.finish(first, "diverged", error="loss is nan at step 3")
    for lease in others:
        train(lease, 2.0)
    found = results(study)
    (diverged,) = [t for t in found.targets if t.diverged]
    assert (diverged.state, diverged.error) == ("failed", "loss is nan at step 3")
    assert found.verdict
    # Of two seeds one lost its run; a single seed has no interval.
    assert found.verdict.seeds == 1
    assert not found.verdict.grow


def test_a_cancelled_study_says_that_its_target_never_started(submit, api, results):
    name = submit()["name"]
    api.client.post(f"/v1/studies/{name}/cancel")
    assert results(name).pending == "the study is cancelled; its target never started"


def test_a_study_without_a_target_has_nothing_to_judge(submit, worker, train, results):
    hpo = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}
    name = submit(target=None, hpo=hpo)["name"]
    train(worker.lease_one(), 2.0)
    assert "no target" in (results(name).pending or "")


def test_curves_are_in_order_of_steps_and_end_at_the_final_loss(study, results, worker, train):
    for lease in worker.lease(4):
        train(lease, 2.0)
    for target in results(study).targets:
        steps = [p.step for p in target.curve]
        assert steps == sorted(steps)
        assert len(steps) == 4
        assert target.curve[-1].val_loss_nats == target.val_loss_nats


def test_the_report_is_a_page_at_every_stage(submit, api, worker, train):
    hpo = {"trials": 2, "parallel": 2, "sampler": "random", "pruner": "none"}
    name = submit(hpo=hpo)["name"]
    pages = [_report(api, name)]
    for lease in worker.lease(2):
        train(lease, 2.0)
    pages.append(_report(api, name))
    for lease in worker.lease(4):
        train(lease, 2.0)
    pages.append(_report(api, name))
    # Before any trial, after the trials, and after the targets. Equal losses show nothing.
    assert [("No verdict yet" in page, "Not shown" in page) for page in pages] == [
        (True, False),
        (True, False),
        (False, True),
    ]


def _report(api, name):
    response = api.client.request("GET", f"/v1/studies/{name}/report")
    assert response.headers["content-type"].startswith("text/html")
    return response.text


@pytest.mark.parametrize("what", ["results", "report"])
def test_results_of_no_study_are_not_found(api, what):
    with pytest.raises(ServiceError) as error:
        api.client.get(f"/v1/studies/nope/{what}")
    assert error.value.status == 404
