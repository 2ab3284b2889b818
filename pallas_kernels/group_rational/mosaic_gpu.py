"""NVIDIA Hopper: Pallas Mosaic GPU kernels, meant to be bound by memory.

x is read as [M, L] with L the least common multiple of D and a tile's width, so that whatever D and the groups are,
every thread has the same two channels in all rows of its thread block: their coefficients and the sums of their
gradients stay in registers. Each block streams tiles of one column of tiles through shared memory and writes its sums
once; XLA adds up the blocks'. Every sum has one order: results do not depend on the order of execution.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

from pallas_kernels import hopper
from pallas_kernels.group_rational import arithmetic
from pallas_kernels.group_rational.reference import Spec, flat
from pallas_kernels.manual_axes import output_like

_THREADS = 128
_SHARED_MEMORY = 227 * 1024  # of a multiprocessor, of which each block takes 1 KiB more than it asks for
_BLOCKS = {2: 8, 3: 6}  # that the registers of a multiprocessor hold, forward and backward
_UNROLLED = 4  # rows
# Without automatic barriers: a tile is either read or written, and the pipeline has a barrier on both sides of it.
_PARAMS = plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class Tiles(NamedTuple):
    """Tiles of rows x channels, how many a block has under way at a time, and the blocks of a multiprocessor."""

    rows: int
    channels: int
    stages: int
    blocks: int


def tiles(spec: Spec, itemsize: int, arrays: int) -> Tiles:
    """As asked for, else the fastest on an H200; shared memory holds ``arrays`` (2 forward, 3 backward) of them."""
    rows, channels = spec.block_sizes or (32 if itemsize == 2 else 8, 256)
    stages = 2
    bytes_of_a_block = stages * arrays * rows * channels * itemsize + 2048
    if channels not in (128, 256) or rows % _UNROLLED or rows > 256 or bytes_of_a_block > _SHARED_MEMORY:
        raise ValueError(
            f"block_sizes={spec.block_sizes}: implementation='mosaic_gpu' has tiles of 128 or 256 channels and a "
            f"multiple of {_UNROLLED} rows, {stages * arrays} of which fit {_SHARED_MEMORY} bytes; use such sizes, or "
            "None"
        )
    return Tiles(rows, channels, stages, min(_SHARED_MEMORY // bytes_of_a_block, _BLOCKS[arrays]))


@functools.partial(jax.jit, static_argnums=0)
def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    return _stream(spec, tiles(spec, x.dtype.itemsize, 2), table, flat(x))[0].reshape(x.shape)


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``chunked.backward``."""
    dx, sums = _stream(spec, tiles(spec, x.dtype.itemsize, 3), table, flat(x), flat(g))
    return dx.reshape(x.shape), sums[0]


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
    splits = min(max(tile.blocks * hopper.MULTIPROCESSORS // columns, 1), steps)
    outputs = [output_like(operands[0], operands[0].shape, operands[0].dtype)]
    if differentiating:
        outputs.append(output_like(operands[0], (splits, coefficients, length), jnp.float32))
    layout = plgpu.Layout.WG_STRIDED((tile.channels,), tile.channels // _THREADS)
    reciprocal = functools.partial(_reciprocal, layout)

    def body(*refs, full, **buffers):
        table_g, *x_g = refs[: 1 + len(operands)]
        out_g, *sums_g = refs[1 + len(operands) :]
        column, split = lax.rem(lax.axis_index("block"), columns), lax.axis_index("block") // columns
        mine = pl.ds(column * tile.channels, tile.channels)
        of_channels = [hopper.load(table_g.at[k, mine], layout) for k in range(coefficients)]
        zeros = (plgpu.layout_cast(jnp.zeros((tile.channels,), jnp.float32), layout),) * coefficients
        nothing = zeros if differentiating else ()
        count = (steps - split + splits - 1) // splits

        def place(t):
            return pl.ds((split + t * splits) * tile.rows, tile.rows), mine

        def fetch(t):
            slot = lax.rem(t, tile.stages)
            for source, target in zip(x_g, buffers["x_s"], strict=True):
                plgpu.copy_gmem_to_smem(source.at[place(t)], target.at[slot], full.at[slot])

        def step(t, sums):
            slot = lax.rem(t, tile.stages)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(tile.stages - 1, wait_read_only=True)
            out_s = buffers["out_s"].at[slot]

            def row(r, sums):
                read = [hopper.load(ref.at[slot, r], layout) for ref in buffers["x_s"]]
                x, *g = (_widened(layout, x) for x in read)
                if differentiating:
                    negative = read[0] < 0  # two numbers at a time, where they are half as wide
                    out, terms = arithmetic.gradients(spec.degree, x, negative, of_channels, g[0], reciprocal)
                    sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
                else:
                    out = arithmetic.value(spec.degree, x, of_channels, reciprocal)
                out_s[r] = out.astype(out_s.dtype)
                return sums

            sums = lax.fori_loop(0, tile.rows, row, sums, unroll=_UNROLLED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s, out_g.at[place(t)])
            pl.when(t + tile.stages < count)(lambda: fetch(t + tile.stages))
            return sums

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
    return _inline(layout, q.dtype, lambda q: q._pointwise(q._lift_fast_instr("rcp.approx.ftz.f32")), q)


def _widened(layout, x):
    """x in float32. Of two bfloat16 numbers in a word, by a shift and a mask: the compiler's way takes three steps."""
    if x.dtype != jnp.bfloat16 or x.size == _THREADS:
        return x.astype(jnp.float32)

    def unpacked(numbers):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        count = ir.VectorType(numbers.type).shape[0]
        words = vector.bitcast(ir.VectorType.get((count // 2,), i32), numbers)
        wide = []
        for i in range(count):
            word = vector.extract(words, [], [i // 2])
            wide.append(arith.andi(word, mgpu.c(-(2**16), i32)) if i % 2 else arith.shli(word, mgpu.c(16, i32)))
        return vector.from_elements(ir.VectorType.get((count,), f32), [arith.bitcast(f32, bits) for bits in wide])

    return _inline(layout, jnp.float32, lambda x: x._pointwise(unpacked), x)


def _inline(layout, dtype, function, x):
    """``function`` of the values of x as Mosaic GPU has them, in the layout of x."""
    returned = plgpu.ShapeDtypeStruct(x.shape, dtype, layout=layout)
    inlined: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)(lambda _, x: function(x))
    return inlined(x)
