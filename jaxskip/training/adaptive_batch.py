"""Batches that grow when gradients get noisy: AdAdaGrad's tests, and what they need (arXiv 2402.11215).

A step estimates how much the gradient varies between samples (`gradient_stats`), a test turns that into the batch size
it would take (`NormTest` and its siblings), and `AdaptiveBatch` decides on the host, between steps, which of a few
sizes comes next. The update rules are in `jaxskip.optim.adadagrad`.
"""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

_MODES = ("chunk", "per_sample")
_BUCKETS = ("pow2", "exact")


class GradStats(NamedTuple):
    """The mean gradient of a batch and how its samples scatter around it; K leaves. See `gradient_stats`."""

    loss: jax.Array  # float32 scalar: mean
    grad: Any  # like params
    n: jax.Array  # int32 scalar: samples
    leaf_var: jax.Array  # [K] float32: unbiased variance of the per-sample gradients, summed over a leaf
    leaf_sq_norm: jax.Array  # [K] float32: |mean gradient|^2
    leaf_var_ip: jax.Array | None = None  # [K] float32: variance of <g_i, mean> within a leaf
    var_ip: jax.Array | None = None  # float32 scalar: variance of <g_i, mean> over all leaves together
    var: Any = None  # like params, float32: variance of each coordinate

    @property
    def var_l1(self) -> jax.Array:
        """Sum of the variances of all coordinates."""
        return jnp.sum(self.leaf_var)

    @property
    def sq_norm(self) -> jax.Array:
        """|mean gradient|^2."""
        return jnp.sum(self.leaf_sq_norm)


def gradient_stats(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    *,
    mode: str = "chunk",
    chunk: int = 32,
    count: jax.Array | int | None = None,
    detail: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> GradStats:
    """Mean gradient of a batch, accumulated over chunks, and the variance of per-sample gradients.

    "chunk" computes one gradient for each chunk of c samples and takes c times the variance between chunks: unbiased,
    and no dearer than accumulation, but only as exact as the number of chunks allows. "per_sample" is exact and holds
    c gradients at a time. Both keep one gradient tree and a few numbers between chunks. Batch normalisation couples
    samples: use "chunk" there.

    Args:
      loss_fn: (params, rows of the batch) -> mean loss.
      batch: tree of arrays [B, ...].
      chunk: c; must divide B.
      count: how many chunks to use, the first ones; may be traced. One program then serves all batch sizes up to B,
        and runs no longer than the size at hand: give B row numbers as the batch and let ``loss_fn`` gather the rows.
      detail: also the fields for the inner-product and coordinate tests; holds all B / c (or B) gradients at once.
      axis_name: inside ``shard_map``, the axes that split the batch: chunks are then local to a device, and sums cross
        the devices once, at the end, instead of once a chunk. Under plain ``jit`` leave it out: there B is the global
        batch and chunks spread over the devices.

    Returns:
      `GradStats`, the same on every device. With a single chunk in "chunk" mode the variances are NaN.

    Raises:
      ValueError: an unknown mode, c that does not divide B, fewer than two chunks or samples, ``count`` with
        ``detail``.

    Source: arXiv 2402.11215; the chunk estimator is ours.

    >>> batch = {"x": jnp.array([1.0, 2.0, 3.0, 6.0])}
    >>> loss = lambda w, rows: jnp.mean(w * rows["x"])
    >>> stats = gradient_stats(loss, jnp.float32(1.0), batch, mode="per_sample", chunk=2)
    >>> stats.grad.item(), round(stats.var_l1.item(), 3)
    (3.0, 4.667)
    """
    parts = _check_chunks(batch, mode, chunk, count, detail, axis_name)
    chunks = jax.tree.map(lambda x: _chunked(x, parts, chunk, contiguous=count is not None), batch)
    dtypes = jax.tree.map(lambda p: p.dtype, params)
    if axis_name is not None:  # a gradient by replicated parameters would be summed over the devices on the spot
        params = jax.tree.map(lambda p: _varying(p, axis_name), params)
    unit = chunk if mode == "chunk" else 1

    def gradients(rows):
        """Losses and float32 gradients of one chunk: [1, ...] or [c, ...]."""
        if mode == "chunk":
            loss, grad = jax.tree.map(lambda x: x[None], jax.value_and_grad(loss_fn)(params, rows))
        else:
            samples = jax.tree.map(lambda x: x[:, None], rows)
            loss, grad = jax.vmap(jax.value_and_grad(loss_fn), in_axes=(None, 0))(params, samples)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (loss, grad))

    def total(x):
        return x if axis_name is None else jax.lax.psum(x, axis_name)

    if detail:
        stats = _detailed(jax.lax.map(gradients, chunks), unit, total)
    else:
        stats = _streamed(gradients, chunks, params, parts if count is None else count, unit, total)
    return stats._replace(grad=jax.tree.map(lambda g, dtype: g.astype(dtype), stats.grad, dtypes))


