"""NVIDIA Hopper, backward: one kernel owns rows of queries (dq), one owns rows of keys (dk and dv).

Each recomputes the probabilities from the log-sum-exp. Every output has one owner and every sum one order: results do
not depend on the order of execution. What streams past the owner comes 64 tokens at a time.
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

STAGES = 3
_ACC = plgpu.ACC((hopper.ROWS, hopper.ROWS), jnp.float32)


def query_gradient(spec: Spec, q, k, v, do, lse2, delta, lists, masks: hopper_tiles.Masks):
    """dq. ``lse2`` and ``delta`` are [B, Hq, T in whole blocks]; ``lse2`` is the log-sum-exp in units of log(2), and
    infinite where all probabilities are 0.
    """
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_q // hopper.ROWS, heads // kv_heads, spec.block_kv // hopper.ROWS
    work = hopper_tiles.schedule(batch, heads, pl.cdiv(queries, spec.block_q), 4 * keys * width // share)

    def make(inputs, outputs, shared, rings, turns):
        (q_g, k_g, v_g, do_g, lse_g, delta_g, lists, masks), (dq_g,) = inputs, outputs
        q_s, k_s, v_s, do_s = (shared[name] for name in ("q_s", "k_s", "v_s", "do_s"))

        def load(i, tile, step):
            b, h, rank = tile
            row = lists.row(b, h, rank)
            _, count, block_at = lists.visits(b, h, row)
            slot = rings["q"].claim(i)

            @pl.when(count > 0)
            def _():
                here = b, pl.ds(row * spec.block_q, spec.block_q), h
                plgpu.copy_gmem_to_smem(q_g.at[here], q_s.at[slot], rings["q"].full.at[slot])
                plgpu.copy_gmem_to_smem(do_g.at[here], do_s.at[slot], rings["q"].full.at[slot])

            def load_part(t, block):
                part = pl.ds(block * spec.block_kv + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                here = b, part, lax.div(h, jnp.int32(share))
                rings["k"].fill(step + t, (k_g.at[here], k_s))
                rings["v"].fill(step + t, (v_g.at[here], v_s))
                return block_at(lax.div(t + 1, parts))

            lax.fori_loop(0, count * parts, load_part, block_at(0))
            return step + count * parts

        def compute(i, tile, step):
            b, h, rank = tile
            row = lists.row(b, h, rank)
            full, count, block_at = lists.visits(b, h, row)
            mine = rings["q"].slot(i), pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
            first_q = row * spec.block_q + turns.group * hopper.ROWS
            lse, delta = (hopper.rows(x.at[b, h, pl.ds(first_q, hopper.ROWS)]) for x in (lse_g, delta_g))

            def part(t, dq, masking):
                def score_gradients(s_acc, dp_acc):
                    slot = rings["k"].wait(step + t)
                    plgpu.wgmma(s_acc, q_s.at[mine], hopper.transposed(k_s.at[slot]))
                    rings["v"].wait(step + t)
                    plgpu.wgmma(dp_acc, do_s.at[mine], hopper.transposed(v_s.at[slot]))
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                    seen = None
                    if masking:
                        first_kv = block_at(lax.div(t, parts)) * spec.block_kv + lax.rem(t, parts) * hopper.ROWS
                        seen = hopper_tiles.mask(spec, s, masks, b, first_q, first_kv, query_axis=0)
                    slope = hopper_tiles.probabilities(spec, s, hopper.across(lse, s), seen)[1]
                    dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                    rings["v"].release(step + t)
                    return slope * (dp - hopper.across(delta, dp)), slot

                ds, slot = pl.run_scoped(score_gradients, _ACC, _ACC)
                dq, _ = hopper.product_onto(dq, ds.astype(q.dtype), k_s.at[slot], lambda: None)
                rings["k"].release(step + t)
                return dq

            @pl.when(count > 0)
            def _():
                rings["q"].wait(i)

            dq = hopper.zeros(width)
            dq = lax.fori_loop(0, full * parts, functools.partial(part, masking=False), dq)
            dq = lax.fori_loop(full * parts, count * parts, functools.partial(part, masking=True), dq)
            q_s[mine] = (dq * spec.scale).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[mine], dq_g.at[b, pl.ds(first_q, hopper.ROWS), h])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rings["q"].release(i)
            return step + count * parts

        return load, compute

    shared = {
        "q_s": hopper_tiles.tiled(q.dtype, 2, spec.block_q, width),
        "do_s": hopper_tiles.tiled(q.dtype, 2, spec.block_q, width),
        "k_s": hopper_tiles.tiled(q.dtype, STAGES, hopper.ROWS, width),
        "v_s": hopper_tiles.tiled(q.dtype, STAGES, hopper.ROWS, width),
    }
    rings = {"q": (2, 2), "k": (STAGES, 1), "v": (STAGES, 1)}
    operands = q, k, v, do, lse2, delta, lists, masks
    return hopper_tiles.launch(work, groups, make, operands, [jax.ShapeDtypeStruct(q.shape, q.dtype)], shared, rings)[0]


def key_gradients(spec: Spec, q, k, v, do, lse2, delta, lists, masks: hopper_tiles.Masks):
    """(dk, dv), as ``query_gradient``. A tile takes the query heads that share its keys in turn."""
    (batch, _, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_kv // hopper.ROWS, heads // kv_heads, spec.block_q // hopper.ROWS
    work = hopper_tiles.schedule(batch, kv_heads, pl.cdiv(keys, spec.block_kv), 4 * q.shape[1] * width * share)

    def make(inputs, outputs, shared, rings, turns):
        (q_g, k_g, v_g, do_g, lse_g, delta_g, lists, masks), (dk_g, dv_g) = inputs, outputs
        q_s, k_s, v_s, do_s, lse_s, delta_s = (
            shared[name] for name in ("q_s", "k_s", "v_s", "do_s", "lse_s", "delta_s")
        )

        def over_heads(kv_head, head, carry):
            return lax.fori_loop(kv_head * share, (kv_head + 1) * share, head, carry)

        def load(i, tile, step):
            b, kv_head, rank = tile
            row = lists.row(b, kv_head, rank)
            here = b, pl.ds(row * spec.block_kv, spec.block_kv), kv_head
            rings["k"].fill(i, (k_g.at[here], k_s), (v_g.at[here], v_s))

            def head(h, step):
                _, count, block_at = lists.visits(b, h, row)

                def load_part(t, block):
                    part = pl.ds(block * spec.block_q + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                    rings["q"].fill(step + t, (q_g.at[b, part, h], q_s), (lse_g.at[b, h, part], lse_s))
                    rings["do"].fill(step + t, (do_g.at[b, part, h], do_s), (delta_g.at[b, h, part], delta_s))
                    return block_at(lax.div(t + 1, parts))

                lax.fori_loop(0, count * parts, load_part, block_at(0))
                return step + count * parts

            return over_heads(kv_head, head, step)

        def compute(i, tile, step):
            b, kv_head, rank = tile
            row = lists.row(b, kv_head, rank)
            mine = rings["k"].wait(i), pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
            first_kv = row * spec.block_kv + turns.group * hopper.ROWS

            def head(h, carry):
                step, dk, dv = carry
                full, count, block_at = lists.visits(b, h, row)

                def part(t, carry, masking):
                    dk, dv = carry

                    def value_gradient(s_acc, dp_acc):
                        slot = rings["q"].wait(step + t)
                        plgpu.wgmma(s_acc, k_s.at[mine], hopper.transposed(q_s.at[slot]))
                        rings["do"].wait(step + t)
                        plgpu.wgmma(dp_acc, v_s.at[mine], hopper.transposed(do_s.at[slot]))
                        lse = hopper.load(lse_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        seen = None
                        if masking:
                            first_q = block_at(lax.div(t, parts)) * spec.block_q + lax.rem(t, parts) * hopper.ROWS
                            seen = hopper_tiles.mask(spec, s, masks, b, first_q, first_kv, query_axis=1)
                        p, slope = hopper_tiles.probabilities(spec, s, hopper.down(lse, s), seen)

                        def meanwhile():
                            delta = hopper.load(delta_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                            plgpu.commit_smem()  # what was read is loaded anew
                            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                            return (slope * (dp - hopper.down(delta, dp))).astype(q.dtype)

                        return *hopper.product_onto(dv, p.astype(q.dtype), do_s.at[slot], meanwhile), slot

                    dv, ds, slot = pl.run_scoped(value_gradient, _ACC, _ACC)
                    rings["do"].release(step + t)
                    dk, _ = hopper.product_onto(dk, ds, q_s.at[slot], lambda: None)
                    rings["q"].release(step + t)
                    return dk, dv

                carry = lax.fori_loop(0, full * parts, functools.partial(part, masking=False), (dk, dv))
                carry = lax.fori_loop(full * parts, count * parts, functools.partial(part, masking=True), carry)
                return step + count * parts, *carry

            step, dk, dv = over_heads(kv_head, head, (step, hopper.zeros(width), hopper.zeros(width)))
            k_s[mine] = (dk * spec.scale).astype(q.dtype)
            v_s[mine] = dv.astype(q.dtype)
            plgpu.commit_smem()
            here = b, pl.ds(first_kv, hopper.ROWS), kv_head
            plgpu.copy_smem_to_gmem(k_s.at[mine], dk_g.at[here])
            plgpu.copy_smem_to_gmem(v_s.at[mine], dv_g.at[here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rings["k"].release(i)
            return step

        return load, compute

    shared = {
        "q_s": hopper_tiles.tiled(q.dtype, STAGES, hopper.ROWS, width),
        "do_s": hopper_tiles.tiled(q.dtype, STAGES, hopper.ROWS, width),
        "k_s": hopper_tiles.tiled(q.dtype, 2, spec.block_kv, width),
        "v_s": hopper_tiles.tiled(q.dtype, 2, spec.block_kv, width),
        "lse_s": plgpu.SMEM((STAGES, hopper.ROWS), jnp.float32),
        "delta_s": plgpu.SMEM((STAGES, hopper.ROWS), jnp.float32),
    }
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    rings = {"k": (2, 2), "q": (STAGES, 2), "do": (STAGES, 2)}
    operands = q, k, v, do, lse2, delta, lists, masks
    return hopper_tiles.launch(work, groups, make, operands, outputs, shared, rings)
