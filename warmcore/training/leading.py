"""Rank 0's training: it announces each collective act, and the other ranks follow (`follow.py`)."""

from pathlib import Path
from typing import Self

from warmcore.checkpoint.checkpoint import SavedCheckpoint
from warmcore.training.events import Event
from warmcore.training.initial_state import InitialState
from warmcore.training.ranks import Beginning, Ranks
from warmcore.training.training import Training


class LeadingTraining(Training):
    """A `Training` of which rank 0 decides every act; alone it is a `Training`.

    Each method announces itself before the first collective operation: the other ranks then call
    the same method of their `Training` and meet rank 0 there.
    """

    @classmethod
    def build(cls, state: InitialState, *, device: str, ranks: Ranks) -> Self:
        """Have all ranks begin a run that rank 0 has checked."""
        ranks.announce_act(Beginning(how=state.how, spec=state.spec, checkpoint=state.checkpoint))
        return super().build(state, device=device, ranks=ranks)

    def advance(self) -> Event:
        """Have all ranks do one step, or the evaluation that is due."""
        self.ranks.announce_act("advance")
        return super().advance()

    def save(self, directory: Path) -> SavedCheckpoint:
        """Have all ranks gather the tensors, and write the folder `directory`."""
        self.ranks.announce_act("save")
        return super().save(directory)
