"""Labelled images, as they come from a file and as they are split: the words every format of this room speaks."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nas.config import Data
from nas.data.lazy import LazyImages, Records, shape_of
from nas.errors import DataError


@dataclass(frozen=True, eq=False)
class Part:
    """Labelled images: `images` uint8 [n, H, W, C] with C 1 or 3, `labels` [n], int32 once checked.

    `LazyImages` stay in their files; `part.images[rows]` is an array either way.
    """

    images: np.ndarray | LazyImages
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Part":
        """The images at `indices`, in that order; lazy ones are not decoded."""
        lazy = isinstance(self.images, LazyImages)
        return Part(self.images.take(indices) if lazy else self.images[indices], self.labels[indices])

    def in_memory(self) -> "Part":
        """The same, decoded; itself where it is so already."""
        return Part(self.images.decoded(), self.labels) if isinstance(self.images, LazyImages) else self


@dataclass(frozen=True, eq=False)
class Splits:
    """What a source brings. `class_names` None: the classes are the numbers 0..max(training labels)."""

    train: Part
    val: Part | None = None
    test: Part | None = None
    class_names: tuple[str, ...] | None = None


def encoded_splits(
    records: Records,
    labels: np.ndarray,
    counts: Mapping[str, int],
    config: Data,
    class_names: tuple[str, ...] | None,
) -> Splits:
    """Splits over encoded images that lie one behind the other: `counts` of "train", and of "val" and "test" if any.

    Args:
        labels: [n] of all records, class numbers or strings.
        class_names: of the numbers, or of the strings in their order; None: numbers, or the training set's strings
            sorted.

    Raises:
        DataError: the images differ in size and are not to be resized, or a string names no class.
    """
    if not len(labels):
        raise DataError(f"{config.source}: there is no image in it. Put images in it, or point data.source elsewhere.")
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]), strict=False))
    rows = {what: np.arange(starts[what], starts[what] + count) for what, count in counts.items()}
    if labels.dtype.kind == "U":
        class_names = class_names or tuple(np.unique(labels[rows["train"]]).tolist())
        number = {name: i for i, name in enumerate(class_names)}
        unknown = next((i for i, label in enumerate(labels.tolist()) if label not in number), None)
        if unknown is not None:
            raise DataError(
                f"{records.name(unknown)}: label {str(labels[unknown])!r} is no class; these are "
                f"{', '.join(class_names[:20])}{', ...' if len(class_names) > 20 else ''}. Correct the label, or give "
                "that class training images."
            )
        labels = np.array([number[label] for label in labels.tolist()])
    shape, resize = shape_of(records, config.image_size), config.image_size is not None
    parts = {
        what: Part(LazyImages(records, own, (len(own), *shape), resize, config.threads), labels[own])
        for what, own in rows.items()
    }
    return Splits(parts["train"], parts.get("val"), parts.get("test"), class_names)


def checked(splits: Splits, source: str, *, same_size: bool = True) -> Splits:
    """`splits` with int32 labels and every class named.

    Args:
        source: where the images came from, for messages.
        same_size: whether all parts must have images of one height and width.

    Raises:
        DataError: a shape, type, count or label that no training could use.
    """
    parts = {"training": splits.train, "validation": splits.val, "test": splits.test}
    given = {what: part for what, part in parts.items() if part is not None}
    for what, part in given.items():
        _check_part(part, what, source)
    names = _named(splits, source)
    for what, part in given.items():
        if part.labels.max() >= len(names):
            at = int(np.argmax(part.labels >= len(names)))
            raise DataError(
                f"{source}: label {part.labels[at]} of {what} image {at} is out of range: {len(names)} classes allow "
                f"0 to {len(names) - 1}. Correct the label, or name every class."
            )
        first = 1 if same_size else 3
        if part.images.shape[first:] != splits.train.images.shape[first:]:
            raise DataError(
                f"{source}: {what} images are {size(part.images)}, training images {size(splits.train.images)} "
                "(height x width x channels). All must be alike: convert them, or set data.image_size where only "
                "height and width differ."
            )
    ready = {what: Part(part.images, part.labels.astype(np.int32)) for what, part in given.items()}
    return Splits(ready["training"], ready.get("validation"), ready.get("test"), names)


def size(images: np.ndarray | LazyImages) -> str:
    """Height x width x channels, for messages."""
    return "x".join(map(str, images.shape[1:]))


def _check_part(part: Part, what: str, source: str) -> None:
    images, labels = part.images, part.labels
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(
            f"{source}: {what} images have shape {list(images.shape)}. They must be [n, height, width] or "
            "[n, height, width, channels] with no empty side: reshape them."
        )
    if labels.ndim != 1:
        raise DataError(
            f"{source}: {what} labels have shape {list(labels.shape)}. They must be [n], one class number an image: "
            "use argmax(1) for one-hot labels, reshape(-1) for a column."
        )
    if len(images) != len(labels):
        raise DataError(
            f"{source}: {len(images)} {what} images but {len(labels)} labels. Each image needs one label: "
            "write both from the same list."
        )
    if not len(labels):
        raise DataError(f"{source}: the {what} set is empty. Put images in it, or leave that set out altogether.")
    if images.shape[3] not in (1, 3):
        advice = "drop the alpha channel with x[..., :3]" if images.shape[3] == 4 else "keep one or three channels"
        if images.shape[1] in (1, 3):
            advice = "these look channels-first, use x.transpose(0, 2, 3, 1)"
        raise DataError(
            f"{source}: {what} images have {images.shape[3]} channels (shape {list(images.shape)}). "
            f"The last axis must be 1 (grey) or 3 (RGB): {advice}."
        )
    if images.dtype != np.uint8:
        raise DataError(f"{source}: {what} images are {images.dtype}. They must be uint8 of 0..255: convert them.")
    if labels.dtype.kind not in "iu":
        advice = "convert them with astype(int) after checking that nothing is lost"
        if labels.dtype.kind in "SU":
            advice = "class_names, numbers = np.unique(names, return_inverse=True) makes both of names"
        raise DataError(
            f"{source}: {what} labels are {labels.dtype}, not integers. They must be class numbers from 0: {advice}."
        )
    if labels.min() < 0:
        at = int(np.argmin(labels))
        raise DataError(
            f"{source}: label {labels[at]} of {what} image {at} is negative. Labels must be class numbers from 0: "
            "remove unlabelled images, or renumber."
        )


def _named(splits: Splits, source: str) -> tuple[str, ...]:
    """The class names; each class must have a training image, or the network's output would have a dead entry."""
    present = np.unique(splits.train.labels).tolist()
    names = splits.class_names
    count = present[-1] + 1 if names is None else len(names)
    if count < 2:
        raise DataError(f"{source}: all images are of only one class. A classifier needs at least two: add another.")
    seen = set(present)
    absent = next((c for c in range(count) if c not in seen), None)
    if absent is not None:
        label = f"class {absent}" if names is None else f"class {absent} ({names[absent]!r})"
        raise DataError(
            f"{source}: {label} of {count} has no training image; labels go up to {present[-1]}. Labels must be "
            "numbered from 0 without gaps: renumber them (labels from 1 need a - 1), or add images of that class."
        )
    if names is None:
        return tuple(map(str, range(count)))
    if len(set(names)) < count:
        raise DataError(f"{source}: class names repeat: {', '.join(names)}. Give each class its own name.")
    return names


def stratified(labels: np.ndarray, share: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices `(kept, held)` of a split that holds out `share` of every class, both in random order.

    Fractions of an image go to the classes with the largest remainder, so that the total is `share` of all to within
    one image. The last image of a class is never held out: a class of one image stays in `kept`.
    """
    groups = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    sizes = np.array([len(g) for g in groups])
    quota = np.minimum(np.floor(share * sizes).astype(int), sizes - 1)
    order = np.lexsort((rng.random(len(groups)), quota - share * sizes))  # largest remainder first, ties by lot
    order = order[quota[order] < sizes[order] - 1]
    quota[order[: max(0, round(share * len(labels)) - quota.sum())]] += 1
    held = np.concatenate([g[:q] for g, q in zip(groups, quota, strict=True)])
    kept = np.concatenate([g[q:] for g, q in zip(groups, quota, strict=True)])
    return rng.permutation(kept), rng.permutation(held)
