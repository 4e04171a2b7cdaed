"""What everything that predicts the latencies of one device has in common: tables, and what is learned instead."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nas.latency.table import Anchor
from nas.ops import Network
from nas.space import Space
from nas.space.space import Genotypes

Floats = NDArray[np.float64]


class LatencyModel(Protocol):
    """Latencies of networks on one device, runtime, precision, thread count and batch size.

    Whoever searches, exports, verifies or reports asks for nothing else, and so not which kind it is.
    """

    @property
    def device(self) -> str:
        """In words."""
        ...

    @property
    def runtime(self) -> str: ...
    @property
    def runtime_version(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def hardware(self) -> str: ...
    @property
    def space(self) -> str:
        """Name of the space that was measured."""
        ...

    @property
    def space_digest(self) -> str: ...
    @property
    def date(self) -> str:
        """ISO 8601, UTC."""
        ...

    @property
    def command(self) -> str: ...
    @property
    def kind(self) -> str:
        """How it came to be, in a word: measured, imported, estimated, learned."""
        ...

    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def unsupported(self) -> dict[str, str]:
        """Key of a block that the device cannot run -> what the runtime said."""
        ...

    @property
    def anchors(self) -> tuple[Anchor, ...]:
        """Networks measured whole."""
        ...

    @property
    def digest(self) -> str:
        """Hash of everything that decides what is predicted."""
        ...

    @property
    def basis(self) -> str:
        """What predictions rest on, in a line."""
        ...

    @property
    def caveat(self) -> str:
        """What `bound` and `reachable` are, where they are not latencies and exact; else empty."""
        ...

    def price(self, space: Space, genotypes: Genotypes) -> Floats:
        """latency_ms [n] of genotypes [n, genes]: to the last bit what `network_ms` gives for each.

        Infinite where the device cannot run a block.

        Raises:
            UnmeasuredBlock, LatencyError: it does not know the networks of `space`.
            SpaceError: the genotypes are of another space.
        """
        ...

    def bound(self, space: Space, genotypes: Genotypes) -> Floats:
        """What a latency limit is held against, [n], of genotypes [n, genes]; never below `price`."""
        ...

    def network_ms(self, network: Network) -> float:
        """latency_ms of one network; errors as of `price`."""
        ...

    def interval_ms(self, network: Network) -> tuple[float, float] | None:
        """The 80 % interval of `network_ms`; None where it is not known for single networks."""
        ...

    def parts_ms(self, network: Network) -> tuple[list[float], float]:
        """What each block of a network takes, and what comes once; they add up to `network_ms`."""
        ...

    def reachable(self, space: Space) -> tuple[float, Genotypes, float, Genotypes]:
        """(smallest `bound`, its genotype, largest `bound`, its genotype) over the whole space."""
        ...

    def level(self, anchors_ms: Floats) -> float:
        """How fast the machine is now, given its anchors measured again [anchors]: 1.1 is 10 % slower than then.

        NaN: an anchor that cannot be run any more.
        """
        ...

    def without(self, unsupported: dict[str, str]) -> "LatencyModel":
        """The same, but all of these blocks (key -> why) count as ones that the device cannot run."""
        ...

    def save(self, folder: Path) -> Path:
        """Writes it to `folder`; returns the path of what says most.

        Raises:
            RunError: the folder cannot be written to.
        """
        ...
