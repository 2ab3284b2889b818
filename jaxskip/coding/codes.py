"""Gradient codes: which data each worker gets, what it sends, and how any n - s messages give the whole gradient.

The data of a step are n chunks. Worker i sends ``sum_j encode[i, j] * g_j``, g_j the gradient (a sum over rows, not a
mean) of chunk j. The master weighs the messages that came with ``decode(mask)`` and adds them: that is ``sum_j g_j``.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import jax.numpy as jnp
import numpy as np

CodeName = Literal["frc", "cyclic", "drop"]

# Relative error that rounding may add to a decoded gradient, and how far a decoding vector may miss the all-ones row.
PRECISION = 1e-3
RESIDUAL = 1e-6


class UndecodableError(RuntimeError):
    """What came back does not determine the gradient; more messages do."""


@dataclasses.dataclass(frozen=True, eq=False)
class GradientCode:
    """A code of n workers and n chunks against s stragglers; made by `frc`, `cyclic` or `drop`.

    Attributes:
      name: which of the three.
      encode: [n, n] float64; row i holds worker i's coefficients.
      s: stragglers that it always tolerates.
      support: [n, k] int; the chunks of each worker, k = s + 1 (1 for "drop").
      dtype: of the messages; less precise ones are refused by `jaxskip.coding.coded_value_and_grad`.
    """

    name: CodeName
    encode: np.ndarray
    s: int
    support: np.ndarray
    dtype: np.dtype

    @property
    def n(self) -> int:
        """Workers, and chunks."""
        return len(self.encode)

    @functools.cached_property
    def _solved(self):
        # A run meets few patterns again and again, and least squares for 256 workers takes a third of a second.
        return functools.lru_cache(maxsize=4096)(self._solve)

    def decode(self, mask: np.ndarray) -> np.ndarray:
        """Weights [n] float64 of the messages, 0 where ``mask`` (bool [n]: who answered) is False.

        More than s stragglers are decoded where the code happens to allow it ("drop" never does).

        Raises:
          ValueError: ``mask`` is not bool [n].
          UndecodableError: the survivors do not determine the gradient, or only with more rounding error than
            `PRECISION` at the precision of ``dtype``.

        >>> code = frc(4, 1)
        >>> code.decode(np.array([False, True, True, True])).tolist()
        [0.0, 1.0, 1.0, 0.0]
        """
        mask = check_mask(mask, self.n)
        weights, reason = self._solved(mask.tobytes())
        if reason:
            raise UndecodableError(f"{self.name} code, n={self.n}, s={self.s}, {np.sum(~mask)} stragglers: {reason}")
        return weights.copy()

    def _solve(self, packed: bytes) -> tuple[np.ndarray, str]:
        mask = np.frombuffer(packed, bool)
        weights = np.zeros(self.n)
        if self.name == "drop":
            few = np.sum(~mask) > self.s
            weights[mask] = 0 if few else self.n / np.sum(mask)
            return weights, "more were dropped than agreed" if few else ""
        if self.name == "frc":
            groups = mask.reshape(-1, self.s + 1)
            first = np.argmax(groups, axis=1) + np.arange(len(groups)) * (self.s + 1)
            weights[first] = 1.0
            return weights, "" if groups.any(axis=1).all() else "a whole group is missing"
        weights[mask] = self._combine(self.encode[mask])
        if np.max(np.abs(weights @ self.encode - 1)) > RESIDUAL:
            return weights, "the survivors do not span the sum"
        error = rounding(weights, self.dtype)
        return weights, f"rounding errors would grow to {error:.1g} of the gradient" if error > PRECISION else ""

    def _combine(self, rows: np.ndarray) -> np.ndarray:
        """The shortest weights [k] with which rows [k, n] come closest to the all-ones row."""
        if len(rows) > self.n - self.s:  # dependent rows: all of them together are better conditioned than n - s
            return np.linalg.lstsq(rows.T, np.ones(self.n))[0]
        q, r = np.linalg.qr(rows.T)  # ten times faster
        return np.linalg.solve(r, q.sum(axis=0))


def rounding(weights: np.ndarray, dtype) -> float:
    """Relative error that messages of this precision bring in: ``|weights|_2`` times the machine epsilon.

    >>> float(rounding(np.ones(4), np.float32) / np.finfo(np.float32).eps)
    2.0
    """
    return float(np.linalg.norm(weights) * float(jnp.finfo(dtype).eps))


def frc(n: int, s: int, dtype=np.float32) -> GradientCode:
    """Fractional repetition: n / (s + 1) groups whose s + 1 workers all send the sum of the same s + 1 chunks.

    Decoding adds one message of each group, so that no precision is lost in any dtype, and every pattern that leaves a
    worker in each group is decoded.

    Raises ValueError unless 0 <= s < n and (s + 1) divides n. Source: Tandon et al., 2017; arXiv 2211.13802 codes over
    time with it.

    >>> frc(4, 1).encode.astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    _check_size(n, s)
    if n % (s + 1):
        fitting = [k for k in range(n) if n % (k + 1) == 0]
        raise ValueError(f"a fractional repetition code of {n} workers takes s = {fitting}, not {s}: choose one of "
                         "these or the cyclic code")  # fmt: skip
    support = np.arange(n)[:, None] // (s + 1) * (s + 1) + np.arange(s + 1)
    return _code("frc", support, np.ones((n, s + 1)), s, dtype)


