"""population.json: who the members of every generation were, and how they did; all that a population remembers."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import msgspec

from nas.errors import CheckpointError
from nas.files import damaged, read_as, write_json
from nas.train.checkpoint import Identity


class Member(msgspec.Struct, frozen=True):
    """One member of one generation, after its interval."""

    generation: int
    member: int
    interval: int
    source: int  # the generation whose weights it went on from; -1: the first weights
    parent: int  # which member of that
    values: dict[str, float]  # by dotted keys of config.Train
    correct: tuple[int, ...] | None  # images that each of the compared subnets classifies correctly; None: it diverged


class _File(msgspec.Struct, frozen=True):
    of: dict[str, str | int | float | bool | None]
    images: int  # that each of `correct` is of
    winner: int | None  # a member of the last generation; None: not finished
    members: tuple[Member, ...]
    sha256: str  # of all the above


class Lineage:
    """The members in the order of their generations, on disk as soon as they are added: the file is replaced, so a
    crash leaves the one before or the new one, and what is damaged is not believed.

    Attributes:
        members: of all generations.
        winner: the member of the last generation whose weights are used; None: not finished.
    """

    def __init__(self, path: Path, of: Identity, *, images: int):
        """Opens `path`, or starts anew.

        Args:
            of: what is trained, by name.
            images: that every subnet is scored on.

        Raises:
            RunError: the file is damaged.
            CheckpointError: it is of another training.
        """
        self.path = path
        self._of, self._images = dict(of), images
        self.members: list[Member] = []
        self.winner: int | None = None
        if not path.exists():
            return
        found = _read(path)
        differ = [k for k in sorted(found.of.keys() | self._of.keys()) if found.of.get(k) != self._of.get(k)]
        if differ:
            what = "; ".join(f"{k} {found.of.get(k)!r}, here {self._of.get(k)!r}" for k in differ)
            raise CheckpointError(
                f"{path}: this population is of another training: {what}. Use the settings that it was begun with, "
                f"train in a new folder with --out, or train anew here with `nas run EXPERIMENT --redo train`."
            )
        self.members, self.winner = list(found.members), found.winner

    @classmethod
    def read(cls, path: Path) -> "Lineage":
        """What is at `path`, of whatever training.

        Raises:
            RunError: the file is missing or damaged.
        """
        found = _read(path)
        return cls(path, found.of, images=found.images)

    def add(self, member: Member) -> None:
        """Adds a member that has trained its interval."""
        self.members.append(member)
        self._write()

    def finish(self, winner: int) -> None:
        """Says which member of the last generation it was all for."""
        self.winner = winner
        self._write()

    def of_generation(self, generation: int) -> list[Member]:
        """The members of a generation that have trained, in their order."""
        return [m for m in self.members if m.generation == generation]

    def winning_line(self) -> list[Member]:
        """The winner and those whose weights it has, the first generation first; none while there is no winner."""
        if self.winner is None:
            return []
        return self.ancestors(self.of_generation(self.members[-1].generation)[self.winner])

    def ancestors(self, member: Member) -> list[Member]:
        """`member` and those whose weights it has, the first generation first."""
        of = {(m.generation, m.member): m for m in self.members}
        line = [member]
        while line[0].source >= 0:
            line.insert(0, of[line[0].source, line[0].parent])
        return line

    def _write(self) -> None:
        file = _File(self._of, self._images, self.winner, tuple(self.members), "")
        write_json(self.path, msgspec.to_builtins(msgspec.structs.replace(file, sha256=_sha256(file))))


def _read(path: Path) -> _File:
    found = read_as(path, _File, stage="train")
    if found.sha256 != _sha256(found):
        raise damaged(path, "its contents do not have its checksum", stage="train")
    return found


def _sha256(file: _File) -> str:
    content: Mapping[str, object] = msgspec.to_builtins(msgspec.structs.replace(file, sha256=""))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
