"""What a run writes down and shows while it runs: metrics.jsonl, TensorBoard, a progress line, loss trouble."""

import collections
import json
import logging
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one JSON object a step to `directory/metrics.jsonl`, flushed at once; optionally to TensorBoard too.

    Opening it for a run that goes on after `resume_step` drops the lines after that step (they will be written again)
    and a last line cut short by a kill.

    Raises ImportError for `tensorboard=True` without the package tensorboardX.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> with MetricsLog(folder) as log:
    ...     log.write(1, {"loss": 2.0})
    >>> read_metrics(folder)
    [{'step': 1, 'loss': 2.0}]
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int = 0, tensorboard: bool = False):
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(directory) if row["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)
        self._tensorboard = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoard output needs tensorboardX: pip install 'jaxskip[plot]'") from error
            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of one step; numbers that are not finite become the strings "NaN" and "Infinity"."""
        row = {name: value if math.isfinite(value) else json.dumps(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The rows of `directory/metrics.jsonl`, oldest first; [] when there is none. A line cut short ends the reading."""
    path = pathlib.Path(directory) / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class LossMonitor:
    """Reports losses that are not finite and losses that jump, and gives up when nothing but bad steps follow.

    A spike is a loss above the median of the last `window` good ones by more than ten of their median absolute
    deviations and by more than 20 %. Steps whose loss or gradient was not finite have been skipped by the training
    step; `patience` of them in a row raise FloatingPointError.

    >>> monitor = LossMonitor()
    >>> [monitor.check(n, loss, 1.0, False) for n, loss in enumerate([2.0] * 10 + [9.0])][-1]
    'step 10: the loss jumped from 2.000 to 9.000 (gradient norm 1)'
    """

    def __init__(self, window: int = 50, patience: int = 10):
        self._recent = collections.deque(maxlen=window)
        self._bad, self._patience = 0, patience

    def check(self, step: int, loss: float, grad_norm: float, skipped: bool) -> str | None:
        """What is wrong with this step, also logged as a warning, or None."""
        message = None
        if skipped:
            self._bad += 1
            message = f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, the update was skipped"
            if self._bad >= self._patience:
                raise FloatingPointError(
                    f"{message}; that was the {self._bad}th in a row. Parameters are those of the last good step; "
                    "resume with a lower learning rate, a longer warm-up or stronger clipping"
                )
        else:
            self._bad = 0
            if len(self._recent) >= 10:
                middle = statistics.median(self._recent)
                spread = statistics.median(abs(x - middle) for x in self._recent)
                if loss > middle + max(10 * spread, 0.2 * abs(middle)):
                    message = (
                        f"step {step}: the loss jumped from {middle:.3f} to {loss:.3f} (gradient norm {grad_norm:.3g})"
                    )
            self._recent.append(loss)
        if message:
            logger.warning(message)
        return message


class Progress:
    """A progress line on stderr: redrawn in place on a terminal, otherwise one line every ten seconds.

    >>> with Progress("adamw", total=2, every=0.0, stream=sys.stdout) as progress:
    ...     progress.update(1, "loss 2.000")
    adamw 1/2 loss 2.000
    """

    def __init__(self, title: str, *, total: int, every: float | None = None, stream=None):
        self._title, self._total = title, total
        self._stream = stream or sys.stderr
        self._redraw = self._stream.isatty()
        self._every = every if every is not None else (0.2 if self._redraw else 10.0)
        self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first step, which compiles, was done, and its number

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._redraw:
            print(file=self._stream)

    def update(self, step: int, text: str) -> None:
        """Show `step` and `text` if it is time to; the last step is always shown."""
        now = time.monotonic()
        self._first = self._first or (now, step)
        if now - self._last < self._every and step < self._total:
            return
        self._last = now
        begun, start = self._first
        line = f"{self._title} {step}/{self._total} {text}"
        if step > start:
            line += f", {_duration((now - begun) / (step - start) * (self._total - step))} left"
        print(
            f"\r{line:<100}" if self._redraw else line, end="" if self._redraw else "\n", file=self._stream, flush=True
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
