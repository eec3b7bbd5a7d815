"""The training of rank 0. It announces each collective act to the ranks in `follow.py`."""

from pathlib import Path
from typing import Self

from warmcore.checkpoint.checkpoint import SavedCheckpoint
from warmcore.training.events import Event
from warmcore.training.initial_state import InitialState
from warmcore.training.ranks import Beginning, Ranks
from warmcore.training.training import Training


class LeadingTraining(Training):
    """A `Training` that other ranks follow; in a single process it equals a `Training`."""

    # A collective operation returns only when every rank calls it. Each method below therefore
    # announces itself first, and then the other ranks call the same method of their `Training`.
    # Example: without "save", rank 0 would wait in `gather_whole` for ranks that await an act.

    @classmethod
    def build(cls, state: InitialState, *, device: str, ranks: Ranks) -> Self:
        """Begin a run on all ranks; rank 0 has checked `state`, and no rank refuses it."""
        ranks.announce_act(Beginning(how=state.how, spec=state.spec, checkpoint=state.checkpoint))
        return super().build(state, device=device, ranks=ranks)

    def advance(self) -> Event:
        """Do a step, or the evaluation that is due, on all ranks."""
        self.ranks.announce_act("advance")
        return super().advance()

    def save(self, directory: Path) -> SavedCheckpoint:
        """Gather the tensors on all ranks, and write the folder `directory`."""
        self.ranks.announce_act("save")
        return super().save(directory)
