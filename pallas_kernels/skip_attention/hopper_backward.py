"""NVIDIA Hopper, backward: one kernel owns rows of queries (dq), one owns rows of keys (dk and dv).

Each recomputes the probabilities from the log-sum-exp. Every output has one owner and every sum one order: results do
not depend on the order of execution.
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

_STAGES = 3  # tiles of 64 tokens on their way


def query_gradient(spec: Spec, q, k, v, do, lse2, delta, lists, masks: hopper_tiles.Masks):
    """dq. ``lse2`` and ``delta`` are [B, Hq, T in whole blocks]; ``lse2`` is the log-sum-exp in units of log(2), and
    infinite where all probabilities are 0.
    """
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_q // hopper.ROWS, heads // kv_heads, spec.block_kv // hopper.ROWS
    work = hopper_tiles.schedule(batch, heads, pl.cdiv(queries, spec.block_q), 4 * keys * width // share)
    flat, tree = jax.tree.flatten((lists, masks))

    def body(
        q_g,
        do_g,
        k_g,
        v_g,
        lse_g,
        delta_g,
        *refs,
        q_s,
        do_s,
        k_s,
        v_s,
        full,
        empty,
        k_full,
        v_full,
        k_empty,
        v_empty,
    ):
        *flat, dq_g = refs
        lists, masks = jax.tree.unflatten(tree, flat)
        group = lax.axis_index("group")

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(hopper_tiles.MEMORY_REGISTERS[groups], action="decrease")
            tiles, tile_at = hopper_tiles.my_tiles(work)

            def load_tile(i, step):
                b, h, rank = tile_at(i)
                row = lists.row(b, h, rank)
                _, count, block_at = lists.visits(b, h, row)
                plgpu.barrier_wait(empty)

                @pl.when(count > 0)
                def _():
                    here = b, pl.ds(row * spec.block_q, spec.block_q), h
                    plgpu.copy_gmem_to_smem(q_g.at[here], q_s, full)
                    plgpu.copy_gmem_to_smem(do_g.at[here], do_s, full)

                def load(t, block):
                    slot = lax.rem(step + t, _STAGES)
                    part = pl.ds(block * spec.block_kv + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                    here = b, part, lax.div(h, jnp.int32(share))
                    plgpu.barrier_wait(k_empty.at[slot])
                    plgpu.copy_gmem_to_smem(k_g.at[here], k_s.at[slot], k_full.at[slot])
                    plgpu.barrier_wait(v_empty.at[slot])
                    plgpu.copy_gmem_to_smem(v_g.at[here], v_s.at[slot], v_full.at[slot])
                    return block_at(lax.div(t + 1, parts))

                lax.fori_loop(0, count * parts, load, block_at(0))
                return step + count * parts

            lax.fori_loop(0, tiles, load_tile, jnp.int32(0))
            plgpu.barrier_wait(empty)
            for slot in range(_STAGES):
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(hopper_tiles.COMPUTE_REGISTERS[groups], action="increase")
            tiles, tile_at = hopper_tiles.my_tiles(work)
            mine = pl.ds(group * hopper.ROWS, hopper.ROWS)
            plgpu.barrier_arrive(empty)
            for slot in range(_STAGES):
                plgpu.barrier_arrive(k_empty.at[slot])
                plgpu.barrier_arrive(v_empty.at[slot])

            def compute_tile(i, step):
                b, h, rank = tile_at(i)
                row = lists.row(b, h, rank)
                n_full, count, block_at = lists.visits(b, h, row)
                first_q = row * spec.block_q + group * hopper.ROWS
                lse, delta = (hopper.rows(x.at[b, h, pl.ds(first_q, hopper.ROWS)]) for x in (lse_g, delta_g))

                def part(t, dq, masking):
                    slot = lax.rem(step + t, _STAGES)

                    def scores(s_acc, dp_acc):
                        plgpu.barrier_wait(k_full.at[slot])
                        plgpu.wgmma(s_acc, q_s.at[mine], hopper.transposed(k_s.at[slot]))
                        plgpu.barrier_wait(v_full.at[slot])
                        plgpu.wgmma(dp_acc, do_s.at[mine], hopper.transposed(v_s.at[slot]))
                        s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                        seen = None
                        if masking:
                            first_kv = block_at(lax.div(t, parts)) * spec.block_kv
                            first_kv += lax.rem(t, parts) * hopper.ROWS
                            seen = hopper_tiles.mask(spec, s, masks, b, first_q, first_kv, query_axis=0)
                        slope = hopper_tiles.probabilities(spec, s, hopper.across(lse, s), seen)[1]
                        dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
                        plgpu.barrier_arrive(v_empty.at[slot])
                        return slope * (dp - hopper.across(delta, dp))

                    acc = plgpu.ACC((hopper.ROWS, hopper.ROWS), jnp.float32)
                    ds = pl.run_scoped(scores, acc, acc)
                    dq, _ = hopper.product_onto(dq, ds.astype(q.dtype), k_s.at[slot], lambda: None)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    return dq

                @pl.when(count > 0)
                def _():
                    plgpu.barrier_wait(full)

                dq = hopper.zeros(width)
                dq = lax.fori_loop(0, n_full * parts, functools.partial(part, masking=False), dq)
                dq = lax.fori_loop(n_full * parts, count * parts, functools.partial(part, masking=True), dq)
                q_s[mine] = (dq * spec.scale).astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_s.at[mine], dq_g.at[b, pl.ds(first_q, hopper.ROWS), h])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(empty)
                return step + count * parts

            lax.fori_loop(0, tiles, compute_tile, jnp.int32(0))

    def shared(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=hopper.TRANSFORMS)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types={
            "q_s": shared(spec.block_q, width),
            "do_s": shared(spec.block_q, width),
            "k_s": shared(_STAGES, hopper.ROWS, width),
            "v_s": shared(_STAGES, hopper.ROWS, width),
            "full": plgpu.Barrier(num_arrivals=2),
            "empty": plgpu.Barrier(num_arrivals=groups),
            "k_full": plgpu.Barrier(num_barriers=_STAGES),
            "v_full": plgpu.Barrier(num_barriers=_STAGES),
            "k_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
            "v_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
        },
        grid=(work.workers,),
        grid_names=("worker",),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=hopper.PARAMS,
    )
    return kernel(q, do, k, v, lse2, delta, *flat)


def key_gradients(spec: Spec, q, k, v, do, lse2, delta, lists, masks: hopper_tiles.Masks):
    """(dk, dv), as ``query_gradient``. A tile takes the query heads that share its keys in turn."""
    (batch, _, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups, share, parts = spec.block_kv // hopper.ROWS, heads // kv_heads, spec.block_q // hopper.ROWS
    work = hopper_tiles.schedule(batch, kv_heads, pl.cdiv(keys, spec.block_kv), 4 * q.shape[1] * width * share)
    flat, tree = jax.tree.flatten((lists, masks))

    def body(
        q_g, do_g, k_g, v_g, lse_g, delta_g, *refs,
        q_s, do_s, k_s, v_s, lse_s, delta_s, full, empty, q_full, do_full, q_empty, do_empty,
    ):  # fmt: skip
        *flat, dk_g, dv_g = refs
        lists, masks = jax.tree.unflatten(tree, flat)
        group = lax.axis_index("group")

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(hopper_tiles.MEMORY_REGISTERS[groups], action="decrease")
            tiles, tile_at = hopper_tiles.my_tiles(work)

            def load_tile(i, step):
                b, kv_head, rank = tile_at(i)
                row = lists.row(b, kv_head, rank)
                plgpu.barrier_wait(empty)
                here = b, pl.ds(row * spec.block_kv, spec.block_kv), kv_head
                plgpu.copy_gmem_to_smem(k_g.at[here], k_s, full)
                plgpu.copy_gmem_to_smem(v_g.at[here], v_s, full)

                def load_head(h, step):
                    _, count, block_at = lists.visits(b, h, row)

                    def load(t, block):
                        slot = lax.rem(step + t, _STAGES)
                        part = pl.ds(block * spec.block_q + lax.rem(t, parts) * hopper.ROWS, hopper.ROWS)
                        plgpu.barrier_wait(q_empty.at[slot])
                        plgpu.copy_gmem_to_smem(q_g.at[b, part, h], q_s.at[slot], q_full.at[slot])
                        plgpu.copy_gmem_to_smem(lse_g.at[b, h, part], lse_s.at[slot], q_full.at[slot])
                        plgpu.barrier_wait(do_empty.at[slot])
                        plgpu.copy_gmem_to_smem(do_g.at[b, part, h], do_s.at[slot], do_full.at[slot])
                        plgpu.copy_gmem_to_smem(delta_g.at[b, h, part], delta_s.at[slot], do_full.at[slot])
                        return block_at(lax.div(t + 1, parts))

                    lax.fori_loop(0, count * parts, load, block_at(0))
                    return step + count * parts

                return lax.fori_loop(kv_head * share, (kv_head + 1) * share, load_head, step)

            lax.fori_loop(0, tiles, load_tile, jnp.int32(0))
            plgpu.barrier_wait(empty)
            for slot in range(_STAGES):
                plgpu.barrier_wait(q_empty.at[slot])
                plgpu.barrier_wait(do_empty.at[slot])

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(hopper_tiles.COMPUTE_REGISTERS[groups], action="increase")
            tiles, tile_at = hopper_tiles.my_tiles(work)
            mine = pl.ds(group * hopper.ROWS, hopper.ROWS)
            plgpu.barrier_arrive(empty)
            for slot in range(_STAGES):
                plgpu.barrier_arrive(q_empty.at[slot])
                plgpu.barrier_arrive(do_empty.at[slot])

            def compute_tile(i, step):
                b, kv_head, rank = tile_at(i)
                row = lists.row(b, kv_head, rank)
                first_kv = row * spec.block_kv + group * hopper.ROWS
                plgpu.barrier_wait(full)

                def head(h, carry):
                    step, dk, dv = carry
                    n_full, count, block_at = lists.visits(b, h, row)

                    def part(t, carry, masking):
                        dk, dv = carry
                        slot = lax.rem(step + t, _STAGES)

                        def scores(s_acc, dp_acc):
                            plgpu.barrier_wait(q_full.at[slot])
                            plgpu.wgmma(s_acc, k_s.at[mine], hopper.transposed(q_s.at[slot]))
                            plgpu.barrier_wait(do_full.at[slot])
                            plgpu.wgmma(dp_acc, v_s.at[mine], hopper.transposed(do_s.at[slot]))
                            lse = hopper.load(lse_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                            s = plgpu.wgmma_accumulator_load(s_acc, wait_n=1)
                            seen = None
                            if masking:
                                first_q = block_at(lax.div(t, parts)) * spec.block_q
                                first_q += lax.rem(t, parts) * hopper.ROWS
                                seen = hopper_tiles.mask(spec, s, masks, b, first_q, first_kv, query_axis=1)
                            p, slope = hopper_tiles.probabilities(spec, s, hopper.down(lse, s), seen)

                            def meanwhile():
                                delta = hopper.load(delta_s.at[slot], plgpu.Layout.WGMMA.reduce(0))
                                plgpu.commit_smem()  # what was read is loaded anew
                                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=1)
                                return (slope * (dp - hopper.down(delta, dp))).astype(q.dtype)

                            return hopper.product_onto(dv, p.astype(q.dtype), do_s.at[slot], meanwhile)

                        acc = plgpu.ACC((hopper.ROWS, hopper.ROWS), jnp.float32)
                        new_dv, ds = pl.run_scoped(scores, acc, acc)
                        plgpu.barrier_arrive(do_empty.at[slot])
                        new_dk, _ = hopper.product_onto(dk, ds, q_s.at[slot], lambda: None)
                        plgpu.barrier_arrive(q_empty.at[slot])
                        return new_dk, new_dv

                    carry = lax.fori_loop(0, n_full * parts, functools.partial(part, masking=False), (dk, dv))
                    carry = lax.fori_loop(n_full * parts, count * parts, functools.partial(part, masking=True), carry)
                    return step + count * parts, *carry

                carry = step, hopper.zeros(width), hopper.zeros(width)
                step, dk, dv = lax.fori_loop(kv_head * share, (kv_head + 1) * share, head, carry)
                k_s[mine] = (dk * spec.scale).astype(q.dtype)
                v_s[mine] = dv.astype(q.dtype)
                plgpu.commit_smem()
                here = b, pl.ds(first_kv, hopper.ROWS), kv_head
                plgpu.copy_smem_to_gmem(k_s.at[mine], dk_g.at[here])
                plgpu.copy_smem_to_gmem(v_s.at[mine], dv_g.at[here])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(empty)
                return step

            lax.fori_loop(0, tiles, compute_tile, jnp.int32(0))

    def shared(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=hopper.TRANSFORMS)

    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types={
            "q_s": shared(_STAGES, hopper.ROWS, width),
            "do_s": shared(_STAGES, hopper.ROWS, width),
            "k_s": shared(spec.block_kv, width),
            "v_s": shared(spec.block_kv, width),
            "lse_s": plgpu.SMEM((_STAGES, hopper.ROWS), jnp.float32),
            "delta_s": plgpu.SMEM((_STAGES, hopper.ROWS), jnp.float32),
            "full": plgpu.Barrier(num_arrivals=2),
            "empty": plgpu.Barrier(num_arrivals=groups),
            "q_full": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            "do_full": plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
            "q_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
            "do_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=_STAGES),
        },
        grid=(work.workers,),
        grid_names=("worker",),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=hopper.PARAMS,
    )
    return kernel(q, do, k, v, lse2, delta, *flat)
