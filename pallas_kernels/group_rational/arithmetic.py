"""The arithmetic of a tile, which every implementation uses: few operations, each polynomial with its derivative."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Reciprocal = Callable[[jax.Array], jax.Array]


def value(degree: tuple[int, int], x: jax.Array, rows: Sequence[jax.Array], reciprocal: Reciprocal) -> jax.Array:
    """P(x) / Q(x); ``rows`` are the m + 1 + n rows of the table, of x's shape or broadcast to it."""
    m, _ = degree
    p, _ = _horner(rows[: m + 1], x)
    q, _ = _horner([jnp.ones_like(x), *rows[m + 1 :]], jnp.abs(x))
    return p * reciprocal(q)


def gradients(
    degree: tuple[int, int],
    x: jax.Array,
    negative: jax.Array,
    rows: Sequence[jax.Array],
    g: jax.Array,
    reciprocal: Reciprocal,
) -> tuple[jax.Array, list[jax.Array]]:
    """(gradient of x, what each element adds to the gradients of the m + 1 + n rows) for the cotangent g."""
    m, n = degree
    size = jnp.abs(x)
    p, dp = _horner(rows[: m + 1], x)
    q, dq = _horner([jnp.ones_like(x), *rows[m + 1 :]], size)
    r = reciprocal(q)
    u, f = g * r, p * r
    # The derivative of |x| is -1 or +1, and so is the ratio of odd powers of |x| and x.
    turned = jnp.where(negative, -f, f)
    powers = [u]  # u * x**i
    for _ in range(max(m, n)):
        powers.append(powers[-1] * x)
    dx = u * (dp - turned * dq)
    return dx, [*powers[: m + 1], *(-(turned if j % 2 else f) * powers[j] for j in range(1, n + 1))]


def _horner(coefficients: Sequence[jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(value, derivative) of coefficients[0] + coefficients[1] * x + ..."""
    total, slope = coefficients[-1], None
    for coefficient in coefficients[-2::-1]:
        slope = total if slope is None else slope * x + total
        total = total * x + coefficient
    return total, jnp.zeros_like(x) if slope is None else slope
