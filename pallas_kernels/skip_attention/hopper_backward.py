"""NVIDIA Hopper, backward: in one pass or in two.

In two passes one kernel owns rows of queries (dq), one owns rows of keys (dk and dv), and each computes the
probabilities again from the log-sum-exp. Every output has one owner and every sum one order: results do not depend on
the order of execution. In one pass the second kernel also adds its part of dq to a sum in global memory, by copies that
add: 5 products a pair of blocks instead of 7, but the order of the additions, and with it the last bits of dq, changes
from run to run. What streams past the owner comes 64 tokens at a time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.skip_attention import hopper_tiles
from pallas_kernels.skip_attention.reference import Spec

_STAGES = 3
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
                block = lists.block(b, h, row, lax.div(t, parts)) if masking else 0
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
        "k_s": hopper_tiles.tiled(q.dtype, _STAGES, hopper.ROWS, width),
        "v_s": hopper_tiles.tiled(q.dtype, _STAGES, hopper.ROWS, width),
    }
    rings = {"q": (2, 2), "kv": (_STAGES, 2)}
    operands = q, k, v, do, lse2, less, masks
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype)]
    return hopper_tiles.launch(work, groups, make, operands, lists, outputs, shared, rings)[0]


def key_gradients(spec: Spec, q, k, v, do, lse2, less, lists, masks: hopper_tiles.Masks, dq_sum=None):
    """(dk, dv), as ``query_gradient``. A tile takes the query heads that share its keys in turn.

    dq / scale is added to ``dq_sum``, if given: a reference to float32 [B, T in whole blocks, Hq, 128].
    """
    (batch, _, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_kv // hopper.ROWS, heads // kv_heads, spec.block_q // hopper.ROWS
    resident = 2 if dq_sum is None else 1  # tiles of keys in shared memory
    work = hopper_tiles.schedule(batch, kv_heads, pl.cdiv(keys, spec.block_kv), 4 * q.shape[1] * width * share, share)

    def make(inputs, lists, outputs, shared, rings, turns):
        (q_g, k_g, v_g, do_g, lse_g, less_g, masks, *dq_g), (dk_g, dv_g) = inputs, outputs
        q_s, k_s, v_s, do_s, lse_s, less_s = (shared[name] for name in ("q_s", "k_s", "v_s", "do_s", "lse_s", "less_s"))
        own = pl.ds(turns.group * hopper.ROWS, hopper.ROWS)
        queries: Any = (
            _Queries(dq_g[0], shared["dq_s"], shared["ds_s"], shared["ds_full"], turns.group) if dq_g else None
        )

        def part_of(block, t):
            return block * parts + lax.rem(t, parts)

        def over_heads(tile, one_head, carry):
            """``one_head(h, number of full blocks, of all blocks, carry)`` for the query heads of a tile."""

            def each(h, carry):
                return one_head(h, *(tile[3:] if share == 1 else lists.sizes(tile.b, h, tile.row)), carry)

            return lax.fori_loop(tile.h * share, (tile.h + 1) * share, each, carry)

        def load(i, tile, step):
            here = tile.b, pl.ds(tile.row * spec.block_kv, spec.block_kv), tile.h
            rings["k"].fill(i, (k_g.at[here], k_s), (v_g.at[here], v_s))

            def one_head(h, _, count, step):
                def load_part(t, block):
                    part = pl.ds(part_of(block, t) * hopper.ROWS, hopper.ROWS)
                    tiles = (q_g.at[tile.b, part, h], q_s), (do_g.at[tile.b, part, h], do_s)
                    per_query = (lse_g.at[tile.b, h, part], lse_s), (less_g.at[tile.b, h, part], less_s)
                    rings["q"].fill(step + t, *tiles, *per_query)
                    return lists.block(tile.b, h, tile.row, lax.div(t + 1, parts))

                lax.fori_loop(0, count * parts, load_part, lists.block(tile.b, h, tile.row, 0))
                return step + count * parts

            return over_heads(tile, one_head, step)

        def score_gradients(step, kept, masked, dv, after):
            """(dv, gradients of the scores): of 64 keys and the 64 queries of a step, with which the first grows."""

            def products(s_acc, dp_acc):
                slot = rings["q"].wait(step)
                added = hopper.down(hopper.load(less_s.at[slot], plgpu.Layout.WGMMA.reduce(0)), dp_acc)
                hopper.start_from(dp_acc, added)
                plgpu.wgmma(s_acc, k_s.at[kept, own], hopper.transposed(q_s.at[slot]))
                plgpu.wgmma(dp_acc, v_s.at[kept, own], hopper.transposed(do_s.at[slot]))
                after()
                s = hopper.products(s_acc, pending=1)
                lse = hopper.load(lse_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                if queries is None:
                    plgpu.commit_smem()  # what was read is loaded anew; publishing does the same
                p, slope = hopper_tiles.probabilities(spec, s, hopper.down(lse, s), masked(s))

                def meanwhile():
                    ds = (slope * hopper.sum_from(dp_acc, added, pending=1)).astype(q.dtype)
                    if queries is not None:
                        queries.publish(step, own, ds)
                    return ds

                return hopper.product_onto(dv, p.astype(q.dtype), do_s.at[slot], meanwhile)

            return pl.run_scoped(products, _ACC, _ACC)

        def compute(i, tile, step):
            slot = rings["k"].wait(i)
            first_kv = tile.row * spec.block_kv + turns.group * hopper.ROWS

            def one_head(h, full, count, carry):
                step, *carry = carry

                def part(t, carry, masking):
                    dk, dv, *last = carry
                    kept = hopper.opaque(slot)
                    block = lists.block(tile.b, h, tile.row, lax.div(t, parts)) if masking or queries else 0

                    def masked(s):
                        if not masking:
                            return None
                        first_q = part_of(block, t) * hopper.ROWS
                        return hopper_tiles.mask(spec, s, masks, tile.b, first_q, first_kv, query_axis=1)

                    def after():
                        if queries is not None:
                            queries.add(tile.b, *last)

                    dv, ds = score_gradients(step + t, kept, masked, dv, after)
                    q_tile = q_s.at[rings["q"].slot(step + t)]
                    if queries is None:
                        dk, _ = hopper.product_onto(dk, ds, q_tile, lambda: None)
                        rings["q"].release(step + t)
                        return dk, dv

                    def both(dq_acc):
                        dk_next, _ = hopper.product_onto(
                            dk, ds, q_tile, lambda: queries.multiply(dq_acc, step + t, k_s.at[kept])
                        )
                        return dk_next, hopper.products(dq_acc)

                    dk, dq = pl.run_scoped(both, _ACC)
                    rings["q"].release(step + t)
                    queries.keep(dq)
                    return dk, dv, part_of(block, t), h

                carry = lax.fori_loop(0, full * parts, functools.partial(part, masking=False), tuple(carry))
                carry = lax.fori_loop(full * parts, count * parts, functools.partial(part, masking=True), carry)
                return step + count * parts, *carry

            nothing = () if queries is None else (jnp.int32(-1), jnp.int32(0))
            carry = step, hopper.zeros(width), hopper.zeros(width), *nothing
            step, dk, dv, *last = over_heads(tile, one_head, carry)
            if queries is not None:
                queries.add(tile.b, *last)
                queries.meet()  # all are done with the keys
            k_s[slot, own] = (dk * spec.scale).astype(q.dtype)
            v_s[slot, own] = dv.astype(q.dtype)
            plgpu.commit_smem()
            here = tile.b, pl.ds(first_kv, hopper.ROWS), tile.h
            plgpu.copy_smem_to_gmem(k_s.at[slot, own], dk_g.at[here])
            plgpu.copy_smem_to_gmem(v_s.at[slot, own], dv_g.at[here])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            rings["k"].release(i)
            return step

        return load, compute

    shared = {
        "q_s": hopper_tiles.tiled(q.dtype, _STAGES, hopper.ROWS, width),
        "do_s": hopper_tiles.tiled(q.dtype, _STAGES, hopper.ROWS, width),
        "k_s": hopper_tiles.tiled(q.dtype, resident, spec.block_kv, width),
        "v_s": hopper_tiles.tiled(q.dtype, resident, spec.block_kv, width),
        "lse_s": plgpu.SMEM((_STAGES, hopper.ROWS), jnp.float32),
        "less_s": plgpu.SMEM((_STAGES, hopper.ROWS), jnp.float32),
    }
    if dq_sum is not None:
        shared |= {
            "ds_s": hopper_tiles.tiled(q.dtype, 2, spec.block_kv, hopper.ROWS),
            "dq_s": plgpu.SMEM((groups, hopper.ROWS, hopper.ROWS), jnp.float32, transforms=hopper.TRANSFORMS_F32),
            "ds_full": plgpu.Barrier(num_arrivals=groups),
        }
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)]
    rings = {"k": (resident, 2), "q": (_STAGES, 4)}
    operands = q, k, v, do, lse2, less, masks, *([] if dq_sum is None else [dq_sum])
    return hopper_tiles.launch(work, groups, make, operands, lists, outputs, shared, rings)


class _Queries(NamedTuple):
    """How two warpgroups, of 64 keys each, multiply dq: each from all 128 keys, 64 of its 128 columns.

    The gradients of the scores go through shared memory, in two places in turn: one warpgroup may still multiply what
    the other has replaced, but no more.
    """

    dq_g: Any
    dq_s: Any
    ds_s: Any
    ds_full: Any
    group: Any

    def columns(self):
        return pl.ds(self.group * hopper.ROWS, hopper.ROWS)

    def publish(self, step, rows, ds):
        """Shows the gradients of the scores [64 keys, 64 queries] to the other warpgroup."""
        self.ds_s[lax.rem(step, 2), rows] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.ds_full)

    def multiply(self, dq_acc, step, keys):
        """Starts the product once both have published."""
        plgpu.barrier_wait(self.ds_full)
        scores = hopper.transposed(self.ds_s.at[lax.rem(step, 2)])
        plgpu.wgmma(dq_acc, scores, keys.at[:, self.columns()])

    def keep(self, dq):
        """Puts the product where ``add`` takes it from."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.dq_s[self.group] = dq

    def add(self, b, place, h):
        """Starts adding what was kept to the 64 queries at ``place``, if there is something: while products run."""

        @pl.when(place >= 0)
        def _():
            plgpu.commit_smem()
            target = self.dq_g.at[b, pl.ds(place * hopper.ROWS, hopper.ROWS), h, self.columns()]
            hopper.add_to(target, self.dq_s.at[self.group])

    def meet(self):
        plgpu.barrier_arrive(self.ds_full)
        plgpu.barrier_wait(self.ds_full)