def _check_chunks(batch, mode, chunk, count, detail, axis_name) -> int:
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r}; choose one of {_MODES}")
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(rows) != 1:
        raise ValueError(f"the arrays of a batch must have the same number of rows, got {sorted(rows)}")
    (rows,) = rows
    if chunk < 1 or rows % chunk:
        raise ValueError(f"chunks of {chunk} do not divide a batch of {rows}")
    units = rows // chunk if mode == "chunk" else rows
    if units < 2 and axis_name is None:
        raise ValueError(f"a batch of {rows} in chunks of {chunk} has no variance: it takes two chunks at least")
    if detail and count is not None:
        raise ValueError("count cannot be combined with detail: all gradients of the batch are kept there")
    return rows // chunk


def _chunked(x, parts: int, chunk: int, *, contiguous: bool):
    """[B, ...] -> [B / c, c, ...]; rows dealt out in turn unless the chunks must keep their order.

    Dealt out, every device keeps its own rows of a sharded batch.
    """
    if contiguous:
        return x.reshape(parts, chunk, *x.shape[1:])
    return x.reshape(chunk, parts, *x.shape[1:]).swapaxes(0, 1)


def _varying(x, axis_name):
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axis_name, to="varying")
    return jax.lax.pvary(x, axis_name)


def _leaf_sums(tree) -> jax.Array:
    """[K]: the sum of each leaf."""
    return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)])


def _streamed(gradients, chunks, params, count, unit, total) -> GradStats:
    """One pass with Welford's update, merged chunk by chunk: no difference of large sums."""

    def merge(i, carry):
        n, loss, mean, scatter = carry
        rows = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), chunks)
        losses, grads = gradients(rows)
        more = losses.shape[0]
        chunk_mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        inside = _leaf_sums(jax.tree.map(lambda g, m: jnp.square(g - m[None]), grads, chunk_mean))
        step = jax.tree.map(jnp.subtract, chunk_mean, mean)
        weight = more / (n + more)
        mean = jax.tree.map(lambda m, s: m + weight * s, mean, step)
        scatter = scatter + inside + n * weight * _leaf_sums(jax.tree.map(jnp.square, step))
        return n + more, loss + weight * (jnp.mean(losses) - loss), mean, scatter

    mean = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    scatter = _leaf_sums(mean)  # zeros that vary over the devices as the parameters do
    zero = jnp.sum(scatter)
    n, loss, mean, scatter = jax.lax.fori_loop(0, count, merge, (zero, zero, mean, scatter))
    units = total(n)
    mean_all = jax.tree.map(lambda m: total(n * m) / units, mean)
    between = n * _leaf_sums(jax.tree.map(lambda m, a: jnp.square(m - a), mean, mean_all))
    return GradStats(
        loss=total(n * loss) / units,
        grad=mean_all,
        n=(units * unit).astype(jnp.int32),
        leaf_var=unit * total(scatter + between) / (units - 1),
        leaf_sq_norm=_leaf_sums(jax.tree.map(jnp.square, mean_all)),
    )


