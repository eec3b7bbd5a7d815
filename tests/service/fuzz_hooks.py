"""Hooks for schemathesis: a valid spec, ids and lease tokens of the service, a checkpoint's folder.

Without them the service would refuse nearly every generated study, and no call behind it would be
reached.
"""

import itertools
import json
import os

import schemathesis

SPEC = json.loads(os.environ["WARMSCALE_FUZZ_SPEC"])
_numbers = itertools.count()
_leases = {}


@schemathesis.hook
def before_call(context, case, kwargs):
    _shorten_wait(case)
    # Cases that are invalid on purpose stay as they are.
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    # Only the service makes these two: any generated text is a 422.
    for name in ("cursor", "Last-Event-ID"):
        case.query.pop(name, None)
        case.headers.pop(name, None)
    # Three of four calls get a real run and its token; the fourth tests the refusal.
    if "{run_id}" in case.path and _leases and next(_numbers) % 4:
        lease = _leases.get(case.path_parameters["run_id"]) or [*_leases.values()][-1]
        case.path_parameters["run_id"] = lease["run_id"]
        if case.method == "POST":
            case.headers["Lease-Token"] = lease["lease_token"]
        if case.path.endswith("/checkpoints") and isinstance(case.body, dict):
            case.body["uri"] = f"{lease['artifact_uri']}/step"
    match case.operation.label:
        case "POST /v1/studies" if next(_numbers) % 4:
            case.body = SPEC | {"name": f"fuzz-{os.getpid()}-{next(_numbers)}"}
        case "POST /v1/leases" if isinstance(case.body, dict):
            any_study = {"study": None, "kinds": None, "resources": {"cpus": 64}}
            case.body |= {"wait_seconds": 0} | (any_study if next(_numbers) % 4 else {})


def _shorten_wait(case):
    """Shorten long-polls to 0.1 s: schemathesis gives up before a longer wait ends."""
    body = case.body if case.operation.label == "POST /v1/leases" else None
    seconds = body.get("wait_seconds") if isinstance(body, dict) else None
    if isinstance(seconds, float) and 0 < seconds <= 60:
        body["wait_seconds"] = min(seconds, 0.1)


@schemathesis.hook
def after_call(context, case, response):
    if case.operation.label == "POST /v1/leases" and response.status_code == 200:
        _leases.update((lease["run_id"], lease) for lease in response.json()["leases"])
    is_write = case.method == "POST" and "{run_id}" in case.path
    if is_write and (response.status_code == 409 or case.path.endswith("/finish")):
        # The lease has ended: later calls use another.
        _leases.pop(case.path_parameters["run_id"], None)
