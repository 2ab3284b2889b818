"""Clipping the largest coordinates of a gradient, and SGD, Adam, Adafactor and Lion with it (arXiv 2306.00204).

The ready optimizers are the paper's: one threshold for all parameters. ``fraction=0`` gives each of them without
clipping. Weight decay is Optax's: put it into the chain.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_SCOPES = ("global", "leaf")
_METHODS = ("sort", "histogram", "ema")
# The controller of method "ema": exponent of (share above the threshold / fraction), and bounds of one correction.
_GAIN, _LARGEST_STEP = 0.5, 2.0


class ClipTopCoordinatesState(NamedTuple):
    """State of ``clip_top_coordinates``."""

    threshold: Any  # float32 scalar, or one a leaf: tau of the last update ("ema": of the next one), without its scale


class ScaleByAdamClippedState(NamedTuple):
    """State of ``scale_by_adam_clipped``."""

    count: jax.Array  # shape=(), dtype=int32
    mu: optax.Updates  # like params, float32: average of clipped gradients
    nu: optax.Updates  # like params, float32: average of the squares of unclipped gradients
    clip: ClipTopCoordinatesState


class ScaleByAdafactorClippedState(NamedTuple):
    """State of ``scale_by_adafactor_clipped``."""

    count: jax.Array  # shape=(), dtype=int32
    nu: Any  # per leaf: array like the param, or the pair of its row means [..., R] and column means [..., C]; float32
    clip: ClipTopCoordinatesState


def top_coordinate_threshold(tree: Any, fraction: ArrayLike, *, method: str = "sort") -> jax.Array:
    """The magnitude tau that at most floor(N fraction) of the N entries of all leaves exceed.

    "sort" takes entry floor(N fraction) of the sorted magnitudes: exact, O(N log N), and a gather of what is sharded.
    "histogram" bins the magnitudes by their upper 16 bits (the bfloat16 numbers) and takes the lower edge of the bin
    that holds the exact tau: at most 0.8 % below it, exact for bfloat16 entries. It finds the bin bit by bit: 15 reads
    and, where the leaves are sharded, 15 all-reduces of one number.

    Args:
      tree: pytree of float arrays, N < 2^31 entries in all; 1 at least.
      fraction: in [0, 1]; 0 gives infinity, 1 gives 0. Traced fractions are multiplied by N in float32.
      method: "sort" or "histogram".

    Returns:
      Scalar, float32 (float64 for float64 leaves and "sort").

    Raises:
      ValueError: an argument out of range, no entries, or too many.

    Source: arXiv 2306.00204, official code (landscape_utils).

    >>> top_coordinate_threshold({"w": jnp.arange(1.0, 11.0)}, 0.5).item()
    5.0
    """
    _validate(fraction=fraction, method=method, methods=_METHODS[:2])
    leaves = jax.tree.leaves(tree)
    n = sum(leaf.size for leaf in leaves)
    if not 0 < n < 2**31:
        raise ValueError(f"the tree has {n} entries; it needs 1 to 2^31 - 1 (for more use scope='leaf')")
    # As the official code computes it; only a traced fraction has to do with float32.
    rank = jnp.floor(n * fraction).astype(jnp.int32) if isinstance(fraction, jax.Array) else int(n * fraction)  # pyright: ignore[reportArgumentType]
    if method == "sort":
        dtype = jnp.result_type(jnp.float32, *leaves)
        magnitudes = jnp.sort(jnp.concatenate([jnp.abs(leaf).astype(dtype).ravel() for leaf in leaves]))
        tau = magnitudes[n - 1 - jnp.minimum(rank, n - 1)]
    else:
        tau = _lower_edge(leaves, jnp.minimum(rank, n - 1))
    return jnp.where(jnp.asarray(fraction) <= 0, jnp.inf, jnp.where(rank >= n, 0, tau)).astype(tau.dtype)


def _lower_edge(leaves, rank):
    """The largest bfloat16 number, in float32, that more than `rank` magnitudes reach: bit by bit.

    On a GPU 15 counts take a tenth of the time of adding to the bins of a table.
    """

    def add_bit(i, edge):
        candidate = edge + (jnp.uint32(2**30) >> i.astype(jnp.uint32))
        count = 0
        for leaf in leaves:  # one by one: a concatenation would gather sharded leaves
            bits = jax.lax.bitcast_convert_type(jnp.abs(leaf).astype(jnp.float32), jnp.uint32)
            count += jnp.sum(bits >= candidate, dtype=jnp.int32)
        return jnp.where(count > rank, candidate, edge)

    edge = jax.lax.fori_loop(0, 15, add_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(edge, jnp.float32)


def clip_top_coordinates(
    fraction: ArrayLike = 0.1,
    *,
    scope: str = "global",
    method: str = "sort",
    threshold_scale: ArrayLike = 1.0,
) -> optax.GradientTransformation:
    """Clip every entry to [-tau, tau], tau being the magnitude that at most ``fraction`` of the entries exceed.

    Put it first in a chain, on raw gradients: ``optax.chain(clip_top_coordinates(0.1), optax.sgd(0.1))``. It clips
    whatever comes in, so behind a rule it clips the update. Scaling the gradients scales tau; ties at tau stay.

    Zero entries count. Where fewer than ``fraction`` of the entries are not zero (embedding rows of unseen tokens), tau
    is 0 and so is the update; where few coordinates are left to solve, tau sinks with the others and stalls them. Lower
    the fraction then, or leave embeddings out with ``optax.masked``.

    Args:
      fraction: largest share of changed entries, in [0, 1]; 0 changes nothing, 1 gives zero. Paper: 0.1 for SGD, 0.5
        for Adam and Adafactor.
      scope: "global", one tau over all leaves as in the paper, or "leaf", one for each.
      method: "sort" or "histogram", see ``top_coordinate_threshold``; "ema" clips at a tau that follows the gradients
        from step to step (tau *= sqrt(share above it / fraction), within a factor of 2), in one read of them: the
        share is right on average only, and lags behind gradients that change scale. It starts from a histogram.
      threshold_scale: factor of tau, > 0.

    Returns:
      ``optax.GradientTransformation`` with state ``ClipTopCoordinatesState``. dtypes stay.

    Raises:
      ValueError: an argument out of range; as ``top_coordinate_threshold``.

    Source: arXiv 2306.00204. The released optimizer classes clip with foreach=True only; this is what the paper says.

    >>> tx = clip_top_coordinates(0.5)
    >>> tx.update(jnp.arange(-5.0, 5.0), tx.init(jnp.zeros(10)))[0].tolist()
    [-2.0, -2.0, -2.0, -2.0, -1.0, 0.0, 1.0, 2.0, 2.0, 2.0]
    """
    _validate(fraction=fraction, scope=scope, method=method, threshold_scale=threshold_scale)  # pyright: ignore[reportArgumentType]

    def init_fn(params):
        zero = jnp.zeros([], jnp.float32)
        return ClipTopCoordinatesState(zero if scope == "global" else jax.tree.map(lambda p: zero, params))

    def update_fn(updates, state, params=None, *, again=None):
        # `again()` computes the updates once more, see `_clip_direction`.
        del params
        if _is_zero(fraction) or optax.tree.size(updates) == 0:
            return updates, state

        def new_thresholds(tree, old, again=None):
            if optax.tree.size(tree) == 0:
                return old, old
            if method != "ema":
                tau = top_coordinate_threshold(tree, fraction, method=method)
                return tau, tau.astype(jnp.float32)

            def first():
                return top_coordinate_threshold(again() if again else tree, fraction, method="histogram")

            # Zero at the start, and again after a long run of zero gradients.
            tau = jax.lax.cond(old > 0, lambda: old, first)
            return tau, _followed(tau, tree, fraction)

        if scope == "global":
            tau, kept = new_thresholds(updates, state.threshold, again)
            taus = jax.tree.map(lambda g: tau, updates)
        else:
            treedef = jax.tree.structure(updates)
            pairs = treedef.flatten_up_to(jax.tree.map(new_thresholds, updates, state.threshold))
            taus, kept = (treedef.unflatten([pair[i] for pair in pairs]) for i in range(2))

        def clip(g, tau):
            bound = (tau * threshold_scale).astype(g.dtype)
            return jnp.clip(g, -bound, bound)

        return jax.tree.map(clip, updates, taus), ClipTopCoordinatesState(kept)

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_adam_clipped(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    fraction: ArrayLike = 0.5,
    *,
    scope: str = "global",
    method: str = "sort",
    threshold_scale: ArrayLike = 1.0,
) -> optax.GradientTransformation:
    """Adam whose first moment averages clipped gradients while the second averages the unclipped ones.

    Args:
      b1, b2, eps: as in ``optax.scale_by_adam``.
      fraction, scope, method, threshold_scale: see ``clip_top_coordinates``.

    Returns:
      ``optax.GradientTransformation`` with state ``ScaleByAdamClippedState``; updates have the gradients' dtype.

    Raises:
      ValueError: as ``clip_top_coordinates``.

    Source: arXiv 2306.00204, with Adam's bias correction (the official landscape code is one step ahead in it).

    >>> tx = scale_by_adam_clipped(fraction=0.5)
    >>> tx.update(jnp.array([1.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [1.0, 0.25]
    """
    clip = clip_top_coordinates(fraction, scope=scope, method=method, threshold_scale=threshold_scale)

    def init_fn(params):
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return ScaleByAdamClippedState(
            jnp.zeros([], jnp.int32),
            zeros,
            jax.tree.map(jnp.copy, zeros),
            clip.init(params),  # pyright: ignore[reportArgumentType]
        )

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        decay_m, decay_v, plus = (jnp.asarray(x, jnp.float32) for x in (b1, b2, eps))
        filled_m, filled_v = 1 - decay_m**count, 1 - decay_v**count
        clipped, clip_state = clip.update(updates, state.clip)

        def leaf(g, clipped_g, mu, nu):
            wide = g.astype(jnp.float32)
            mu = (1 - decay_m) * clipped_g.astype(jnp.float32) + decay_m * mu
            nu = (1 - decay_v) * (wide * wide) + decay_v * nu
            return (mu / filled_m / (jnp.sqrt(nu / filled_v) + plus)).astype(g.dtype), mu, nu

        treedef = jax.tree.structure(updates)
        rows = treedef.flatten_up_to(jax.tree.map(leaf, updates, clipped, state.mu, state.nu))
        new_updates, mu, nu = (treedef.unflatten([row[i] for row in rows]) for i in range(3))
        return new_updates, ScaleByAdamClippedState(count, mu, nu, clip_state)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init_fn, update_fn)


def scale_by_adafactor_clipped(
    fraction: ArrayLike = 0.5,
    *,
    decay_rate: ArrayLike = 0.8,
    eps: ArrayLike = 1e-30,
    clipping_threshold: ArrayLike = 1.0,
    min_dim_size_to_factor: int = 128,
    scope: str = "global",
    method: str = "sort",
    threshold_scale: ArrayLike = 1.0,
) -> optax.GradientTransformation:
    """Adafactor's direction g_c / sqrt(v), v from the unclipped g, and then its clipping by the root mean square.

    v is the average of g^2 + eps with decay 1 - t^-decay_rate, factored into row and column means over the last two
    axes where both are at least ``min_dim_size_to_factor`` long (Optax's default; the official code has 1).

    Args:
      clipping_threshold: largest root mean square of a leaf's direction.
      fraction, scope, method, threshold_scale: see ``clip_top_coordinates``.

    Returns:
      ``optax.GradientTransformation`` with state ``ScaleByAdafactorClippedState``; updates have the gradients' dtype.

    Raises:
      ValueError: as ``clip_top_coordinates``.

    Source: arXiv 2306.00204, official code; Adafactor: arXiv 1804.04235.

    >>> tx = scale_by_adafactor_clipped(fraction=0.5)
    >>> tx.update(jnp.array([1.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [1.0, 0.25]
    """
    clip = clip_top_coordinates(fraction, scope=scope, method=method, threshold_scale=threshold_scale)

    def init_fn(params):
        def zeros(p):
            full = jnp.zeros_like(p, dtype=jnp.float32)
            if p.ndim >= 2 and min(p.shape[-2:]) >= min_dim_size_to_factor:
                return full.mean(-1), full.mean(-2)
            return full

        return ScaleByAdafactorClippedState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params), clip.init(params))  # pyright: ignore[reportArgumentType]

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        decay = 1 - count.astype(jnp.float32) ** -jnp.asarray(decay_rate, jnp.float32)
        clipped, clip_state = clip.update(updates, state.clip)

        def leaf(g, clipped_g, nu):
            squares = jnp.square(g.astype(jnp.float32)) + jnp.asarray(eps, jnp.float32)
            if isinstance(nu, tuple):
                rows, columns = nu
                rows = decay * rows + (1 - decay) * squares.mean(-1)
                columns = decay * columns + (1 - decay) * squares.mean(-2)
                nu = rows, columns
                share = rows / rows.mean(-1, keepdims=True)
                scale = jax.lax.rsqrt(share)[..., :, None] * jax.lax.rsqrt(columns)[..., None, :]
            else:
                nu = decay * nu + (1 - decay) * squares
                scale = jax.lax.rsqrt(nu)
            direction = clipped_g.astype(jnp.float32) * scale
            size = jnp.sqrt(jnp.mean(jnp.square(direction)))
            return (direction / jnp.maximum(1, size / clipping_threshold)).astype(g.dtype), nu

        treedef = jax.tree.structure(updates)
        columns = (treedef.flatten_up_to(tree) for tree in (updates, clipped, state.nu))
        rows = [leaf(*row) for row in zip(*columns, strict=True)]
        new_updates, nu = (treedef.unflatten([row[i] for row in rows]) for i in range(2))
        return new_updates, ScaleByAdafactorClippedState(count, nu, clip_state)  # pyright: ignore[reportArgumentType]

    return optax.GradientTransformation(init_fn, update_fn)


def sgd_coordinate_clip(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    fraction: ArrayLike = 0.1,
    *,
    normalize: bool = False,
    method: str = "sort",
) -> optax.GradientTransformation:
    """SGD on clipped gradients: m = momentum m + (1 - momentum) g_c, first m = g_c, params -= learning_rate * m.

    ``optax.sgd`` has no factor 1 - momentum: its learning rate is that much smaller.

    Args:
      learning_rate: a number or a schedule.
      momentum: in [0, 1).
      normalize: scale each leaf of m to the norm sqrt(number of entries): normalized SGD.
      fraction, method: see ``clip_top_coordinates``.

    Raises:
      ValueError: as ``clip_top_coordinates``.

    Source: arXiv 2306.00204, official code (dampening equals momentum).

    >>> tx = sgd_coordinate_clip(1.0, fraction=0.5)
    >>> tx.update(jnp.array([1.0, -4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, 1.0]
    """
    return optax.chain(
        clip_top_coordinates(fraction, method=method),
        _momentum(momentum),
        *([optax.stateless(_normalized)] if normalize else []),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam_clip_first_moment(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    fraction: ArrayLike = 0.5,
    *,
    method: str = "sort",
) -> optax.GradientTransformation:
    """``scale_by_adam_clipped`` with a learning rate: m from clipped, v from unclipped gradients.

    Source: arXiv 2306.00204.

    >>> tx = adam_clip_first_moment(1e-3)
    >>> [round(x, 5) for x in tx.update(jnp.array([1.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()]
    [-0.001, -0.00025]
    """
    return optax.chain(
        scale_by_adam_clipped(b1, b2, eps, fraction, method=method),
        optax.scale_by_learning_rate(learning_rate),
    )


def adam_clip_update(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    fraction: ArrayLike = 0.5,
    *,
    method: str = "sort",
) -> optax.GradientTransformation:
    """Adam on plain gradients whose direction is clipped: the top ``fraction`` of its entries come down to tau.

    Source: arXiv 2306.00204 ("clip update").

    >>> tx = adam_clip_update(1.0, b1=0.0)
    >>> tx.update(jnp.array([1.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [-1.0, -1.0]
    """
    return optax.chain(
        _clip_direction(scale_by_adam_clipped(b1, b2, eps, fraction=0.0), fraction, method),
        optax.scale_by_learning_rate(learning_rate),
    )


def adafactor_coordinate_clip(
    learning_rate: optax.ScalarOrSchedule | None = None,
    fraction: ArrayLike = 0.5,
    *,
    decay_rate: ArrayLike = 0.8,
    eps: ArrayLike = 1e-30,
    clipping_threshold: ArrayLike = 1.0,
    min_dim_size_to_factor: int = 128,
    multiply_by_parameter_scale: bool = True,
    method: str = "sort",
) -> optax.GradientTransformation:
    """Adafactor on clipped gradients: ``scale_by_adafactor_clipped`` times rate and size of each parameter.

    Args:
      learning_rate: a number or a schedule; None: min(1e-2, 1 / sqrt(t)), the relative step.
      multiply_by_parameter_scale: times the root mean square of each leaf, at least 1e-3; ``update`` then needs params.
      min_dim_size_to_factor: name it in ``static_args`` of ``optax.inject_hyperparams``.
      fraction, decay_rate, eps, clipping_threshold, method: see ``scale_by_adafactor_clipped``.

    Source: arXiv 2306.00204, official code.

    >>> tx = adafactor_coordinate_clip(multiply_by_parameter_scale=False)
    >>> [round(x, 5) for x in tx.update(jnp.array([1.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()]
    [-0.01, -0.0025]
    """
    if learning_rate is None:
        learning_rate = lambda count: jnp.minimum(1e-2, jax.lax.rsqrt(count + 1.0))  # noqa: E731
    return optax.chain(
        scale_by_adafactor_clipped(
            fraction,
            decay_rate=decay_rate,
            eps=eps,
            clipping_threshold=clipping_threshold,
            min_dim_size_to_factor=min_dim_size_to_factor,
            method=method,
        ),
        *([optax.scale_by_param_block_rms(1e-3)] if multiply_by_parameter_scale else []),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion_coordinate_clip(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    fraction: ArrayLike = 0.5,
    *,
    clip: str = "update",
    method: str = "sort",
) -> optax.GradientTransformation:
    """Lion with its sign replaced by a clip of the interpolated update, or Lion on clipped gradients.

    Args:
      clip: "update": b1 m + (1 - b1) g, clipped; its size is the gradient's, so the learning rate is not Lion's.
        "gradient": sign(b1 m + (1 - b1) g_c), m from g_c.
      fraction, method: see ``clip_top_coordinates``.

    Raises:
      ValueError: unknown ``clip``; as ``clip_top_coordinates``.

    Source: arXiv 2306.00204, official code; Lion: arXiv 2302.06675.

    >>> tx = lion_coordinate_clip(1.0)
    >>> [round(x, 5) for x in tx.update(jnp.array([1.0, -4.0]), tx.init(jnp.zeros(2)))[0].tolist()]
    [-0.1, 0.1]
    """
    if clip not in ("update", "gradient"):
        raise ValueError(f"clip={clip!r}; choose 'update' or 'gradient'")
    if clip == "update":
        stages = [_clip_direction(_interpolation(b1, b2), fraction, method)]
    else:
        stages = [clip_top_coordinates(fraction, method=method), _interpolation(b1, b2), optax.scale_by_sign()]
    return optax.chain(*stages, optax.scale_by_learning_rate(learning_rate))


def _clip_direction(rule: optax.GradientTransformation, fraction, method) -> optax.GradientTransformation:
    """``optax.chain(rule, clip_top_coordinates(fraction, method=method))`` that keeps no array of directions.

    In the chain, the branch of "ema" that takes the first threshold has the directions as operands, so that every
    update would write them to memory and read them back. Here the branch computes them again from the rule's operands.
    """
    clip = clip_top_coordinates(fraction, method=method)

    def init_fn(params):
        return rule.init(params), clip.init(params)

    def update_fn(updates, state, params=None):
        rule_state, clip_state = state
        directions, new_rule_state = rule.update(updates, rule_state, params)
        clipped, clip_state = clip.update(
            directions,
            clip_state,
            again=lambda: rule.update(updates, rule_state, params)[0],  # pyright: ignore[reportCallIssue]
        )
        return clipped, (new_rule_state, clip_state)

    return optax.GradientTransformation(init_fn, update_fn)


def _followed(tau, tree, fraction):
    """The threshold for the next step, from the share of the entries that exceed this one."""
    n = optax.tree.size(tree)
    above = optax.tree.sum(jax.tree.map(lambda g: jnp.sum(jnp.abs(g).astype(jnp.float32) > tau), tree))
    share = jnp.maximum(above, 0.5) / n
    return tau * jnp.clip((share / fraction) ** _GAIN, 1 / _LARGEST_STEP, _LARGEST_STEP)


def _momentum(momentum) -> optax.GradientTransformation:
    """The paper's average, which starts at the first gradient (``optax.ema`` starts at zero)."""

    def init_fn(params):
        return optax.EmaState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=jnp.float32))

    def update_fn(updates, state, params=None):
        del params
        decay = jnp.where(state.count > 0, jnp.asarray(momentum, jnp.float32), 0)
        ema = jax.tree.map(lambda g, m: decay * m + (1 - decay) * g.astype(jnp.float32), updates, state.ema)
        new_updates = jax.tree.map(lambda m, g: m.astype(g.dtype), ema, updates)
        return new_updates, optax.EmaState(optax.safe_increment(state.count), ema)

    return optax.GradientTransformation(init_fn, update_fn)


def _interpolation(b1, b2) -> optax.GradientTransformation:
    """Lion's update before the sign."""

    def init_fn(params):
        zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
        return optax.ScaleByLionState(jnp.zeros([], jnp.int32), zeros)

    def update_fn(updates, state, params=None):
        del params
        d1, d2 = jnp.asarray(b1, jnp.float32), jnp.asarray(b2, jnp.float32)
        mixed = jax.tree.map(lambda g, m: (d1 * m + (1 - d1) * g).astype(g.dtype), updates, state.mu)
        mu = jax.tree.map(lambda g, m: d2 * m + (1 - d2) * g.astype(jnp.float32), updates, state.mu)
        return mixed, optax.ScaleByLionState(optax.safe_increment(state.count), mu)

    return optax.GradientTransformation(init_fn, update_fn)


def _normalized(updates, params=None):
    del params

    def leaf(u):
        wide = u.astype(jnp.float32)
        size = jnp.sqrt(jnp.sum(wide * wide))
        return jnp.where(size > 0, wide / jnp.where(size > 0, size, 1) * u.size**0.5, 0).astype(u.dtype)

    return jax.tree.map(leaf, updates)


def _is_zero(fraction) -> bool:
    return not isinstance(fraction, jax.core.Tracer) and float(fraction) == 0


def _validate(*, fraction, method, scope="global", threshold_scale=1.0, methods=_METHODS) -> None:
    for name, value, allowed in (("scope", scope, _SCOPES), ("method", method, methods)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; choose one of {allowed}")
    for name, value, valid, allowed in (
        ("fraction", fraction, lambda v: 0 <= v <= 1, "in [0, 1]"),
        ("threshold_scale", threshold_scale, lambda v: v > 0, "> 0"),
    ):
        if not isinstance(value, jax.core.Tracer) and not valid(value):
            raise ValueError(f"{name}={value}; it must be {allowed}")
