"""Checkpoints by Orbax (the one place it enters): atomic, pruned safely, restored to the bit."""

import logging
from pathlib import Path
from typing import Any

import jax

from nas.errors import CheckpointError


class Checkpoints:
    """The checkpoints of one training, by step, in `folder`; the newest two are kept."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every save
        self._ocp = ocp
        self.folder = folder
        # Deleting a step in place leaves half of it behind when the process is killed; a step is moved aside first.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, todelete_subdir="trash", enable_async_checkpointing=False, create=True
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, step: int, tree: Any) -> None:
        """Writes `tree` as the state after `step` steps; returns when it is on disk."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=self._ocp.args.StandardSave(tree))
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> Any:
        """The tree saved at `step`, with the structure, shapes and types of `like`, and on the devices of its arrays.

        Raises:
            CheckpointError: the files are damaged, or are of other shapes.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # wherever it was saved, on however many

        def wanted(array: Any) -> jax.ShapeDtypeStruct:
            sharding = getattr(array, "sharding", None)
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=here if sharding is None else sharding)

        abstract = jax.tree.map(wanted, like)
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(abstract))
        except Exception as e:  # Orbax and TensorStore raise many types
            raise CheckpointError(
                f"{self.folder / str(step)}: this checkpoint cannot be restored: it is damaged or of another "
                f"network ({type(e).__name__}: {str(e).splitlines()[0][:200]}). While this training is unfinished, "
                f"move that folder away to go on from the checkpoint before it; or train anew with `nas run "
                f"EXPERIMENT --redo train` (a winner: `--redo finish`)."
            ) from e

    def close(self) -> None:
        """Waits for what is under way."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
