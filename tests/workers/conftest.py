"""Both services that a worker can talk to: the API, and the fake for outages and clocks."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from service.client import Client
from tests.workers.fake_service import FakeService, serving
from tests.workers.fleet.fleet_process import FleetProcess
from warmcore.specs import DataSpec, ModelSpec, RunSpec, TrainSpec


@pytest.fixture(autouse=True, scope="session")
def _one_thread_and_an_own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # As `cpus.pin_threads` sets for these runs; two threads would compete for a core.
        torch.set_num_threads(1)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def api(shared_api: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """The API without queued runs. All tests of a module share it, which saves 0.5 s a test."""
    yield shared_api
    for study in shared_api.client.get("/v1/studies", limit=10)["items"]:
        if study["state"] in ("active", "paused"):
            shared_api.client.post(f"/v1/studies/{study['id']}/cancel")


@pytest.fixture
def fake(tmp_path: Path) -> FakeService:
    return FakeService(f"{tmp_path.as_uri()}/artifacts")


@pytest.fixture
def url(fake: FakeService) -> Iterator[str]:
    with serving(fake) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, "key", patience_seconds=20) as client:
        yield client


@pytest.fixture
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of documents from which a model can learn."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        lines = (f"line {n}: the square of {n} is {n * n}, said document {i}\n" for n in range(60))
        (folder / f"{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def make_spec(text: Path) -> Callable[..., RunSpec]:
    """Make specs of small runs; keyword arguments override fields of the train spec."""

    def make(*, num_steps: int = 20, **train: Any) -> RunSpec:
        options = {"batch_size": 4, "log_every": 5, "evaluations": 4, "eval_tokens": 512}
        return RunSpec(
            model=ModelSpec(width=16, depth=1, head_dim=16),
            data=DataSpec(source=str(text), context=32),
            train=TrainSpec(**options | {"num_tokens": num_steps * 128} | train),
        )

    return make


@pytest.fixture(scope="module")
def start_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., FleetProcess]]:
    """Start fleets, and stop them after the last test of the module."""
    with contextlib.ExitStack() as stack:

        def start(url: str, *options: str, **how: Any) -> FleetProcess:
            fleet = FleetProcess(url, tmp_path_factory.mktemp("fleet") / "log", *options, **how)
            stack.callback(fleet.stop)
            return fleet

        yield start


@pytest.fixture(scope="module")
def shared_fake(tmp_path_factory: pytest.TempPathFactory) -> FakeService:
    return FakeService(tmp_path_factory.mktemp("artifacts").as_uri())


@pytest.fixture(scope="module")
def shared_url(shared_fake: FakeService) -> Iterator[str]:
    with serving(shared_fake) as url:
        yield url
