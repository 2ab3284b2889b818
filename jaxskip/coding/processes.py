"""A scheme over worker processes, where stragglers cost time and coding saves it."""

import contextlib
import multiprocessing
import queue
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxskip.coding.execute import Compute, Master
from jaxskip.coding.schemes import Message, Scheme


class WorkerProcesses(Master):
    """Runs a scheme over n processes of this machine; stragglers, stalls and deaths are real. Use in a ``with`` block.

    A round ends when all have answered or, (1 + mu) times after the first answer, as soon as the scheme can do without
    the rest; late answers are thrown away, and a worker that comes back skips the rounds that it missed. What a dead
    worker had to do is from then on done by another one. So is, where the scheme cannot do without it, what a worker
    has not answered for ``patience`` seconds, and that worker is ended.

    Args:
      make_compute: called once in each process (so it is picklable: a module's function or a partial of it), returns
        the ``compute`` of `Emulation`. A main program needs the ``if __name__ == "__main__"`` guard of multiprocessing.
      scheme, jobs, batch_size: as for `Emulation`.
      mu: how much slower than the fastest is late.
      patience: seconds; longer than any task takes, compilation included.

    Attributes:
      processes: of the workers, ``multiprocessing.Process``; ended ones stay in the list.
      seconds: of each round. late: for each round, bool [n], whose answer was not used.

    Raises RuntimeError with the worker's traceback where ``compute`` raises, and where no worker is left.
    """

    def __init__(
        self,
        make_compute: Callable[[], Compute],
        scheme: Scheme,
        jobs: int,
        batch_size: int,
        mu: float = 1.0,
        patience: float = 60.0,
    ):
        super().__init__(scheme, jobs, batch_size)
        if mu <= 0 or patience <= 0:
            raise ValueError(f"mu={mu}, patience={patience}; both must be positive")
        self.make_compute, self.mu, self.patience = make_compute, mu, patience
        self.processes: list[Any] = []
        self.seconds: list[float] = []
        self.late: list[np.ndarray] = []
        self._messages: dict[Message, Any] = {}
        self._owner = np.arange(scheme.n)  # the process that does the work of each of the scheme's workers
        self._alive = np.ones(scheme.n, bool)
        self._events: queue.SimpleQueue = queue.SimpleQueue()
        self._inboxes: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(scheme.n)]
        self._threads: list[threading.Thread] = []

    def __enter__(self):
        context = multiprocessing.get_context("spawn")  # a forked JAX hangs
        try:
            for i, inbox in enumerate(self._inboxes):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(theirs, self.make_compute, self.scheme.delay), daemon=True, name=f"worker {i}"
                )
                process.start()
                theirs.close()
                self.processes.append(process)
                thread = threading.Thread(target=_talk, args=(i, ours, inbox, self._events), daemon=True)
                thread.start()
                self._threads.append(thread)
            for _ in self._threads:
                worker, _, answer = self._events.get()
                if answer is None:
                    raise RuntimeError(f"worker {worker} died while it started")
                _check_answer(worker, answer)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process, inbox in zip(self.processes, self._inboxes, strict=False):
            inbox.put(None)
            process.kill()  # workers hold nothing, and a stopped one would not hear a milder signal
            process.join()
        for thread in self._threads:
            thread.join()

    def step(self, params: Any = None) -> list[tuple[int, Any]]:
        """Runs the next round, see `Master`."""
        if not self._threads:
            raise ValueError("the workers are not running: use a with block")
        tasks = self._begin(jax.device_get(params))
        self._round = self.scheme.rounds + 1
        self._work = [
            [(slot, task.job, *self.rows(task)) for slot, task in enumerate(slots) if task is not None]
            for slots in tasks
        ]
        fresh = {self._round: self.pending[self._round]} if params is not None else {}
        for worker in np.flatnonzero(self._alive).tolist():
            self._send(worker, np.flatnonzero(self._owner == worker), fresh)
        began = time.monotonic()
        returned = self._gather(began)
        self.seconds.append(time.monotonic() - began)
        self.late.append(~returned)
        self.scheme.report(returned)
        done = self._decoded(self._messages.__getitem__)
        oldest = self._round - self.scheme.delay
        self._messages = {key: value for key, value in self._messages.items() if key.round > oldest}
        return done

    def _gather(self, began: float) -> np.ndarray:
        """bool [n]: whose answers came before the round could end."""
        returned = np.array([not work for work in self._work])
        orphaned = np.zeros(self.scheme.n, bool)  # lost with their process, and not sent to another one
        deadline = None
        silent_since = began
        while not returned.all():
            late = deadline is not None and time.monotonic() >= deadline
            over = late or bool((returned | orphaned).all())
            if over and self.scheme.allows(returned):
                break
            if over and orphaned.any():
                for role in np.flatnonzero(orphaned):
                    self._send(self._owner[role], [role], {})
                orphaned[:] = False
                silent_since = time.monotonic()
            until = silent_since + self.patience if late or deadline is None else deadline
            try:
                worker, number, answer = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                if time.monotonic() - silent_since >= self.patience:
                    orphaned |= self._bury(np.unique(self._owner[~(returned | orphaned)]), returned)
                continue
            if answer is None:
                orphaned |= self._bury([worker], returned)
                continue
            roles, messages = _check_answer(worker, answer)
            if number != self._round:
                continue
            self._messages |= messages
            returned[roles] = True
            orphaned[roles] = False
            if deadline is None:
                deadline = began + (1 + self.mu) * (time.monotonic() - began)
        return returned

    def _bury(self, workers, returned: np.ndarray) -> np.ndarray:
        """Gives the work of processes to living ones; bool [n]: whose work of this round was lost with them."""
        lost = np.zeros(self.scheme.n, bool)
        for worker in workers:
            if self._alive[worker]:
                self._alive[worker] = False
                self._inboxes[worker].put(None)
                self.processes[worker].kill()
                lost |= (self._owner == worker) & ~returned
        if not self._alive.any():
            raise RuntimeError(
                f"no worker is left in round {self._round}: all died or were silent for {self.patience} s"
            )
        for role in np.flatnonzero(~self._alive[self._owner]):
            loads = np.bincount(self._owner, minlength=self.scheme.n)
            self._owner[role] = np.argmin(np.where(self._alive, loads, self.scheme.n + 1))
        return lost

    def _send(self, worker: int, roles, fresh: dict[int, Any]) -> None:
        self._inboxes[worker].put((self._round, fresh, [(int(role), self._work[role]) for role in roles]))


