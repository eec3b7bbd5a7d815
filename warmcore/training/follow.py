"""What every rank but 0 does: whatever rank 0 does, until that says that it is the end."""

from warmcore.corpus.prepare import prepare_corpus
from warmcore.training.ranks import Beginning, Ranks
from warmcore.training.training import Training


def follow_rank_0(ranks: Ranks, *, device: str = "cpu") -> None:
    """Take part in rank 0's runs, one after another."""
    training: Training | None = None
    while (act := ranks.receive_act()) != "end":
        if isinstance(act, Beginning):
            training = _begin_training(act, ranks, device)
            continue
        assert training is not None, f"{act} before any run was begun"
        if act == "advance":
            training.advance()
        else:
            training.gather_for_save()


def _begin_training(act: Beginning, ranks: Ranks, device: str) -> Training:
    corpus = prepare_corpus(act.spec.data)
    if act.how == "start":
        return Training.start(act.spec, corpus, device=device, base=act.checkpoint, ranks=ranks)
    assert act.checkpoint is not None
    return Training.resume(act.spec, corpus, act.checkpoint, device=device, ranks=ranks)
