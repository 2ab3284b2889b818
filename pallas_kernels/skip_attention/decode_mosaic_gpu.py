"""NVIDIA Hopper: attention of one token a sequence, the cache split over the multiprocessors.

A thread block is one warpgroup. It takes one sequence, one key/value head with all query heads that share it, and a
part of the chunks that hold visible slots; XLA puts the parts together. What is not visible is not loaded, but for the
rest of a chunk.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.skip_attention.hopper_tiles import whole

_CHUNK = 128  # slots at a time

_STAGE_BYTES = 64 * 2**10  # of keys and values on their way: two thread blocks share a multiprocessor
_LOWEST = -1e30  # the score of what is not visible


def attend(query, keys, values, lengths, start, count, scale):
    """As ``decode_attention``; ``start`` and ``count`` [B] may be traced."""
    (batch, heads, width), (slots, groups) = query.shape, keys.shape[1:3]
    share = heads // groups
    rows = -(-share // 8) * 8  # copies are whole 8 rows
    if rows > hopper.ROWS:
        raise NotImplementedError(f"{share} query heads share a key head; implementation='mosaic_gpu' takes up to 64")
    parts = min(pl.cdiv(slots, _CHUNK), max(1, hopper.MULTIPROCESSORS // (batch * groups)))
    stages = max(1, _STAGE_BYTES // (2 * _CHUNK * width * query.dtype.itemsize))
    query = hopper.padded(query.reshape(batch, groups, share, width), (1, 1, rows, 1))
    keys, values = whole(keys), whole(values)
    recent = jnp.stack([start, jnp.where(count > 0, start + count, 0)])  # an empty range visits no chunk

    def body(
        q_g, k_g, v_g, lengths_g, recent_g, out_g, sums_g, q_s, k_s, v_s, p_s, out_s, sums_s, q_full, k_full, v_full
    ):
        b, g, part = (lax.axis_index(name) for name in ("sequence", "head", "part"))
        plgpu.copy_gmem_to_smem(q_g.at[b, g], q_s.at[pl.ds(0, rows)], q_full)
        length, start, end = lengths_g[b], recent_g[0, b], recent_g[1, b]
        # Chunks of the first slots, then those of the recent ones that are not among them.
        first = lax.div(length + _CHUNK - 1, _CHUNK)
        jump = jnp.maximum(first, lax.div(start, _CHUNK)) - first
        chunks = jnp.maximum(first, lax.div(end + _CHUNK - 1, _CHUNK) - jump)
        begin, stop = lax.div(part * chunks, parts), lax.div((part + 1) * chunks, parts)

        def slot_of(t):
            return jnp.where(t < first, t, t + jump) * _CHUNK

        def load(t):
            stage = lax.rem(t - begin, stages)
            here = pl.ds(slot_of(t), _CHUNK)
            plgpu.copy_gmem_to_smem(k_g.at[b, here, g], k_s.at[stage], k_full.at[stage])
            plgpu.copy_gmem_to_smem(v_g.at[b, here, g], v_s.at[stage], v_full.at[stage])

        for stage in range(stages):
            pl.when(begin + stage < stop)(lambda stage=stage: load(begin + stage))
        plgpu.barrier_wait(q_full)

        def chunk(t, carry):
            top, total, out = carry
            stage = lax.rem(t - begin, stages)
            plgpu.barrier_wait(k_full.at[stage])
            scores = _product(q_s, hopper.transposed(k_s.at[stage]), _CHUNK) * (scale * hopper.LOG2E)
            slot = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA) + slot_of(t)
            visible = (slot < length) | ((slot >= start) & (slot < end))
            scores = jnp.where(visible, scores, _LOWEST)
            new_top = jnp.maximum(top, jnp.max(scores, axis=1))
            p = jnp.exp2(scores - hopper.across(new_top, scores))
            p_s[...] = p.astype(p_s.dtype)
            plgpu.commit_smem()
            shrink = jnp.exp2(top - new_top)
            plgpu.barrier_wait(v_full.at[stage])
            out = out * hopper.across(shrink, out) + _product(p_s, v_s.at[stage], width)
            pl.when(t + stages < stop)(lambda: load(t + stages))
            return new_top, total * shrink + jnp.sum(p, axis=1), out

        zeros = plgpu.layout_cast(jnp.zeros((hopper.ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
        carry = hopper.row_vector(_LOWEST), hopper.row_vector(0.0), zeros
        sums_s[0], sums_s[1], out_s[...] = lax.fori_loop(begin, stop, chunk, carry)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s.at[pl.ds(0, rows)], out_g.at[b, g, part])
        for i in range(2):
            plgpu.copy_smem_to_gmem(sums_s.at[i], sums_g.at[i, b, g, part])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def shared(*shape, dtype=query.dtype):
        transforms = hopper.TRANSFORMS if jnp.dtype(dtype).itemsize == 2 else hopper.TRANSFORMS_F32
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, groups, parts, rows, width), jnp.float32),
            jax.ShapeDtypeStruct((2, batch, groups, parts, hopper.ROWS), jnp.float32),
        ),
        scratch_types={
            "q_s": shared(hopper.ROWS, width),
            "k_s": shared(stages, _CHUNK, width),
            "v_s": shared(stages, _CHUNK, width),
            "p_s": shared(hopper.ROWS, _CHUNK),
            "out_s": shared(hopper.ROWS, width, dtype=jnp.float32),
            "sums_s": plgpu.SMEM((2, hopper.ROWS), jnp.float32),
            "q_full": plgpu.Barrier(),
            "k_full": plgpu.Barrier(num_barriers=stages),
            "v_full": plgpu.Barrier(num_barriers=stages),
        },
        grid=(batch, groups, parts),
        grid_names=("sequence", "head", "part"),
        compiler_params=hopper.PARAMS,
    )
    out, (top, total) = kernel(query, keys, values, lengths.astype(jnp.int32), recent)
    out, top, total = out[..., :share, :], top[..., :share], total[..., :share]
    # A maximum of slices: with two reductions one after the other, this would be two of XLA's kernels instead of one.
    weight = jnp.exp2(top - functools.reduce(jnp.maximum, jnp.split(top, parts, axis=2)))
    total = (weight * total).sum(axis=2)
    out = (weight[..., None] * out).sum(axis=2) / jnp.where(total > 0, total, 1)[..., None]
    return out.reshape(batch, heads, width).astype(query.dtype)


def _product(a_s, b_s, columns):
    def multiply(acc):
        plgpu.wgmma(acc, a_s, b_s)
        plgpu.wgmma_wait(0)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((hopper.ROWS, columns), jnp.float32))