def _check_answer(worker: int, answer):
    if isinstance(answer, str):
        raise RuntimeError(f"worker {worker} failed:\n{answer}")
    return answer


def _talk(worker: int, connection, inbox: queue.SimpleQueue, events: queue.SimpleQueue) -> None:
    """Passes work to a process and its answers back: a thread for each, since a pipe to a stalled process blocks."""
    with contextlib.closing(connection):
        try:
            events.put((worker, 0, connection.recv()))
            while True:
                orders = [inbox.get()]
                while not inbox.empty():
                    orders.append(inbox.get())
                if None in orders:
                    return
                number = orders[-1][0]
                params = {job: value for _, fresh, _ in orders for job, value in fresh.items()}
                work = [item for order in orders if order[0] == number for item in order[2]]
                connection.send((number, params, work))
                answer = connection.recv()
                if isinstance(answer, str) or answer[0]:
                    events.put((worker, number, answer))
        except (EOFError, OSError):
            events.put((worker, 0, None))


def _work(connection, make_compute: Callable[[], Compute], delay: int) -> None:
    """A worker process: answers (roles, messages) to each order, or a traceback."""
    compute = None
    params: dict[int, Any] = {}

    def answer(number, fresh, work):
        nonlocal compute, params
        compute = compute or make_compute()
        params = {job: value for job, value in (params | fresh).items() if job >= number - delay}
        messages = {
            Message(number, role, slot): jax.device_get(compute(params[job], job, rows, weights))
            for role, tasks in work
            for slot, job, rows, weights in tasks
        }
        return [role for role, _ in work], messages

    order = (0, {}, [])
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # the master is gone
        while True:
            try:
                reply = answer(*order)
            except Exception:  # its OSErrors too: a file of data that is not there
                reply = traceback.format_exc()
            connection.send(reply)
            order = connection.recv()
