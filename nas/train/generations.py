"""Training of a population of supernets, whose hyper-parameters are found meanwhile (nas.train.population says how).

    values of all members -> each trains an interval (`fit`) -> compared subnets are scored -> population.json
              ^                                                                                      |
              +-------- exploit and explore: whose weights, which values (nas.train.population) -----+

Members differ in their hyper-parameters alone: first weights, batches and subnets of every step are the same, so that
luck has as little part in the comparison as can be. The values are inputs of the compiled step; nothing is compiled for
a member.

All that happens follows from the seed and the scores, which are whole numbers on disk: a training that was cut off
derives its generations again, and goes on with the member it was at, from that one's newest checkpoint. Checkpoints
are kept of two generations, the one that trains and the one that it goes on from. What is left in the end is what one
supernet leaves, a checkpoint of the best member and the metrics of the line that led to it, and all members' metrics.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array

from nas import config
from nas.data import Dataset
from nas.errors import CheckpointError, ConfigError, Diverged
from nas.files import write_bytes
from nas.supernet import Supernet
from nas.train import optimiser, population, precision
from nas.train.checkpoint import Checkpoints, Identity
from nas.train.lineage import Lineage, Member
from nas.train.loop import Progress, fit, steps_of
from nas.train.step import State, Step
from nas.train.supernet import identity, make_step, trained

Score = Callable[[Mapping[str, Array]], Sequence[int]]
"""Weights -> images that each of the compared subnets classifies correctly; the same subnets and images every time."""

ATTEMPTS = 3  # generations in a row in which all members diverge


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation that has trained its interval."""

    interval: int  # from 0
    intervals: int  # of the whole training
    members: tuple[Member, ...]

    @property
    def scores(self) -> population.Scores:
        """Images that all compared subnets together classify correctly; NaN where a member diverged."""
        return np.array([np.nan if m.correct is None else sum(m.correct) for m in self.members])


