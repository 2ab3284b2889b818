"""Estimators of the diagonal of the Hessian and of the Gauss-Newton matrix, independent of any update rule.

Average over data first, square afterwards. Under ``jax.jit`` with a global batch sharded by ``NamedSharding`` this
holds by itself: one key, one global mean, the partitioner inserts the reduction. Inside ``jax.shard_map`` (with its
default ``check_vma=True``) it is up to the caller: the loss given to ``hutchinson_diag`` or ``sampled_gnb_diag`` must
itself be the global mean (``jax.lax.pmean(local_mean, axis)`` for equal shards), so that its gradient is the global one
before it is squared. Labels need a key that differs per shard (``jax.random.fold_in(key, jax.lax.axis_index(axis))``),
Hutchinson's probe the same key on all shards, and ``num_terms`` is the global count. ``gnb_diag`` computes its own mean
and so belongs under ``jit`` only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_PROBES = {"rademacher": jax.random.rademacher, "normal": jax.random.normal}


def _at_least_f32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)


def hutchinson_diag(
    loss_fn: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    key: jax.Array,
    *,
    distribution: str = "rademacher",
    num_samples: int = 1,
) -> optax.Params:
    """Unbiased estimate of the diagonal of the Hessian of ``loss_fn``: mean over u of u * (H u).

    One Hessian-vector product a sample, forward over reverse. ``custom_vjp`` functions in ``loss_fn`` pass if their
    forward and backward rules can be differentiated in forward mode; opaque kernels and callbacks in those rules raise
    JAX's own error (use a Gauss-Newton estimate there, which needs reverse mode only). Entries can be negative.
    Variance of coordinate i per sample: sum_{j != i} H_ij^2 for "rademacher", sum_j H_ij^2 + H_ii^2 for "normal" (the
    Sophia paper's choice).

    Args:
      loss_fn: params -> scalar mean loss. It sees a float32 copy of bf16 params, so that the products are float32.
      params: pytree of float arrays.
      key: PRNG key; the same on all data-parallel shards.
      distribution: "rademacher" or "normal".
      num_samples: probes to average, >= 1, one after the other (memory of one).

    Returns:
      Pytree like params, float32.

    Raises:
      ValueError: unknown distribution, or num_samples < 1.

    Source: arXiv 2305.14342, algorithm 1.

    >>> loss = lambda p: jnp.sum(jnp.array([1.0, 2.0, 3.0]) * p["w"] ** 2)
    >>> hutchinson_diag(loss, {"w": jnp.ones(3)}, jax.random.key(0))["w"].tolist()
    [2.0, 4.0, 6.0]
    """
    if distribution not in _PROBES:
        raise ValueError(f"distribution={distribution!r}; choose one of {sorted(_PROBES)}")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}; it must be at least 1")
    params = _at_least_f32(params)
    grad_fn = jax.grad(loss_fn)

    def add_sample(total, sample_key):
        u = optax.tree.random_like(sample_key, params, _PROBES[distribution])
        hvp = jax.jvp(grad_fn, (params,), (u,))[1]
        return jax.tree.map(lambda t, a, b: t + a * b, total, u, hvp), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add_sample, zeros, jax.random.split(key, num_samples))
    return jax.tree.map(lambda t: t / num_samples, total)


def gnb_diag(
    logits_fn: Callable[..., jax.Array],
    params: optax.Params,
    x,
    key: jax.Array,
    *,
    mask: jax.Array | None = None,
    max_norm: ArrayLike | None = None,
) -> optax.Params:
    """Gauss-Newton-Bartlett estimate: N * g * g, with g the gradient of the mean loss on labels drawn from the model.

    Unbiased for the diagonal of the Gauss-Newton matrix of the mean cross-entropy, never negative, reverse mode only.
    N counts the terms of that mean: every position of the leading axes that ``mask`` keeps (tokens, not sequences).
    One forward and one backward pass; the logits are materialised (``sampled_gnb_diag`` avoids that).

    Args:
      logits_fn: (params, x) -> logits ``[..., V]``.
      params: pytree of float arrays.
      x: the inputs, of a sub-batch if wanted; true labels are not used (their squared gradient, the empirical Fisher,
        estimates something else).
      key: PRNG key of the labels.
      mask: ``[...]`` bool or 0/1, false where a position is not part of the loss. All false gives zeros.
      max_norm: clip g to this global norm before squaring, as the official code does (1.0). It biases the estimate down
        when it acts; off by default.

    Returns:
      Pytree like params, float32.

    Raises:
      ValueError: logits without a class axis, mask of another shape, max_norm <= 0.

    Source: arXiv 2305.14342, algorithm 2.

    >>> logits_fn = lambda p, x: x @ p["w"]
    >>> gnb_diag(logits_fn, {"w": jnp.zeros((4, 3))}, jnp.ones((6, 4)), jax.random.key(0))["w"].shape
    (4, 3)
    """
    logits, pull = jax.vjp(lambda p: logits_fn(p, x), params)
    if logits.ndim == 0:
        raise ValueError("logits_fn returned a scalar; it must return logits with the classes on the last axis")
    terms = logits.shape[:-1]
    if mask is None:
        keep = jnp.ones(terms, bool)
    elif jnp.shape(mask) == terms:
        keep = jnp.asarray(mask) != 0
    else:
        raise ValueError(f"mask has shape {jnp.shape(mask)}; it must have the logits' leading shape {terms}")
    z = _at_least_f32(logits)
    labels = jax.random.categorical(key, z)
    residual = jnp.where(keep[..., None], jax.nn.softmax(z) - jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype), 0)
    # The sum is pulled back and divided afterwards: 1/N inside could underflow in 16-bit logits.
    (grad_sum,) = pull(residual.astype(logits.dtype))
    n = jnp.maximum(jnp.sum(keep, dtype=jnp.float32), 1)
    grad = jax.tree.map(lambda g: g / n, _at_least_f32(grad_sum))
    return _scaled_square(grad, n, max_norm)


def sampled_gnb_diag(
    sampled_loss_fn: Callable[[optax.Params, jax.Array], jax.Array],
    params: optax.Params,
    key: jax.Array,
    num_terms: ArrayLike,
    *,
    max_norm: ArrayLike | None = None,
) -> optax.Params:
    """Gauss-Newton-Bartlett estimate from a loss that draws its own labels: num_terms * g * g.

    The route for language models whose loss never materialises the logits.

    Args:
      sampled_loss_fn: (params, key) -> mean cross-entropy (scalar) on labels drawn from the model's own softmax with
        ``key`` and held constant under differentiation.
      params: pytree of float arrays.
      key: PRNG key of the labels.
      num_terms: how many terms that mean has (unmasked tokens of the whole batch); a number or a traced scalar.
      max_norm: as in ``gnb_diag``.

    Returns:
      Pytree like params, float32.

    Raises:
      ValueError: max_norm <= 0.

    Source: arXiv 2305.14342, algorithm 2.

    >>> def sampled_loss(p, key):
    ...     z = jnp.ones((6, 4)) @ p["w"]
    ...     return optax.softmax_cross_entropy_with_integer_labels(z, jax.random.categorical(key, z)).mean()
    >>> sampled_gnb_diag(sampled_loss, {"w": jnp.zeros((4, 3))}, jax.random.key(0), num_terms=6)["w"].shape
    (4, 3)
    """
    grad = _at_least_f32(jax.grad(sampled_loss_fn)(params, key))
    return _scaled_square(grad, num_terms, max_norm)


def _scaled_square(grad: optax.Params, num_terms: ArrayLike, max_norm: Any) -> optax.Params:
    if max_norm is None:
        clip = 1.0
    elif isinstance(max_norm, jax.core.Tracer) or max_norm > 0:
        clip = max_norm / jnp.maximum(optax.tree.norm(grad), max_norm)
    else:
        raise ValueError(f"max_norm={max_norm}; it must be positive, or None for no clipping")
    return jax.tree.map(lambda g: num_terms * (clip * g) ** 2, grad)
