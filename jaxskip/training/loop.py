"""The one training loop: step, log, evaluate, save; continue where a killed run stopped."""

import contextlib
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxskip.data import BatchIterator
from jaxskip.training.checkpoints import Checkpoints
from jaxskip.training.metrics import LossMonitor, MetricsLog, Progress, read_metrics
from jaxskip.training.sharding import shard_batch
from jaxskip.training.step import TrainState

logger = logging.getLogger(__name__)

# (state, device batch, number of steps taken before this one) -> (state, metrics)
StepFn = Callable[[TrainState, Any, int], tuple[TrainState, dict[str, jax.Array]]]


def fit(
    state: TrainState,
    step_fn: StepFn,
    batches: BatchIterator,
    *,
    mesh: Mesh,
    steps: int,
    directory: str | os.PathLike,
    save_every: int | None = None,
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    eval_every: int | None = None,
    tokens_per_step: int | None = None,
    title: str = "training",
    tensorboard: bool = False,
) -> tuple[TrainState, list[dict]]:
    """Train until `steps` steps are taken in all, writing metrics and checkpoints to `directory`.

    When `directory` holds checkpoints, the newest readable one is restored onto `state`'s shardings and training
    goes on from there, also in the data: on one machine with the same devices the losses are bit for bit those of a
    run that was never interrupted.

    Args:
      state: from `init_state`; donated.
      step_fn: (state, batch, n) -> (state, metrics), at least "loss", "grad_norm", "skipped", see `make_train_step`.
      batches: this process's rows, see `jaxskip.data.BatchIterator`.
      mesh: the mesh that `state` lies on; in force during steps and evaluation.
      save_every: steps between checkpoints; None saves only at the end and when stopped.
      evaluate: params -> values to log, called every `eval_every` steps and after the last.
      tokens_per_step: to report tokens per second.

    Returns: the last state and the rows of metrics.jsonl. A row has "step" (steps taken), the step's metrics,
    "seconds" (spent in steps so far, without compilation, evaluation and saving), and evaluation values where due.

    Raises KeyboardInterrupt after a first SIGINT or SIGTERM, with the state saved (one process; with several the last
    periodic checkpoint counts); FloatingPointError when steps stay non-finite; CheckpointError for a full disk.
    """
    directory = pathlib.Path(directory)
    writer = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(directory / "checkpoints"))
        checkpoints.check_room(state)
        restored = checkpoints.restore(state)
        start = 0
        if restored is not None:
            start, state, extra = restored
            batches.set_state(extra["data"])
            logger.warning("%s: resuming after step %d", title, start)
        log = stack.enter_context(MetricsLog(directory, resume_step=start, tensorboard=tensorboard)) if writer else None
        progress = stack.enter_context(Progress(title, total=steps)) if writer else None
        stopped = stack.enter_context(_stop_signals())
        stack.enter_context(jax.set_mesh(mesh))
        recorder = _Recorder(log, progress, tokens_per_step, read_metrics(directory))

        for n in range(start, steps):
            state, metrics = step_fn(state, shard_batch(next(batches), mesh), n)
            recorder.push(n + 1, metrics)
            interrupted = stopped()
            last = n + 1 == steps or interrupted
            if evaluate is not None and (last or (eval_every and (n + 1) % eval_every == 0)):
                recorder.drain(lambda params=state.params: evaluate(params))
            if last or (save_every and (n + 1) % save_every == 0):
                recorder.drain()
                checkpoints.save(n + 1, state, {"data": batches.get_state()})
                recorder.restart_clock()
            if interrupted:
                checkpoints.wait()
                raise KeyboardInterrupt(f"stopped after step {n + 1}; a checkpoint was saved")
    return state, read_metrics(directory)


class _Recorder:
    """Writes each step's row one step late, so that reading the metrics does not stall the device."""

    def __init__(self, log, progress, tokens_per_step, rows):
        self._log, self._progress, self._tokens = log, progress, tokens_per_step
        self._seconds = rows[-1]["seconds"] if rows else 0.0
        self._mark: float | None = None  # when the step before finished; None: the next duration is not counted
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._monitor = LossMonitor()

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.drain()
        self._pending = (step, metrics)

    def drain(self, evaluate: Callable[[], dict[str, float]] = dict) -> None:
        """Wait for the pending step, then write its row together with what `evaluate` gives."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        row = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        elapsed, self._mark = (now - self._mark if self._mark is not None else 0.0), now
        self._seconds += elapsed
        row["seconds"] = self._seconds
        if self._tokens and elapsed:
            row["tokens_per_second"] = self._tokens / elapsed
        values = evaluate()
        if values:
            self.restart_clock()
        if self._log is not None:
            self._log.write(step, {**row, **values})
            shown = f"loss {row['loss']:.3f}" + "".join(f", {name} {value:.3f}" for name, value in values.items())
            self._progress.update(step, shown)
        self._monitor.check(step, row["loss"], row["grad_norm"], bool(row["skipped"]))

    def restart_clock(self) -> None:
        """Leave what happened since the last step (evaluation, saving) out of the time."""
        self._mark = time.perf_counter()


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn a first SIGINT or SIGTERM into a request to stop after the step; a second one acts at once.

    Only in the main thread of a single process: several processes would have to stop at the same step.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield lambda: False
        return
    asked = False
    previous = {}

    def ask(number, frame):
        nonlocal asked
        asked = True
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        logger.warning("%s: stopping after this step; once more to stop at once", signal.Signals(number).name)

    for signum in (signal.SIGINT, signal.SIGTERM):
        previous[signum] = signal.signal(signum, ask)
    try:
        yield lambda: asked
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
