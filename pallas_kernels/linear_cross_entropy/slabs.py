"""The exact backward pass of the GPU kernels: one slab of the vocabulary at a time.

A kernel computes the logits of the slab again and turns them into their gradient; XLA's matrix products take it from
there. Beyond the outputs this holds one slab [N, slab] in the operands' dtype and the embeddings' gradient in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_cross_entropy.chunked import loop_over_tiles
from pallas_kernels.linear_cross_entropy.reference import Spec

SLAB_BYTES = 80 * 2**20
_MULTIPLE = 1024  # a slab is whole tiles, of any kernel's size
_LEAST = 4096  # each slab reads and writes the embeddings' gradient: with fewer entries that would take over


def _einsum(subscripts, a, b, dtype):
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)


def backward(
    spec: Spec,
    e: jax.Array,
    c: jax.Array,
    b: jax.Array | None,
    g: jax.Array,
    h: jax.Array,
    scale: jax.Array,
    logit_gradients: Callable[..., jax.Array],
    embeddings: bool = True,
    classifier: bool = True,
    slab_bytes: int = SLAB_BYTES,
    product: Callable[..., jax.Array] = _einsum,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients as ``chunked.backward``; None for one that is not asked for.

    ``logit_gradients(g, h, start, size)`` is the gradient [N, size] of the logits from ``start`` (before the bias is
    added), in ``spec.operand_dtype``; ``start`` may be traced. ``product(subscripts, a, b, dtype)`` takes the place of
    ``jnp.einsum``.
    """
    vocabulary_axis = spec.classifier_layout.index("v")
    vocabulary, dtype = c.shape[vocabulary_axis], spec.operand_dtype
    if dtype != jnp.float16:  # float16 cannot hold the gradient of a mean: there, scale comes last
        g, h, scale = g * scale, h * scale, jnp.ones_like(scale)
    operand = e.astype(dtype)
    size = slab_bytes // (max(e.shape[0], 1) * dtype.itemsize) // _MULTIPLE * _MULTIPLE
    size = max(size, _LEAST if embeddings else _MULTIPLE)

    def step(carry, start, size):
        de, dc, db = carry
        dz = logit_gradients(g, h, start, size)
        if de is not None:
            c_slab = lax.dynamic_slice_in_dim(c, start, size, vocabulary_axis).astype(dtype)
            de += product(f"rv,{spec.classifier_layout}->rd", dz, c_slab, spec.dtype)
        if dc is not None:
            rounded = dtype if dtype == dc.dtype == jnp.bfloat16 else spec.dtype  # by the product itself if it can
            part = product(f"rv,rd->{spec.classifier_layout}", dz, operand, rounded)
            part = part if rounded == dc.dtype == jnp.bfloat16 else (part * scale).astype(dc.dtype)
            dc = lax.dynamic_update_slice_in_dim(dc, part, start, vocabulary_axis)
        if db is not None:
            db = lax.dynamic_update_slice_in_dim(db, dz.sum(0, dtype=spec.dtype), start, 0)
        return de, dc, db

    carry = (
        jnp.zeros_like(e, spec.dtype) if embeddings else None,
        jnp.zeros_like(c) if classifier else None,
        None if b is None else jnp.zeros_like(b, spec.dtype),
    )
    de, dc, db = loop_over_tiles(step, carry, vocabulary, size)
    return None if de is None else de * scale, dc, None if db is None else db * scale
