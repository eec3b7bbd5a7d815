"""Two gloo processes compared with a single process, on the same batches."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from warmcore.checkpoint.checkpoint import load_checkpoint
from warmcore.specs import CheckpointRef, GrowthSpec
from warmcore.specs.train import check_parallel_training
from warmcore.training.ranks import Ranks
from warmcore.training.training import Training

# Relative: the same sums in another order, in float32 (6e-8), added up over the steps.
LOSS, NORM = 1e-6, 1e-5
STRATEGIES = ("ddp", "fsdp")
NUM_BEFORE = 8  # events before another number of processes resumes a run
FAULTS = [
    ("ddp", "all read the first rows"),
    ("fsdp", "all read the first rows"),
    ("fsdp", "each clips by the norm of its shards"),
    ("ddp", "gradients are not averaged"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def wide(run_spec):
    """A run that is clipped at every step by a weighted norm.

    The number of its validation batches is odd: in the last turn rank 1 has no batch.
    """
    fields = {"width": 32, "base_width": 16, "depth": 2, "grad_clip": 0.02}
    return run_spec(steps=16, eval_tokens=4096 * 3 - 1, **fields)


@pytest.fixture(scope="module")
def grown(run_spec, corpus, folder, wide):
    """A run grown with its base's optimizer, in parts, with recomputed blocks and averages."""
    training = Training.start(run_spec(steps=8, depth=2), corpus)
    list(training.train_to_end())
    saved = training.save(folder / "base")
    ref = CheckpointRef(uri=str(saved.path), hash=saved.hash)
    growth = GrowthSpec(base=ref, operator="clone", optimizer_state="transfer")
    options = {"accumulate": 2, "activation_checkpointing": True, "ema_half_life": 0.2}
    options |= {"ema_half_life": 0.2, "swa_fraction": 0.8}
    train = wide.train.model_copy(update=options)
    return wide.model_copy(update={"growth": growth, "train": train})


@pytest.fixture(scope="module")
def one(wide, grown, corpus, folder):
    """The curves of a single process; it saves checkpoints in the middle and at the end."""
    torch.set_num_threads(1)  # as in the two processes
    curves = {}
    for name, spec, base in (("cold", wide, None), ("grown", grown, folder / "base")):
        training = Training.start(spec, corpus, base=base)
        curve = list(itertools.islice(training.train_to_end(), NUM_BEFORE))
        training.save(folder / f"one-{name}-middle")
        curve += list(training.train_to_end())
        curves[name] = [dataclasses.asdict(event) for event in curve]
        training.save(folder / f"one-{name}")
    return curves


@pytest.fixture(scope="module")
def two(one, wide, grown, folder, cache):
    """The curves of two processes, by strategy and name of the planned run."""
    # A single pair of processes does all runs: starting a pair takes seconds.
    plan = {}

    def add(strategy, name, spec, how="start", checkpoint=None, fault=None):
        plan[strategy, name] = {
            "strategy": strategy,
            "how": how,
            "spec": spec.model_dump(mode="json"),
            "checkpoint": checkpoint and str(checkpoint),
            "out": str(folder / f"{strategy}-{name}"),
            "middle": str(folder / f"{strategy}-{name}-middle"),
            "num_before": NUM_BEFORE,
            "fault": fault,
        }

    for strategy in STRATEGIES:
        add(strategy, "cold", wide)
        add(strategy, "grown", grown, checkpoint=folder / "base")
        add(strategy, "resumed", wide, "resume", folder / "one-cold-middle")
    for strategy, fault in FAULTS:
        add(strategy, fault, wide, fault=fault)
    (folder / "plan.json").write_text(json.dumps(list(plan.values())))
    script = Path(__file__).with_name("two_ranks.py")
    env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONWARNINGS": "error"}
    subprocess.run([sys.executable, script, folder / "plan.json"], env=env, check=True)
    return {key: json.loads(Path(f"{p['out']}.json").read_text()) for key, p in plan.items()}


