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
ONE_PASS_STAGES = 3
_ACC = plgpu.ACC((hopper.ROWS, hopper.ROWS), jnp.float32)


def query_gradient(spec: Spec, q, k, v, do, lse2, less, lists, masks: hopper_tiles.Masks):
    """dq. ``lse2`` and ``less`` are [B, Hq, T in whole blocks]: the log-sum-exp in units of log(2), infinite where all
    probabilities are 0, and what is added to the gradients of the probabilities.
    """
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_q // hopper.ROWS, heads // kv_heads, spec.block_kv // hopper.ROWS
    work = hopper_tiles.schedule(batch, heads, pl.cdiv(queries, spec.block_q), 4 * keys * width // share)

    def make(inputs, lists, outputs, shared, rings, turns):
        (q_g, k_g, v_g, do_g, lse_g, less_g, masks), (dq_g,) = inputs, outputs
        q_s, k_s, v_s, do_s = (shared[name] for name in ("q_s", "k_s", "v_s", "do_s"))

        def load(i, tile, step):
            b, h, row, _, count = tile
            slot = rings["q"].claim(i)

            @pl.when(count > 0)
            def _():
                here = b, pl.ds(row * spec.block_q, spec.block_q), h
                plgpu.copy_gmem_to_smem(q_g.at[here], q_s.at[slot], rings["q"].full.at[slot])
                plgpu.copy_gmem_to_smem(do_g.at[here], do_s.at[slot], rings["q"].full.at[slot])

            def load_part(t, block):
                part = pl.ds(block * spec.block_kv + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                here = b, part, lax.div(h, jnp.int32(share))
                rings["kv"].fill(step + t, (k_g.at[here], k_s), (v_g.at[here], v_s))
                return lists.block(b, h, row, lax.div(t + 1, parts))

            lax.fori_loop(0, count * parts, load_part, lists.block(b, h, row, 0))
            return step + count * parts

        def compute(i, tile, step):
            b, h, row, full, count = tile
            resident_slot, my_rows = rings["q"].slot(i), pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
            first_q = row * spec.block_q + turns.group * hopper.ROWS
            lse, less_rows = (hopper.rows(x.at[b, h, pl.ds(first_q, hopper.ROWS)]) for x in (lse_g, less_g))

            def part(t, dq, masking):
                block = lists.block(b, h, row, lax.div(t, parts)) if masking else None
                less = hopper.across(less_rows, _ACC)
                kept = hopper.opaque(resident_slot), my_rows

                def score_gradients(s_acc, dp_acc):
                    slot = rings["kv"].wait(step + t)
                    hopper.start_from(dp_acc, less)
                    plgpu.wgmma(s_acc, q_s.at[kept], hopper.transposed(k_s.at[slot]))
                    plgpu.wgmma(dp_acc, do_s.at[kept], hopper.transposed(v_s.at[slot]))
                    s = hopper.products(s_acc, pending=1)
                    seen = None
                    if masking:
                        first_kv = block * spec.block_kv + lax.rem(t, parts) * hopper.ROWS
                        seen = hopper_tiles.mask(spec, s, masks, b, first_q, first_kv, query_axis=0)
                    slope = hopper_tiles.probabilities(spec, s, hopper.across(lse, s), seen)[1]
                    return (slope * hopper.sum_from(dp_acc, less)).astype(q.dtype), slot

                ds, slot = pl.run_scoped(score_gradients, _ACC, _ACC)
                dq, _ = hopper.product_onto(dq, ds, k_s.at[slot], lambda: None)
                rings["kv"].release(step + t)
                return dq

            @pl.when(count > 0)
            def _():
                rings["q"].wait(i)

            dq = hopper.zeros(width)
            dq = lax.fori_loop(0, full * parts, functools.partial(part, masking=False), dq)
            dq = lax.fori_loop(full * parts, count * parts, functools.partial(part, masking=True), dq)
            mine = resident_slot, my_rows
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
    rings = {"q": (2, 2), "kv": (STAGES, 2)}
    operands = q, k, v, do, lse2, less, masks
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    return hopper_tiles.launch(work, groups, make, operands, lists, outputs, shared, rings)[0]


def key_gradients(spec: Spec, q, k, v, do, lse2, less, lists, masks: hopper_tiles.Masks, dq_sum=None):
    """(dk, dv), as ``query_gradient``. A tile takes the query heads that share its keys in turn.

    dq / scale is added to ``dq_sum``, a ``jax.Ref`` of float32 [B, T in whole blocks, Hq, d], if it is given.
    """
    (batch, _, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_kv // hopper.ROWS, heads // kv_heads, spec.block_q // hopper.ROWS
    resident, stages = (2, STAGES) if dq_sum is None else (1, ONE_PASS_STAGES)
    work = hopper_tiles.schedule(batch, kv_heads, pl.cdiv(keys, spec.block_kv), 4 * q.shape[1] * width * share, share)

    def make(inputs, lists, outputs, shared, rings, turns):
        (q_g, k_g, v_g, do_g, lse_g, less_g, masks, *dq_g), (dk_g, dv_g) = inputs, outputs
        q_s, k_s, v_s, do_s, lse_s, less_s = (shared[name] for name in ("q_s", "k_s", "v_s", "do_s", "lse_s", "less_s"))

        def over_heads(kv_head, head, carry):
            return lax.fori_loop(kv_head * share, (kv_head + 1) * share, head, carry)

        def load(i, tile, step):
            b, kv_head, row, *sizes = tile
            here = b, pl.ds(row * spec.block_kv, spec.block_kv), kv_head
            rings["k"].fill(i, (k_g.at[here], k_s), (v_g.at[here], v_s))

            def head(h, step):
                _, count = sizes if share == 1 else lists.sizes(b, h, row)

                def load_part(t, block):
                    part = pl.ds(block * spec.block_q + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                    tiles = (q_g.at[b, part, h], q_s), (do_g.at[b, part, h], do_s)
                    per_query = (lse_g.at[b, h, part], lse_s), (less_g.at[b, h, part], less_s)
                    rings["q"].fill(step + t, *tiles, *per_query)
                    return lists.block(b, h, row, lax.div(t + 1, parts))

                lax.fori_loop(0, count * parts, load_part, lists.block(b, h, row, 0))
                return step + count * parts

            return over_heads(kv_head, head, step)

        def compute(i, tile, step):
            b, kv_head, row, *sizes = tile
            resident_slot, my_rows = rings["k"].wait(i), pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
            first_kv = row * spec.block_kv + turns.group * hopper.ROWS
            my_columns = pl.ds(turns.group * (width // groups), width // groups)

            def part_of(block, t):
                return block * parts + lax.rem(t, parts)

            def add_dq(place, h):
                """Starts adding what is in dq_s, if there is something."""

                @pl.when(place >= 0)
                def _():
                    plgpu.commit_smem()
                    target = dq_g[0].at[b, pl.ds(place * hopper.ROWS, hopper.ROWS), h, my_columns]
                    hopper.add_to(target, shared["dq_s"].at[turns.group])

            def head(h, carry):
                step, *carry = carry
                full, count = sizes if share == 1 else lists.sizes(b, h, row)

                def part(t, carry, masking):
                    dk, dv, *last = carry
                    kept = hopper.opaque(resident_slot)
                    block = lists.block(b, h, row, lax.div(t, parts)) if masking or dq_g else None

                    def value_gradient(s_acc, dp_acc):
                        slot = rings["q"].wait(step + t)
                        less = hopper.down(hopper.load(less_s.at[slot], plgpu.Layout.WGMMA.reduce(0)), dp_acc)
                        hopper.start_from(dp_acc, less)
                        plgpu.wgmma(s_acc, k_s.at[kept, my_rows], hopper.transposed(q_s.at[slot]))
                        plgpu.wgmma(dp_acc, v_s.at[kept, my_rows], hopper.transposed(do_s.at[slot]))
                        if dq_g:
                            add_dq(*last)
                        s = hopper.products(s_acc, pending=1)
                        lse = hopper.load(lse_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                        if not dq_g:
                            plgpu.commit_smem()  # what was read is loaded anew
                        seen = None
                        if masking:
                            seen = hopper_tiles.mask(
                                spec, s, masks, b, part_of(block, t) * hopper.ROWS, first_kv, query_axis=1
                            )
                        p, slope = hopper_tiles.probabilities(spec, s, hopper.down(lse, s), seen)

                        def meanwhile():
                            ds = (slope * hopper.sum_from(dp_acc, less, pending=1)).astype(q.dtype)
                            if dq_g:
                                shared["ds_s"][lax.rem(step + t, 2), my_rows] = ds
                                plgpu.commit_smem()
                                plgpu.barrier_arrive(shared["ds_full"])
                            return ds

                        return *hopper.product_onto(dv, p.astype(q.dtype), do_s.at[slot], meanwhile), slot

                    dv, ds, slot = pl.run_scoped(value_gradient, _ACC, _ACC)
                    if not dq_g:
                        dk, _ = hopper.product_onto(dk, ds, q_s.at[slot], lambda: None)
                        rings["q"].release(step + t)
                        return dk, dv
                    ds_both = shared["ds_s"].at[lax.rem(step + t, 2)]

                    def key_gradient(dq_acc):
                        def meanwhile():  # half the width of dq, from the scores of all keys of the block
                            plgpu.barrier_wait(shared["ds_full"])
                            plgpu.wgmma(dq_acc, hopper.transposed(ds_both), k_s.at[kept, :, my_columns])

                        dk_next, _ = hopper.product_onto(dk, ds, q_s.at[slot], meanwhile)
                        return dk_next, hopper.products(dq_acc)

                    dk, dq = pl.run_scoped(key_gradient, plgpu.ACC((hopper.ROWS, width // groups), jnp.float32))
                    rings["q"].release(step + t)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    shared["dq_s"][turns.group] = dq
                    return dk, dv, part_of(block, t), h

                carry = lax.fori_loop(0, full * parts, functools.partial(part, masking=False), tuple(carry))
                carry = lax.fori_loop(full * parts, count * parts, functools.partial(part, masking=True), carry)
                return step + count * parts, *carry

            start = [hopper.zeros(width), hopper.zeros(width)]
            if dq_g:  # it is added to the sum while the next products run
                start += [jnp.int32(-1), kv_head * share]
            step, dk, dv, *last = over_heads(kv_head, head, (step, *start))
            if dq_g:
                add_dq(*last)
                plgpu.barrier_arrive(shared["ds_full"])  # all are done with the keys
                plgpu.barrier_wait(shared["ds_full"])
            mine = resident_slot, my_rows
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
        "q_s": hopper_tiles.tiled(q.dtype, stages, hopper.ROWS, width),
        "do_s": hopper_tiles.tiled(q.dtype, stages, hopper.ROWS, width),
        "k_s": hopper_tiles.tiled(q.dtype, resident, spec.block_kv, width),
        "v_s": hopper_tiles.tiled(q.dtype, resident, spec.block_kv, width),
        "lse_s": plgpu.SMEM((stages, hopper.ROWS), jnp.float32),
        "less_s": plgpu.SMEM((stages, hopper.ROWS), jnp.float32),
    }
    if dq_sum is not None:
        shared |= {
            "ds_s": hopper_tiles.tiled(q.dtype, 2, spec.block_kv, hopper.ROWS),
            "dq_s": plgpu.SMEM((groups, hopper.ROWS, width // groups), jnp.float32, transforms=hopper.TRANSFORMS_F32),
            "ds_full": plgpu.Barrier(num_arrivals=groups),
        }
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    rings = {"k": (resident, 2), "q": (stages, 4)}
    operands = q, k, v, do, lse2, less, masks, *([] if dq_sum is None else [dq_sum])
    return hopper_tiles.launch(work, groups, make, operands, lists, outputs, shared, rings)
