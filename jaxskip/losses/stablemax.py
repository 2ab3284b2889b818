"""StableMax: a softmax that grows linearly, so that its cross-entropy does not round to zero (arXiv 2501.04697)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike


def _symmetric_log(x: jax.Array) -> jax.Array:
    """sign(x) log(1 + |x|) with the slope 1 / (1 + |x|) everywhere.

    Each branch sees zero where the other is taken: its derivative would otherwise divide by zero at x = 1 or x = -1
    and reach the gradient as NaN. sign(x) itself would give x = 0 the slope zero.
    """
    positive = x >= 0
    return jnp.where(positive, jnp.log1p(jnp.where(positive, x, 0)), -jnp.log1p(jnp.where(positive, 0, -x)))


def _at_least_float32(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def log_stablemax(logits: ArrayLike, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """Logarithm of `stablemax`.

    Args:
      logits: [..., V], any float dtype.
      axis: the axis of the classes.
      where: bool, broadcastable to the logits; False leaves a class out (its result is -inf).

    Returns: [..., V], float32, or float64 for float64 logits.

    To sample, ``jax.random.categorical(key, log_stablemax(logits))``: the logits alone would be read as softmax's.

    >>> print(log_stablemax(jnp.array([0.0, 0.0])))
    [-0.6931472 -0.6931472]
    """
    return jax.nn.log_softmax(_symmetric_log(_at_least_float32(logits)), axis=axis, where=where)


def stablemax(logits: ArrayLike, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
    """s(z_i) / sum_j s(z_j) with s(z) = z + 1 for z >= 0 and 1 / (1 - z) for z < 0.

    Unlike softmax it changes when a constant is added to all logits.

    Args:
      logits: [..., V], any float dtype.
      axis: the axis of the classes.
      where: bool, broadcastable to the logits; False leaves a class out (its probability is 0).

    Returns: [..., V] probabilities, float32, or float64 for float64 logits.

    Source: arXiv 2501.04697, section 3.3, computed as softmax(log s(z)) (its proposition 1); the authors' code divides
    the s(z) in float64.

    >>> print(stablemax(jnp.array([3.0, 0.0, -1.0])).round(4))  # 4, 1 and 1/2
    [0.7273 0.1818 0.0909]
    """
    return jax.nn.softmax(_symmetric_log(_at_least_float32(logits)), axis=axis, where=where)


def stablemax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int = -1,
    where: ArrayLike | None = None,
    ignore_index: int | None = -100,
) -> jax.Array:
    """-log stablemax(logits)[label], one loss for each example.

    The gradient is (p - y) / (1 + |z|). The loss falls with the margin m between logits only like 1 / m, and rounds
    to zero in float32 at m = 1e7, where that of softmax does at m = 17. Label smoothing and z-loss are defined by
    softmax and have no meaning here.

    Args:
      logits: [..., V], any float dtype.
      labels: int [...], the shape of the logits without ``axis``.
      axis: the axis of the classes.
      where: bool, broadcastable to the logits; False leaves a class out.
      ignore_index: label of examples whose loss is 0; None for none. Average over the others yourself.

    Returns: [...] float32, or float64 for float64 logits. NaN for a label that is no class, infinity for a class that
      ``where`` leaves out.

    Raises: TypeError for labels that are not integers, ValueError for shapes that do not fit.

    Source: arXiv 2501.04697, section 3.3; the authors' code computes it in float64, which the logarithmic form spares.

    >>> z = jnp.array([[3.0, -1.0], [0.0, 0.0]])
    >>> print(stablemax_cross_entropy_with_integer_labels(z, jnp.array([0, -100])).round(4))
    [0.1178 0.    ]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    return _pick(log_stablemax(logits, axis, where), labels, axis, ignore_index)


def cross_entropy_in_dtype(logits: ArrayLike, labels: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Softmax cross-entropy whose every operation is rounded to ``dtype``: the loss that collapses.

    To study precision, not to train with: for real training compute in float32 whatever the logits are. As soon as
    the sum of the exponentials rounds to that of the label alone, the loss and its gradient are exactly zero.

    Args:
      logits: [..., V], any float dtype.
      labels: int [...].
      dtype: float16, bfloat16, float32 or float64 (which needs ``jax_enable_x64``).

    Returns: [...] losses in the logits' dtype, at least float32; the gradient has the logits' dtype.

    Raises: ValueError for float64 without x64 and for a dtype that is not floating; TypeError and ValueError as
      `stablemax_cross_entropy_with_integer_labels`.

    Source: arXiv 2501.04697, section 3 (the sweep over the softmax's precision).

    >>> z, y = jnp.array([0.0, 10.0]), jnp.array(1)
    >>> [float(cross_entropy_in_dtype(z, y, dtype)) > 0 for dtype in (jnp.bfloat16, jnp.float32)]
    [False, True]
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    shifted, sums = rounded_exponential_sums(logits, dtype)
    log_probs = round_to(shifted - round_to(jnp.log(sums), dtype), dtype)
    return _pick(log_probs.astype(_at_least_float32(logits).dtype), labels, -1, None)


def rounded_exponential_sums(logits: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """z - max z [..., V] and sum exp(z - max z) [..., 1], computed in ``dtype`` but held in float32 or wider."""
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}; it must be a floating-point type")
    if dtype.itemsize == 8 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError("dtype=float64 needs jax.config.update('jax_enable_x64', True); without it JAX has float32")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.promote_types(dtype, jnp.float32)))
    logits = round_to(logits, dtype)
    shifted = round_to(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)), dtype)
    return shifted, _sum_in(round_to(jnp.exp(shifted), dtype), dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_in(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sum over the last axis, kept, with every addition rounded to ``dtype``; XLA's own would use float32 inside."""
    if x.dtype == dtype:
        return x.sum(-1, keepdims=True)
    total = jax.lax.reduce(x, jnp.zeros((), x.dtype), lambda a, b: round_to(a + b, dtype), (x.ndim - 1,))
    return total[..., None]


@_sum_in.defjvp
def _sum_in_jvp(dtype, primals, tangents):
    return _sum_in(*primals, dtype), tangents[0].sum(-1, keepdims=True)


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x rounded to ``dtype`` without leaving its own: XLA drops a cast there and back, and keeps this."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)


def _pick(log_probs: jax.Array, labels: jax.Array, axis: int, ignore_index: int | None) -> jax.Array:
    """Minus the entries of log_probs that labels point at, 0 at ignore_index, NaN at labels that are no class."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {labels.dtype}; they must be integers")
    expected = list(log_probs.shape)
    expected.pop(axis)
    if list(labels.shape) != expected:
        raise ValueError(f"labels have shape {labels.shape}; for logits {log_probs.shape} it must be {tuple(expected)}")
    labels = labels.astype(jnp.int32)
    ignored = jnp.zeros(labels.shape, bool) if ignore_index is None else labels == ignore_index
    classes = jnp.where(ignored, 0, labels)
    # A negative index would count from the end; one past the end is filled with NaN.
    classes = jnp.where(classes < 0, log_probs.shape[axis], classes)
    picked = jnp.take_along_axis(log_probs, jnp.expand_dims(classes, axis), axis, mode="fill").squeeze(axis)
    return jnp.where(ignored, 0, -picked)
