"""NVIDIA Hopper: Pallas Mosaic GPU kernels, meant to be bound by memory.

x is read as [M, L] with L the least common multiple of D and a tile's width, so that whatever D and the groups are,
every thread has the same two channels in all rows of its thread block: their coefficients and the sums of their
gradients stay in registers. Each block streams tiles of one column of tiles through shared memory and writes its sums
once; XLA adds up the blocks'. Every sum has one order: results do not depend on the order of execution.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.group_rational import arithmetic
from pallas_kernels.group_rational.reference import Spec

_MULTIPROCESSORS = 132
_THREADS = 128
_SHARED_MEMORY = 227 * 1024  # of a multiprocessor, of which each block takes 1 KiB more than it asks for
_UNROLLED = 4  # rows
_BEFORE_0_11 = jax.__version_info__ < (0, 11)
# Without automatic barriers: a tile is either read or written, and the pipeline has a barrier on both sides of it.
_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Tiles(NamedTuple):
    """Tiles of rows x channels, how many a block has under way at a time, and the blocks of a multiprocessor."""

    rows: int
    channels: int
    stages: int
    blocks: int


def tiles(spec: Spec, itemsize: int, arrays: int) -> Tiles:
    """As asked for, else of 8 KiB; ``arrays`` (2 forward, 3 backward) of such tiles are in shared memory."""
    rows, channels = spec.block_sizes or (16 if itemsize == 2 else 8, 256)
    stages = 2
    bytes_of_a_block = stages * arrays * rows * channels * itemsize + 2048
    if channels not in (128, 256) or rows % _UNROLLED or rows > 256 or bytes_of_a_block > _SHARED_MEMORY:
        raise ValueError(
            f"block_sizes={spec.block_sizes}: implementation='mosaic_gpu' has tiles of 128 or 256 channels and a "
            f"multiple of {_UNROLLED} rows, {stages * arrays} of which fit {_SHARED_MEMORY} bytes; use such sizes, or "
            "None"
        )
    return Tiles(rows, channels, stages, min(_SHARED_MEMORY // bytes_of_a_block, {2: 6, 3: 4}[arrays]))


@functools.partial(jax.jit, static_argnums=0)
def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    return _stream(spec, tiles(spec, x.dtype.itemsize, 2), table, x)[0]


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``chunked.backward``."""
    dx, sums = _stream(spec, tiles(spec, x.dtype.itemsize, 3), table, x, g)
    return dx, sums[0]


def _stream(spec, tile, table, *operands):
    """(value or gradient of x, [sums of the table's gradient, with a cotangent among the operands])."""
    (count, channels), (coefficients, _) = operands[0].shape, table.shape
    differentiating = len(operands) == 2
    if count == 0:
        return operands[0], [jnp.zeros_like(table)]
    length = math.lcm(channels, tile.channels)
    together = length // channels  # rows of x in a row of the tiles
    rows = pl.cdiv(count, together)
    padding = ((0, rows * together - count), (0, 0))
    operands = [jnp.pad(x, padding).reshape(rows, length) for x in operands]
    columns, steps = length // tile.channels, pl.cdiv(rows, tile.rows)
    splits = min(max(tile.blocks * _MULTIPROCESSORS // columns, 1), steps)
    outputs = [_like(operands[0], operands[0].shape, operands[0].dtype)]
    if differentiating:
        outputs.append(_like(operands[0], (splits, coefficients, length), jnp.float32))
    layout = plgpu.Layout.WG_STRIDED((tile.channels,), tile.channels // _THREADS)
    reciprocal = functools.partial(_reciprocal, layout)

    def body(*refs, full, **buffers):
        table_g, *x_g = refs[: 1 + len(operands)]
        out_g, *sums_g = refs[1 + len(operands) :]
        column, split = lax.rem(lax.axis_index("block"), columns), lax.axis_index("block") // columns
        mine = pl.ds(column * tile.channels, tile.channels)
        of_channels = [_load(table_g.at[k, mine], layout) for k in range(coefficients)]
        zeros = (plgpu.layout_cast(jnp.zeros((tile.channels,), jnp.float32), layout),) * coefficients
        nothing = zeros if differentiating else ()
        count = (steps - split + splits - 1) // splits

        def place(t):
            return pl.ds((split + t * splits) * tile.rows, tile.rows), mine

        def fetch(t):
            slot = lax.rem(t, tile.stages)
            for source, target in zip(x_g, buffers["x_s"], strict=True):
                plgpu.copy_gmem_to_smem(source.at[place(t)], target.at[slot], full.at[slot])

        def step(t, totals):
            slot = lax.rem(t, tile.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(tile.stages - 1, wait_read_only=True)
            out_s = buffers["out_s"].at[slot]

            def row(r, sums):
                x, *g = (_load(ref.at[slot, r], layout).astype(jnp.float32) for ref in buffers["x_s"])
                if differentiating:
                    out, terms = arithmetic.gradients(spec.degree, x, of_channels, *g, reciprocal)
                    sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
                else:
                    out = arithmetic.value(spec.degree, x, of_channels, reciprocal)
                out_s[r] = out.astype(out_s.dtype)
                return sums

            sums = lax.fori_loop(0, tile.rows, row, nothing, unroll=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_g.at[place(t)])
            pl.when(t + tile.stages < count)(lambda: fetch(t + tile.stages))
            # A tile's sums are added to the totals once: fewer roundings of large numbers.
            return tuple(total + part for total, part in zip(totals, sums, strict=True))

        lax.fori_loop(0, jnp.minimum(count, tile.stages), lambda t, _: fetch(t), None)
        totals = lax.fori_loop(0, count, step, nothing)
        for k, total in enumerate(totals):
            sums_g[0][split, k, mine] = total
        plgpu.wait_smem_to_gmem(0)

    buffer = plgpu.SMEM((tile.stages, tile.rows, tile.channels), operands[0].dtype)
    scratch = {
        "x_s": [buffer] * len(operands),
        "out_s": buffer,
        "full": plgpu.Barrier(num_arrivals=len(operands), num_barriers=tile.stages),
    }
    out, *sums = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=(columns * splits,),
        grid_names=("block",),
        compiler_params=_PARAMS,
    )(jnp.tile(table, (1, together)), *operands)
    sums = [x.sum(0).reshape(coefficients, together, channels).sum(1) for x in sums]
    return out.reshape(-1, channels)[:count], sums


def _reciprocal(layout, q):
    """1 / q to one unit in the last place, in one instruction; q is at least 1, so that no case is special."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(q.shape, q.dtype, layout=layout))
    def approximate(_, q):
        return q._pointwise(q._lift_fast_instr("rcp.approx.ftz.f32"))

    return approximate(q)


def _load(ref, layout):
    index = ((),) if _BEFORE_0_11 else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def _like(x, shape, dtype):
    """The shape of an output that varies over the same mesh axes as x."""
    return jax.eval_shape(lambda x: jnp.zeros_like(x, dtype, shape=shape), x)
