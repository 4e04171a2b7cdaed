"""One step of supernet training, in parts that are each compiled once for a resolution.

    prepare    images of the data set -> augmented, mixed, resized, normalised; targets
    gradient   of one subnet on (a part of) the batch, added to what the subnets before it gave
    update     the weights, their moving average, the loss scale

The host calls `gradient` for every subnet of the step, so a sampler may name any number of them, and nothing is
compiled anew. The first subnet teaches the others where the sampler says so.

Images of a batch are spread over all devices, of all processes where JAX is connected to several; the state is the same
on each. Every process makes the same calls with its own rows of the batch, so all of them must name the same subnets.
"""

import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from numpy.typing import NDArray

from nas import config
from nas.data import Dataset
from nas.data.resize import resize
from nas.errors import ExecutorError
from nas.supernet import Supernet
from nas.train import ema, losses, optimiser, precision
from nas.train.augment import augment, mix
from nas.train.samplers import Sampler

State = dict[str, Any]  # params, optimiser; average with settings.ema; loss_scale where the precision needs one;
# hyperparameters where some are inputs of the compiled step: float32 [] by their dotted keys of config.Train
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Called as `step(state, number, images, labels)`: one update of the weights, with what `sampler` names.

    Values in the state's `hyperparameters` stand in for those of the settings, and nothing is compiled anew for others.

    Everything random is drawn from (seed, number), so a training that was cut off repeats its steps, and every process
    draws the same. `images` and `labels` are the rows of this process.
    """

    supernet: Supernet
    data: Dataset
    settings: config.Train
    transform: optax.GradientTransformation
    sampler: Sampler
    seed: int
    steps: int  # in all, which the schedule of the learning rate is over

    def init(self, params: Mapping[str, ArrayLike], hyperparameters: Mapping[str, float] | None = None) -> State:
        """The state before the first step, a copy of it on every device.

        `params` must be the same in all processes; where there are several, NumPy arrays. `hyperparameters` as `State`
        has them.
        """

        def init(params: Any) -> State:
            state: State = {"params": params, "optimiser": self.transform.init(params)}
            if self.settings.ema:
                state["average"] = jax.tree.map(jnp.copy, params)
            if self._precision.scaled:
                state["loss_scale"] = precision.initial_scale()
            if hyperparameters is not None:
                state["hyperparameters"] = {key: jnp.float32(value) for key, value in hyperparameters.items()}
            return state

        if self._everywhere is None:
            return init(jax.tree.map(jnp.asarray, params))
        return jax.jit(init, out_shardings=self._everywhere)(params)

    def __call__(
        self, state: State, number: int, images: NDArray[np.uint8], labels: NDArray[np.int32]
    ) -> tuple[State, Metrics]:
        """The next state, and losses and top-1 on this batch of the largest, smallest and other subnets.

        Where the loss is scaled, `skipped` is 1 if the gradients overflowed and the step is to be tried with less.
        """
        space = self.supernet.space
        rng = np.random.default_rng([self.seed, number, 1])
        side = int(rng.choice(space.resolutions))
        varied = state.get("hyperparameters")
        size = space.at(side).input[:2]
        x, targets = self._prepare(np.uint32(number), *self._spread(images, labels), varied, size=size)
        drawn = self.sampler(number, rng, functools.partial(self._score, state["params"], side, x, targets))
        _require_same_subnets(number, drawn.genotypes)
        branches = space.at(side).branches(drawn.genotypes)
        kinds = [self._kind(g) for g in drawn.genotypes]
        total = self._spare.pop("total", None) or jax.tree.map(jnp.copy, state["params"])
        seen: dict[str, list[Array]] = {}
        parts = self.settings.accumulate
        for part in range(parts):
            x_part, targets_part = (x, targets) if parts == 1 else self._part(x, targets, np.int32(part))
            teacher = self._no_teacher(len(x_part), next(iter(state["params"].values())))
            for index, (kind, picked) in enumerate(zip(kinds, branches, strict=True)):
                learns, fresh = np.bool_(index == 0 or not drawn.distil), np.bool_(part == index == 0)
                key = np.array([number, part, index], np.uint32)
                total, logits, loss, top1 = self._gradient(
                    total,
                    fresh,
                    state["params"],
                    state.get("loss_scale"),
                    varied,
                    picked,
                    key,
                    x_part,
                    targets_part,
                    teacher,
                    learns,
                )
                teacher = logits if index == 0 else teacher
                seen.setdefault(f"loss_{kind}", []).append(loss)
                seen.setdefault(f"top1_{kind}", []).append(top1)
        state, metrics = self._update(state, total, np.int32(number))
        self._spare["total"] = total
        return state, {name: _mean(values) for name, values in seen.items()} | metrics

    @property
    def compiled(self) -> int:
        """Programs compiled so far: three, whatever was trained; preparation and gradient once more a resolution."""
        parts: tuple[Any, ...] = (self._prepare, self._gradient, self._update)
        return sum(part._cache_size() for part in parts)

    @functools.cached_property
    def _by_image(self) -> NamedSharding | None:
        """How a batch is spread over the devices of all processes; None if there is one."""
        devices = np.array(jax.devices())
        return NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data")) if len(devices) > 1 else None

    @functools.cached_property
    def _everywhere(self) -> NamedSharding | None:
        return None if self._by_image is None else NamedSharding(self._by_image.mesh, PartitionSpec())

    def _spread(self, images: NDArray[np.uint8], labels: NDArray[np.int32]) -> tuple[Any, Any]:
        """The batch [batch, ...] that the rows of all processes make, in the order of the processes."""
        if self._by_image is None:
            return images, labels
        return tuple(jax.make_array_from_process_local_data(self._by_image, rows) for rows in (images, labels))

    def _no_teacher(self, images: int, param: Array) -> Array:
        """Logits [images, classes] for the first subnet of a step, which has no teacher.

        Restored weights are bound to their device, and so are logits that come of them. These are bound where `param`
        is: else the gradient would be compiled once for them and once for a teacher's.
        """
        if images not in self._zeros:
            zeros = np.zeros((images, self.supernet.space.classes), np.float32)
            if self._by_image is None:
                self._zeros[images] = jax.device_put(zeros, param.sharding if param.committed else None)
            else:
                self._zeros[images] = jax.make_array_from_callback(zeros.shape, self._by_image, zeros.__getitem__)
        return self._zeros[images]

    @functools.cached_property
    def _zeros(self) -> dict[int, Array]:
        return {}

    @functools.cached_property
    def _precision(self) -> precision.Precision:
        return precision.named(self.settings.precision)

    @functools.cached_property
    def _ends(self) -> dict[bytes, str]:
        space = self.supernet.space.at(self.supernet.space.resolutions[-1])
        return {space.smallest().tobytes(): "smallest", space.largest().tobytes(): "largest"}

    def _kind(self, genotype: NDArray[np.uint8]) -> str:
        return self._ends.get(genotype.tobytes(), "random")

    def _score(self, params: Any, side: int, x: Array, targets: Array, genotypes: Any) -> NDArray[np.float64]:
        """Loss [n] of genotypes [n, genes] on this batch, forward only."""
        branches = self.supernet.space.at(side).branches(genotypes)
        return np.array([float(self._loss_of(params, b, x, targets)) for b in branches])

    # what is compiled

    @functools.cached_property
    def _prepare(self) -> Callable[..., tuple[Array, Array]]:
        mean, std = jnp.asarray(self.data.mean), jnp.asarray(self.data.std)
        classes = self.supernet.space.classes

        def prepare(
            number: Array, images: Array, labels: Array, varied: Any, *, size: tuple[int, int]
        ) -> tuple[Array, Array]:
            settings = self._with(varied).augment
            key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(self.seed), number))
            x = augment(key, images.astype(jnp.float32) / 255, settings, fill=mean)
            x = (resize(x, size) - mean) / std
            return mix(mix_key, x, jax.nn.one_hot(labels, classes), settings)

        return jax.jit(prepare, static_argnames="size", out_shardings=self._by_image)

    @functools.cached_property
    def _part(self) -> Callable[..., tuple[Array, Array]]:
        """The rows that are computed at a time, spread like the batch."""
        count = self.settings.accumulate

        def part(x: Array, targets: Array, index: Array) -> tuple[Array, Array]:
            x, targets = (a.reshape(count, -1, *a.shape[1:])[index] for a in (x, targets))
            return x, targets

        return jax.jit(part, out_shardings=self._by_image)

    @functools.cached_property
    def _spare(self) -> dict[str, Any]:
        """The memory of the last step's sum of gradients, for the next one: zeros would have to be written."""
        return {}

    def _with(self, varied: Mapping[str, Any] | None) -> config.Train:
        """The settings, with traced numbers in place of those that vary."""
        return self.settings if varied is None else config.with_values(self.settings, varied)

    def _apply(self, params: Any, branches: Array, x: Array, key: Array | None, varied: Any = None) -> Array:
        """Logits in training mode, in the precision of the settings."""
        settings, dtype = self._with(varied), self._precision.dtype
        logits, _ = self.supernet.apply(
            precision.compute_params(params, dtype),
            branches,
            x.astype(dtype),
            mode="train",
            key=key,
            noise=settings.noise if key is not None else None,
            norm_images=settings.norm_images,
            rematerialise=settings.rematerialise,
        )
        return logits

    @functools.cached_property
    def _loss_of(self) -> Callable[..., Array]:
        def loss_of(params: Any, branches: Array, x: Array, targets: Array) -> Array:
            return losses.cross_entropy(self._apply(params, branches, x, None), targets)

        return jax.jit(loss_of, out_shardings=self._everywhere)

    @functools.cached_property
    def _gradient(self) -> Callable[..., tuple[Any, Array, Array, Array]]:
        def loss(
            params: Any,
            scale: Any,
            varied: Any,
            branches: Array,
            key: Array,
            x: Array,
            targets: Array,
            teacher: Array,
            learns: Array,
        ) -> tuple[Array, tuple[Array, Array]]:
            settings = self._with(varied)
            logits = self._apply(params, branches, x, key, varied)
            hard = losses.cross_entropy(logits, targets, smoothing=settings.label_smoothing)
            chosen = jnp.where(learns, hard, losses.divergence(settings.distillation)(logits, teacher))
            return (chosen if scale is None else precision.scaled(chosen, scale)), (logits, hard)

        def gradient(
            total: Any, fresh: Array, params: Any, scale: Any, varied: Any, branches: Array, numbers: Array,
            x: Array, targets: Array, teacher: Array, learns: Array,
        ) -> tuple[Any, Array, Array, Array]:  # fmt: skip
            key = jax.random.key(self.seed)
            for number in numbers:
                key = jax.random.fold_in(key, number)
            (_, (logits, hard)), mine = jax.value_and_grad(loss, has_aux=True)(
                params, scale, varied, branches, key, x, targets, teacher, learns
            )
            top1 = (logits.argmax(-1) == targets.argmax(-1)).mean()
            total = jax.tree.map(lambda t, g: jnp.where(fresh, 0, t) + g, total, mine)
            return total, jax.lax.stop_gradient(logits), hard, top1

        everywhere = self._everywhere
        return jax.jit(gradient, donate_argnums=0, out_shardings=(everywhere, self._by_image, everywhere, everywhere))

    @functools.cached_property
    def _update(self) -> Callable[..., tuple[State, Metrics]]:
        decay, parts = self.settings.ema, self.settings.accumulate

        def update(state: State, total: Any, number: Array) -> tuple[State, Metrics]:
            gradients = total if parts == 1 else jax.tree.map(lambda g: g / parts, total)
            if "loss_scale" in state:
                gradients = precision.unscale(gradients, state["loss_scale"])
            varied = state.get("hyperparameters")
            transform = self.transform if varied is None else optimiser.build(self._with(varied).optimiser, self.steps)
            updates, of_optimiser = transform.update(gradients, state["optimiser"], state["params"])
            new = {"params": optax.apply_updates(state["params"], updates), "optimiser": of_optimiser}
            if "average" in state:
                new["average"] = ema.update(state["average"], new["params"], decay, number)
            metrics: Metrics = {}
            if "loss_scale" in state:
                finite = precision.all_finite(gradients)
                skipped = precision.skipped(state["loss_scale"], finite)
                old = {name: state[name] for name in new}
                new = precision.keep_if(finite, new, old)
                new["loss_scale"] = precision.adjust(state["loss_scale"], finite)
                gradients = precision.keep_if(~skipped, gradients, jax.tree.map(jnp.zeros_like, gradients))
                metrics["skipped"] = skipped.astype(jnp.float32)
            if varied is not None:
                new["hyperparameters"] = varied
            return new, metrics | {"gradient_norm": optimiser.global_norm(gradients)}

        return jax.jit(update, donate_argnums=0, out_shardings=self._everywhere)


def _mean(values: list[Array]) -> Array:
    """Of scalars; where there is one no program has to be run for it, a third of a millisecond."""
    return values[0] if len(values) == 1 else functools.reduce(operator.add, values) / len(values)


def _require_same_subnets(number: int, genotypes: NDArray[np.uint8]) -> None:
    """That all processes drew the same; otherwise they would wait for each other in different branches for ever.

    Raises:
        ExecutorError: they did not.
    """
    if jax.process_count() == 1:
        return
    mine = np.uint32(zlib.crc32(np.ascontiguousarray(genotypes).tobytes()))
    seen = multihost_utils.process_allgather(mine)
    if len(np.unique(seen)) > 1:
        raise ExecutorError(
            f"step {number}: the processes drew different subnets (checksums {seen.tolist()}), whose gradients "
            f"cannot be added up. A sampler must draw from its step, its generator and its scores alone, and all nodes "
            f"need the same versions of this package, NumPy and JAX. Correct that, or set train.processes = 1."
        )
