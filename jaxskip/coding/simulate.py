"""How long a scheme takes under given delays, and which parameters take least."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxskip.coding.codes import UndecodableError
from jaxskip.coding.schemes import GC, MSGC, SRSGC, Scheme
from jaxskip.coding.stragglers import check_delays


class Simulation(NamedTuple):
    """One simulated run of R rounds."""

    durations: np.ndarray  # float64 [R], seconds of each round
    waited: np.ndarray  # bool [R]: the master waited for all workers
    returned: np.ndarray  # bool [n, R]: whose results counted

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return float(self.durations.sum())


def simulate(scheme: Scheme, delays: np.ndarray, jobs: int, mu: float = 1.0) -> Simulation:
    """Runs ``jobs`` jobs under the wait-out rule; ``scheme`` itself is left as it is.

    A worker straggles in a round if it takes more than (1 + mu) times as long as the fastest. Where the scheme allows
    that pattern, the round ends at that deadline, or earlier when all have answered; else the master waits for all, and
    nobody counts as a straggler.

    Args:
      scheme: `GC`, `SRSGC` or `MSGC`.
      delays: seconds [n, R] that each worker takes in each round, its work included; R >= jobs + scheme.delay.
      jobs: J; rounds after the last job take no time where nothing is left to do.
      mu: how much slower than the fastest is late.

    Raises ValueError for delays of another shape or not positive, jobs < 1 or mu <= 0. Source: arXiv 2211.13802.

    >>> delays = np.array([[1.0, 1.0, 1.0], [9.0, 1.5, 9.0], [1.0, 9.0, 1.0]])
    >>> simulate(GC(3, 0), delays, jobs=3).seconds, simulate(GC(3, 1), delays, jobs=3).seconds
    (27.0, 6.0)
    """
    delays = check_delays(delays)
    rounds = jobs + scheme.delay
    if jobs < 1 or mu <= 0:
        raise ValueError(f"jobs={jobs}, mu={mu}; jobs must be at least 1 and mu positive")
    if delays.shape[0] != scheme.n or delays.shape[1] < rounds:
        raise ValueError(f"delays {list(delays.shape)}; {scheme} and {jobs} jobs take [{scheme.n}, >= {rounds}]")
    scheme = dataclasses.replace(scheme)
    durations, waited = np.zeros(rounds), np.zeros(rounds, bool)
    for t in range(rounds):
        if t >= jobs and scheme.idle(jobs):
            scheme.report(np.ones(scheme.n, bool))
            continue
        deadline = (1 + mu) * delays[:, t].min()
        longest = delays[:, t].max()
        try:
            scheme.report(delays[:, t] <= deadline)
            durations[t] = min(deadline, longest)
        except UndecodableError:
            scheme.report(np.ones(scheme.n, bool))
            durations[t], waited[t] = longest, True
    return Simulation(durations, waited, np.stack(scheme.returned, axis=1))


def candidates(kind: str, n: int, max_delay: int = 3, max_lam: int | None = None) -> Iterator[Scheme]:
    """All parameters of a kind of scheme with delay <= ``max_delay`` and at most ``max_lam`` (by default n) stragglers.

    kind: "gc" (0 < s < n), "sr-sgc" or "m-sgc" (lam > 0). Raises ValueError for another one.

    >>> [(s.B, s.W) for s in candidates("m-sgc", 8, max_delay=2, max_lam=1)]
    [(1, 2), (1, 3)]
    """
    lams = range(1, (n if max_lam is None else min(n, max_lam)) + 1)
    if kind == "gc":
        yield from (GC(n, s) for s in lams if s < n)
    elif kind == "sr-sgc":
        # W is not bounded by the delay; three windows of each B are what the paper's search found worth trying.
        shapes = [(B, x * B + 1) for B in range(1, max_delay + 1) for x in (1, 2, 3)]
        yield from (SRSGC(n, B, W, lam) for B, W in shapes for lam in lams)
    elif kind == "m-sgc":
        shapes = [(B, W) for W in range(2, max_delay + 2) for B in range(1, W) if max_delay >= W - 2 + B]
        yield from (MSGC(n, B, W, lam) for B, W in shapes for lam in lams)
    else:
        raise ValueError(f"kind is {kind!r}; choose 'gc', 'sr-sgc' or 'm-sgc'")


def tune(
    schemes: Iterable[Scheme], probe: np.ndarray, alpha: float, jobs: int, mu: float = 1.0
) -> tuple[Scheme, Simulation]:
    """The scheme that finishes first, and its run, where a load of L makes each round alpha * L seconds longer.

    Args:
      schemes: for example `candidates`.
      probe: seconds [n, R] of rounds without work.
      alpha: seconds of work for a whole batch, see `fit_alpha`.
      jobs, mu: as in `simulate`.

    Raises ValueError where ``schemes`` is empty. Source: arXiv 2211.13802, appendix.

    >>> probe = np.array([[1.0, 1.0], [1.0, 9.0], [1.0, 1.0], [1.0, 1.0]])
    >>> tune(candidates("gc", 4), probe, alpha=0.1, jobs=2)[0].s
    1
    """
    best = None
    for scheme in schemes:
        run = simulate(scheme, probe + alpha * scheme.load, jobs, mu)
        if best is None or run.seconds < best[1].seconds:
            best = scheme, run
    if best is None:
        raise ValueError("no schemes to choose from")
    return best


def fit_alpha(loads: np.ndarray, delays: np.ndarray) -> tuple[float, float]:
    """(alpha, constant) of the line ``delay = alpha * load + constant`` through measured delays, by least squares.

    loads: [K], fractions of a batch; delays: seconds [K, ...], all of the same weight.

    Raises ValueError with fewer than two different loads.

    >>> [round(x, 6) for x in fit_alpha(np.array([0.0, 0.5]), np.array([[1.0, 1.2], [2.0, 2.2]]))]
    [2.0, 1.1]
    """
    loads = np.asarray(loads, np.float64)
    if len(np.unique(loads)) < 2:
        raise ValueError(f"loads {loads.tolist()}: a line takes two different ones at least")
    alpha, constant = np.polyfit(loads, np.asarray(delays).reshape(len(loads), -1).mean(axis=1), 1)
    return float(alpha), float(constant)
