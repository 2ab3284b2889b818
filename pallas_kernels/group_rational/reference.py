"""The definition, with JAX's own derivatives. Tests compare every other file with this one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


class Spec(NamedTuple):
    """The static options that implementations see: ``degree`` is (m, n)."""

    implementation: str
    target: dispatch.Target
    degree: tuple[int, int]
    block_sizes: tuple[int, int] | None


def magnitude(x: jax.Array) -> jax.Array:
    """|x| with derivative +1 at 0, of either sign."""
    return jnp.where(x < 0, -x, x)


def channel_table(numerator: jax.Array, denominator: jax.Array, channels: int, dtype: Any) -> jax.Array:
    """Every channel's coefficients, a0..am and the magnitudes of b0..b(n-1): [m + 1 + n, D] of [groups or 1, ...]."""

    def spread(groups):
        each = channels // groups.shape[0]
        return jnp.broadcast_to(groups.T[:, :, None], (*groups.shape[::-1], each)).reshape(groups.shape[1], channels)

    return jnp.concatenate([spread(numerator.astype(dtype)), spread(magnitude(denominator.astype(dtype)))])


def horner(coefficients: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """coefficients[0] + coefficients[1] * x + ..."""
    total = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        total = total * x + coefficient
    return total


def flat(x: jax.Array) -> jax.Array:
    """[..., D] as [N, D]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """P(x) / Q(x) of x [..., D], in x's dtype, with each channel's column of the table [m + 1 + n, D]."""
    m, _ = spec.degree
    wide = x.astype(table.dtype)
    rows = [jnp.broadcast_to(row, x.shape) for row in table]
    p = horner(rows[: m + 1], wide)
    q = horner([jnp.ones_like(wide), *rows[m + 1 :]], magnitude(wide))
    return (p / q).astype(x.dtype)