def cyclic(n: int, s: int, seed: int = 0, dtype=np.float32) -> GradientCode:
    """The cyclic code: worker i holds chunks i, ..., i + s (mod n), with coefficients for which any n - s rows decode.

    Takes every s, but decoding adds large terms of opposite sign: the error is measured for runs of neighbours and for
    random sets of stragglers. With float32 messages some seeds are refused from n = 32 on; coefficients are float64.

    Args:
      seed: of the random matrix behind the coefficients.
      dtype: of the messages that will be sent.

    Raises ValueError unless 0 <= s < n, and where a decoded gradient would have a relative error above `PRECISION`.
    Source: Tandon et al., 2017, algorithm 2; decoding uses all survivors, not the first n - s.

    >>> code = cyclic(5, 2)
    >>> mask = np.array([True, False, True, False, True])
    >>> np.allclose(code.decode(mask) @ code.encode, 1)
    True
    """
    _check_size(n, s)
    rng = np.random.default_rng(seed)
    support = (np.arange(n)[:, None] + np.arange(s + 1)) % n
    coefficients = np.ones((n, s + 1))
    if s:
        null = rng.normal(size=(s, n - 1))
        null = np.concatenate([null, -null.sum(axis=1, keepdims=True)], axis=1)
        for i, chunks in enumerate(support):
            coefficients[i, 1:] = -np.linalg.solve(null[:, chunks[1:]], null[:, chunks[0]])
    code = _code("cyclic", support, coefficients, s, dtype)
    for mask in _probe_masks(n, s, rng):
        try:
            code.decode(mask)
        except UndecodableError as error:
            raise ValueError(f"{error}; choose another seed, a smaller s, more precise messages (not {code.dtype}), or "
                             "the fractional repetition code") from error  # fmt: skip
    return code


def drop(n: int, s: int, dtype=np.float32) -> GradientCode:
    """No code: up to s stragglers are left out and the rest is scaled up. A baseline; the gradient is not exact.

    >>> drop(4, 1).decode(np.array([True, True, False, True])).round(2).tolist()
    [1.33, 1.33, 0.0, 1.33]
    """
    _check_size(n, s)
    return _code("drop", np.arange(n)[:, None], np.ones((n, 1)), s, dtype)


CODES = {"frc": frc, "cyclic": cyclic, "drop": drop}


def check_mask(mask, n: int) -> np.ndarray:
    """``mask`` as a contiguous bool array; ValueError where it is not bool [n]."""
    mask = np.asarray(mask)
    if mask.shape != (n,) or mask.dtype != bool:
        raise ValueError(f"a mask of {n} workers is bool [{n}], True for those who answered; got {mask.dtype} "
                         f"{list(mask.shape)}")  # fmt: skip
    return np.ascontiguousarray(mask)


def _check_size(n: int, s: int) -> None:
    if not 0 <= s < n:
        raise ValueError(f"s={s} stragglers of n={n} workers; 0 <= s < n is needed")


def _code(name, support, coefficients, s, dtype) -> GradientCode:
    encode = np.zeros((len(support), len(support)))
    np.put_along_axis(encode, support, coefficients, axis=1)
    return GradientCode(name, encode, s, support, jnp.dtype(dtype))


def _probe_masks(n: int, s: int, rng):
    """Straggler sets to measure: all of them where there are few, else neighbours and random ones."""
    if s == 0:
        return
    if n <= 10:
        sets = itertools.combinations(range(n), s)
    else:
        neighbours = [(i + np.arange(s)) % n for i in range(0, n, max(1, n // 32))]
        sets = [*neighbours, *(rng.choice(n, s, replace=False) for _ in range(32))]
    for stragglers in sets:
        mask = np.ones(n, bool)
        mask[list(stragglers)] = False
        yield mask
