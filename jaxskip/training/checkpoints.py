"""Checkpoints through Orbax: atomic, asynchronous, restorable on another mesh. Nothing else imports Orbax."""

import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)


def _layout(tree: Any) -> dict[str, str]:
    """Path of each array -> its dtype and shape."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or none could be read; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run: `directory/<step>/`, the newest `keep` of them.

    Each holds a state (any pytree of arrays, typed PRNG keys included) and `extra` (JSON: the position in the data,
    the configuration). Saving copies the state to the host and writes in the background; a kill while writing leaves
    the step before it.

    Raises CheckpointError when the folder cannot be written or has no room for two checkpoints of `like`.

    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
    ...     checkpoints.save(3, {"w": jnp.ones(2)}, {"batch": 3})
    ...     step, state, extra = checkpoints.restore({"w": jnp.zeros(2)})
    >>> step, state["w"].tolist(), extra
    (3, [1.0, 1.0], {'batch': 3})
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        self.directory = pathlib.Path(directory).resolve()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".writable-{os.getpid()}"
            probe.write_bytes(b"0")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoints to {self.directory}: {error}") from error
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def check_room(self, state: Any) -> None:
        """Raise CheckpointError now rather than hours later when the disk cannot take two checkpoints of `state`."""
        need = 2 * sum(
            x.nbytes for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise CheckpointError(
                f"two checkpoints need {need / 1e6:.0f} MB, but {self.directory} has {free / 1e6:.0f} MB free; "
                "free some space, choose another folder, or train without checkpoints"
            )

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Write `state` and `extra` under `step`; returns once the state is copied and may be donated.

        Saving a step that is there already does nothing. Raises CheckpointError when this or the write before it,
        which went on in the background, failed.
        """
        if step in self._manager.all_steps():
            return
        # Orbax casts a dtype that differs at restore without a word; the layout written here is compared first.
        record = {"layout": _layout(state), "extra": extra}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(step, error) from error

    def wait(self) -> None:
        """Return when everything saved is on disk; raises CheckpointError when it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._write_error(None, error) from error

    def _write_error(self, step: int | None, error: Exception) -> CheckpointError:
        what = "a checkpoint" if step is None else f"the checkpoint of step {step} (or the one before it)"
        return CheckpointError(
            f"{what} could not be written to {self.directory}: {error}. "
            f"Finished checkpoints: {self.steps()}; free some space and resume from the newest."
        )

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extra) of the newest readable checkpoint, or None when there is none at all.

        Args:
          like: a state of the same structure, arrays or ShapeDtypeStructs; its shardings decide where the restored
            arrays lie, which may be another mesh than the one they were saved from.

        An unreadable checkpoint (truncated, files missing) is reported and the one before it is taken. Raises
        CheckpointError when all are unreadable, or when the newest is sound but was written by another model or
        optimizer (other names, shapes or dtypes), which no older checkpoint can mend.
        """
        steps = self.steps()
        failures = []
        for step in reversed(steps):
            try:
                return (step, *self._read(step, like))
            except CheckpointError:
                raise
            except Exception as error:  # Orbax and its storage raise many types, plain Exception too, for damaged files
                failures.append(f"step {step}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                logger.warning("checkpoint %s cannot be read; trying the one before it", failures[-1])
        if failures:
            raise CheckpointError(f"no checkpoint in {self.directory} can be read: " + "; ".join(failures))
        return None

    def _read(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        record = self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
        saved, wanted = record["layout"], _layout(like)
        if saved != wanted:
            differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
            name = differing[0]
            raise CheckpointError(
                f"step {step} in {self.directory} was written by another model or optimizer: {len(differing)} arrays "
                f"differ, the first is {name!r}, saved {saved.get(name, 'not at all')}, wanted "
                f"{wanted.get(name, 'not at all')}; resume with the run's own configuration or start a new run"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return items.state, record["extra"]

    def close(self) -> None:
        """Wait for the last write and release Orbax's threads."""
        self.wait()
        self._manager.close()
