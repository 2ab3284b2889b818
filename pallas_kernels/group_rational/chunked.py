"""XLA only, for every device: one band of rows at a time, so that nothing of x's size is held beside the results."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.group_rational import arithmetic
from pallas_kernels.group_rational.reference import Spec

# Elements of a band: on a CPU what its caches hold, elsewhere few bands, each of which fills the device.
_BAND = {"cpu": 2**16, "gpu": 2**28, "tpu": 2**26}


@functools.partial(jax.jit, static_argnums=0)
def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    return arithmetic.value(spec.degree, x.astype(table.dtype), list(table[:, None, :]), _reciprocal).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and of the table from the cotangent g [N, D]."""
    count, channels = x.shape
    rows = min(spec.block_sizes[0] if spec.block_sizes else max(_BAND[spec.target.platform] // channels, 1), count)
    if rows == 0:
        return jnp.zeros_like(x), jnp.zeros_like(table)

    def band(x, g):
        wide, g = x.astype(table.dtype), g.astype(table.dtype)
        dx, terms = arithmetic.gradients(spec.degree, wide, wide < 0, list(table[:, None, :]), g, _reciprocal)
        return dx.astype(x.dtype), jnp.stack([jnp.sum(term, 0) for term in terms])

    whole = count // rows * rows
    bands = (array[:whole].reshape(-1, rows, channels) for array in (x, g))
    dx, sums = lax.map(lambda pair: band(*pair), tuple(bands))
    dx, sums = dx.reshape(whole, channels), sums.sum(0)
    if whole == count:
        return dx, sums
    rest, last = band(x[whole:], g[whole:])
    return jnp.concatenate([dx, rest]), sums + last


def _reciprocal(q):
    return 1 / q
