"""Signs that training stopped for want of precision: softmax collapse, naive loss minimisation (arXiv 2501.04697)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxskip.losses.stablemax import cross_entropy_in_dtype, rounded_exponential_sums


def softmax_collapse_fraction(logits: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Share of examples whose softmax is one-hot in ``dtype``: sum_k exp(z_k - max z) rounds to 1.

    On such an example that is classified right, the cross-entropy and its gradient are exactly zero. Every addition of
    the sum is rounded to ``dtype``; kernels that accumulate 16-bit numbers in float32 collapse a little later.

    Args:
      logits: [..., V], any float dtype.
      dtype: float16, bfloat16, float32 or float64 (which needs ``jax_enable_x64``): the precision that is asked
        about, whatever that of the logits.

    Returns: float32 scalar in [0, 1]; the mean over all examples.

    Raises: ValueError for float64 without x64 and for a dtype that is not floating.

    Source: arXiv 2501.04697, section 3.

    >>> z = jnp.array([[10.0, 0.0], [1.0, 0.0]])
    >>> [float(softmax_collapse_fraction(z, dtype)) for dtype in (jnp.bfloat16, jnp.float32)]
    [0.5, 0.0]
    """
    _, sums = rounded_exponential_sums(jnp.asarray(logits), dtype)
    return jnp.mean(sums == 1, dtype=jnp.float32)


def zero_loss_fraction(logits: ArrayLike, labels: ArrayLike, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Share of examples whose softmax cross-entropy, computed in ``dtype``, is exactly zero.

    Args:
      logits: [..., V], any float dtype.
      labels: int [...].
      dtype: as in `softmax_collapse_fraction`.

    Returns: float32 scalar in [0, 1].

    Raises: as `jaxskip.losses.cross_entropy_in_dtype`.

    >>> float(zero_loss_fraction(jnp.array([[30.0, 0.0], [30.0, 0.0]]), jnp.array([0, 1])))
    0.5
    """
    return jnp.mean(cross_entropy_in_dtype(logits, labels, dtype) == 0, dtype=jnp.float32)


def nlm_alignment(params: Any, grads: Any) -> Any:
    """Cosine between w and -g of every array: near 1 when descent only lengthens w (naive loss minimisation).

    Args:
      params, grads: pytrees of equal shapes, any float dtypes.

    Returns: a tree of float32 scalars in [-1, 1]; 0 where either is zero.

    Source: arXiv 2501.04697, section 4.

    >>> float(nlm_alignment(jnp.array([1.0, 0.0]), jnp.array([-2.0, 0.0])))
    1.0
    """

    def cosine(w, g):
        w, g = _largest_is_one(w), _largest_is_one(g)
        lengths = jnp.sqrt(jnp.sum(w * w) * jnp.sum(g * g))
        return jnp.where(lengths > 0, -jnp.sum(w * g) / jnp.where(lengths > 0, lengths, 1), 0)

    return jax.tree.map(cosine, params, grads)


def _largest_is_one(x: ArrayLike) -> jax.Array:
    """x in float32, scaled: late in training the squares of gradients are below the smallest float."""
    x = jnp.asarray(x).astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), initial=0)
    return x / jnp.where(largest > 0, largest, 1)
