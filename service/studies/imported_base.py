"""Bases that no run of the study made: imported models, by their checkpoints."""

from typing import Any

from service.studies.space import FieldError
from service.studies.study_spec import StudySpec, WarmstartSpec
from warmcore.spec import ModelSpec, TrainSpec

_PLACE = "base.model"


def check_imported(spec: StudySpec, model: ModelSpec, warmstart: WarmstartSpec) -> None:
    """Raise a FieldError unless the study's hyperparameters and tokens are this model's too.

    muP carries a learning rate from width to width as long as both have one base (METHOD §2).
    """
    tuned = spec.base_model
    if model.parametrization != tuned.parametrization:
        message = f"the study's is {tuned.parametrization}; they must be the same"
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
        message = f"the study's tokens go to {tuned.vocab_size}; that or more would work"
        raise FieldError(f"{_PLACE}.vocab_size", model.vocab_size, message)
    for name, works in (("optimizer_state", "reset"), ("base_weights", "raw")):
        if (value := getattr(warmstart, name)) != works:
            message = f"an imported model has its weights and nothing else; {works} works"
            raise FieldError(f"warmstart.{name}", value, message)


def tuned_params(params: dict[str, Any]) -> dict[str, Any]:
    """What an imported model takes of a trial's parameters; its multipliers are its own."""
    return {name: value for name, value in params.items() if name in TrainSpec.model_fields}
