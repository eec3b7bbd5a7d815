"""Growth on the disk equals growth in memory, and holds a single tensor at a time."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from tests.warmcore.growth.families import COPYING, PADDING, seeded
from warmcore.checkpoint.checkpoint import (
    MODEL,
    OPTIMIZER,
    CheckpointCorruptError,
    load_checkpoint,
    save_checkpoint,
)
from warmcore.checkpoint.progress import Progress
from warmcore.growth.from_checkpoint import GrownTensors, grow_checkpoint
from warmcore.growth.growth import Growth
from warmcore.model.decoder import parameter_shapes
from warmcore.specs import CheckpointRef, GrowthSpec
from warmcore.tensors.files import TensorFile, TensorInfo, TensorStream, write_tensors
from warmcore.training.events import EvaluationEvent, StepEvent
from warmcore.training.training import Training


@pytest.fixture(scope="module")
def base(run_spec, corpus, tmp_path_factory):
    training = Training.start(run_spec(steps=12, depth=2, base_width=16, base_depth=2), corpus)
    list(training.train_to_end())
    return training.save(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture
def grown_run(run_spec, base):
    def make(**options):
        growth = GrowthSpec(base=CheckpointRef(uri=str(base.path), hash=base.hash), **options)
        shape = {"width": 32, "depth": 4, "base_width": 16, "base_depth": 2}
        return run_spec(steps=4, growth=growth, **shape)

    return make


def losses(training):
    return [
        event.loss_nats if isinstance(event, StepEvent) else event.val_loss_nats
        for event in training.train_to_end()
        if isinstance(event, StepEvent | EvaluationEvent)
    ]


RULES = [
    *((operator, "reset") for operator in (*PADDING, *COPYING)),
    *((operator, "transfer_old_reset_new") for operator in (*PADDING, *COPYING)),
    *((operator, "transfer") for operator in COPYING),
]


@pytest.mark.parametrize(("operator", "rule"), RULES)
def test_a_checkpoint_grown_on_disk_begins_and_goes_on_as_one_grown_in_memory(
    operator, rule, grown_run, base, corpus, tmp_path
):
    run = grown_run(operator=operator, optimizer_state=rule)
    saved = grow_checkpoint(base.path, tmp_path / "grown", run=run)
    started = Training.start(run, corpus, base=base.path)
    resumed = Training.resume(run, corpus, saved.path)
    assert started.save(tmp_path / "started").hash == saved.hash
    assert (saved.step, saved.tokens, resumed.base_hash) == (0, 0, base.hash)
    assert losses(resumed) == losses(started)


def test_the_library_reads_what_is_written(grown_run, base, tmp_path):
    run = grown_run(operator="clone", optimizer_state="transfer")
    saved = grow_checkpoint(base.path, tmp_path / "grown", run=run)
    loaded = load_checkpoint(saved.path, expected_hash=saved.hash)
    for name, tensors in ((MODEL, loaded.weights), (OPTIMIZER, loaded.optimizer)):
        theirs = load_file(saved.path / name)
        assert theirs.keys() == tensors.keys()
        assert all(torch.equal(theirs[key], tensors[key]) for key in theirs)


def test_a_base_that_is_another_is_refused_and_leaves_nothing(grown_run, base, tmp_path):
    run = grown_run()
    other = run.growth.model_copy(update={"base": CheckpointRef(uri="x", hash="0" * 64)})
    with pytest.raises(CheckpointCorruptError, match=f"expected {'0' * 64}"):
        grow_checkpoint(base.path, tmp_path / "grown", run=run.model_copy(update={"growth": other}))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_growth_is_refused(run_spec, base, tmp_path):
    with pytest.raises(ValueError, match="growth is None"):
        grow_checkpoint(base.path, tmp_path / "grown", run=run_spec())


def test_growth_that_is_killed_leaves_no_checkpoint(grown_run, base, tmp_path, monkeypatch):
    whole = Growth.grow_weights

    def stop_after_five(self, tensors, generator):
        for _, grown in zip(range(5), whole(self, tensors, generator), strict=False):
            yield grown
        raise KeyboardInterrupt

    monkeypatch.setattr(Growth, "grow_weights", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        grow_checkpoint(base.path, tmp_path / "grown", run=grown_run())
    assert not (tmp_path / "grown").exists()


def test_tensors_of_the_base_are_read_one_at_a_time(grown_run, base, monkeypatch):
    grown = GrownTensors.from_base(grown_run(), base.path)
    alive = []
    read = TensorFile.__getitem__

    def record_read(self, name):
        alive.append(name)
        return read(self, name)

    monkeypatch.setattr(TensorFile, "__getitem__", record_read)
    for taken, _ in enumerate(grown.weights.tensors, start=1):
        assert len(alive) == taken


PEAK = """
import sys
from pathlib import Path
from warmcore.growth.from_checkpoint import grow_checkpoint
from warmcore.specs import RunSpec

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

