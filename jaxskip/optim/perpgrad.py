"""⊥Grad: gradients without the component along the weights, which only scales the logits (arXiv 2501.04697)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

_SCOPES = ("leaf", "global", "axis")


def orthogonalize_to_params(
    grads: optax.Updates,
    params: optax.Params,
    *,
    scope: str = "leaf",
    axis: int | Sequence[int] = -1,
    rescale: bool = True,
    eps: ArrayLike = 1e-30,
    min_ratio: ArrayLike | None = None,
) -> optax.Updates:
    """g minus its projection on w, o = g - <w,g> / (<w,w> + eps) w, by default with the norm of g restored.

    The result is g⊥ = o ||g|| / (||o|| + eps) with ``rescale`` and o without. Where ||o|| <= min_ratio ||g|| the
    gradient is parallel to w but for rounding, and o is returned as it is: restoring its norm would blow up noise. A
    vector of one coordinate is always parallel to w and passes unchanged; so does every gradient where w = 0.

    Args:
      grads, params: pytrees of equal shapes, any float dtypes. Dot products are float32 (float64 for float64 leaves).
      scope: what counts as one vector w. "leaf": each array (official code). "global": all arrays together (the
        paper's formula). "axis": in each array, every slice along ``axis`` (with the default -1, the weights of one
        output unit of a Flax kernel; with 0, one layer of a stack of layers).
      axis: the axis or axes that tell the vectors of scope "axis" apart; the others are summed over.
      rescale: restore the norm of the gradient (official code); False is the paper's equation 12.
      eps: added to <w,w> and to ||o||. Weights shorter than about 1e-15 count as zero.
      min_ratio: None means 1e-4, and 1e-2 for vectors in which a gradient or a parameter has 16 bits.

    Returns:
      A tree like ``grads``, in its dtypes.

    Raises:
      ValueError: an unknown scope, an axis that an array does not have, trees or shapes that differ.

    Source: arXiv 2501.04697, equation 12; the defaults are the authors' code.

    >>> g = orthogonalize_to_params(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]))
    >>> g.tolist()
    [0.0, 5.0]
    """
    if scope not in _SCOPES:
        raise ValueError(f"scope={scope!r}; choose one of {_SCOPES}")
    paths, treedef = jax.tree.flatten_with_path(grads)
    if jax.tree.structure(params) != treedef:
        raise ValueError(f"grads and params differ: {treedef} and {jax.tree.structure(params)}")
    gs, ws = [leaf for _, leaf in paths], jax.tree.leaves(params)
    for (path, g), w in zip(paths, ws, strict=True):
        if jnp.shape(g) != jnp.shape(w):
            raise ValueError(
                f"at {jax.tree_util.keystr(path)!r} the gradient has shape {g.shape}, the params {w.shape}"
            )
    if scope == "global":
        return treedef.unflatten(_orthogonalize(gs, ws, None, rescale, eps, min_ratio))
    axes = [_summed_axes(g.ndim, axis) if scope == "axis" else None for g in gs]
    per_leaf = [_orthogonalize([g], [w], a, rescale, eps, min_ratio) for g, w, a in zip(gs, ws, axes, strict=True)]
    return treedef.unflatten([leaf for (leaf,) in per_leaf])


def perp_grad(
    scope: str = "leaf",
    axis: int | Sequence[int] = -1,
    rescale: bool = True,
    eps: ArrayLike = 1e-30,
    min_ratio: ArrayLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Makes gradients orthogonal to the parameters, before any optimizer (⊥AdamW, ⊥SGD).

    ``optax.chain(optax.clip_by_global_norm(1.0), perp_grad(), optax.adamw(1e-3, weight_decay=0.0))``; with
    ``optax.MultiSteps`` around the chain it acts on the accumulated gradient. No state. Over a mesh it adds two rounds
    of communication, of a few scalars a leaf, which XLA merges for all leaves.

    What it does not do: the optimizer's momentum is not projected again, so updates are not orthogonal to today's w. A
    step along o only lengthens w (||w - a o||² = ||w||² + a² ||o||²), so the effective learning rate decays unless
    weights decay or are normalised. Before a normalisation layer g is orthogonal already and nothing changes. On the
    embeddings and the head of a language model the scale of the logits can no longer be learned (calibration): mask
    them out. Layers stacked for a scan are one leaf: use ``scope="axis", axis=0`` to tell them apart.

    Args:
      scope, axis, rescale, eps, min_ratio: see ``orthogonalize_to_params``.
      mask: pytree of bools or a function params -> such a tree; false where gradients pass unchanged. None takes
        arrays with two axes or more: biases, gates and normalisation scales stay out. Under
        ``optax.inject_hyperparams`` name a function in ``static_args``, or it is taken for a schedule.

    Returns:
      ``optax.GradientTransformationExtraArgs``; ``update`` needs params.

    Raises:
      ValueError: as ``orthogonalize_to_params``, and update without params.

    Source: arXiv 2501.04697, section 5.

    >>> tx = optax.chain(perp_grad(), optax.sgd(1.0))
    >>> params = {"w": jnp.array([[1.0, 0.0]]), "b": jnp.ones(2)}
    >>> updates, _ = tx.update({"w": jnp.array([[3.0, 4.0]]), "b": jnp.ones(2)}, tx.init(params), params)
    >>> updates["w"].tolist(), updates["b"].tolist()
    ([[-0.0, -5.0]], [-1.0, -1.0])
    """
    if scope not in _SCOPES:
        raise ValueError(f"scope={scope!r}; choose one of {_SCOPES}")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("perp_grad needs the current value of the parameters: pass `params` to `update`")
        perpendicular = orthogonalize_to_params(
            updates, params, scope=scope, axis=axis, rescale=rescale, eps=eps, min_ratio=min_ratio
        )
        return perpendicular, state

    rule = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
    return optax.masked(rule, _matrices if mask is None else mask)