def _detailed(losses_and_grads, unit, total) -> GradStats:
    """Two passes over all gradients [units, ...]."""
    losses, grads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), losses_and_grads)
    units = total(jnp.float32(losses.size))
    mean = jax.tree.map(lambda g: total(jnp.sum(g, axis=0)) / units, grads)
    off = jax.tree.map(lambda g, m: g - m[None], grads, mean)
    var = jax.tree.map(lambda d: unit * total(jnp.sum(d**2, axis=0)) / (units - 1), off)
    # <g_i, mean> - |mean|^2, of which |mean|^2 is the exact average
    products = jax.tree.map(lambda d, m: jnp.sum((d * m[None]).reshape(d.shape[0], -1), axis=1), off, mean)
    products = jnp.stack(jax.tree.leaves(products))
    return GradStats(
        loss=total(jnp.sum(losses)) / units,
        grad=mean,
        n=(units * unit).astype(jnp.int32),
        leaf_var=_leaf_sums(var),
        leaf_sq_norm=_leaf_sums(jax.tree.map(jnp.square, mean)),
        leaf_var_ip=unit * total(jnp.sum(products**2, axis=1)) / (units - 1),
        var_ip=unit * total(jnp.sum(jnp.sum(products, axis=0) ** 2)) / (units - 1),
        var=var,
    )


def total_variance(means: jax.Array, variances: jax.Array) -> jax.Array:
    """Variance of W groups of equal size from their means and variances [W, ...]: the law of total variance.

    Exact for biased (1/n) variances. The authors' code feeds unbiased ones, which is too much by
    mean(variances) / n for groups of n samples; `gradient_stats` with `axis_name` is unbiased instead.

    >>> x = jnp.arange(6.0).reshape(2, 3)
    >>> total_variance(x.mean(1), x.var(1)).round(4).item() == jnp.var(x).round(4).item()
    True
    """
    return jnp.mean(variances, axis=0) + jnp.mean(means**2, axis=0) - jnp.mean(means, axis=0) ** 2


class BatchTest(Protocol):
    """What `AdaptiveBatch` asks for: ``terms(stats)`` -> float32 [k, 2], rows (a, b) that each want a size of a / b."""

    @property
    def detail(self) -> bool:
        """Whether `gradient_stats` must be called with ``detail=True``."""
        ...

    def terms(self, stats: GradStats) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class NormTest:
    """Batch size at which the gradient's noise is eta times its norm: sum Var / (eta^2 |g|^2).

    On pure noise it asks for b / eta^2, so eta >= 1 never reacts to noise alone. Source: arXiv 2402.11215.

    >>> stats = GradStats(0.0, None, 8, leaf_var=jnp.array([3.0, 5.0]), leaf_sq_norm=jnp.array([1.0, 1.0]))
    >>> NormTest(eta=0.5).terms(stats).tolist()
    [[8.0, 0.5]]
    """

    eta: float = 0.1
    detail = False

    def __post_init__(self):
        _positive(eta=self.eta)

    def terms(self, stats: GradStats) -> jax.Array:
        return jnp.stack([stats.var_l1, self.eta**2 * stats.sq_norm])[None]


@dataclasses.dataclass(frozen=True)
class InnerProductTest:
    """Var <g_i, g> / (theta^2 |g|^4); with `nu` also the noise orthogonal to g, over nu^2 |g|^2 ("augmented").

    `per_leaf` sums the variances of the inner products leaf by leaf, as the authors' code does; the definition has
    the variance of their total. Source: arXiv 2402.11215; Bollapragada et al., 2018.
    """

    theta: float = 0.1
    nu: float | None = None
    per_leaf: bool = False
    detail = True

    def __post_init__(self):
        _positive(theta=self.theta, nu=1.0 if self.nu is None else self.nu)

    def terms(self, stats: GradStats) -> jax.Array:
        if stats.leaf_var_ip is None or stats.var_ip is None:
            raise ValueError("InnerProductTest needs gradient_stats(..., detail=True)")
        tiny = jnp.finfo(jnp.float32).tiny
        sq_norm = jnp.maximum(stats.sq_norm, tiny)
        if self.per_leaf:
            along = jnp.sum(stats.leaf_var_ip)
            across = jnp.sum(stats.leaf_var - stats.leaf_var_ip / jnp.maximum(stats.leaf_sq_norm, tiny))
        else:
            along, across = stats.var_ip, stats.var_l1 - stats.var_ip / sq_norm
        # Divided once by |g|^2, whose square would leave float32's range.
        rows = [jnp.stack([along / sq_norm, self.theta**2 * sq_norm])]
        if self.nu is not None:
            rows.append(jnp.stack([jnp.maximum(across, 0), self.nu**2 * sq_norm]))
        return jnp.stack(rows)


