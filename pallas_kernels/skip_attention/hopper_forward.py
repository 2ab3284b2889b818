"""NVIDIA Hopper, forward: two warpgroups take turns at the tensor cores.

While one multiplies, the other does its softmax; and of one warpgroup, the scores of the next block are on their way
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

STAGE_BYTES = 128 * 2**10  # of keys and values on their way
TURNS = True
PINNED = False


def run(spec: Spec, q, k, v, lists, masks: hopper_tiles.Masks):
    """(output, log-sum-exp [B, Hq, T rounded up])."""
    (batch, queries, heads, width), keys, kv_heads = q.shape, k.shape[1], k.shape[2]
    groups = spec.block_q // hopper.ROWS
    blocks = pl.cdiv(queries, spec.block_q)
    stages = max(2, STAGE_BYTES // (4 * spec.block_kv * width))
    share = heads // kv_heads
    work = hopper_tiles.schedule(batch, heads, blocks, 4 * keys * width // share)
    flat, tree = jax.tree.flatten((lists, masks))

    def body(q_g, k_g, v_g, *refs, q_s, k_s, v_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, pin_s):
        *flat, o_g, lse_g = refs
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

                plgpu.barrier_wait(q_empty)

                @pl.when(count > 0)
                def _():
                    plgpu.copy_gmem_to_smem(q_g.at[b, pl.ds(row * spec.block_q, spec.block_q), h], q_s, q_full)

                def load(t, block):
                    slot = lax.rem(step + t, stages)
                    here = (b, pl.ds(block * spec.block_kv, spec.block_kv), lax.div(h, jnp.int32(share)))
                    for x_g, x_s, full, empty in ((k_g, k_s, k_full, k_empty), (v_g, v_s, v_full, v_empty)):
                        plgpu.barrier_wait(empty.at[slot])
                        plgpu.copy_gmem_to_smem(x_g.at[here], x_s.at[slot], full.at[slot])
                    return block_at(t + 1)

                lax.fori_loop(0, count, load, block_at(0))
                return step + count

            lax.fori_loop(0, tiles, load_tile, jnp.int32(0))
            plgpu.barrier_wait(q_empty)
            for slot in range(stages):
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(hopper_tiles.COMPUTE_REGISTERS[groups], action="increase")
            mine = pl.ds(group * hopper.ROWS, hopper.ROWS)
            scaled = hopper_tiles.factor(spec) * hopper.LOG2E

            @pl.when((group == groups - 1) & TURNS)
            def _():
                plgpu.barrier_arrive(turn.at[0])

            plgpu.barrier_arrive(q_empty)
            for slot in range(stages):
                plgpu.barrier_arrive(k_empty.at[slot])
                plgpu.barrier_arrive(v_empty.at[slot])

            tiles, tile_at = hopper_tiles.my_tiles(work)

            def compute_tile(i, step):
                b, h, rank = tile_at(i)
                row = lists.row(b, h, rank)
                full, count, block_at = lists.visits(b, h, row)
                first_q = row * spec.block_q + group * hopper.ROWS

                def softmax(t, s, top, total, masking):
                    """(p, new top, new total, factor of what came before) of the products of turn t."""
                    s = hopper_tiles.capped(spec, s)
                    if masking:
                        seen = hopper_tiles.mask(spec, s, masks, b, first_q, block_at(t) * spec.block_kv, query_axis=0)
                        s = jnp.where(seen, s, -jnp.inf)
                    new_top = jnp.maximum(top, jnp.max(s, axis=1))
                    p = jnp.exp2(s * scaled - hopper.across(new_top * scaled, s))
                    shrink = jnp.exp2((top - new_top) * scaled)
                    return p, new_top, total * shrink + jnp.sum(p, axis=1), shrink

                def scores(t, s_acc):
                    """Starts the products of queries and keys of turn t."""
                    slot = lax.rem(step + t, stages)
                    plgpu.barrier_wait(k_full.at[slot])
                    if TURNS:
                        plgpu.barrier_wait(turn.at[group])
                    plgpu.wgmma(s_acc, q_s.at[mine], hopper.transposed(k_s.at[slot]))

                def finished(t, s_acc, pending):
                    """The products that ``scores`` started; ``pending`` later ones may still be on their way."""
                    if TURNS:
                        plgpu.barrier_arrive(turn.at[lax.rem(group + 1, groups)])
                    s = plgpu.wgmma_accumulator_load(s_acc, wait_n=pending)
                    plgpu.barrier_arrive(k_empty.at[lax.rem(step + t, stages)])
                    return s

                def first(_, carry):
                    out, _, top, total = carry

                    def products(s_acc):
                        scores(0, s_acc)
                        return finished(0, s_acc, 0)

                    s = pl.run_scoped(products, plgpu.ACC((hopper.ROWS, spec.block_kv), jnp.float32))
                    p, top, total, _ = softmax(0, s, top, total, masking=True)
                    return out, p.astype(q.dtype), top, total

                def following(t, carry, masking):
                    out, p, top, total = carry
                    slot = lax.rem(step + t - 1, stages)

                    def both(s_acc):
                        scores(t, s_acc)
                        plgpu.barrier_wait(v_full.at[slot])

                        def meanwhile():
                            s = finished(t, s_acc, 1)
                            found = softmax(t, s, top, total, masking)
                            if PINNED:
                                hopper.store(pin_s.at[group], found[2])
                            return found

                        return hopper.product_onto(out, p, v_s.at[slot], meanwhile)

                    acc = plgpu.ACC((hopper.ROWS, spec.block_kv), jnp.float32)
                    new_out, (new_p, new_top, new_total, shrink) = pl.run_scoped(both, acc)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return new_out * hopper.across(shrink, new_out), new_p.astype(q.dtype), new_top, new_total

                def last(_, out, p):
                    slot = lax.rem(step + count - 1, stages)
                    plgpu.barrier_wait(v_full.at[slot])
                    out, _ = hopper.product_onto(out, p, v_s.at[slot], lambda: None)
                    plgpu.barrier_arrive(v_empty.at[slot])
                    return out

                some = jnp.minimum(count, 1)

                @pl.when(count > 0)
                def _():
                    plgpu.barrier_wait(q_full)

                carry = (
                    hopper.zeros(width),
                    hopper.zeros(spec.block_kv, q.dtype),
                    hopper.row_vector(hopper_tiles.LOWEST),
                    hopper.row_vector(0.0),
                )
                carry = lax.fori_loop(0, some, first, carry)
                unmasked = jnp.maximum(full, some)
                carry = lax.fori_loop(some, unmasked, functools.partial(following, masking=False), carry)
                carry = lax.fori_loop(unmasked, count, functools.partial(following, masking=True), carry)
                out, p, top, total = carry
                out = lax.fori_loop(0, some, functools.partial(last, p=p), out)
                out = out * hopper.across(jnp.where(total > 0, 1 / total, 0.0), out)
                lse = jnp.where(total > 0, top * hopper_tiles.factor(spec) + jnp.log(total), -jnp.inf)
                hopper.store(lse_g.at[b, h, pl.ds(first_q, hopper.ROWS)], lse)
                q_s[mine] = out.astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_s.at[mine], o_g.at[b, pl.ds(first_q, hopper.ROWS), h])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_empty)
                return step + count

            lax.fori_loop(0, tiles, compute_tile, jnp.int32(0))

            @pl.when((group == 0) & TURNS)
            def _():
                plgpu.barrier_wait(turn.at[0])

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, blocks * spec.block_q), jnp.float32),
        ),
        scratch_types={
            "q_s": plgpu.SMEM((spec.block_q, width), q.dtype, transforms=hopper.TRANSFORMS),
            "k_s": plgpu.SMEM((stages, spec.block_kv, width), q.dtype, transforms=hopper.TRANSFORMS),
            "v_s": plgpu.SMEM((stages, spec.block_kv, width), q.dtype, transforms=hopper.TRANSFORMS),
            "q_full": plgpu.Barrier(),
            "q_empty": plgpu.Barrier(num_arrivals=groups),
            "k_full": plgpu.Barrier(num_barriers=stages),
            "k_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            "v_full": plgpu.Barrier(num_barriers=stages),
            "v_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            "pin_s": plgpu.SMEM((groups, hopper.ROWS), jnp.float32),
            "turn": plgpu.Barrier(num_barriers=groups),
        },
        grid=(work.workers,),
        grid_names=("worker",),
        num_threads=groups + 1,
        thread_name="group",
        compiler_params=hopper.PARAMS,
    )
    return kernel(q, k, v, *flat)
