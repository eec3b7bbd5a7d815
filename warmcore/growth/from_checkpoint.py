"""Growth of a base checkpoint tensor by tensor: into a model's memory or to the disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Generator

from warmcore.checkpoint.checkpoint import (
    OpenCheckpoint,
    SavedCheckpoint,
    open_checkpoint,
    save_checkpoint,
)
from warmcore.checkpoint.progress import Progress
from warmcore.corpus.tokenizer import TOKENIZER
from warmcore.growth.growth import Growth
from warmcore.specs import RunSpec, derive_seed, growth_rules
from warmcore.tensors.files import TensorStream, make_layout_like


@dataclass(frozen=True, kw_only=True, eq=False)
class GrownTensors:
    """A run's initial tensors, none of them in memory yet. Read weights before the optimizer."""

    source: OpenCheckpoint
    growth: Growth
    generator: Generator

    @classmethod
    def from_base(cls, run: RunSpec, base: Path) -> Self:
        """Open the base and plan its growth; the noise is drawn from the run's seed.

        Raises:
            ValueError: the base model cannot be grown into the run's.
            CheckpointCorruptError: `base` is not the checkpoint that `run.growth` names.
        """
        if run.growth is None:
            raise ValueError("growth is None: this run does not start from a base checkpoint")
        source = open_checkpoint(base, expected_hash=run.growth.base.hash)
        base_run = source.manifest.run
        growth_rules.check_optimizers(run.growth, base_run and base_run.train, run.train)
        generator = make_weights_generator(run)
        growth = Growth.plan(source.manifest.model, run.model, run.growth, generator)
        return cls(source=source, growth=growth, generator=generator)

    @property
    def weights(self) -> TensorStream:
        """The target's weights, grown when they are read."""
        growth, base = self.growth, self.source.select_weights(self.growth.options.base_weights)
        entries = ((n, growth.depth.base_name(n), tuple(s)) for n, s in growth.shapes.items())
        return TensorStream(
            layout=make_layout_like(entries, base.layout),
            tensors=growth.grow_weights(base, self.generator),
        )

    @property
    def optimizer(self) -> TensorStream:
        """The target's optimizer state, grown when it is read; empty for a fresh optimizer."""
        growth, layout = self.growth, self.source.optimizer.layout
        entries = (
            (m.name, m.source, () if m.key == "step" else tuple(growth.shapes[m.parameter]))
            for m in growth.list_moments(layout)
        )
        return TensorStream(
            layout=make_layout_like(entries, layout),
            tensors=growth.grow_moments(self.source.optimizer),
        )


def make_weights_generator(run: RunSpec) -> Generator:
    """Return the generator of the run's initial weights, and of the noise of growth."""
    return Generator().manual_seed(derive_seed("weights", run.seed))


def grow_checkpoint(
    base: Path, path: Path, *, run: RunSpec, data_hash: str | None = None
) -> SavedCheckpoint:
    """Write the checkpoint of step 0 of `run`, for `Training.resume`.

    Only a few blocks of the target are in memory at a time, and the base tensor from which they are
    made. `data_hash` is the hash of the run's data; None means the data of the base.

    Raises:
        ValueError: the base model cannot be grown into the run's, or `data_hash` is None and the
            base was imported, without data.
        CheckpointCorruptError: `base` is not the checkpoint that `run.growth` names.
    """
    grown = GrownTensors.from_base(run, base)
    data_hash = data_hash or grown.source.manifest.data_hash
    if data_hash is None:
        raise ValueError("data_hash is None and the base was imported: give the hash of the data")
    return save_checkpoint(
        path,
        weights=grown.weights,
        optimizer=grown.optimizer,
        run=run,
        data_hash=data_hash,
        base_hash=grown.source.hash,
        tokens=0,
        progress=Progress(),
        # The run reads the tokens of its base, hence also the base's tokenizer.
        attached={
            n: (base / n).read_bytes() for n in grown.source.manifest.files if n == TOKENIZER
        },
    )