@dataclasses.dataclass(frozen=True)
class CoordinateTest:
    """The norm test coordinate by coordinate: a quantile of Var_j / (eta^2 g_j^2). Ours.

    The paper's theory wants it for every coordinate, which is quantile=1: some g_j is always near 0, and the first test
    asks for the largest batch. Coordinates without variance (dead units, unused embeddings) do not count.
    """

    eta: float = 0.1
    quantile: float = 0.5
    detail = True

    def __post_init__(self):
        _positive(eta=self.eta)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile}; it must be in [0, 1]")

    def terms(self, stats: GradStats) -> jax.Array:
        if stats.var is None:
            raise ValueError("CoordinateTest needs gradient_stats(..., detail=True)")
        var, g = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (stats.var, stats.grad))
        ratios = jnp.where(var > 0, var / (self.eta**2 * g.astype(jnp.float32) ** 2), jnp.nan)
        # "higher": an interpolation towards infinity would be NaN.
        wanted = jnp.nanquantile(ratios, self.quantile, method="higher")
        return jnp.stack([jnp.where(jnp.any(var > 0), wanted, 0.0), 1.0])[None]


@dataclasses.dataclass(frozen=True)
class LeafTest:
    """The norm test tensor by tensor: the largest of Var_leaf / (eta^2 |g_leaf|^2). Ours."""

    eta: float = 0.1
    detail = False

    def __post_init__(self):
        _positive(eta=self.eta)

    def terms(self, stats: GradStats) -> jax.Array:
        return jnp.stack([stats.leaf_var, self.eta**2 * stats.leaf_sq_norm], axis=1)


def _positive(**numbers) -> None:
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name}={value}; it must be > 0")


class AdaptiveBatchState(NamedTuple):
    """Python numbers on the host: put ``state._asdict()`` into a checkpoint, ``AdaptiveBatchState(**d)`` restores it.

    ``samples`` is also the position in the data (`epoch_rows`) and in a schedule of samples.
    """

    batch_size: int
    samples: int = 0  # used by the steps so far
    steps: int = 0
    averages: tuple = ()  # running sums of the test's terms, as floats


