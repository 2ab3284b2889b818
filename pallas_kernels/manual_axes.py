"""Over which axes of ``shard_map`` an array varies, by the names of each JAX version."""

from typing import Any

import jax
import jax.numpy as jnp


def same_manual_axes(tree: Any) -> Any:
    """Inside ``shard_map``: every array made varying over the axes that any of them varies over.

    JAX then sums the gradient of what was replicated over those axes, outside the custom derivative.
    """
    axes = frozenset().union(*(manual_axes(x) for x in jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: varying(x, axes), tree)


def varying_like(operands: Any, results: Any) -> Any:
    """The results of a kernel, which does not say so itself, varying over the axes of its operands."""
    return same_manual_axes((results, operands))[0]


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x, said to vary over ``axes`` too."""
    missing = tuple(axes - manual_axes(x))
    if not missing:
        return x
    return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)


def manual_axes(x: jax.Array) -> frozenset[str]:
    """The axes over which x varies."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def output_like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's output that varies over the same axes as x."""
    return jax.eval_shape(lambda x: jnp.zeros_like(x, dtype, shape=shape), x)
