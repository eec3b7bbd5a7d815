"""Studies from submission to the end, driven by hand: states, targets, reading."""

import hashlib

import httpx
import pytest

from service.client import ServiceError
from warmcore.corpus.tokenizer import make_byte_json


def problem(call, *args, **kwargs):
    with pytest.raises(ServiceError) as refused:
        call(*args, **kwargs)
    return refused.value


def run_trials(worker, losses):
    for number, loss in enumerate(losses):
        lease = worker.lease_one()
        assert lease.trial_number == number
        worker.complete(lease, loss)


def test_the_last_trial_enqueues_warm_and_cold_targets_from_the_best_one(api, submit, worker):
    study = submit()
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    best = api.client.get(f"/v1/studies/{study['id']}")["best_trial"]
    assert (best["number"], best["val_loss_nats"]) == (1, 2.1)
    (checkpoint,) = api.client.get(f"/v1/runs/{best['run_id']}/checkpoints")["items"]
    leases = worker.lease(8)
    assert sorted(lease.arm for lease in leases) == ["cold", "cold", "warm", "warm"]
    for lease in leases:
        assert lease.params == best["params"]
        assert lease.spec.train.lr == best["params"]["lr"]
        assert (lease.spec.model.width, lease.spec.model.base_width) == (64, 32)
        base = lease.spec.growth and lease.spec.growth.base.hash
        assert base == (checkpoint["hash"] if lease.arm == "warm" else None)
    seeds = {arm: sorted(x.spec.seed for x in leases if x.arm == arm) for arm in ("warm", "cold")}
    assert seeds["warm"] == seeds["cold"]
    assert len(set(seeds["warm"])) == 2
    assert {lease.spec.data for lease in leases} == {leases[0].spec.data}


def test_a_study_completes_when_its_targets_have(api, submit, worker):
    study = submit()
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    for lease in worker.lease(8):
        worker.complete(lease, 1.9 if lease.arm == "warm" else 2.0)
    view = api.client.get(f"/v1/studies/{study['name']}")
    assert (view["state"], view["progress"]) == ("completed", 1.0)
    assert view["targets"]["succeeded"] == 4
    assert view["finished_at"] is not None


def test_a_study_without_target_completes_with_its_trials(api, submit, worker):
    study = submit(target=None)
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "completed"


def test_a_ladder_climbs_rung_by_rung_and_controls_the_last(api, submit, worker):
    study = submit(target=None, ladder=[{"width": 48}, {"width": 64}])
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    first = worker.lease(8)
    shape = sorted((lease.arm, lease.spec.model.width) for lease in first)
    assert shape == [("cold", 64), ("cold", 64), ("warm", 48), ("warm", 48)]
    for lease in first:
        worker.complete(lease)
    second = worker.lease(8)
    assert [(x.arm, x.spec.model.width) for x in second] == [("warm", 64), ("warm", 64)]
    rung_below = {x.spec.seed: x for x in first if x.arm == "warm"}
    for lease in second:
        below = rung_below[lease.spec.seed]
        assert lease.spec.growth.base.uri.startswith(below.artifact_uri)
        worker.complete(lease)
    assert api.client.get(f"/v1/studies/{study['id']}")["state"] == "completed"


def test_what_the_user_wrote_for_the_target_wins_over_what_was_tuned(submit, worker):
    space = {"batch_size": {"type": "categorical", "choices": [4, 8]}}
    submit(search_space=space, target={"width": 64, "train": {"batch_size": 16}})
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    assert {lease.spec.train.batch_size for lease in worker.lease(8)} == {16}