@dataclasses.dataclass(frozen=True)
class AdaptiveBatch:
    """Chooses the next batch size from a test; sizes never fall.

    Args:
      test: `NormTest`, `InnerProductTest`, `CoordinateTest`, `LeafTest`, or any `BatchTest`.
      b0, b_max: first and largest size.
      max_growth: largest factor a test may ask for; ``inf`` is the paper's. Where the gradient is mostly noise, each
        test asks for the factor 1 / eta^2, whatever the size.
      interval: steps between tests.
      buckets: "pow2" rounds up to b0 2^j (and b_max), so that at most log2(b_max / b0) + 1 programs (rounded up) are
        compiled; "exact" rounds up to multiples of `micro`, for a step that takes the number of chunks as an array.
      micro: the chunk size of `gradient_stats`: all sizes are multiples, and b0 has two.
      ema: the test's numerators and denominators are averaged over tests with this decay; 0 takes the last.
      dataset_size: when given, b_max may not exceed it: beyond it a batch would repeat samples.

    Raises:
      ValueError: numbers that do not fit together.

    Source: arXiv 2402.11215; max_growth, ema and buckets are ours.

    >>> controller = AdaptiveBatch(NormTest(eta=1.0), b0=8, b_max=64)
    >>> state = controller.init()
    >>> controller.sizes, controller.update(state, np.array([[90.0, 3.0]])).batch_size
    ((8, 16, 32, 64), 16)
    """

    test: BatchTest
    b0: int
    b_max: int
    max_growth: float = 2.0
    interval: int = 1
    buckets: str = "pow2"
    micro: int = 1
    ema: float = 0.0
    dataset_size: int | None = None

    def __post_init__(self):
        if self.buckets not in _BUCKETS:
            raise ValueError(f"buckets={self.buckets!r}; choose one of {_BUCKETS}")
        if not 2 * self.micro <= self.b0 <= self.b_max or self.micro < 1:
            raise ValueError(
                f"micro={self.micro}, b0={self.b0}, b_max={self.b_max}: wanted 2 micro <= b0 <= b_max, because one "
                "chunk has no variance"
            )
        if self.b0 % self.micro or self.b_max % self.micro:
            raise ValueError(f"b0={self.b0} and b_max={self.b_max} must be multiples of micro={self.micro}")
        if self.b0 < self.b_max and self._next_size(self.b0, math.inf) == self.b0:
            raise ValueError(f"max_growth={self.max_growth} can never reach the next size; take at least 2")
        if self.interval < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"interval={self.interval}, ema={self.ema}: wanted interval >= 1 and ema in [0, 1)")
        if self.dataset_size is not None and self.b_max > self.dataset_size:
            raise ValueError(f"b_max={self.b_max} exceeds the {self.dataset_size} samples there are")

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes that can occur, ascending."""
        if self.buckets == "exact":
            return tuple(range(self.b0, self.b_max + 1, self.micro))
        doublings = math.ceil(math.log2(self.b_max / self.b0))
        return tuple(min(self.b0 * 2**j, self.b_max) for j in range(doublings + 1))

    def init(self) -> AdaptiveBatchState:
        """The state before the first step."""
        return AdaptiveBatchState(self.b0)

    def due(self, state: AdaptiveBatchState) -> bool:
        """Whether `update` will look at the terms of the step that `state` is about to take."""
        return state.steps % self.interval == 0 and state.batch_size < self.b_max

    def update(self, state: AdaptiveBatchState, terms: jax.Array | np.ndarray | None) -> AdaptiveBatchState:
        """The state after a step of ``state.batch_size`` samples; the new size is for the next one.

        Args:
          terms: ``test.terms(stats)`` of that step; fetched from the device only when `due`, else it may be None.

        Terms that are not finite, after a loss that was not, change nothing; a / 0 with a > 0 asks for b_max.

        Raises:
          ValueError: terms that are due and missing, or that are not the same on all devices and hosts.
        """
        moved = state._replace(samples=state.samples + state.batch_size, steps=state.steps + 1)
        if not self.due(state):
            return moved
        if terms is None:
            raise ValueError(f"step {state.steps} has a test (interval {self.interval}): update needs its terms")
        new = np.asarray(_same_everywhere(terms), np.float64)
        if not np.all((new >= 0) & (new[:, 1:] < np.inf)):
            return moved
        # The ratio needs no bias correction: the numerator and the denominator lack the same factor.
        old = np.asarray(state.averages or np.zeros_like(new))
        averages = self.ema * old + (1 - self.ema) * new if self.ema else new
        # Of Python's floats, whose quotient by next to nothing is infinity without a warning.
        wanted = max(((a / b if b > 0 else math.inf) for a, b in averages.tolist() if a > 0), default=0)
        kept = tuple(map(tuple, averages.tolist())) if self.ema else ()
        return moved._replace(batch_size=self._next_size(state.batch_size, wanted), averages=kept)

    def _next_size(self, size: int, wanted: float) -> int:
        if not wanted > size:
            return size
        limit = min(self.max_growth * size, self.b_max)
        if self.buckets == "exact":
            largest = int(limit) // self.micro * self.micro
            return largest if wanted >= largest else math.ceil(wanted / self.micro) * self.micro
        allowed = [s for s in self.sizes if size <= s <= limit] or [size]
        return next((s for s in allowed if s >= wanted), allowed[-1])


def _same_everywhere(terms) -> np.ndarray:
    """The terms on the host; several processes get process 0's bits, so that none takes another size."""
    if isinstance(terms, jax.Array) and not terms.is_fully_replicated:
        raise ValueError(f"the terms lie on {terms.sharding}: compute them from the statistics of the global batch")
    if jax.process_count() == 1:
        return np.asarray(terms)
    if not isinstance(terms, jax.Array) or terms.is_fully_addressable:
        raise ValueError("these terms are one process's own: compute them from the statistics of the global batch")
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(np.asarray(terms))


