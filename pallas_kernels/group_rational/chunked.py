"""XLA only, for every device: one band of rows at a time, so that nothing of x's size is held beside the results."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.group_rational import arithmetic
from pallas_kernels.group_rational.reference import Spec, flat

# Elements of a band: on a CPU what its caches hold, elsewhere few bands, each of which fills the device.
_BAND = {"cpu": 2**16, "gpu": 2**28, "tpu": 2**26}


@functools.partial(jax.jit, static_argnums=0)
def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    rows = [jnp.broadcast_to(row, x.shape) for row in table]
    return arithmetic.value(spec.degree, x.astype(table.dtype), rows, _reciprocal).astype(x.dtype)


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and of the table from the cotangent g [..., D]."""
    shape, x, g = x.shape, flat(x), flat(g)
    count, channels = x.shape
    rows = min(spec.block_sizes[0] if spec.block_sizes else max(_BAND[spec.target.platform] // channels, 1), count)
    if rows == 0:
        return x.reshape(shape), jnp.zeros_like(table)

    def band(start, size, carry):
        dx, sums = carry
        own, g_own = (lax.dynamic_slice_in_dim(array, start, size).astype(table.dtype) for array in (x, g))
        found, terms = arithmetic.gradients(spec.degree, own, own < 0, list(table[:, None, :]), g_own, _reciprocal)
        dx = lax.dynamic_update_slice_in_dim(dx, found.astype(x.dtype), start, 0)
        return dx, sums + jnp.stack([jnp.sum(term, 0) for term in terms])

    carry = jnp.zeros_like(x), jnp.zeros_like(table)
    carry = lax.fori_loop(0, count // rows, lambda i, carry: band(i * rows, rows, carry), carry)
    dx, sums = band(count - count % rows, count % rows, carry) if count % rows else carry
    return dx.reshape(shape), sums


def _reciprocal(q):
    return 1 / q