base, out, *runs = sys.argv[1:]
for run in runs:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = resident("VmRSS")
    grow_checkpoint(Path(base), Path(out), run=RunSpec.model_validate_json(run))
    print(resident("VmHWM") - before)
"""
EVERY_OPERATOR = [
    *({"operator": operator} for operator in PADDING),
    *({"operator": operator, "noise": 0.1} for operator in COPYING),
    {"depth_operator": "interleave"},
    {"depth_operator": "identity"},
]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's high-water mark")
def test_peak_memory_is_a_few_tensors_and_not_a_checkpoint(run_spec, tmp_path):
    small = run_spec(width=256, depth=4, head_dim=64)
    base = save_checkpoint(
        tmp_path / "base",
        weights=TensorStream.from_tensors(random_weights(small.model)),
        optimizer=TensorStream.from_tensors({}),
        run=small,
        data_hash="x",
        base_hash=None,
        tokens=0,
        progress=Progress(),
    )
    ref = CheckpointRef(uri="x", hash=base.hash)
    shape = {"width": 512, "depth": 8, "head_dim": 64, "base_width": 256, "base_depth": 4}
    growths = [GrowthSpec(**options, base=ref) for options in EVERY_OPERATOR]
    runs = [run_spec(growth=growth, **shape).model_dump_json() for growth in growths]
    child = subprocess.run(
        [sys.executable, "-c", PEAK, base.path, tmp_path / "grown", *runs],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    num_bytes = (tmp_path / "grown" / MODEL).stat().st_size
    # The contract allows 300 MB, and the imports take most of them.
    in_flight = 20e6
    allowed = 0.2 * num_bytes + 2 * (3 * 512 * 512 * 4) + in_flight
    peaks = [int(line) for line in child.stdout.splitlines()]
    assert len(peaks) == len(EVERY_OPERATOR)
    assert max(peaks) < allowed < 0.5 * num_bytes


def random_weights(spec):
    shapes = parameter_shapes(spec)
    return {name: torch.randn(shape, generator=seeded()) for name, shape in shapes.items()}


dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(st.integers(0, 5), max_size=3)


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(dtypes, shapes), max_size=6))
def test_a_file_of_tensors_survives_a_round_trip_and_the_library_reads_it(
    tmp_path_factory, entries
):
    path = tmp_path_factory.mktemp("tensors") / "file"
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in entries.items()}
    facts = write_tensors(path, TensorStream.from_tensors(tensors))
    ours, theirs = TensorFile(path), load_file(path)
    assert facts.num_bytes == path.stat().st_size
    assert set(ours) == set(theirs) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(ours[name], tensor)
        assert torch.equal(theirs[name], tensor)
        assert ours.layout[name] == TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))
    path.write_bytes(save(tensors))
    assert all(torch.equal(TensorFile(path)[name], tensors[name]) for name in tensors)
