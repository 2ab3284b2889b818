"""The exact backward pass of the GPU kernels: one slab of the vocabulary at a time.

A kernel computes the logits of the slab again and turns them into their gradient; XLA's matrix products take it from
there. Beyond the outputs this holds one slab [N, slab] in the operands' dtype and the embeddings' gradient in float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.linear_cross_entropy.reference import Spec

_SLAB_BYTES = 128 * 2**20
_MULTIPLE = 1024  # a slab is whole tiles, of any kernel's size


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
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """Gradients as ``chunked.backward``; None for one that is not asked for.

    ``logit_gradients(g, h, start, size)`` is the gradient [N, size] of the logits from ``start`` (before the bias is
    added), in ``spec.operand_dtype``; ``start`` may be traced.
    """
    vocabulary_axis = spec.classifier_layout.index("v")
    vocabulary, dtype = c.shape[vocabulary_axis], spec.operand_dtype
    if dtype != jnp.float16:  # float16 cannot hold the gradient of a mean: there, scale comes last
        g, h, scale = g * scale, h * scale, jnp.ones_like(scale)
    operand = e.astype(dtype)
    size = _slab(e.shape[0], vocabulary, dtype.itemsize)

    def step(carry, start, size):
        de, dc, db = carry
        dz = logit_gradients(g, h, start, size)
        if de is not None:
            c_slab = lax.dynamic_slice_in_dim(c, start, size, vocabulary_axis).astype(dtype)
            de += jnp.einsum(f"rv,{spec.classifier_layout}->rd", dz, c_slab, preferred_element_type=spec.dtype)
        if dc is not None:
            accumulated = spec.dtype if dtype == jnp.float16 else dc.dtype
            part = jnp.einsum(f"rv,rd->{spec.classifier_layout}", dz, operand, preferred_element_type=accumulated)
            part = (part * scale).astype(dc.dtype) if dtype == jnp.float16 else part
            dc = lax.dynamic_update_slice_in_dim(dc, part, start, vocabulary_axis)
        if db is not None:
            db = lax.dynamic_update_slice_in_dim(db, dz.sum(0, dtype=spec.dtype), start, 0)
        return de, dc, db

    carry = (
        jnp.zeros_like(e, spec.dtype) if embeddings else None,
        jnp.zeros_like(c) if classifier else None,
        None if b is None else jnp.zeros_like(b, spec.dtype),
    )
    full, rest = divmod(vocabulary, size)
    carry = lax.fori_loop(np.int32(0), np.int32(full), lambda i, carried: step(carried, i * size, size), carry)
    de, dc, db = step(carry, full * size, rest) if rest else carry
    return None if de is None else de * scale, dc, None if db is None else db * scale


def _slab(tokens: int, vocabulary: int, itemsize: int) -> int:
    most = max(_SLAB_BYTES // (max(tokens, 1) * itemsize) // _MULTIPLE, 1) * _MULTIPLE
    return min(most, vocabulary)
