"""Schemes over time: what each worker does in each round, and which messages then make up each gradient.

Job t, the gradient of one step of one network, starts in round t and is decoded by the end of round t + delay. A scheme
is a state machine on the host: `Scheme.assign` says what the next round's tasks are, `Scheme.report` takes down who
answered, `Scheme.decode` says how a job's messages are weighed. Rounds and jobs count from 1, workers from 0. A task's
message is ``sum_k coefficients[k] * g(chunks[k])``, g the gradient (a sum over rows) of a chunk of the job's batch.

With stragglers inside its design model a scheme decodes every job in time. `Scheme.allows` checks that; the master has
to wait for more answers where it says no.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from jaxskip.coding.codes import GradientCode, UndecodableError, check_mask, drop, frc
from jaxskip.coding.stragglers import conforms_arbitrary, conforms_bursty


class Task(NamedTuple):
    """One gradient that a worker computes in a round; see the module's docstring."""

    job: int
    kind: Literal["first", "repeat", "coded"]
    chunks: tuple[int, ...]
    coefficients: tuple[float, ...]


class Message(NamedTuple):
    """Where a message came from: slot number ``slot`` of ``worker`` in ``round``."""

    round: int
    worker: int
    slot: int


@dataclasses.dataclass(eq=False)
class Scheme:
    """What `GC`, `Dropping`, `SRSGC` and `MSGC` share; one instance serves one run (``dataclasses.replace`` copies)."""

    n: int

    def __post_init__(self):
        self.returned: list[np.ndarray] = []  # for each finished round, bool [n]: who answered
        self._check()

    @property
    def rounds(self) -> int:
        """Finished rounds."""
        return len(self.returned)

    @property
    def tolerance(self) -> int:
        """Stragglers that the code inside the scheme is built against."""
        raise NotImplementedError

    @property
    def load(self) -> float:
        """Fraction of a batch that each worker processes in a round."""
        raise NotImplementedError

    @property
    def delay(self) -> int:
        """T: rounds from a job's first to the one in which it is decoded at the latest."""
        raise NotImplementedError

    @property
    def chunk_shares(self) -> np.ndarray:
        """Units of data in each chunk, int [chunks]; a batch splits evenly where ``units`` divides it."""
        return np.ones(self.n, int)

    @property
    def units(self) -> int:
        """The smallest batch that splits evenly."""
        return int(self.chunk_shares.sum())

    @functools.cached_property
    def gradient_code(self) -> GradientCode:
        """The code inside the scheme, built when tasks are first assigned: simulations need none."""
        return self.code(self.n, self.tolerance)  # pyright: ignore

    def allows(self, mask: np.ndarray) -> bool:
        """Whether the design model still holds if only the workers in ``mask`` (bool [n]) answer in the next round."""
        mask = check_mask(mask, self.n)
        return bool(mask.all()) or self._allows(mask)

    def report(self, mask: np.ndarray) -> None:
        """Ends a round: only the workers in ``mask`` (bool [n]) answered.

        Raises UndecodableError where the design model is broken: wait for more answers.
        """
        if not self.allows(mask):
            late = np.flatnonzero(~np.asarray(mask)).tolist()
            raise UndecodableError(f"round {self.rounds + 1}: {self} cannot do without workers {late}; wait for more")
        self._record(np.array(mask))

    def assign(self, last_job: int | None = None) -> list[list[Task | None]]:
        """The next round's tasks, a list of slots for each worker; None where a slot has nothing to do.

        Jobs beyond ``last_job`` do not exist. Raises ValueError where ``code`` cannot be built for this n and s.
        """
        return [self._tasks(i, last_job) for i in range(self.n)]

    def decode(self, job: int) -> dict[Message, float]:
        """Weights of the messages whose weighted sum is the gradient of ``job`` over its whole batch.

        Raises UndecodableError while messages are missing.
        """
        raise NotImplementedError

    def decodable(self, job: int) -> bool:
        """Whether `decode` has what it needs."""
        try:
            self.decode(job)
        except UndecodableError:
            return False
        return True

    def idle(self, last_job: int) -> bool:
        """Whether the next round has no tasks, after ``last_job``."""
        return self.rounds >= last_job + self.delay

    def _check(self) -> None:
        _between("n", self.n, 1, None)

    def _allows(self, mask) -> bool:
        raise NotImplementedError

    def _record(self, mask) -> None:
        self.returned.append(mask)

    def _tasks(self, worker: int, last_job: int | None) -> list[Task | None]:
        raise NotImplementedError

    def _coded(self, job: int, kind, worker: int, first_chunk: int = 0) -> Task:
        """The coded task of a worker, on the n chunks from ``first_chunk`` on."""
        code = self.gradient_code
        chunks = code.support[worker]
        coefficients = code.encode[worker, chunks]
        return Task(job, kind, tuple((first_chunk + chunks).tolist()), tuple(coefficients.tolist()))


