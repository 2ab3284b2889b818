"""NVIDIA Hopper: Pallas Mosaic GPU kernels. Neither computes nor loads the blocks that the lists leave out."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from pallas_kernels import hopper
from pallas_kernels.skip_attention import hopper_backward, hopper_forward, hopper_tiles
from pallas_kernels.skip_attention.hopper_tiles import whole
from pallas_kernels.skip_attention.reference import Places, Spec, Visits

# One pass needs copies that add, which came with JAX 0.11; it is faster, and dq is not the same bit for bit each time.
ONE_PASS = not hopper.BEFORE_0_11


def forward(spec: Spec, q, k, v, rows: Visits, places: Places):
    """As ``reference.forward``."""
    _check(spec, q)
    return _forward(spec, q, k, v, hopper_tiles.lists(rows), hopper_tiles.masks(spec, places, q.shape[1], k.shape[1]))


@functools.partial(jax.jit, static_argnums=0)
def _forward(spec, q, k, v, lists, masks):
    out, lse = hopper_forward.run(spec, whole(q), whole(k), whole(v), lists, masks)
    return out[:, : q.shape[1]], lse[:, :, : q.shape[1]]


def backward(spec: Spec, q, k, v, rows: Visits, columns: Visits, places: Places, lse, delta, do):
    """(dq, dk, dv); lse and delta, the sum of output times its gradient less the gradient of lse, are [B, Hq, T]."""
    _check(spec, q)
    lists = hopper_tiles.lists(rows), hopper_tiles.lists(columns, share=q.shape[2] // k.shape[2])
    return _backward(spec, q, k, v, *lists, hopper_tiles.masks(spec, places, q.shape[1], k.shape[1]), lse, delta, do)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, q, k, v, rows, columns, masks, lse, delta, do):
    # Rows that see nothing, and those past the end, get probabilities of exp(-inf).
    lse2 = jnp.where(lse == -jnp.inf, jnp.inf, lse * hopper.LOG2E)
    padding = ((0, 0), (0, 0), (0, -lse.shape[2] % spec.block_q))
    lse2, less = jnp.pad(lse2, padding, constant_values=jnp.inf), jnp.pad(-delta, padding)
    operands = whole(q), whole(k), whole(v), whole(do.astype(q.dtype)), lse2, less
    if ONE_PASS and q.shape[-1] == 128 and spec.block_kv == 128:
        batch, _, heads, width = q.shape

        def one_pass(refs):
            dq_sum, dk, dv = refs
            dk[...], dv[...] = hopper_backward.key_gradients(spec, *operands, columns, masks, dq_sum)

        dq_sum = jnp.zeros((batch, lse2.shape[2], heads, width), jnp.float32)
        results = pl.run_state(one_pass)((dq_sum, jnp.zeros_like(operands[1]), jnp.zeros_like(operands[2])))
        dq, dk, dv = (results[0] * spec.scale).astype(q.dtype), *results[1:]
    else:
        dq = hopper_backward.query_gradient(spec, *operands, rows, masks)
        dk, dv = hopper_backward.key_gradients(spec, *operands, columns, masks)
    return dq[:, : q.shape[1]], dk[:, : k.shape[1]], dv[:, : k.shape[1]]


def _check(spec, q):
    if spec.block_q not in (64, 128) or spec.block_kv not in (64, 128):
        raise NotImplementedError(
            f"blocks of {spec.block_q} queries and {spec.block_kv} keys; implementation='mosaic_gpu' takes 64 or 128"
        )
    if q.shape[-1] not in (64, 128) or q.dtype.itemsize != 2:
        raise NotImplementedError(
            f"{q.dtype} heads of width {q.shape[-1]}; implementation='mosaic_gpu' takes 16 bits and widths 64 and 128"
        )