def train_population(
    supernet: Supernet,
    data: Dataset,
    settings: config.Train,
    *,
    seed: int,
    folder: Path,
    score: Score,
    images: int,
    progress: Progress | None = None,
    told: Callable[[Generation], None] | None = None,
) -> dict[str, Array]:
    """The weights of the best of `settings.population`, as `train_supernet` gives those of one supernet.

    Args:
        folder: for checkpoints, metrics and population.json; a training that was cut off goes on from there.
        score: how good weights are; called once for a member and interval.
        images: that each of its counts is of.
        progress: steps of all members together; among the metrics are `interval` and `member`, from 1.
        told: called after every generation that was not there yet.

    Raises:
        ConfigError: settings that do not fit together.
        Diverged: all members did, `ATTEMPTS` generations in a row.
        CheckpointError: a checkpoint is damaged or could not be written, or the folder is of another training.
        RunError: population.json is damaged or cannot be written.
    """
    if settings.population is None:
        raise ConfigError("a population was asked for, but train.population is not set: name there what may vary.")
    step = make_step(supernet, data, settings, seed=seed)
    written = {key: config.value_of(settings, key) for key in settings.population.ranges}
    first = step.init(supernet.init(seed), written)
    first = jax.tree.map(lambda a: jax.device_put(a, a.sharding), first)  # placed, as restored ones are: compiled once
    described = json.dumps(config.deciding(settings), sort_keys=True)
    of = {
        **identity(supernet, settings),
        "data": data.digest,
        "seed": seed,
        "settings": hashlib.sha256(described.encode()).hexdigest()[:16],
    }
    lineage = Lineage(folder / "population.json", of, images=images)
    run = _Run(step, settings, settings.population, folder, of, lineage, score, first, progress)
    with Checkpoints(folder / "checkpoints", identity(supernet, settings)) as checkpoints:
        newest = checkpoints.latest()
        if newest is not None and lineage.winner is None:
            raise CheckpointError(
                f"{folder}: it has a checkpoint of one supernet (step {newest}), so no population can be trained "
                f"there. Train in a new folder with --out, or anew here with `nas run EXPERIMENT --redo train`."
            )
        if newest is None:
            winner = run.train(told)
            run.write_metrics(winner)
            lineage.finish(winner.member)
            checkpoints.save(step.steps, _alone(run.state_of(winner.generation, winner.member)))
        state = checkpoints.restore(step.steps, _alone(first))
    run.remove_checkpoints(before=len(lineage.members))
    return dict(trained(state))


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One population in one folder."""

    step: Step
    settings: config.Train
    asked: config.Population
    folder: Path
    of: Identity
    lineage: Lineage
    score: Score
    first: State  # before training
    progress: Progress | None

    def train(self, told: Callable[[Generation], None] | None) -> Member:
        """The best member of the last generation, all before it trained or found in population.json.

        Raises:
            Diverged: all members did, too often.
        """
        asked, ranges = self.asked, self.asked.ranges
        evolution = population.truncation(
            list(ranges.values()),
            [config.value_of(self.settings, key) for key in ranges],
            members=asked.members,
            replaced=asked.replaced,
            resampled=asked.resampled,
        )
        state = evolution.init(population.generation_rng(self.step.seed, 0))
        while True:
            self.remove_checkpoints(before=state.source)
            found = self._found(state)
            members = found + [self._member(state, m) for m in range(len(found), asked.members)]
            generation = Generation(state.interval, self.intervals, tuple(members))
            if told is not None and len(found) < asked.members:
                told(generation)
            if np.isnan(generation.scores).all():
                if state.generation - state.source >= ATTEMPTS:
                    raise _all_diverged(ranges, self.folder)
            elif state.interval + 1 == self.intervals:
                return members[population.best(generation.scores)]
            rng = population.generation_rng(self.step.seed, state.generation + 1)
            state = evolution.tell(rng, state, generation.scores)

    @functools.cached_property
    def intervals(self) -> int:
        """How many equal parts the training has."""
        wanted = steps_of(self.step.data.train, self.asked.interval, self.settings.batch_size)
        return max(1, round(self.step.steps / wanted))

    def state_of(self, generation: int, member: int) -> State:
        """The state that a member's interval ended with; before the first generation, that before training."""
        if generation < 0:
            return jax.tree.map(jnp.copy, self.first)  # what trains gives its arrays away
        with Checkpoints(self._folder(generation, member) / "checkpoints", self._identity(generation, member)) as made:
            step = made.latest()
            if step is None:
                raise CheckpointError(
                    f"{made.folder}: the checkpoint of a member of the population is missing. Bring it back, or train "
                    f"anew with `nas run EXPERIMENT --redo train`."
                )
            return made.restore(step, self.first)

    def write_metrics(self, winner: Member) -> None:
        """Writes metrics.jsonl: of the members whose weights the winner's came from, each in its interval."""
        files = [self._folder(m.generation, m.member) / "metrics.jsonl" for m in self.lineage.ancestors(winner)]
        write_bytes(self.folder / "metrics.jsonl", b"".join(f.read_bytes() for f in files if f.exists()))

    def remove_checkpoints(self, *, before: int) -> None:
        """Removes those of generations before one; never later ones, which a training that goes on comes to yet."""
        for folder in (self.folder / "population").glob("*/*/checkpoints"):
            if int(folder.parts[-3]) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def _found(self, state: population.State) -> list[Member]:
        """The members of a generation that have trained before, which must be those that follow from the seed."""
        found = self.lineage.of_generation(state.generation)
        for number, member in enumerate(found):
            if member != self._described(state, number, member.correct):
                raise CheckpointError(
                    f"{self.lineage.path}: member {number} of generation {state.generation} is not what follows "
                    f"from this seed and the generations before. Another version of nas may have written it: go on "
                    f"with that one, or train anew with `nas run EXPERIMENT --redo train`."
                )
        return found

    def _member(self, state: population.State, number: int) -> Member:
        """Trains a member its interval, scores it and records it."""
        start, stop = (round(self.step.steps * n / self.intervals) for n in (state.interval, state.interval + 1))
        described = self._described(state, number, None)
        begun = self.state_of(state.source, state.parents[number])
        values = {key: np.float32(value) for key, value in described.values.items()}
        placed = self.first["hyperparameters"]
        begun["hyperparameters"] = {key: jax.device_put(v, placed[key].sharding) for key, v in values.items()}

        def progress(done: int, total: int, metrics: dict[str, float]) -> None:
            if self.progress is not None:
                earlier = start * self.asked.members + number * (stop - start)
                where = {"interval": state.interval + 1, "intervals": self.intervals, "member": number + 1}
                self.progress(earlier + done - start, self.step.steps * self.asked.members, metrics | where)

        settings, member = self.settings, described
        try:
            ended = fit(
                self.step,
                begun,
                self.step.data.train,
                steps=stop,
                batch_size=settings.batch_size,
                seed=self.step.seed,
                start=start,
                folder=self._folder(state.generation, number),
                identity=self._identity(state.generation, number),
                checkpoint_steps=settings.checkpoint_steps,
                learning_rate=lambda at: self._rate(at, values),
                tensorboard=settings.tensorboard,
                progress=progress,
            )
        except Diverged:
            ended = None
        if ended is not None and precision.all_finite(ended["params"]):  # the last update may have broken them
            correct = tuple(int(count) for count in self.score(trained(ended)))
            member = msgspec.structs.replace(described, correct=correct)
        self.lineage.add(member)
        return member

    def _described(self, state: population.State, number: int, correct: tuple[int, ...] | None) -> Member:
        values = dict(zip(self.asked.ranges, state.values[number].tolist(), strict=True))
        return Member(state.generation, number, state.interval, state.source, state.parents[number], values, correct)

    @functools.cached_property
    def _rate(self) -> Callable[[int, Mapping[str, Any]], Array]:
        """The learning rate of a step."""

        def rate(at: int, values: Mapping[str, Any]) -> Any:
            return optimiser.schedule(config.with_values(self.settings, values).optimiser, self.step.steps)(at)

        return jax.jit(rate)

    def _folder(self, generation: int, member: int) -> Path:
        return self.folder / "population" / f"{generation:03d}" / f"{member:02d}"

    def _identity(self, generation: int, member: int) -> Identity:
        return {**self.of, "generation": generation, "member": member}


def _alone(state: State) -> State:
    """A member's state as training one supernet leaves it."""
    return {key: part for key, part in state.items() if key != "hyperparameters"}


def _all_diverged(ranges: Mapping[str, config.Range], folder: Path) -> Diverged:
    told = ", ".join(f"{key} = [{low:g}, {high:g}]" for key, (low, high) in ranges.items())
    return Diverged(
        f"{folder}: all members of the population diverged, {ATTEMPTS} times in a row, with values of {told}. Narrow "
        f"the ranges (train.population.vary), of the learning rate first, and train anew with "
        f"`nas run EXPERIMENT --redo train`."
    )
