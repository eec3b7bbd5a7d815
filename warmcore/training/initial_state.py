"""The state that a run begins with: fresh, grown from a base, of a trunk, or of its own checkpoint.

Opening a state checks the spec against the checkpoint and verifies every hash; it needs no other
process. Rank 0 can therefore refuse a run, or skip a damaged checkpoint, before other ranks begin.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from warmcore.checkpoint.checkpoint import Checkpoint, load_checkpoint, read_manifest
from warmcore.checkpoint.progress import Progress
from warmcore.corpus.prepare import Corpus
from warmcore.growth.from_checkpoint import GrownTensors, make_weights_generator
from warmcore.model.decoder import Decoder, init_weights_, load_weights
from warmcore.specs import AverageName, GrowthSpec, RunSpec, growth_rules
from warmcore.specs.branching import select_branch_losses

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class InitialState:
    """The checked state that a run begins with. Call `fill_model` before `read_optimizer`.

    Another rank opens the same state with `how` and `checkpoint`.
    """

    spec: RunSpec
    corpus: Corpus
    how: Literal["start", "resume"]
    checkpoint: Path | None
    fill_model: Callable[[Decoder], object]
    read_optimizer: Callable[[], Mapping[str, Tensor]] = dict[str, Tensor]
    averages: Mapping[AverageName, Mapping[str, Tensor]] = field(
        default_factory=dict[AverageName, Mapping[str, Tensor]]
    )
    base_hash: str | None = None
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Raise ValueError if the corpus has tokens for which the model has no embedding."""
        size, known = self.spec.model.vocab_size, self.corpus.vocab_size
        if known > size:
            raise ValueError(
                f"vocab_size {size} is smaller than the {known} of tokenizer "
                f"{self.spec.data.tokenizer}"
            )


def open_start(spec: RunSpec, corpus: Corpus, base: Path | None) -> InitialState:
    """Return fresh weights, or the state in the folder `base` of `spec.start_checkpoint`.

    Raises:
        ValueError: `base` is given without `spec.start_checkpoint` or the reverse, the base
            model cannot be grown into the target, or the trunk is of another run.
        CheckpointCorruptError: `base` is not the checkpoint that `spec` names.
    """
    if (spec.start_checkpoint is None) != (base is None):
        name, ref = ("trunk", spec.trunk) if spec.trunk else ("growth", spec.growth)
        raise ValueError(f"{name} is {ref} but the base checkpoint is {base}; give both")
    if base is not None and spec.trunk is not None:
        return _open_trunk(spec, corpus, base, expected_hash=spec.trunk.hash)
    if base is not None and spec.growth is not None:
        return _open_base(spec, corpus, base, spec.growth)

    def draw_weights(model: Decoder) -> None:
        init_weights_(model, spec.model, make_weights_generator(spec))

    return InitialState(
        spec=spec, corpus=corpus, how="start", checkpoint=None, fill_model=draw_weights
    )


def open_resume(spec: RunSpec, corpus: Corpus, checkpoint: Path) -> InitialState:
    """Return the state in a checkpoint of `spec` itself.

    Raises:
        ValueError: the checkpoint is of another spec or other data.
        CheckpointCorruptError: a file differs from its hash.
    """
    saved = load_checkpoint(checkpoint)
    try:
        saved.manifest.check_run(spec, corpus.data_hash)
    except ValueError as error:
        raise ValueError(f"checkpoint {checkpoint} {error}") from error
    return _open_saved(spec, corpus, saved, how="resume", path=checkpoint)


def _open_base(spec: RunSpec, corpus: Corpus, base: Path, growth: GrowthSpec) -> InitialState:
    manifest, _ = read_manifest(base, expected_hash=growth.base.hash)
    # Compare tokenizers before models: "vocab_size must be the same" would not name the cause.
    manifest.check_tokenizer(corpus.tokenizer)
    grown = GrownTensors.from_base(spec, base)
    for warning in growth_rules.find_warnings(growth, grown.growth.base, spec.model):
        log.warning(warning)

    def read_optimizer() -> Mapping[str, Tensor]:
        return grown.optimizer.read_into_memory()

    return InitialState(
        spec=spec,
        corpus=corpus,
        how="start",
        checkpoint=base,
        fill_model=lambda model: load_weights(model, grown.weights.tensors),
        read_optimizer=read_optimizer,
        base_hash=grown.source.hash,
    )


def _open_trunk(spec: RunSpec, corpus: Corpus, trunk: Path, *, expected_hash: str) -> InitialState:
    """Return a trunk's state with the evaluations that the branch would have made itself."""
    saved = load_checkpoint(trunk, expected_hash=expected_hash)
    try:
        saved.manifest.check_trunk_of(spec, corpus.data_hash)
    except ValueError as error:
        raise ValueError(f"trunk {trunk} {error}") from error
    progress = saved.manifest.progress
    trunk_steps = saved.manifest.trained_run.evaluation_steps
    branch_steps = frozenset(spec.evaluation_steps)
    losses = select_branch_losses(progress.val_losses_nats, trunk_steps, branch_steps)
    progress = progress.model_copy(update={"val_losses_nats": losses})
    state = _open_saved(spec, corpus, saved, how="start", path=trunk)
    return dataclasses.replace(state, progress=progress)


def _open_saved(
    spec: RunSpec, corpus: Corpus, saved: Checkpoint, *, how: Literal["start", "resume"], path: Path
) -> InitialState:
    return InitialState(
        spec=spec,
        corpus=corpus,
        how=how,
        checkpoint=path,
        fill_model=lambda model: model.load_state_dict(saved.weights),
        read_optimizer=lambda: saved.optimizer,
        averages=saved.averages,
        base_hash=saved.manifest.base_hash,
        progress=saved.manifest.progress,
    )
