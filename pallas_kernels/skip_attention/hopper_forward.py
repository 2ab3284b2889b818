"""NVIDIA Hopper, forward: warpgroups take turns at the tensor cores.

While one multiplies, another does its softmax; and of one warpgroup, the scores of the next block are on their way
before the values of the last one are multiplied in.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.skip_attention import hopper_tiles
from pallas_kernels.skip_attention.reference import Spec

_STAGE_BYTES = 128 * 2**10  # of keys and values on their way


def run(spec: Spec, q, k, v, lists, masks: hopper_tiles.Masks):
    """(output, log-sum-exp [B, Hq, T in whole blocks])."""
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share = spec.block_q // hopper.ROWS, heads // kv_heads
    stages = max(2, _STAGE_BYTES // (4 * spec.block_kv * width))
    blocks = pl.cdiv(queries, spec.block_q)
    work = hopper_tiles.schedule(batch, heads, blocks, 4 * keys * width // share)

    def make(inputs, lists, outputs, shared, rings, turns):
        (q_g, k_g, v_g, masks), (o_g, lse_g) = inputs, outputs
        q_s, k_s, v_s, pin_s = (shared[name] for name in ("q_s", "k_s", "v_s", "pin_s"))
        scaled = hopper_tiles.factor(spec) * hopper.LOG2E
        s_acc = plgpu.ACC((hopper.ROWS, spec.block_kv), jnp.float32)

        def load(i, tile, step):
            b, h, row, _, count = tile

            slot = rings["q"].claim(i)

            @pl.when(count > 0)
            def _():
                here = b, pl.ds(row * spec.block_q, spec.block_q), h
                plgpu.copy_gmem_to_smem(q_g.at[here], q_s.at[slot], rings["q"].full.at[slot])

            def load_block(t, block):
                here = b, pl.ds(block * spec.block_kv, spec.block_kv), lax.div(h, jnp.int32(share))
                rings["k"].fill(step + t, (k_g.at[here], k_s))
                rings["v"].fill(step + t, (v_g.at[here], v_s))
                return lists.block(b, h, row, t + 1)

            lax.fori_loop(0, count, load_block, lists.block(b, h, row, 0))
            return step + count

        def compute(i, tile, step):
            b, h, row, full, count = tile
            mine = rings["q"].slot(i), pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
            first_q = row * spec.block_q + turns.group * hopper.ROWS

            def softmax(s, top, total, block):
                """(p, new top, new total, factor of what came before) of products; ``block`` is None or one to mask."""
                s = hopper_tiles.capped(spec, s)
                if block is not None:
                    seen = hopper_tiles.mask(spec, s, masks, b, first_q, block * spec.block_kv, query_axis=0)
                    s = jnp.where(seen, s, -jnp.inf)
                new_top = jnp.maximum(top, jnp.max(s, axis=1))
                p = jnp.exp2(s * scaled - hopper.across(new_top * scaled, s))
                shrink = jnp.exp2((top - new_top) * scaled)
                return p, new_top, total * shrink + jnp.sum(p, axis=1), shrink

            def start(t, s_acc):
                """Starts the products of queries and keys of turn t."""
                slot = rings["k"].wait(step + t)
                turns.take()
                plgpu.wgmma(s_acc, q_s.at[hopper.opaque(mine[0]), mine[1]], hopper.transposed(k_s.at[slot]))

            def finished(t, s_acc, pending):
                """The products that ``start`` started; ``pending`` later ones may still be on their way."""
                turns.give()
                s = hopper.products(s_acc, pending)
                rings["k"].release(step + t)
                return s

            def first(_, carry, masking):
                out, _, top, total = carry
                block = lists.block(b, h, row, 0) if masking else None

                def products(s_acc):
                    start(0, s_acc)
                    return finished(0, s_acc, 0)

                p, top, total, _ = softmax(pl.run_scoped(products, s_acc), top, total, block)
                return out, p.astype(q.dtype), top, total

            def following(t, carry, masking):
                out, p, top, total = carry
                block = lists.block(b, h, row, t) if masking else None

                def products(s_acc):
                    start(t, s_acc)
                    slot = rings["v"].wait(step + t - 1)

                    def meanwhile():
                        found = softmax(finished(t, s_acc, 1), top, total, block)
                        # Nobody reads it: it keeps the compiler from waiting for the product first.
                        hopper.store(pin_s.at[turns.group], found[2])
                        return found

                    return hopper.product_onto(out, p, v_s.at[slot], meanwhile)

                out, (new_p, new_top, new_total, shrink) = pl.run_scoped(products, s_acc)
                rings["v"].release(step + t - 1)
                return out * hopper.across(shrink, out), new_p.astype(q.dtype), new_top, new_total

            def last(t, out, p):
                slot = rings["v"].wait(step + t)
                out, _ = hopper.product_onto(out, p, v_s.at[slot], lambda: None)
                rings["v"].release(step + t)
                return out

            @pl.when(count > 0)
            def _():
                rings["q"].wait(i)

            start_full, start_any = jnp.minimum(full, 1), jnp.minimum(count, 1)
            carry = (
                hopper.zeros(width),
                hopper.zeros(spec.block_kv, q.dtype),
                hopper.row_vector(hopper_tiles.LOWEST),
                hopper.row_vector(0.0),
            )
            unmasked, masked = ({"masking": value} for value in (False, True))
            carry = lax.fori_loop(0, start_full, functools.partial(first, **unmasked), carry)
            carry = lax.fori_loop(start_full, start_any, functools.partial(first, **masked), carry)
            pl.when(i > 0)(lambda: finish(i))  # by now the output of the tile before has left
            carry = lax.fori_loop(start_full, full, functools.partial(following, **unmasked), carry)
            carry = lax.fori_loop(jnp.maximum(full, start_any), count, functools.partial(following, **masked), carry)
            out, p, top, total = carry
            out = lax.fori_loop(count - start_any, count, functools.partial(last, p=p), out)
            out = out * hopper.across(jnp.where(total > 0, 1 / total, 0.0), out)
            lse = jnp.where(total > 0, top * hopper_tiles.factor(spec) + jnp.log(total), -jnp.inf)
            hopper.store(lse_g.at[b, h, pl.ds(first_q, hopper.ROWS)], lse)
            q_s[mine] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[mine], o_g.at[b, pl.ds(first_q, hopper.ROWS), h])
            return step + count

        def finish(tiles):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rings["q"].release(tiles - 1)

        return load, compute, finish

    outputs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, blocks * spec.block_q), jnp.float32),
    ]
    shared = {
        "q_s": hopper_tiles.tiled(q.dtype, 2, spec.block_q, width),
        "k_s": hopper_tiles.tiled(q.dtype, stages, spec.block_kv, width),
        "v_s": hopper_tiles.tiled(q.dtype, stages, spec.block_kv, width),
        "pin_s": plgpu.SMEM((groups, hopper.ROWS), jnp.float32),
    }
    rings = {"q": (2, 1), "k": (stages, 1), "v": (stages, 1)}
    return hopper_tiles.launch(work, groups, make, (q, k, v, masks), lists, outputs, shared, rings)
