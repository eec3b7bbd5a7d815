"""Checks of imported models, the bases that no run of the study has trained."""

import re
from typing import Any

from sqlalchemy.orm import Session

from service.access.caller import Caller
from service.access.lookup import find_study
from service.access.paths import NAMES_BELOW, check_paths, is_below, resolve_path
from service.problems import Problem, bad_field, not_found
from service.settings import Settings
from service.specs.study import StudySpec
from service.specs.target import WarmstartSpec
from warmcore.specs import ModelSpec, TrainSpec
from warmcore.specs.fields import FieldError
from warmcore.storage.locations import local_path

_PLACE = "base.model"


def check_imported_model(spec: StudySpec, model: ModelSpec, warmstart: WarmstartSpec) -> None:
    """Raise a FieldError unless the study's hyperparameters and tokens suit this model.

    muP transfers a learning rate between widths if both models have the same base (METHOD §2).
    """
    # Example: a study with proxies of base width 48 tunes for an imported model of base width 48.
    # At base width 96 the same learning rate gives other step sizes in the hidden layers.
    tuned = spec.base_model
    if model.parametrization != tuned.parametrization:
        message = f"the study has {tuned.parametrization}; they must be the same"
        raise FieldError(f"{_PLACE}.parametrization", model.parametrization, message)
    own = {
        "base_width": model.base_width or model.width,
        "base_depth": model.base_depth or model.depth,
    }
    for name, value in own.items():
        if value != getattr(tuned, name):
            message = (
                f"the study tunes at {name} {getattr(tuned, name)}, so its hyperparameters do not "
                f"transfer; a study with proxy.{name} {value} tunes for this model"
            )
            raise FieldError(f"{_PLACE}.{name}", value, message)
    if model.vocab_size < tuned.vocab_size:
        message = f"the study has {tuned.vocab_size} tokens; that or more would work"
        raise FieldError(f"{_PLACE}.vocab_size", model.vocab_size, message)
    for name, works in (("optimizer_state", "reset"), ("base_weights", "raw")):
        if (value := getattr(warmstart, name)) != works:
            message = f"an imported model has weights and nothing else; {works} works"
            raise FieldError(f"warmstart.{name}", value, message)


def select_tuned_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters that apply to an imported model: those of the training.

    Parameters of the model, such as its multipliers, stay as they were imported.
    """
    return {name: value for name, value in params.items() if name in TrainSpec.model_fields}


_STUDY_ID = re.compile(r"st_[0-9a-f]+")


def check_base_uri(session: Session, caller: Caller, settings: Settings, uri: str) -> None:
    """Refuse an imported model in a location that the caller may not read.

    Raises:
        Problem: 404 for a checkpoint of another project's run; 422 for any other location.
    """
    # Below the artifact root a study's folder belongs to its project. Elsewhere the rule for
    # corpora holds: the folder must lie in a data root.
    below = _find_path_in_store(settings.artifact_root, uri)
    if below is not None:
        _check_owner(session, caller, below, uri)
        return
    path = local_path(uri)
    if path is None:
        message = f"not below {settings.artifact_root}/ (WARMSCALE_ARTIFACTS), nor a local folder"
        raise bad_field("base.uri", uri, message)
    if settings.readable is not None:
        check_paths("base.uri", uri, [path], settings.readable)


def _find_path_in_store(root: str, uri: str) -> str | None:
    """Return the part of the URI after the artifact root; None outside of it.

    Local paths are resolved first: a link, or a path with `..`, may lead into the store.
    """
    path, store = local_path(uri), local_path(root)
    if path is not None:
        if store is None or not is_below(path, store):
            return None
        return f"/{resolve_path(path).relative_to(resolve_path(store))}"
    return uri[len(root) :] if uri.startswith(f"{root}/") else None


def _check_owner(session: Session, caller: Caller, below: str, uri: str) -> None:
    """Refuse a checkpoint of a study that the caller cannot see; other folders are open to all."""
    if not NAMES_BELOW.fullmatch(below):
        raise bad_field("base.uri", uri, "the names below the artifact root are of A-Za-z0-9._-")
    owner = below.split("/")[1]
    if not _STUDY_ID.fullmatch(owner):
        return
    try:
        find_study(session, caller, owner)
    except Problem:
        raise not_found("checkpoint", uri) from None