def test_a_study_whose_best_trial_has_no_checkpoint_fails_and_says_so(api, submit, worker):
    study = submit(hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    worker.finish(worker.lease_one(), loss=2.0)
    view = api.client.get(f"/v1/studies/{study['id']}")
    assert (view["state"], view["reason"]) == (
        "failed",
        "no trial succeeded with a checkpoint to grow from",
    )


def test_states_move_only_along_the_table(api, submit):
    study = submit()
    path = f"/v1/studies/{study['id']}"
    assert api.client.post(f"{path}/pause")["state"] == "paused"
    assert api.client.post(f"{path}/pause")["state"] == "paused"
    assert api.client.post(f"{path}/resume")["state"] == "active"
    assert api.client.post(f"{path}/cancel")["state"] == "cancelled"
    assert problem(api.client.post, f"{path}/resume").status == 409
    assert problem(api.client.post, f"{path}/pause").type == "urn:warmscale:wrong-state"


def test_cancel_ends_every_live_run_and_optuna_hears_it(api, submit, worker):
    study = submit()
    worker.lease(2)
    api.client.post(f"/v1/studies/{study['id']}/cancel")
    assert {run["state"] for run in api.client.get("/v1/runs")["items"]} == {"cancelled"}
    # The next request for a lease reports the ends to Optuna.
    worker.lease()
    states = api.sampler.read_states(study["name"])
    assert {state for state, _ in states.values()} == {"FAIL"}


def test_a_diverged_trial_is_failed_here_and_pruned_at_the_worst_value_there(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    worker.evaluate(lease, 1, 3.0)
    assert worker.finish(lease, "diverged", error="loss is nan") == "failed"
    worker.lease()
    states = api.sampler.read_states(study["name"])
    assert states[0] == ("PRUNED", float("inf"))
    (trial,) = [
        t for t in api.client.get(f"/v1/studies/{study['id']}/trials")["items"] if t["number"] == 0
    ]
    assert (trial["state"], trial["diverged"], trial["error"]) == ("failed", True, "loss is nan")


def test_a_bad_trial_is_told_to_prune_and_a_good_one_to_go_on(submit, worker):
    submit(hpo={"trials": 12, "parallel": 12, "sampler": "random", "pruner": "median"})
    leases = worker.lease(12)
    for lease in leases[:5]:
        for evaluation in (1, 2, 3, 4):
            worker.evaluate(lease, evaluation, 3.0)
        worker.complete(lease, 3.0)
    # Five trials have ended: the median pruner has losses to compare with.
    bad, good = leases[5:7]
    assert [worker.evaluate(bad, e, 4.0) for e in (1, 2)] == ["continue", "prune"]
    assert [worker.evaluate(good, e, 2.0) for e in (1, 2)] == ["continue", "continue"]
    assert worker.finish(bad, "pruned", loss=4.0) == "pruned"


def test_enqueued_parameters_are_tried_next(api, submit, worker):
    study = submit()
    path = f"/v1/studies/{study['id']}/trials"
    assert api.client.post(path, {"params": {"lr": 0.02}})["state"] == "queued"
    assert [t["params"] for t in api.client.get(path)["items"]] == [{"lr": 0.02}]
    assert worker.lease_one().params == {"lr": 0.02}


def test_enqueueing_beyond_the_budget_is_refused(api, submit):
    study = submit(hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    path = f"/v1/studies/{study['id']}/trials"
    api.client.post(path, {"params": {"lr": 0.02}})
    assert problem(api.client.post, path, {"params": {"lr": 0.01}}).status == 409


def test_a_trial_that_a_crash_left_without_its_run_leaves_no_room_for_one_too_many(api, submit):
    import optuna

    study = submit(hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    storage = api.sampler.storage
    # Optuna counts a trial here that has no run of ours.
    optuna.load_study(study_name=study["name"], storage=storage).ask()
    refused = problem(
        api.client.post, f"/v1/studies/{study['id']}/trials", {"params": {"lr": 0.02}}
    )
    assert refused.type == "urn:warmscale:budget-spent"


@pytest.mark.parametrize("params", [{"lr": 1.0}, {"lr": "high"}, {"lr": True}, {"depth": 2}])
def test_parameters_off_the_search_space_are_refused_by_name_and_value(api, submit, params):
    study = submit()
    refused = problem(api.client.post, f"/v1/studies/{study['id']}/trials", {"params": params})
    (name,) = params
    assert refused.status == 422
    assert refused.problem["errors"][0]["path"] == f"params.{name}"
    assert refused.problem["errors"][0]["value"] == params[name]


def test_the_same_idempotency_key_gives_the_same_study(api, study_spec):
    spec = study_spec()
    first = api.client.post("/v1/studies", spec, idempotency_key="k1")
    assert api.client.post("/v1/studies", spec, idempotency_key="k1") == first
    other = problem(api.client.post, "/v1/studies", study_spec(), idempotency_key="k1")
    assert (other.status, other.type) == (409, "urn:warmscale:idempotency-key-reused")


def test_a_duplicate_name_is_refused(api, study_spec):
    spec = study_spec()
    api.client.post("/v1/studies", spec)
    again = problem(api.client.post, "/v1/studies", spec)
    assert (again.status, again.type) == (409, "urn:warmscale:duplicate-name")
    assert again.problem["errors"][0] == {
        "path": "name",
        "value": spec["name"],
        "message": "a study of this name exists; choose another name",
    }


def test_pages_hold_every_study_once(api, submit):
    ids = [submit()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = api.client.get("/v1/studies", limit=2, cursor=cursor)
        seen += [study["id"] for study in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]


def test_a_target_can_be_started_by_hand_from_any_trial(api, submit, worker):
    study = submit(target=None)
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    path = f"/v1/studies/{study['id']}/targets"
    started = api.client.post(path, {"trial": 2, "target": {"width": 96}})["items"]
    assert sorted(run["arm"] for run in started) == ["cold", "cold", "warm", "warm"]
    assert len(worker.lease(8)) == 4
    refused = problem(api.client.post, path, {"trial": 2, "target": {"width": 16}})
    assert refused.problem["errors"][0]["path"] == "target.width"
    assert problem(api.client.post, path, {"trial": 77, "target": {"width": 96}}).status == 404


IMPORTED = {
    "uri": "file:///models/base",
    "hash": "5" * 64,
    "model": {"width": 48, "depth": 1, "head_dim": 16, "base_width": 48, "base_depth": 1},
}


@pytest.fixture
def for_imported(submit):
    """A study with the imported model's base width; it tunes a multiplier, too."""

    def create(**changes):
        proxy = {"width": 32, "depth": 1, "head_dim": 16, "base_width": 48, "base_depth": 1}
        space = {
            "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
            "embedding_multiplier": {"type": "float", "low": 0.5, "high": 2.0},
        }
        return submit(**({"proxy": proxy, "search_space": space, "target": None} | changes))

    return create


def test_an_imported_model_is_grown_with_the_best_trials_hyperparameters(api, for_imported, worker):
    study = for_imported()
    path, body = f"/v1/studies/{study['id']}/targets", {"base": IMPORTED, "target": {"width": 96}}
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    best = api.client.get(f"/v1/studies/{study['id']}")["best_trial"]["params"]
    warm, cold = api.client.post(path, body | {"warmstart": {"seeds": 1}})["items"]
    assert (warm["arm"], cold["arm"]) == ("warm", "cold")
    leases = {lease.run_id: lease.spec for lease in worker.lease(8)}
    grown, fresh = leases[warm["id"]], leases[cold["id"]]
    assert grown.growth.base.model_dump() == {"uri": IMPORTED["uri"], "hash": IMPORTED["hash"]}
    assert fresh.growth is None
    assert grown.model == fresh.model
    assert (grown.model.width, grown.model.base_width) == (96, 48)
    assert grown.train.lr == fresh.train.lr == best["lr"]
    # The imported model keeps its own multiplier; the tuned value belongs to the proxies.
    assert grown.model.embedding_multiplier == 1.0 != best["embedding_multiplier"]
    path = f"/v1/studies/{for_imported()['id']}/targets"
    assert {run["params"] == {} for run in api.client.post(path, body)["items"]} == {True}


@pytest.mark.parametrize(
    ("changes", "path", "said"),
    [
        (
            {"base_width": 96, "width": 96},
            "base.model.base_width",
            "a study with proxy.base_width 96",
        ),
        ({"base_depth": 2, "depth": 2}, "base.model.base_depth", "proxy.base_depth 2"),
        ({"vocab_size": 255}, "base.model.vocab_size", "256"),
        ({"parametrization": "standard"}, "base.model.parametrization", "must be the same"),
        ({"width": 64, "base_width": 48}, "target.width", "ratio 1.5 is not an integer"),
    ],
)
def test_an_imported_model_that_the_study_did_not_tune_for_is_refused(
    changes, path, said, api, for_imported
):
    study = for_imported()
    base = IMPORTED | {"model": IMPORTED["model"] | changes}
    body = {"base": base, "target": {"width": 96}, "warmstart": {"operator": "clone"}}
    refused = problem(api.client.post, f"/v1/studies/{study['id']}/targets", body)
    assert refused.status == 422
    (field,) = refused.problem["errors"]
    assert field["path"] == path
    assert said in field["message"]


def test_an_imported_model_has_weights_and_nothing_else_and_is_the_only_base(api, for_imported):
    path = f"/v1/studies/{for_imported()['id']}/targets"
    body = {"base": IMPORTED, "target": {"width": 96}}
    for name, value in (("optimizer_state", "transfer"), ("base_weights", "ema")):
        warmstart = {"operator": "clone", name: value}
        refused = problem(api.client.post, path, body | {"warmstart": warmstart})
        assert refused.problem["errors"][0]["path"] == f"warmstart.{name}"
    refused = problem(api.client.post, path, body | {"trial": 0})
    assert refused.problem["errors"][0]["message"] == "give one of trial and base"


def test_importance_needs_trials_and_then_ranks_parameters(api, submit, worker):
    space = {
        "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
        "beta2": {"type": "float", "low": 0.9, "high": 0.99},
    }
    hpo = {"trials": 12, "parallel": 12, "sampler": "random", "pruner": "none"}
    study = submit(search_space=space, hpo=hpo)
    path = f"/v1/studies/{study['id']}/importance"
    assert problem(api.client.get, path).type == "urn:warmscale:too-few-trials"
    for lease in worker.lease(12):
        worker.complete(lease, 2 + abs(lease.params["lr"] - 0.01) * 50)
    worker.lease()
    importance = api.client.get(path)["importance"]
    assert importance["lr"] > importance["beta2"]


def test_events_are_streamed_in_order_and_resume_after_the_last_one(api, submit, worker):
    study = submit(target=None, hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    worker.complete(worker.lease_one())
    headers = {"Authorization": f"Bearer {api.key}"}

    def stream(**more):
        url = f"{api.url}/v1/studies/{study['id']}/events"
        text = httpx.get(url, headers=headers | more, timeout=5).text
        lines = [line.partition(": ") for line in text.splitlines()]
        return [v for k, _, v in lines if k == "event"], [v for k, _, v in lines if k == "id"]

    names, ids = stream()
    assert names == [
        "study.created",
        "run.queued",
        "run.leased",
        "run.checkpoint",
        "run.succeeded",
        "study.completed",
    ]
    assert stream(**{"Last-Event-ID": ids[3]})[0] == names[4:]


def test_a_live_stream_delivers_what_happens_after_it_was_opened(api, submit, worker):
    study = submit(target=None, hpo={"trials": 1, "parallel": 1, "sampler": "random"})
    headers = {"Authorization": f"Bearer {api.key}"}
    url = f"{api.url}/v1/studies/{study['id']}/events"
    seen = []
    with httpx.stream("GET", url, headers=headers, timeout=10) as response:
        for line in response.iter_lines():
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))
            if seen == ["study.created"]:
                # Something has to happen after the stream was opened.
                seen.append("(finished by hand)")
                worker.complete(worker.lease_one())
    assert seen[-1] == "study.completed"


def test_curves_are_read_by_step_and_runs_by_filter(api, submit, worker):
    study = submit()
    lease = worker.lease_one()
    for evaluation in (1, 2):
        worker.evaluate(lease, evaluation, 3.0 - evaluation)
    items = api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"]
    assert [(p["step"], p["val_loss_nats"]) for p in items] == [(5, 2.0), (10, 1.0)]
    run = api.client.get(f"/v1/runs/{lease.run_id}")
    assert (run["step"], run["tokens"], run["val_loss_nats"]) == (10, 2560, 1.0)
    assert run["cost_flops"] > 0
    assert len(api.client.get("/v1/runs", study=study["name"], state="leased")["items"]) == 1
    assert api.client.get("/v1/runs", study=study["name"], kind="target")["items"] == []


def test_losses_of_averaged_weights_are_on_the_curve_and_judge_nothing(api, submit, worker):
    study = submit(warmstart={"seeds": 1, "control": False})
    run_trials(worker, [2.5, 2.1, 2.3, 2.4])
    lease = worker.lease_one()
    averaged = {"ema_val_loss_nats": 1.5, "swa_val_loss_nats": 1.25}
    point = {"step": 5, "tokens": 1280, "val_loss_nats": 2.0, "evaluation": 1} | averaged
    worker.report(lease, point)
    worker.complete(lease, 2.0)
    (item,) = api.client.get(f"/v1/runs/{lease.run_id}/measurements")["items"]
    assert {name: item[name] for name in point} == point
    (target,) = api.client.get(f"/v1/studies/{study['id']}/results")["targets"]
    assert target["curve"] == [{name: point[name] for name in point if name != "evaluation"}]
    assert target["val_loss_nats"] == 2.0


def test_what_does_not_exist_is_a_404_problem(api):
    for path in ("/v1/studies/nope", "/v1/runs/nope", "/v1/runs/nope/measurements", "/v1/nope"):
        refused = problem(api.client.get, path)
        assert refused.status == 404
        assert set(refused.problem) >= {"type", "title", "status", "detail"}


def test_an_answer_is_committed_before_it_is_sent(api, study_spec):
    # A commit after the response would lose this race now and then.
    for _ in range(20):
        study = api.client.post("/v1/studies", study_spec())
        assert api.client.get(f"/v1/studies/{study['id']}")["id"] == study["id"]


def test_a_study_is_pinned_to_its_tokenizer_and_its_vocabulary_follows(
    api, study_spec, worker, tmp_path
):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(make_byte_json())
    data = study_spec()["data"] | {"tokenizer": str(path)}
    api.client.post("/v1/studies", study_spec(data=data))
    run = worker.lease_one().spec
    assert (run.data.vocab_size, run.model.vocab_size) == (256, 256)
    assert run.data.tokenizer_hash == hashlib.sha256(make_byte_json()).hexdigest()
    assert len(run.data.hash) == 64


def test_the_vocabulary_of_bpe_reaches_trials_and_targets(api, study_spec, worker):
    data = study_spec()["data"] | {"tokenizer": "bpe:300"}
    api.client.post("/v1/studies", study_spec(data=data, hpo={"trials": 1}))
    run_trials(worker, [2.5])
    assert worker.lease_one().spec.model.vocab_size == 300