def rebatch(
    batch_size: int, max_micro: int, *, workers: int = 1, accumulate: int = 1, max_batch_size: int | None = None
) -> tuple[int, int, int]:
    """The authors' split of a batch: (rows of a micro-batch, accumulation steps, batch size rounded up to fit).

    Micro-batches grow first, and from `max_micro` on the number of accumulation steps does. Every result is a new
    shape, and so a new program: `AdaptiveBatch` has few sizes instead.

    Raises ValueError for numbers below 1.

    >>> rebatch(100, 16, workers=4), rebatch(33, 16, workers=4)
    ((16, 2, 128), (9, 1, 36))
    """
    if min(batch_size, max_micro, workers, accumulate) < 1:
        raise ValueError(f"rebatch{batch_size, max_micro, workers, accumulate}: all must be at least 1")
    micro = math.ceil(batch_size / (workers * accumulate))
    if micro > max_micro:
        micro = max_micro
        accumulate = math.ceil(batch_size / (micro * workers))
    rounded = micro * workers * accumulate
    return micro, accumulate, rounded if max_batch_size is None else min(rounded, max_batch_size)


def epoch_rows(num_rows: int, start: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Row numbers [size] of samples start to start + size: epoch after epoch, each a permutation of its own.

    A pure function of its arguments, whatever the batch sizes were: ``AdaptiveBatchState.samples`` is the cursor, and
    resuming costs nothing. Several processes take slices of the same numbers.

    Raises ValueError for a batch larger than the data.

    >>> np.concatenate([epoch_rows(5, 0, 2), epoch_rows(5, 2, 3)]).tolist() == epoch_rows(5, 0, 5).tolist()
    True
    """
    if not 1 <= size <= num_rows:
        raise ValueError(f"a batch of {size} from {num_rows} rows; it must have 1 to {num_rows}")
    epochs = range(start // num_rows, (start + size - 1) // num_rows + 1)
    order = [np.random.Generator(np.random.Philox(key=seed, counter=e << 128)).permutation(num_rows) for e in epochs]
    first = start % num_rows
    return np.concatenate(order)[first : first + size]


class BucketPrograms:
    """One compiled program for each batch size, the next one compiled in the background.

    Args:
      step: a jitted function.
      example: size -> its arguments, as arrays or ShapeDtypeStructs (with shardings on a mesh).
      sizes: ``AdaptiveBatch.sizes``; nothing else is ever compiled.

    ``compilations`` counts them: at most ``len(sizes)``.

    >>> programs = BucketPrograms(jax.jit(jnp.sum), lambda size: (jnp.ones(size),), (2, 4, 8))
    >>> float(programs(4)(jnp.ones(4))), programs.compilations
    (4.0, 2)
    """

    def __init__(self, step: Any, example: Callable[[int], tuple], sizes: tuple[int, ...]):
        self._step, self._example, self._sizes = step, example, sizes
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
        self._programs: dict[int, concurrent.futures.Future] = {}

    @property
    def compilations(self) -> int:
        """Programs compiled or being compiled."""
        return len(self._programs)

    def __call__(self, size: int) -> Callable:
        """The program for `size`; waits for it when it is not ready. Raises ValueError for a size not in `sizes`."""
        if size not in self._sizes:
            raise ValueError(f"no program for a batch of {size}; the sizes are {self._sizes}")
        here = self._sizes.index(size)
        for wanted in self._sizes[here : here + 2]:
            if wanted not in self._programs:
                # Traced in this thread, where the mesh is set; only XLA's part runs in the other.
                lowered = self._step.lower(*self._example(wanted))
                self._programs[wanted] = self._compiler.submit(lowered.compile)
        return self._programs[size].result()