@dataclasses.dataclass(eq=False)
class GC(Scheme):
    """Plain gradient coding: each job is one round, against s stragglers in every round; s = 0 is no coding at all.

    Load (s + 1) / n, delay 0. Raises ValueError unless 0 <= s < n. Source: Tandon et al., 2017.

    >>> scheme = GC(4, 1)
    >>> scheme.assign()[3]
    [Task(job=1, kind='first', chunks=(2, 3), coefficients=(1.0, 1.0))]
    >>> scheme.report(np.array([True, True, True, False]))
    >>> scheme.decode(1)
    {Message(round=1, worker=0, slot=0): 1.0, Message(round=1, worker=2, slot=0): 1.0}
    """

    n: int
    s: int
    code: Callable[[int, int], GradientCode] = dataclasses.field(default=frc, repr=False)

    @property
    def tolerance(self) -> int:
        return self.s

    @property
    def load(self) -> float:
        return (self.s + 1) / self.n

    @property
    def delay(self) -> int:
        return 0

    def decode(self, job: int) -> dict[Message, float]:
        _check_started(job, self.rounds)
        weights = self.gradient_code.decode(self.returned[job - 1])
        return {Message(job, i, 0): float(weights[i]) for i in map(int, np.flatnonzero(weights))}

    def _check(self):
        super()._check()
        _between("s", self.s, 0, self.n - 1)

    def _allows(self, mask):
        return bool(np.sum(~mask) <= self.s)

    def _tasks(self, worker, last_job):
        job = self.rounds + 1
        return [self._coded(job, "first", worker) if last_job is None or job <= last_job else None]


@dataclasses.dataclass(eq=False)
class Dropping(GC):
    """Leaves out up to s stragglers and scales up the rest: the baseline without coding, whose gradient is not exact.

    >>> Dropping(8, 2).load
    0.125
    """

    code: Callable[[int, int], GradientCode] = dataclasses.field(default=drop, repr=False)

    @property
    def load(self) -> float:
        return 1 / self.n


