"""Checkpoints by Orbax (the one place it enters): in the background, atomic, pruned safely, restored to the bit."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nas.errors import CheckpointError

Identity = Mapping[str, str | int | float | bool | None]  # what a checkpoint is of, by name: {"space": digest, ...}

_TRASH = "trash"


class Checkpoints:
    """The checkpoints of one training, by step, in `folder`; the newest two are kept. Use it by `with`.

    A step is written under another name and takes its own when it is whole; one that is to go is moved aside before it
    is deleted. So a process that is killed anywhere leaves whole steps only, and the training goes on from the newest.

    Every checkpoint says what it is of: `identity`, and a hash of the names, shapes and types of its arrays.
    """

    def __init__(self, folder: Path, identity: Identity | None = None):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every save; its errors are raised here
        self._args = ocp.args
        self.folder = folder
        self.identity = dict(identity or {})
        self._step: int | None = None  # being written, or the last that was
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            todelete_subdir=_TRASH,  # deleting in place leaves half a step behind when the process is killed
            cleanup_tmp_directories=True,  # what killed processes were writing
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._empty_trash),
            create=True,
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree` as the state after `step` steps, in the background; a step that is there already is kept.

        When it returns, what is written no longer depends on the arrays of `tree`: they may be donated. It waits for
        the save before it, if that is still under way.

        Raises:
            CheckpointError: the save before this one failed, or this one cannot begin.
        """
        self._wait()
        if step in self._manager.all_steps():
            return
        # Orbax cannot restore NumPy's scalars. On a CPU it reads the arrays' own memory, which JAX does not give to a
        # donation while it is being read; elsewhere it has copied them to the host when `save` returns.
        tree = jax.tree.map(lambda a: a if isinstance(a, jax.Array) else np.asarray(a), tree)
        args = self._args.Composite(
            state=self._args.StandardSave(tree),
            identity=self._args.JsonSave(self.identity | {"arrays": _structure(tree)}),
        )
        self._step = step
        try:
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._unwritten(e) from e

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        self._wait()
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, with the structure, shapes, types and devices of `like`.

        Raises:
            CheckpointError: the checkpoint is of something else, or its files are damaged.
        """
        self._wait()
        self._check(step, like)
        args = self._args.Composite(state=self._args.StandardRestore(jax.tree.map(_abstract, like)))
        try:
            return self._manager.restore(step, args=args)["state"]
        except Exception as e:  # Orbax and TensorStore raise many types
            raise _unusable(self.folder / str(step), "it is damaged", e) from e

    def close(self) -> None:
        """Waits for what is under way.

        Raises:
            CheckpointError: it could not be written.
        """
        try:
            self._wait()
        finally:
            self._manager.close()
            self._empty_trash()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:  # otherwise the first error says more
                raise

    def _check(self, step: int, like: Any) -> None:
        """Holds what the checkpoint is of against what it is wanted for."""
        path = self.folder / str(step)
        try:
            args = self._args.Composite(identity=self._args.JsonRestore())
            found = dict(self._manager.restore(step, args=args)["identity"])
        except Exception as e:
            raise _unusable(
                path, "it does not say what it is of, so it is damaged or of an older version of nas", e
            ) from e
        wanted = self.identity | {"arrays": _structure(like)}
        differ = [k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
        if differ:
            what = "; ".join(f"{k} {found.get(k)!r}, here {wanted.get(k)!r}" for k in differ)
            raise CheckpointError(
                f"{path}: this checkpoint is of another training: {what}. Use it with the space and the settings that "
                f"it was made with (space.toml and config.toml of its run folder), train in a new folder with --out, "
                f"or train anew here with `nas run EXPERIMENT --redo train` (a winner: `--redo finish`)."
            )

    def _wait(self) -> None:
        """Until the save under way is done."""
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._unwritten(e) from e

    def _unwritten(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: the checkpoint of step {self._step} could not be written: {_brief(error)}. Free some "
            f"space or make the folder writable, then run the same command: it goes on from the checkpoint before it."
        )

    def _empty_trash(self) -> None:
        """Deletes what was moved aside; called in the background, while the next step is written."""
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / _TRASH, ignore_errors=True)


def _unusable(path: Path, why: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: this checkpoint cannot be restored: {why} ({_brief(error)}). While this training is unfinished, "
        f"move that folder away to go on from the checkpoint before it; or train anew with "
        f"`nas run EXPERIMENT --redo train` (a winner: `--redo finish`)."
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, type and place of an array; one that has no place yet goes to the first device."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _structure(tree: Any) -> str:
    """Hash of the path, shape and type of every array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    kinds = [[jax.tree_util.keystr(path), list(a.shape), str(a.dtype)] for path, a in leaves]
    return hashlib.sha256(json.dumps(kinds).encode()).hexdigest()[:16]


def _brief(error: Exception) -> str:
    """The type of an error and the first line of what it says; TensorStore's are long, and the reason stands last."""
    said = next(iter(str(error).splitlines()), "")
    said = said if len(said) <= 240 else f"{said[:80]} ... {said[-155:]}"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
