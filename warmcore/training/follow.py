"""The loop of every rank but rank 0: receive an act, do it, until the act is "end".

An example, a run of two ranks that trains a step and saves:

    rank 0 (`leading.py`)            rank 1 (here)
    checks the run
    announces Beginning              opens the same checkpoint
    builds the model                 builds the model         <- both shard or broadcast it
    announces "advance"
    trains on rows 0 to B/2          trains on rows B/2 to B  <- both average the gradient
    announces "save"
    gathers and writes the tensors   gathers the tensors
    announces "end"                  returns
"""

from warmcore.corpus.prepare import prepare_corpus
from warmcore.training.ranks import Beginning, Ranks
from warmcore.training.training import Training


def follow_rank_0(ranks: Ranks, *, device: str = "cpu") -> None:
    """Do every act of rank 0 until it announces the end; a process may train several runs."""
    training: Training | None = None
    while (act := ranks.receive_act()) != "end":
        if isinstance(act, Beginning):
            training = _begin_training(act, ranks, device)
            continue
        assert training is not None, f"{act} came before a run was begun"
        if act == "advance":
            training.advance()
        else:
            training.gather_for_save()


def _begin_training(act: Beginning, ranks: Ranks, device: str) -> Training:
    # The spec names the data's hash, and the cache holds the data: rank 0 has just prepared it.
    corpus = prepare_corpus(act.spec.data)
    if act.how == "start":
        return Training.start(act.spec, corpus, device=device, base=act.checkpoint, ranks=ranks)
    assert act.checkpoint is not None
    return Training.resume(act.spec, corpus, act.checkpoint, device=device, ranks=ranks)
