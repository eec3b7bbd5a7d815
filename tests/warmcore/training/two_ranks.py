"""Runs on two gloo processes: `python two_ranks.py plan.json`, for `test_ranks.py`.

A planned run has a `strategy`, `how` it begins, `spec` and `checkpoint`, the folder `out` for its
last checkpoint, the folder `middle` for a checkpoint after `num_before` events, and a `fault`.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from warmcore.corpus.prepare import prepare_corpus
from warmcore.specs import RunSpec
from warmcore.training import optimizer
from warmcore.training.follow import follow_rank_0
from warmcore.training.launch import exit_at_once
from warmcore.training.leading import LeadingTraining
from warmcore.training.ranks import Ranks


def main(rank, plan):
    torch.set_num_threads(1)
    store = f"file://{plan}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for planned in json.loads(plan.read_text()):
        ranks = Ranks.from_process_group(planned["strategy"])
        with wrong(planned["fault"]):
            if rank:
                follow_rank_0(ranks)
            else:
                lead(planned, ranks)
    exit_at_once()


def lead(planned, ranks):
    spec = RunSpec.model_validate(planned["spec"])
    corpus, out = prepare_corpus(spec.data), Path(planned["out"])
    path = Path(planned["checkpoint"]) if planned["checkpoint"] else None
    if planned["how"] == "start":
        training = LeadingTraining.start(spec, corpus, base=path, ranks=ranks)
    else:
        training = LeadingTraining.resume(spec, corpus, path, ranks=ranks)
    events = []
    for event in training.train_to_end():
        events.append(dataclasses.asdict(event))
        if len(events) == planned["num_before"]:
            training.save(Path(planned["middle"]))
            if planned["fault"]:
                break
    training.save(out)
    ranks.announce_act("end")
    out.with_suffix(".json").write_text(json.dumps(events))


def wrong(fault):
    match fault:
        case "all read the first rows":
            return mock.patch.object(
                Ranks, "select_rows", lambda ranks, batch: batch.chunk(ranks.size)[0]
            )
        case "each clips by the norm of its shards":
            right = optimizer.get_total_norm

            def local(gradients, **options):
                return right([gradient.to_local() for gradient in gradients], **options)

            return mock.patch.object(optimizer, "get_total_norm", local)
        case "gradients are not averaged":
            return mock.patch.object(Ranks, "wrap_averaging", lambda _, model: model)
        case None:
            return contextlib.nullcontext()


if __name__ == "__main__":
    spawn(main, (Path(sys.argv[1]),), nprocs=2)