def distance(curve, other):
    """Return the largest relative differences of losses and norms; the events must be equal."""
    for a, b in zip(curve, other, strict=True):
        assert (a.keys(), a["step"], a["tokens"]) == (b.keys(), b["step"], b["tokens"])
        assert [name for name in a if a[name] is None] == [name for name in b if b[name] is None]
    averages = ("ema_val_loss_nats", "swa_val_loss_nats")
    return {
        name: max(
            (abs(a[name] / b[name] - 1) for a, b in zip(curve, other, strict=True) if a.get(name)),
            default=0.0,
        )
        for name in ("loss_nats", "val_loss_nats", "grad_norm", *averages)
    }


def assert_same(curve, other):
    found = distance(curve, other)
    assert found.pop("grad_norm") < NORM, found
    assert max(found.values()) < LOSS, found


def test_averages_are_evaluated(one):
    assert any(event.get("ema_val_loss_nats") for event in one["grown"])


def test_clipping_is_active(one, wide):
    norms = [event["grad_norm"] for curve in one.values() for event in curve if "lr" in event]
    assert min(norms) > wide.train.grad_clip


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["cold", "grown"])
def test_two_processes_follow_the_curve_of_one(one, two, strategy, name):
    assert_same(two[strategy, name], one[name])


@pytest.mark.parametrize(("strategy", "fault"), FAULTS)
def test_whatever_is_done_wrong_shows_in_the_curve(one, two, strategy, fault):
    found = distance(two[strategy, fault], one["cold"][:NUM_BEFORE])
    assert found["loss_nats"] > 100 * LOSS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_go_on_where_one_stopped(one, two, strategy):
    assert_same(two[strategy, "resumed"], one["cold"][NUM_BEFORE:])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["cold", "grown"])
def test_one_process_goes_on_where_two_stopped(
    one, two, strategy, name, corpus, folder, wide, grown
):
    spec = {"cold": wide, "grown": grown}[name]
    training = Training.resume(spec, corpus, folder / f"{strategy}-{name}-middle")
    curve = [dataclasses.asdict(event) for event in training.train_to_end()]
    assert_same(curve, one[name][NUM_BEFORE:])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_of_two_processes_is_an_ordinary_one(one, two, strategy, folder):
    ours, theirs = (
        load_checkpoint(folder / "one-cold"),
        load_checkpoint(folder / f"{strategy}-cold"),
    )
    for name in ("weights", "optimizer"):
        expected, found = getattr(ours, name), getattr(theirs, name)
        assert list(found) == list(expected)
        assert [t.shape for t in found.values()] == [t.shape for t in expected.values()]
    without = {"versions", "files", "progress"}
    assert theirs.manifest.model_dump(exclude=without) == ours.manifest.model_dump(exclude=without)
    assert theirs.manifest.progress.step == ours.manifest.progress.step


def test_ranks_share_a_batch_row_by_row():
    batch = torch.arange(12).reshape(6, 2)
    parts = [Ranks(rank=rank, size=3).select_rows(batch) for rank in range(3)]
    assert torch.equal(torch.cat(parts), batch)
    assert {len(part) for part in parts} == {2}


def test_a_batch_without_equal_parts_is_refused_with_what_works(run_spec, corpus):
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of 3 processes; 3 or 6"):
        Training.start(run_spec(batch_size=4), corpus, ranks=Ranks(size=3))
    with pytest.raises(ValueError, match="batch_size 4 is no multiple of 8 processes; 8 would"):
        check_parallel_training(run_spec(batch_size=4).train, 8, "ddp")
    with pytest.raises(ValueError, match="2 processes x accumulate 2; 4 or 8 would work"):
        check_parallel_training(run_spec(batch_size=6, accumulate=2).train, 2, "ddp")


def test_compiling_is_for_one_process(run_spec):
    train = run_spec(compile=True).train
    check_parallel_training(train, 1, "ddp")
    with pytest.raises(ValueError, match="compile true is for a single process, not 2"):
        check_parallel_training(train, 2, "ddp")


def test_sharded_matrices_are_not_for_muon(run_spec):
    train = run_spec(optimizer="muon").train
    check_parallel_training(train, 1, "fsdp")
    check_parallel_training(train, 2, "ddp")
    with pytest.raises(ValueError, match="optimizer muon needs whole matrices"):
        check_parallel_training(train, 2, "fsdp")