@dataclasses.dataclass(eq=False)
class SRSGC(Scheme):
    """Selective repetition: (n, s)-GC with a smaller s; B rounds later, some workers repeat what was lost beyond s.

    With v results of job t - B missing after its round, v - s of these workers (lowest numbers first) compute theirs in
    round t, instead of that round's own job. Tolerates (B, W, lam)-bursty stragglers, and s stragglers in every round:
    rounds without repetitions and with at most s stragglers do not count as part of a burst.
    Load (s + 1) / n with s = ceil(B lam / (W - 1 + B)), delay B.

    Raises ValueError unless B >= 1 divides W - 1 >= 1 and 0 <= lam <= n. Source: arXiv 2211.13802.

    >>> scheme = SRSGC(256, B=2, W=3, lam=23)
    >>> scheme.tolerance, scheme.load, scheme.delay
    (12, 0.05078125, 2)
    """

    n: int
    B: int
    W: int
    lam: int
    code: Callable[[int, int], GradientCode] = dataclasses.field(default=frc, repr=False)

    def __post_init__(self):
        self.own: list[np.ndarray] = []  # for each finished round, bool [n]: who worked on that round's own job
        self.counted: list[np.ndarray] = []  # for each finished round, bool [n]: stragglers that belong to a burst
        super().__post_init__()

    @property
    def tolerance(self) -> int:
        return math.ceil(self.B * self.lam / (self.W - 1 + self.B))

    @property
    def load(self) -> float:
        return (self.tolerance + 1) / self.n

    @property
    def delay(self) -> int:
        return self.B

    def decode(self, job: int) -> dict[Message, float]:
        _check_started(job, self.rounds)
        at_once = self.returned[job - 1] & self.own[job - 1]
        later = np.zeros(self.n, bool)
        if job + self.B <= self.rounds:
            later = self.returned[job + self.B - 1] & ~self.own[job + self.B - 1]
        weights = self.gradient_code.decode(at_once | later)
        return {
            Message(job if at_once[i] else job + self.B, i, 0): float(weights[i])
            for i in map(int, np.flatnonzero(weights))
        }

    def idle(self, last_job: int) -> bool:
        return self.rounds >= last_job and not self._repeating().any()

    def _check(self):
        super()._check()
        _between("B", self.B, 1, None)
        _between("lam", self.lam, 0, self.n)
        if self.W < 2 or (self.W - 1) % self.B:
            raise ValueError(f"W={self.W} with B={self.B}; W must be B + 1, 2 B + 1, ...")

    def _repeating(self) -> np.ndarray:
        """bool [n]: who repeats in the next round."""
        repeating = np.zeros(self.n, bool)
        if self.rounds >= self.B:
            lost = np.flatnonzero(~(self.returned[-self.B] & self.own[-self.B]))
            repeating[lost[: max(0, len(lost) - self.tolerance)]] = True
        return repeating

    def _exempt(self, mask) -> bool:
        return bool(np.sum(~mask) <= self.tolerance) and not self._repeating().any()

    def _allows(self, mask):
        if self._exempt(mask):
            return True
        window = np.stack([*self.counted[max(0, self.rounds - self.W + 1) :], ~mask], axis=1)
        return conforms_bursty(window, self.B, self.W, self.lam)

    def _record(self, mask):
        self.counted.append(~mask if not self._exempt(mask) else np.zeros(self.n, bool))
        self.own.append(~self._repeating())
        super()._record(mask)

    def _tasks(self, worker, last_job):
        job = self.rounds + 1
        if self._repeating()[worker]:
            return [self._coded(job - self.B, "repeat", worker)]
        return [self._coded(job, "first", worker) if last_job is None or job <= last_job else None]


