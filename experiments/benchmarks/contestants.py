"""Who takes part in supernet.py: our training step, each network compiled alone, and PyTorch's supernet."""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self
from unittest import mock

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import psutil

from nas import config, cost, native
from nas.data import Dataset, Part
from nas.run import run
from nas.space import Space, load_space
from nas.supernet import Supernet
from nas.train import losses, optimiser, precision
from nas.train.loop import steps_of
from nas.train.samplers.sampler import Draw
from nas.train.supernet import make_step

BATCH, CLASSES, SIDE = 64, 10, 32


@dataclasses.dataclass(frozen=True)
class Case:
    """A space with weights, images of noise and settings: what every contestant works on."""

    space: Space
    settings: config.Train
    images: int = 5000  # of validation

    @classmethod
    def of(cls, name: Path | str, *, precision: str = "float32", images: int = 5000) -> "Case":
        space = load_space(str(name), input_shape=(SIDE, SIDE, 3), classes=CLASSES)
        return cls(space, config.Train(batch_size=BATCH, precision=precision), images)

    @functools.cached_property
    def supernet(self) -> Supernet:
        return Supernet(self.space)

    @functools.cached_property
    def params(self) -> dict[str, np.ndarray]:
        return self.supernet.init(0)

    @functools.cached_property
    def data(self) -> Dataset:
        rng = np.random.default_rng(0)

        def part(n: int) -> Part:
            images = rng.integers(0, 256, (n, *self.space.input), dtype=np.uint8)
            return Part(images, rng.integers(0, CLASSES, n, dtype=np.int32))

        names = tuple(map(str, range(CLASSES)))
        mean, std = np.full(3, 0.5, np.float32), np.full(3, 0.25, np.float32)
        return Dataset(part(4096), part(self.images), part(1), names, mean, std, "noise")

    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images [BATCH, height, width, 3] and labels."""
        return self.data.train.images[:BATCH], self.data.train.labels[:BATCH]

    def ends(self) -> dict[str, np.ndarray]:
        """The smallest network, the one of 101 random ones with the middle number of MACs, and the largest."""
        drawn = self.space.sample(np.random.default_rng(0), 101)
        macs = self.space.price(drawn, self.space.costs(cost.macs))
        middle = drawn[np.argsort(macs)[50]]
        return {"smallest": self.space.smallest(), "random": middle, "largest": self.space.largest()}

    def sandwich(self, rng: np.random.Generator) -> np.ndarray:
        """Largest, smallest and two random genotypes [4, genes]."""
        return np.stack([self.space.largest(), self.space.smallest(), *self.space.sample(rng, 2)])


class Ours:
    """Training steps of our supernet; each call says which subnets they train."""

    def __init__(self, case: Case, *, native_kernels: bool = True, **changes: Any):
        self.case, self.native = case, native_kernels
        settings = msgspec.structs.replace(case.settings, **changes)
        step = make_step(case.supernet, case.data, settings, seed=0)
        self.genotypes = case.sandwich(np.random.default_rng(0))
        self.step = dataclasses.replace(step, sampler=lambda number, rng, score: Draw(self.genotypes, distil=True))
        self.state = self.step.init(jax.tree.map(jnp.asarray, case.params))
        self.number = 0

    def train(self, genotypes: np.ndarray, steps: int) -> float:
        """Seconds of a step. The kernels are chosen when the first one is traced."""
        self.genotypes = genotypes
        images, labels = self.case.batch()
        written_out = mock.patch.object(native, "available", return_value=False)
        with contextlib.nullcontext() if self.native else written_out:
            start = time.perf_counter()
            for _ in range(steps):
                self.state, metrics = self.step(self.state, self.number, images, labels)
                self.number += 1
            jax.block_until_ready((self.state, metrics))
            return (time.perf_counter() - start) / steps


class Alone:
    """Training steps of one network that was compiled alone, by the same loss and optimiser."""

    def __init__(self, case: Case, genotype: np.ndarray):
        self.case, settings, data = case, case.settings, case.data
        network = case.space.decode(genotype)
        graph, dtype = network.flat(), precision.named(settings.precision).dtype
        steps = steps_of(data.train, settings.epochs, settings.batch_size)
        transform = optimiser.build(settings.optimiser, steps)

        def loss(params: Any, x: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
            compute = precision.compute_params(params, dtype)
            logits = run(graph, compute, x.astype(dtype), batch_stats=True)[0].astype(jnp.float32)
            return losses.cross_entropy(logits, targets), logits

        def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            x = (images.astype(jnp.float32) / 255 - data.mean) / data.std
            graded = jax.value_and_grad(loss, has_aux=True)
            (value, logits), gradients = graded(state["params"], x, jax.nn.one_hot(labels, CLASSES))
            updates, state_of_optimiser = transform.update(gradients, state["optimiser"], state["params"])
            new = {"params": optax.apply_updates(state["params"], updates), "optimiser": state_of_optimiser}
            top1 = (logits.argmax(-1) == labels).mean()
            return new, {"loss": value, "top1": top1, "gradient_norm": optax.tree.norm(gradients)}

        self.step = jax.jit(step, donate_argnums=0)
        params = jax.tree.map(jnp.asarray, case.supernet.slice(case.params, network))
        self.state = {"params": params, "optimiser": transform.init(params)}

    def train(self, steps: int) -> float:
        """Seconds of a step."""
        images, labels = self.case.batch()
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.step(self.state, images, labels)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / steps


class Torch:
    """PyTorch's supernets, in both memory formats, in a process of their own that allocates as PyTorch comes."""

    def __init__(self, space: Path, params: Mapping[str, np.ndarray], settings: config.Optimiser):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        threads = psutil.cpu_count() or 1
        self.process = context.Process(target=serve_torch, args=(theirs, space, params, settings, threads), daemon=True)
        with mock.patch.dict(os.environ, NAS_KEEP_MEMORY="0"):  # see nas.memory
            self.process.start()
        theirs.close()

    def __call__(self, form: str, method: str, *arguments: Any) -> Any:
        """What `method` of the `torch_supernet.Peer` of that format returns."""
        self.pipe.send((form, method, arguments))
        return self.pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join()


def serve_torch(
    pipe: Connection, space: Path, params: Mapping[str, np.ndarray], settings: config.Optimiser, threads: int
) -> None:
    """What the process of `Torch` does."""
    import torch
    import torch_supernet

    torch.set_num_threads(threads)
    searched = load_space(str(space), input_shape=(SIDE, SIDE, 3), classes=CLASSES)
    peers = {form: torch_supernet.Peer(searched, params, settings, form=form) for form in torch_supernet.FORMATS}
    with contextlib.suppress(EOFError):  # the other end was closed
        while True:
            form, method, arguments = pipe.recv()
            pipe.send(getattr(peers[form], method)(*arguments))
