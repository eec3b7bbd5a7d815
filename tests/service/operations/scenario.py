"""A small copy of a team's database: studies in every state, runs of every kind and state."""

import contextlib

from service.protocol import Measurement

ONE = {"trials": 1, "parallel": 1, "sampler": "random", "pruner": "none"}
SPEC = {
    "data": {"source": "stdlib", "context": 32},
    "proxy": {"width": 32, "depth": 1, "head_dim": 16},
    "target": {"width": 64},
    "train": {"batch_size": 8, "num_tokens": 8 * 32 * 20, "evaluations": 4},
    "search_space": {
        "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
        "beta2": {"type": "categorical", "choices": [0.95, 0.99]},
    },
    "hpo": ONE,
    "warmstart": {"seeds": 1},
}


def play(worker, **changes):
    """Drive a service until every state occurs; `changes` apply to the spec of every study."""
    client = worker.client

    def submit(name, **more):
        return client.post("/v1/studies", SPEC | changes | {"name": name} | more)["id"]

    failed = submit("failed", max_attempts=1)
    # An error with the characters that COPY's text format escapes.
    worker.finish(worker.lease_one(study=failed), "failed", error="CUDA said no\n\tand \\ more")
    completed = submit("completed", hpo=ONE | {"trials": 2})
    for loss in (2.5, 2.0):
        train(worker, worker.lease_one(study=completed), loss)
    for target in worker.lease(2, study=completed):
        train(worker, target, 1.5)
    launch = {"target": {"width": 96}}
    client.post(f"/v1/studies/{completed}/targets", launch, idempotency_key="once")
    cancelled = submit("cancelled")
    worker.lease_one(study=cancelled)
    client.post(f"/v1/studies/{cancelled}/cancel")
    paused = submit("paused")
    client.post(f"/v1/studies/{paused}/pause")
    active = submit("active", hpo=ONE | {"trials": 9, "parallel": 3})
    client.post(f"/v1/studies/{active}/trials", {"params": {"lr": 0.01}})
    train(worker, worker.lease_one(study=active), 2.25)
    for outcome in ("pruned", "diverged", "released"):
        worker.finish(worker.lease_one(study=active), outcome)
    # The released run is leased again, as its second attempt, and stays leased.
    held = worker.lease_one(study=active)
    worker.evaluate(held, 1, 3.0)
    for step in (5, 10, 15):
        worker.publish(held, step, final=False)
    # The code of an old revision, with which a sample is made, has no budgets.
    with contextlib.suppress(Exception):
        make_budgets(worker, submit)


def make_budgets(worker, submit):
    """Make a study with a trunk that has published the first of its two budgets."""
    study = submit("budgets", target={"width": 64, "budgets": [2, 4]})
    worker.complete(worker.lease_one(study=study), 2.0)
    trunk, _ = worker.lease(2, study=study)
    worker.publish(trunk, trunk.spec.branch_steps[0], final=False)


def train(worker, lease, loss):
    # An old revision has no averages in its measurements.
    averages = {"ema_val_loss_nats", "swa_val_loss_nats"} & set(Measurement.model_fields)
    for evaluation in (1, 2):
        step = evaluation * 5
        point = {"step": step, "tokens": step * 256, "evaluation": evaluation}
        point |= dict.fromkeys(averages, loss + 0.25)
        worker.report(lease, point | {"val_loss_nats": loss + 1 / evaluation, "lr": 1e-3 / 3})
    worker.complete(lease, loss)
