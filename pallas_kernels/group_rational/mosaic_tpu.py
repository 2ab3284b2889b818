"""TPU: Pallas kernels that stream x once through VMEM.

Groups of channels need not fit the 128 lanes, so the kernels know none: they see a column of coefficients for every
channel and add up the gradients of every channel. A tile is worked on in strips of one column of registers, whose
coefficients and sums stay in registers. The rows are split in two parts, one for each core of a chip that has two.
Every sum has one order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.group_rational import arithmetic
from pallas_kernels.group_rational.reference import Spec, flat
from pallas_kernels.manual_axes import output_like

_LANES, _SUBLANES = 128, 8
_STEP = 16  # rows at a time: a register of bfloat16
_TILE_BYTES = 2**20  # in float32; two of each operand and result are in VMEM
_MOST_CHANNELS = 2048
_FEW = 64  # rows that are not worth a tile of their own


class Tiles(NamedTuple):
    """Tiles of rows x channels of x; the last ones reach beyond it."""

    rows: int
    channels: int


def tiles(spec: Spec, count: int, channels: int) -> Tiles:
    """As asked for, else as many whole rows as a tile may hold."""
    if spec.block_sizes is not None:
        rows, width = spec.block_sizes
        if rows % _STEP or (width % _LANES and width != channels) or 4 * rows * width > 2 * _TILE_BYTES:
            raise ValueError(
                f"block_sizes={spec.block_sizes}: implementation='mosaic_tpu' has tiles of a multiple of {_STEP} rows "
                f"and of all {channels} or a multiple of {_LANES} channels, with at most {_TILE_BYTES // 2} elements; "
                "use such sizes, or None"
            )
        return Tiles(rows, width)
    width = channels if channels <= _MOST_CHANNELS else _MOST_CHANNELS
    most = _TILE_BYTES // (4 * pl.cdiv(width, _LANES) * _LANES) // _STEP * _STEP
    return Tiles(min(most, pl.cdiv(count, _STEP) * _STEP), width)


def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    return _stream(spec, table, x)[0]


def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``chunked.backward``."""
    dx, sums = _stream(spec, table, x, g)
    return dx, sums.sum((0, 2))


def _blocks(x: jax.Array) -> jax.Array:
    """[..., D] as [B, T, D]: one block of rows unless that moves data, as the TPU lays rows out in whole registers."""
    if x.ndim < 3 or x.shape[-2] % _STEP == 0 or x.shape[-2] < _FEW:
        return flat(x)[None]
    return x.reshape(-1, *x.shape[-2:])


@functools.partial(jax.jit, static_argnums=0)
def _stream(spec, table, *operands):
    """[value or gradient of x, with a cotangent the gradient of the table by part and sublane]."""
    shape, dtype, coefficients = operands[0].shape, operands[0].dtype, table.shape[0]
    differentiating = len(operands) == 2
    if operands[0].size == 0:
        return [operands[0], jnp.zeros_like(table, shape=(1, coefficients, 1, shape[-1]))][: len(operands)]
    if dtype == jnp.float16:  # which the vector unit does not have
        operands = [x.astype(jnp.float32) for x in operands]
    operands = [_blocks(x) for x in operands]
    blocks, count, channels = operands[0].shape
    tile = tiles(spec, count, channels)
    row_tiles, column_tiles = pl.cdiv(count, tile.rows), pl.cdiv(channels, tile.channels)
    parts = min(blocks * row_tiles, 2)
    steps = pl.cdiv(blocks * row_tiles, parts)

    def place(part, column, step):  # a part without a last tile stays at the one before
        index = jnp.minimum(part * steps + step, blocks * row_tiles - 1)
        return lax.div(index, row_tiles), lax.rem(index, row_tiles), column

    of_tile = pl.BlockSpec((None, *tile), place)
    outputs = [(output_like(operands[0], operands[0].shape, operands[0].dtype), of_tile)]
    if differentiating:
        sums = output_like(operands[0], (parts, coefficients, _SUBLANES, channels), jnp.float32)
        of_sums = (None, coefficients, _SUBLANES, tile.channels)
        outputs.append((sums, pl.BlockSpec(of_sums, lambda part, column, _: (part, 0, 0, column))))

    def body(table_ref, *refs):
        x_refs, out_ref, *sums_refs = refs[: len(operands)], *refs[len(operands) :]
        step = pl.program_id(2)
        index = pl.program_id(0) * steps + step
        for sums_ref in sums_refs:

            @pl.when(step == 0)
            def _(sums_ref=sums_ref):
                sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when(index < blocks * row_tiles)
        def _():
            for start in range(0, tile.channels, _LANES):
                strip = slice(start, min(start + _LANES, tile.channels))
                remaining = count - lax.rem(index, row_tiles) * tile.rows if count % tile.rows else None
                _strip(spec, strip, remaining, table_ref, x_refs, out_ref, *sums_refs)

    size, moved = operands[0].size, (len(operands) + 1) * operands[0].nbytes
    results = pl.pallas_call(
        body,
        grid=(parts, column_tiles, steps),
        in_specs=[
            pl.BlockSpec((coefficients, tile.channels), lambda part, column, _: (0, column)),
            *(of_tile for _ in operands),
        ],
        out_shape=[shape for shape, _ in outputs],
        out_specs=[spec for _, spec in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=(60 if differentiating else 21) * size, transcendentals=0, bytes_accessed=moved
        ),
    )(table, *operands)
    return [results[0].reshape(shape).astype(dtype), *results[1:]]


def _strip(spec, strip, remaining, table_ref, x_refs, out_ref, *sums_refs):
    """One column of registers of a tile, of which ``remaining`` rows exist (None: all)."""
    rows, width = out_ref.shape[0], strip.stop - strip.start
    coefficients = [jnp.broadcast_to(table_ref[k : k + 1, strip], (_STEP, width)) for k in range(table_ref.shape[0])]

    def of_rows(i, sums):
        here = pl.ds(pl.multiple_of(i * _STEP, _STEP), _STEP)
        read = [ref[here, strip].astype(jnp.float32) for ref in x_refs]
        if not sums_refs:
            out_ref[here, strip] = arithmetic.value(spec.degree, read[0], coefficients, _reciprocal).astype(
                out_ref.dtype
            )
            return sums
        if remaining is not None:  # what lies beyond the last row is anything, and must not reach the sums
            exists = lax.broadcasted_iota(jnp.int32, (_STEP, width), 0) < remaining - i * _STEP
            read = [jnp.where(exists, value, 0) for value in read]
        x, g = read
        dx, terms = arithmetic.gradients(spec.degree, x, x < 0, coefficients, g, _reciprocal)
        out_ref[here, strip] = dx.astype(out_ref.dtype)
        folded = [term.reshape(_STEP // _SUBLANES, _SUBLANES, width).sum(0) for term in terms]
        return tuple(total + term for total, term in zip(sums, folded, strict=True))

    zeros = (jnp.zeros((_SUBLANES, width), jnp.float32),) * (len(coefficients) if sums_refs else 0)
    sums = lax.fori_loop(0, rows // _STEP, of_rows, zeros)
    for k, total in enumerate(sums):
        sums_refs[0][k, :, strip] += total


def _reciprocal(q):
    return 1 / q
