"""The manifest of a checkpoint: the origin of its weights, its progress, the hash of every file."""

import hashlib
from typing import Literal, Self

from pydantic import model_validator

from warmcore.checkpoint.progress import Progress
from warmcore.corpus.tokenizer import TOKENIZER, make_byte_json
from warmcore.specs import ModelSpec, NonNegativeInt, PositiveInt, RunSpec, Spec
from warmcore.specs.fields import TokenIds
from warmcore.specs.run import make_branch
from warmcore.specs.sources import ByteTokens
from warmcore.storage.file_facts import FileFacts


class ImportedModel(Spec):
    """A model that no run of ours trained, and the files from which it was read."""

    model: ModelSpec
    context: PositiveInt
    architecture: str
    dtypes: tuple[str, ...]
    tied_embeddings: bool
    bos: TokenIds
    eos: TokenIds
    source_files: dict[str, FileFacts]


class CheckpointManifest(Spec):
    """Everything about a checkpoint except its tensors; its origin is a `run`, or `imported`.

    An imported checkpoint has no run, data, tokens or optimizer, because we do not know them.
    """

    format_version: Literal[1] = 1
    run: RunSpec | None
    imported: ImportedModel | None = None
    data_hash: str | None
    base_hash: str | None
    tokens: NonNegativeInt
    progress: Progress
    versions: dict[str, str]
    files: dict[str, FileFacts]

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.run is None) == (self.imported is None):
            raise ValueError("a checkpoint is either of a run or imported")
        if (self.run is None) != (self.data_hash is None):
            raise ValueError("a run has a data_hash, an imported model has none")
        return self

    @property
    def model(self) -> ModelSpec:
        """The model to which the weights belong."""
        origin = self.run or self.imported
        assert origin is not None
        return origin.model

    @property
    def tokenizer(self) -> str | None:
        """`byte`, the hash of the attached tokenizer.json, or None if it is unknown."""
        # An imported byte tokenizer is a file with our own content: it counts as `byte`.
        if TOKENIZER in self.files:
            found = self.files[TOKENIZER].sha256
            return "byte" if found == hashlib.sha256(make_byte_json()).hexdigest() else found
        if self.run is not None and isinstance(self.run.data.parsed_tokenizer, ByteTokens):
            return "byte"
        return None

    def check_tokenizer(self, tokenizer: str | None) -> None:
        """Raise ValueError if a run with `tokenizer` has tokens that this model does not read.

        `tokenizer` is as in the property. If either is unknown, nothing is compared.
        """
        if None not in (self.tokenizer, tokenizer) and self.tokenizer != tokenizer:
            raise ValueError(
                f"growth.base reads tokens of tokenizer {self.tokenizer}, this run's are of "
                f"{tokenizer}; data.tokenizer must be the base's: byte, or the {TOKENIZER} in its "
                "folder"
            )

    @property
    def context(self) -> int:
        """The longest sequence for which the model is made, in tokens."""
        if self.imported is not None:
            return self.imported.context
        assert self.run is not None
        return self.run.data.context

    @property
    def trained_run(self) -> RunSpec:
        """The run that made this checkpoint; ValueError if it was imported."""
        if self.run is None:
            raise ValueError("was imported, and no run can continue it; name it as growth.base")
        return self.run

    def check_run(self, run: RunSpec, data_hash: str) -> None:
        """Raise ValueError unless this is a checkpoint of `run` on that data."""
        if self.trained_run != run:
            raise ValueError(f"is of another run: {_describe_difference(self.trained_run, run)}")
        self._check_data(data_hash)

    def check_trunk_of(self, branch: RunSpec, data_hash: str) -> None:
        """Raise ValueError unless this is the trunk's checkpoint from which `branch` starts."""
        # Derive the branch from the trunk's own spec: a branch differs from its trunk in its budget
        # and warmup, and any other difference would be in `expected`.
        expected = make_branch(self.trained_run, branch.train.tokens_per_param, branch.trunk)
        if expected != branch:
            raise ValueError(f"is of another run's trunk: {_describe_difference(expected, branch)}")
        if self.progress.step != branch.start_step:
            raise ValueError(f"is at step {self.progress.step}, not {branch.start_step}")
        self._check_data(data_hash)

    def _check_data(self, data_hash: str) -> None:
        if self.data_hash != data_hash:
            raise ValueError(f"was trained on data {self.data_hash}, not {data_hash}")


def _describe_difference(saved: RunSpec, requested: RunSpec) -> str:
    """Return the first field in which two specs differ, with both values."""
    name, a, b = _find_first_difference(saved, requested)
    # Example: "train.lr is 0.01, not 0.02", and not the two train sections in full.
    if isinstance(a, Spec) and isinstance(b, Spec):
        field, a, b = _find_first_difference(a, b)
        name = f"{name}.{field}"
    return f"{name} is {a}, not {b}"


def _find_first_difference(a: Spec, b: Spec) -> tuple[str, object, object]:
    pairs = ((name, getattr(a, name), getattr(b, name)) for name in type(a).model_fields)
    return next((name, x, y) for name, x, y in pairs if x != y)
