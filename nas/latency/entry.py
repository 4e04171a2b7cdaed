"""What a latency table holds of one block."""

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """One block, alone, before any correction."""

    latency_ms: float
    spread: float  # half the interquartile range of the samples it was found from, relative to latency_ms
    label: str
    role: str  # first, middle or last in the chain; the first one's latency includes what a call costs
    rounds: int

    @property
    def kind(self) -> str:
        """The type of the block, "mbconv", with which its label begins."""
        return self.label.partition(" ")[0]
