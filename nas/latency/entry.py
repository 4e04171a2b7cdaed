"""What a latency table holds of one block."""

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """One block, alone, before any correction."""

    latency_ms: float
    interval_ms: float  # half the 95 % interval of latency_ms, which is a difference of timings; 0 where not known
    label: str
    role: str  # first, middle or last in the chain; the first one's latency includes what a call costs
    rounds: int

    @property
    def kind(self) -> str:
        """The type of the block, "mbconv", with which its label begins."""
        return self.label.partition(" ")[0]