@dataclasses.dataclass(eq=False)
class MSGC(Scheme):
    """Multiplexed coding: most data are computed once and repeated where lost, only a small part is coded.

    In a round a worker has W - 1 + B slots, each for another job. In the W - 1 rounds from a job's start on, worker i
    computes its own W - 1 uncoded chunks of it; in each of the B rounds after that, a chunk that was lost, or, if none
    is missing, its part of an (n, lam)-GC of n coded chunks. Tolerates stragglers that are, in the W - 1 + B rounds of
    each job, (B, W, lam)-bursty or (B, W - 1 + B, lam)-arbitrary; a worker that never returns is neither.
    Load (lam + 1)(W - 1 + B) / (n (B + (W - 1)(lam + 1))), for lam = n (W - 1 + B) / (n (W - 1)); delay W - 2 + B.

    Raises ValueError unless 1 <= B < W and 0 <= lam <= n. Source: arXiv 2211.13802.

    >>> scheme = MSGC(256, B=1, W=2, lam=27)
    >>> round(scheme.load, 9), scheme.delay
    (0.007543103, 1)
    """

    n: int
    B: int
    W: int
    lam: int
    code: Callable[[int, int], GradientCode] = dataclasses.field(default=frc, repr=False)

    @property
    def tolerance(self) -> int:
        return self.lam

    @property
    def load(self) -> float:
        largest = int(self.chunk_shares[0])
        return largest * (self.W - 1 + self.B) / self.units

    @property
    def delay(self) -> int:
        return self.W - 2 + self.B

    @property
    def chunk_shares(self) -> np.ndarray:
        own = self.n * (self.W - 1)
        if self.lam == self.n:
            return np.ones(own, int)
        return np.concatenate([np.full(own, self.lam + 1), np.ones(self.n * self.B, int)])

    def decode(self, job: int) -> dict[Message, float]:
        _check_started(job, self.rounds)
        came, coded = self._progress(job)
        if np.any(came < 0):
            raise UndecodableError(
                f"job {job}: {np.sum(came < 0)} uncoded chunks are missing after round {self.rounds}"
            )
        weights = {
            Message(job + int(slot), worker, int(slot)): 1.0 for worker, slots in enumerate(came) for slot in slots
        }
        for group in range(self.B if self.lam < self.n else 0):
            slot = self.W - 1 + group
            a = self.gradient_code.decode(coded[:, group])
            weights |= {Message(job + slot, i, slot): float(a[i]) for i in map(int, np.flatnonzero(a))}
        return weights

    def _check(self):
        super()._check()
        _between("B", self.B, 1, self.W - 1)
        _between("lam", self.lam, 0, self.n)

    def _allows(self, mask):
        # A job's messages all come from the W - 1 + B rounds from its start on, so that the past before does not count.
        window = np.stack([*(~r for r in self.returned[max(0, self.rounds - self.delay) :]), ~mask], axis=1)
        return conforms_bursty(window, self.B, self.W, self.lam) or conforms_arbitrary(
            window, self.B, self.W - 1 + self.B, self.lam
        )

    def _progress(self, job: int) -> tuple[np.ndarray, np.ndarray]:
        """For each uncoded chunk, int [n, W - 1], the slot in which it came, or -1; for each coded result whether."""
        came = np.full((self.n, self.W - 1), -1)
        coded = np.zeros((self.n, self.B), bool)
        for slot, mask in enumerate(self.returned[job - 1 : job + self.delay]):
            if slot < self.W - 1:
                came[mask, slot] = slot
                continue
            missing = np.any(came < 0, axis=1)
            repeated = np.flatnonzero(missing & mask)
            came[repeated, np.argmax(came[repeated] < 0, axis=1)] = slot
            coded[:, slot - (self.W - 1)] = mask & ~missing
        return came, coded

    def assign(self, last_job: int | None = None) -> list[list[Task | None]]:
        if self.lam < self.n and not self.rounds:
            self.gradient_code.decode(np.ones(self.n, bool))  # no coded task yet: a size that does not fit is told now
        tasks: list[list[Task | None]] = [[] for _ in range(self.n)]
        for slot in range(self.W - 1 + self.B):
            job = self.rounds + 1 - slot
            exists = job >= 1 and (last_job is None or job <= last_job)
            came = self._progress(job)[0] if exists else None
            for worker, slots in enumerate(tasks):
                slots.append(None if came is None else self._task(job, slot, worker, came[worker]))
        return tasks

    def _task(self, job: int, slot: int, worker: int, came: np.ndarray) -> Task | None:
        own = worker * (self.W - 1)
        if slot < self.W - 1:
            return Task(job, "first", (own + slot,), (1.0,))
        if np.any(came < 0):
            return Task(job, "repeat", (own + int(np.argmax(came < 0)),), (1.0,))
        if self.lam == self.n:
            return None
        return self._coded(job, "coded", worker, self.n * slot)


def bursty_lower_bound(n: int, B: int, W: int, lam: int) -> float:
    """Least load of any scheme against (B, W, lam)-bursty stragglers, at any delay.

    (W - 1 + B) / (n (W - 1) + B (n - lam)), and 1 / (n - lam) where B = W. Raises ValueError unless 1 <= B <= W and
    0 <= lam <= n, lam < n where B = W. Source: arXiv 2211.13802.

    >>> bursty_lower_bound(8, 1, 2, 7) == MSGC(8, 1, 2, 7).load
    True
    """
    _between("B", B, 1, W)
    if B == W:
        return arbitrary_lower_bound(n, W, W, lam)
    return arbitrary_lower_bound(n, B, W - 1 + B, lam)


def arbitrary_lower_bound(n: int, N: int, W: int, lam: int) -> float:
    """Least load of any scheme against (N, W, lam)-arbitrary stragglers, at any delay: W / (n W - N lam).

    Ours, by counting: where the same lam workers miss N of every W rounds, n W - N lam worker-rounds do W jobs. With
    N = W = 1 it is the bound against lam stragglers in every round. Raises ValueError unless 0 <= N <= W, 0 <= lam <= n
    and any work is left.

    >>> arbitrary_lower_bound(8, N=1, W=1, lam=4)
    0.25
    """
    _between("n", n, 1, None)
    _between("N", N, 0, W)
    _between("lam", lam, 0, n)
    if n * W == N * lam:
        raise ValueError(f"N={N}, W={W}, lam={lam}: all {n} workers may straggle for ever, and no scheme gets through")
    return W / (n * W - N * lam)


def _between(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={value}; it must be at least {least}" + ("" if most is None else f", at most {most}"))


def _check_started(job: int, rounds: int) -> None:
    if not 1 <= job <= rounds:
        raise UndecodableError(f"job {job} has not been started: {rounds} rounds are finished")
