"""Who is late when: models that schemes are designed for, and sources of delays.

A pattern is bool [n, R], True where worker i straggled in round t; delays are seconds [n, R].
"""

import os
from collections.abc import Callable

import numpy as np


def conforms_per_round(stragglers: np.ndarray, s: int) -> bool:
    """Whether every round of the pattern [n, R] has at most s stragglers.

    >>> conforms_per_round(np.array([[True, False], [False, True]]), 1)
    True
    """
    return bool(np.all(np.sum(_pattern(stragglers), axis=0) <= s))


def conforms_bursty(stragglers: np.ndarray, B: int, W: int, lam: int) -> bool:
    """Whether in every W rounds in a row at most lam workers straggle, each in a stretch of at most B rounds.

    A worker's stretch runs from its first to its last straggling round in the window, rounds without straggling in
    between included. Windows are cut off at both ends of the pattern [n, R].

    Source: arXiv 2211.13802, (B, W, lambda)-bursty.

    >>> late = np.array([[True, False, True, False]])
    >>> conforms_bursty(late, B=2, W=3, lam=1), conforms_bursty(late, B=2, W=2, lam=1)
    (False, True)
    """
    for window in _windows(_pattern(stragglers), W):
        workers = window.any(axis=1)
        first, last = np.argmax(window, axis=1), window.shape[1] - 1 - np.argmax(window[:, ::-1], axis=1)
        if np.sum(workers) > lam or np.any((last - first)[workers] >= B):
            return False
    return True


def conforms_arbitrary(stragglers: np.ndarray, N: int, W: int, lam: int) -> bool:
    """Whether in every W rounds in a row at most lam workers straggle, each in at most N rounds.

    Source: arXiv 2211.13802, (N, W', lambda')-arbitrary.

    >>> conforms_arbitrary(np.array([[True, False, True, False]]), N=2, W=3, lam=1)
    True
    """
    for window in _windows(_pattern(stragglers), W):
        counts = np.sum(window, axis=1)
        if np.sum(counts > 0) > lam or np.any(counts > N):
            return False
    return True


def random_stragglers(
    conforms: Callable[[np.ndarray], bool], n: int, rounds: int, seed: int, rate: float = 0.5
) -> np.ndarray:
    """A random pattern [n, R] that ``conforms`` allows in each of its beginnings.

    Round by round, each worker in random order straggles with probability ``rate`` unless that breaks the model.

    >>> late = random_stragglers(lambda s: conforms_bursty(s, 1, 3, 2), n=4, rounds=8, seed=0)
    >>> late.shape, conforms_bursty(late, 1, 3, 2)
    ((4, 8), True)
    """
    rng = np.random.default_rng(seed)
    late = np.zeros((n, rounds), bool)
    for t in range(rounds):
        for worker in rng.permutation(n)[rng.random(n) < rate]:
            late[worker, t] = True
            late[worker, t] = conforms(late[:, : t + 1])
    return late


def gilbert_elliott(n: int, rounds: int, enter: float, leave: float, seed: int) -> np.ndarray:
    """Slow spells, bool [n, R]: each worker is a chain that enters a spell and leaves it with these probabilities.

    All start outside. Raises ValueError unless both are in [0, 1].

    >>> gilbert_elliott(3, 4, enter=1.0, leave=1.0, seed=0)[0].tolist()
    [True, False, True, False]
    """
    for name, value in (("enter", enter), ("leave", leave)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}; it is a probability")
    rng = np.random.default_rng(seed)
    slow = np.zeros((n, rounds), bool)
    state = np.zeros(n, bool)
    for t in range(rounds):
        state = np.where(state, rng.random(n) >= leave, rng.random(n) < enter)
        slow[:, t] = state
    return slow


def gilbert_elliott_delays(
    n: int,
    rounds: int,
    seed: int,
    enter: float = 0.02,
    leave: float = 0.7,
    base: float = 1.0,
    jitter: float = 0.1,
    extra: float = 2.0,
    tail: float = 8.0,
) -> np.ndarray:
    """Seconds [n, R] without work: ``base + U(0, jitter)``, and in slow spells ``extra + Exp(mean tail)`` on top.

    >>> delays = gilbert_elliott_delays(64, 100, seed=0)
    >>> bool(np.mean(delays < 1.1) > 0.9), bool(delays.max() > 10)
    (True, True)
    """
    rng = np.random.default_rng([seed, 1])
    slow = gilbert_elliott(n, rounds, enter, leave, seed)
    return base + jitter * rng.random((n, rounds)) + slow * (extra + rng.exponential(tail, (n, rounds)))


def load_trace(path: str | os.PathLike) -> np.ndarray:
    """Recorded delays in seconds [n, R] from a CSV file with a line for each worker and a column for each round.

    Raises ValueError where these are not finite positive numbers in a rectangle, OSError where there is no such file.
    ``numpy.savetxt(path, delays, delimiter=",")`` writes one.
    """
    try:
        delays = np.loadtxt(path, delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path} is not a table of numbers: {error}") from error
    return check_delays(delays, str(path))


def check_delays(delays, name: str = "delays") -> np.ndarray:
    """``delays`` as float64 [n, R]; ValueError where they are not finite and positive."""
    delays = np.asarray(delays, np.float64)
    if delays.ndim != 2 or not delays.size or not np.all(np.isfinite(delays) & (delays > 0)):
        raise ValueError(f"{name}: delays are finite positive seconds [workers, rounds]; got {list(delays.shape)}, "
                         f"from {np.min(delays, initial=np.inf)} to {np.max(delays, initial=-np.inf)}")  # fmt: skip
    return delays


def _pattern(stragglers) -> np.ndarray:
    stragglers = np.asarray(stragglers)
    if stragglers.ndim != 2 or stragglers.dtype != bool:
        raise ValueError(f"a pattern is bool [workers, rounds]; got {stragglers.dtype} {list(stragglers.shape)}")
    return stragglers


def _windows(stragglers: np.ndarray, W: int):
    if W < 1:
        raise ValueError(f"a window of {W} rounds; it takes 1 at least")
    for start in range(max(1, stragglers.shape[1] - W + 1)):
        yield stragglers[:, start : start + W]
