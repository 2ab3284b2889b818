"""AdAdaGrad's update rules: AdaGrad, AdaGrad-Norm, and learning rates that follow samples (arXiv 2402.11215).

What makes the batch grow is in ``jaxskip.training.adaptive_batch``; the rules here are ordinary ones.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_SCOPES = ("global", "leaf", "row")


class AdaGradState(NamedTuple):
    """State of ``scale_by_adagrad`` and ``scale_by_adagrad_norm``: the sums of squares so far, float32."""

    sum_of_squares: Any


class SampleScheduleState(NamedTuple):
    """State of ``scale_by_sample_schedule``."""

    samples: jax.Array  # shape=(), dtype=int32: samples used by the updates so far


def scale_by_adagrad(
    initial_accumulator_value: ArrayLike = 0.0, eps: ArrayLike = 1e-10
) -> optax.GradientTransformation:
    """AdaGrad as torch and the paper have it: acc += g^2 and the direction g / (sqrt(acc) + eps).

    ``optax.adagrad`` differs: it starts from 0.1 and multiplies with rsqrt(acc + 1e-7).

    Args:
      initial_accumulator_value: acc before the first update, >= 0.
      eps: added to the root, >= 0.

    Returns:
      ``optax.GradientTransformation`` with state ``AdaGradState``; all arithmetic is float32, updates have the
      gradients' dtype. A coordinate without any gradient so far gets 0.

    Raises:
      ValueError: an argument below 0.

    Source: arXiv 2402.11215; Duchi et al., 2011.

    >>> tx = scale_by_adagrad()
    >>> _, state = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
    >>> round(tx.update(jnp.array([4.0]), state)[0].item(), 4)
    0.8
    """
    _at_least_zero(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def init_fn(params):
        start = jnp.asarray(initial_accumulator_value, jnp.float32)
        return AdaGradState(jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32) + start, params))

    def update_fn(updates, state, params=None):
        del params
        squares = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), updates)
        sums = jax.tree.map(jnp.add, state.sum_of_squares, squares)
        return jax.tree.map(lambda g, acc: _divide(g, acc, eps), updates, sums), AdaGradState(sums)

    return optax.GradientTransformation(init_fn, update_fn)


def adagrad(
    learning_rate: optax.ScalarOrSchedule, initial_accumulator_value: ArrayLike = 0.0, eps: ArrayLike = 1e-10
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad: params -= learning_rate * g / (sqrt(acc) + eps), as ``torch.optim.Adagrad``.

    Args:
      learning_rate: a number or a schedule of steps; for one of samples, which is what growing batches need, chain
        ``scale_by_adagrad`` with ``scale_by_sample_schedule``.
      initial_accumulator_value, eps: see ``scale_by_adagrad``.

    Raises:
      ValueError: an argument below 0.

    >>> tx = adagrad(0.1)
    >>> round(tx.update(jnp.array([-5.0]), tx.init(jnp.zeros(1)))[0].item(), 4)
    0.1
    """
    return optax.chain(
        scale_by_adagrad(initial_accumulator_value, eps),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_adagrad_norm(
    initial_accumulator_value: ArrayLike = 1e-2, eps: ArrayLike = 0.0, scope: str = "global"
) -> optax.GradientTransformation:
    """AdaGrad-Norm: acc += |g|^2, one number, and the direction g / (sqrt(acc) + eps).

    Args:
      initial_accumulator_value: acc before the first update; with ``eps`` 0 it must be > 0.
      eps: added to the root; 0 in the paper, 1e-10 in the authors' code.
      scope: "global" (the paper: |g| over all parameters), "leaf" (one number a leaf), or "row" (one number for each
        output unit, the last axis of a Flax kernel; of a bias, each entry). The authors' code has rows, with a rule
        for biases that depends on the parameter before it and a weight decay of gradients; neither is copied.

    Returns:
      ``optax.GradientTransformation`` with state ``AdaGradState``; all arithmetic is float32, updates have the
      gradients' dtype.

    Raises:
      ValueError: an argument below 0, both 0, or an unknown scope.

    Source: arXiv 2402.11215; arXiv 1806.01811.

    >>> tx = scale_by_adagrad_norm(initial_accumulator_value=11.0)
    >>> direction, state = tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    >>> state.sum_of_squares.item(), direction.tolist()
    (36.0, [0.5, 0.6666666865348816])
    """
    _at_least_zero(initial_accumulator_value=initial_accumulator_value, eps=eps)
    if scope not in _SCOPES:
        raise ValueError(f"scope={scope!r}; choose one of {_SCOPES}")
    if not any(isinstance(x, jax.core.Tracer) or x > 0 for x in (initial_accumulator_value, eps)):  # pyright: ignore[reportOperatorIssue]
        raise ValueError("initial_accumulator_value and eps are both 0; a zero gradient would divide 0 by 0")

    def squared(g):
        kept = {"global": None, "leaf": None, "row": tuple(range(g.ndim - 1))}[scope]
        return jnp.sum(jnp.square(g.astype(jnp.float32)), axis=kept, keepdims=scope == "row")

    def init_fn(params):
        start = jnp.asarray(initial_accumulator_value, jnp.float32)
        if scope == "global":
            return AdaGradState(start)
        if scope == "leaf":
            return AdaGradState(jax.tree.map(lambda p: start, params))
        return AdaGradState(jax.tree.map(lambda p: jnp.full((1,) * (p.ndim - 1) + p.shape[-1:], start), params))

    def update_fn(updates, state, params=None):
        del params
        squares = jax.tree.map(squared, updates)
        if scope == "global":
            total = state.sum_of_squares + optax.tree.sum(squares)
            return jax.tree.map(lambda g: _divide(g, total, eps), updates), AdaGradState(total)
        sums = jax.tree.map(jnp.add, state.sum_of_squares, squares)
        return jax.tree.map(lambda g, acc: _divide(g, acc, eps), updates, sums), AdaGradState(sums)

    return optax.GradientTransformation(init_fn, update_fn)


def adagrad_norm(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    initial_accumulator_value: ArrayLike = 1e-2,
    eps: ArrayLike = 0.0,
    scope: str = "global",
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad-Norm: params -= learning_rate * g / (sqrt(acc) + eps).

    Args:
      learning_rate: a number or a schedule of steps; see ``adagrad`` for one of samples.
      initial_accumulator_value, eps, scope: see ``scale_by_adagrad_norm``.

    Raises:
      ValueError: as ``scale_by_adagrad_norm``.

    >>> tx = adagrad_norm(initial_accumulator_value=11.0)
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0].tolist()
    [-0.5, -0.6666666865348816]
    """
    return optax.chain(
        scale_by_adagrad_norm(initial_accumulator_value, eps, scope),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_sample_schedule(schedule: optax.Schedule, flip_sign: bool = True) -> optax.GradientTransformationExtraArgs:
    """Multiplies by -schedule(samples so far): the learning rate of a run whose batch size changes.

    Give ``update`` the size of the batch that its gradient comes from: ``tx.update(grads, state, params,
    batch_size=b)``. It may be traced, so that no batch size needs a compilation of its own; under ``optax.MultiSteps``
    it is that of the whole step.

    Args:
      schedule: samples (int32) -> learning rate; any of Optax's, with samples where it says steps.
      flip_sign: minimise.

    Returns:
      ``optax.GradientTransformationExtraArgs`` with state ``SampleScheduleState``, whose count stops at 2^31 - 1.

    Raises:
      ValueError: update without ``batch_size``.

    >>> tx = scale_by_sample_schedule(optax.linear_schedule(1.0, 0.0, 100))
    >>> _, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), batch_size=60)
    >>> round(tx.update(jnp.ones(1), state, batch_size=20)[0].item(), 4)
    -0.4
    """
    sign = -1 if flip_sign else 1

    def init_fn(params):
        del params
        return SampleScheduleState(jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, *, batch_size=None, **extra_args):
        del params, extra_args
        if batch_size is None:
            raise ValueError("a schedule of samples needs the size of the batch: update(..., batch_size=b)")
        rate = sign * jnp.asarray(schedule(state.samples), jnp.float32)
        room = jnp.iinfo(jnp.int32).max - state.samples
        samples = state.samples + jnp.minimum(room, jnp.asarray(batch_size, jnp.int32))
        return jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates), SampleScheduleState(samples)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _divide(g, acc, eps):
    # Without any gradient so far this is 0 / tiny.
    denominator = jnp.maximum(jnp.sqrt(acc) + eps, jnp.finfo(jnp.float32).tiny)
    return (g.astype(jnp.float32) / denominator).astype(g.dtype)


def _at_least_zero(**numbers) -> None:
    for name, value in numbers.items():
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"{name}={value}; it must be >= 0")