def _matrices(params: optax.Params) -> Any:
    return jax.tree.map(lambda w: jnp.ndim(w) >= 2, params)


def _summed_axes(ndim: int, axis: int | Sequence[int]) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis={axis}, but an array of the tree has {ndim} axes; mask it out or choose another axis")
    kept = {a % ndim for a in axes}
    return tuple(a for a in range(ndim) if a not in kept)


def _orthogonalize(gs, ws, axes, rescale, eps, min_ratio):
    """The gradients `gs` as one vector (over `axes`, None for all) against the weights `ws`."""
    if sum(math.prod(g.shape if axes is None else [g.shape[a] for a in axes]) for g in gs) <= 1:
        return gs
    dtype = jnp.result_type(jnp.float32, *gs, *ws)
    if min_ratio is None:
        min_ratio = 1e-2 if any(x.dtype.itemsize < 4 for x in (*gs, *ws)) else 1e-4
    eps, min_ratio = jnp.asarray(eps, dtype), jnp.asarray(min_ratio, dtype)
    wide = [(g.astype(dtype), w.astype(dtype)) for g, w in zip(gs, ws, strict=True)]

    # Products and sums rather than `vdot`: on TPU that would be a matrix product in bfloat16.
    def total(products):
        return sum(jnp.sum(p, axis=axes, keepdims=axes is not None) for p in products)

    share = total(w * g for g, w in wide) / (total(w * w for _, w in wide) + eps)
    os = [g - share * w for g, w in wide]
    if rescale:
        norm_g, norm_o = jnp.sqrt(total(g * g for g, _ in wide)), jnp.sqrt(total(o * o for o in os))
        scale = jnp.where(norm_o > min_ratio * norm_g, norm_g / (norm_o + eps), 1)
        # Computed again from g and w: writing o for the norm and reading it back would cost one pass more.
        again = jax.lax.optimization_barrier(share)
        os = [scale * (g - again * w) for g, w in wide]
    return [o.astype(g.dtype) for o, g in zip(os, gs, strict=True)]
