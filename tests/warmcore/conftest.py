"""A small real corpus and small models for the laws."""

import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from warmcore.corpus.prepare import Corpus, prepare_corpus
from warmcore.specs import DataSpec, ModelSpec, RunSpec, TrainSpec

# Derandomized: a failure must be there again in the next run.
settings.register_profile("warmcore", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("warmcore")

CONTEXT = 16


# The sums of a matrix product depend on the number of threads, and laws compare bit for bit.
@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of the standard library that no test writes to."""
    folder = tmp_path_factory.mktemp("text")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for name in ("json", "email", "logging"):
        for source in (stdlib / name).glob("*.py"):
            (folder / f"{name}_{source.name}").write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def data_spec(text_folder: Path) -> DataSpec:
    return DataSpec(source=str(text_folder), context=CONTEXT)


@pytest.fixture(scope="session")
def corpus(data_spec: DataSpec, cache: Path) -> Corpus:
    return prepare_corpus(data_spec, cache)


@pytest.fixture(scope="session")
def run_spec(data_spec: DataSpec) -> Callable[..., RunSpec]:
    """A function that makes the spec of a run; keywords are fields of the model or of training."""

    def make(*, steps: int = 12, seed: int = 0, growth: Any = None, **fields: Any) -> RunSpec:
        of_model = {k: v for k, v in fields.items() if k in ModelSpec.model_fields}
        of_train = {k: v for k, v in fields.items() if k not in of_model}
        train = {"batch_size": 4, "evaluations": 3, "eval_tokens": 256} | of_train
        return RunSpec(
            model=ModelSpec(**({"width": 16, "depth": 1, "head_dim": 8} | of_model)),
            data=data_spec,
            train=TrainSpec(**train, num_tokens=steps * train["batch_size"] * CONTEXT),
            growth=growth,
            seed=seed,
        )

    return make
