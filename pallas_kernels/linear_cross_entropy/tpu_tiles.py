"""The tiles of the TPU kernels: their sizes, and which of them the backward pass computes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import noise
from pallas_kernels.linear_cross_entropy.reference import Spec

LANES = 128
# (rows, columns), best first: both the classifier's and the embeddings' arithmetic per byte fall along the list.
_SIZES = ((1024, 512), (512, 512), (512, 256), (256, 256), (128, 256), (128, 128))
# By device kind: MiB of VMEM of a core, side of the matrix unit. The filter's tiles are as fine as that unit allows:
# finer tiles leave out more.
_CORES = {
    "TPU v4": (16, 128),
    "TPU v5 lite": (128, 128),
    "TPU v5e": (128, 128),
    "TPU v5": (64, 128),
    "TPU v5p": (64, 128),
    "TPU v6 lite": (128, 256),
    "TPU v6e": (128, 256),
}
_LATER = (64, 256)


class Tiles(NamedTuple):
    """A tile of the logits is [columns, rows]: ``columns`` vocabulary entries, ``rows`` tokens, multiples of 128. The
    last ones, or the only one, reach beyond the arrays."""

    tokens: int
    vocabulary: int
    rows: int
    columns: int

    @property
    def row_tiles(self) -> int:
        return pl.cdiv(self.tokens, self.rows)

    @property
    def column_tiles(self) -> int:
        return pl.cdiv(self.vocabulary, self.columns)


def forward_tiles(spec: Spec, e: jax.Array, c: jax.Array, drawing: bool, saving: bool) -> tuple[Tiles, int]:
    """The tiles of the forward pass, and how many columns share one of the largest logits that it saves."""
    multiple = noise.PERIOD if drawing else LANES
    tiles = _tiles(spec, e, c, _SIZES, multiple, 0, 0)
    if not saving:
        return tiles, tiles.columns
    part = backward_tiles(spec, e, c, True).columns
    parts = next(n for n in (8, 4, 2, 1) if n == 1 or n * part <= tiles.columns)
    return tiles._replace(columns=parts * part), part


def backward_tiles(spec: Spec, e: jax.Array, c: jax.Array, filtering: bool) -> Tiles:
    """The tiles of both gradients."""
    out = [kernel_dtype(dtype).itemsize for dtype in spec.dtypes[:2]]
    _, side = core()
    sizes = ((side, side), (LANES, LANES)) if filtering else _SIZES
    return _tiles(spec, e, c, sizes, LANES, *(2 * size + 4 for size in out))


def kept_tiles(
    spec: Spec,
    tiles: Tiles,
    labels: jax.Array,
    lse: jax.Array,
    gh: jax.Array,
    g: jax.Array,
    tops: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(which tiles to compute [column tiles, row tiles], which token tiles have a token that counts [row tiles])."""
    width = tiles.row_tiles * tiles.rows

    def by_tile(x, fill=0):
        return jnp.pad(x, (0, width - tiles.tokens), constant_values=fill).reshape(1, tiles.row_tiles, tiles.rows)

    pulled = by_tile(gh != 0)
    labelled = by_tile(jnp.where((g != 0) & (labels >= 0), labels // tiles.columns, -1), -1)
    active = (pulled | (labelled >= 0)).any((0, 2))
    if tops is None:
        return jnp.broadcast_to(active[None], (tiles.column_tiles, tiles.row_tiles)), active
    large = (_by_tile(tiles, tops) - by_tile(lse) >= jnp.log(spec.filter_eps)) & pulled
    own = labelled == jnp.arange(tiles.column_tiles)[:, None, None]
    return (large | own).any(2), active


def most_left_out(tiles: Tiles, keep: jax.Array, lse: jax.Array, tops: jax.Array) -> jax.Array:
    """The largest probability [N] outside the tiles to ``keep``, 0 where nothing is."""
    top = jnp.where(keep[:, :, None], -jnp.inf, _by_tile(tiles, tops)).max(0).reshape(-1)
    return jnp.exp(top[: tiles.tokens] - lse)


def _by_tile(tiles: Tiles, tops: jax.Array) -> jax.Array:
    """Largest logits by tile and token, [column tiles, row tiles, rows]."""
    width = tiles.row_tiles * tiles.rows
    top = tops[: tiles.column_tiles, :width]
    return jnp.pad(top, ((0, 0), (0, width - top.shape[1]))).reshape(tiles.column_tiles, tiles.row_tiles, tiles.rows)


def lists(keep):
    """For each row of ``keep``: the places, those to keep first, [outer, 1, inner], and how many those are."""
    kept = keep.sum(1, dtype=jnp.int32)
    rank = jnp.where(keep, jnp.cumsum(keep, 1), kept[:, None] + jnp.cumsum(~keep, 1)) - 1
    # The inverse permutation by comparison: a sort takes the compiler longer than all kernels together.
    place = jnp.arange(keep.shape[1], dtype=jnp.int32)
    order = jnp.where(rank[:, None, :] == place[None, :, None], place[None, None, :], 0).sum(2, dtype=jnp.int32)
    return order[:, None], kept


def _tiles(spec, e, c, sizes, multiple, row_bytes, column_bytes):
    """The best tiles that fit, made even; ``row_bytes`` and ``column_bytes`` per element of what the outputs take."""
    tokens, vocabulary = e.shape[0], vocabulary_size(spec, c)
    width = pl.cdiv(e.shape[1], LANES) * LANES
    whole = (_multiple_of(LANES, tokens), _multiple_of(multiple, vocabulary))
    if spec.block_sizes is not None:
        if spec.block_sizes[0] % LANES or spec.block_sizes[1] % multiple:
            raise ValueError(
                f"block_sizes={spec.block_sizes}: tiles of implementation='mosaic_tpu' have a multiple of {LANES} "
                f"rows and, here, a multiple of {multiple} vocabulary entries"
            )
        return Tiles(tokens, vocabulary, *map(min, spec.block_sizes, whole))
    operand = operand_dtype(spec).itemsize
    # Two buffers of each operand, its conversion, and the float32 passes of a full-precision product.
    operands = [2 * x.dtype.itemsize + operand * (x.dtype.itemsize != operand) + 6 * (operand == 4) for x in (e, c)]
    budget = core()[0] * 5 // 8
    for rows, columns in sizes:
        even = _multiple_of(LANES, pl.cdiv(tokens, pl.cdiv(tokens, rows)))
        rows, columns = even, min(columns, whole[1])
        outputs = max(rows * row_bytes, columns * column_bytes)
        need = width * (rows * operands[0] + columns * operands[1] + outputs) + 6 * 4 * part_of(rows) * columns
        if need <= budget and columns % multiple == 0:
            return Tiles(tokens, vocabulary, rows, columns)
    raise NotImplementedError(
        f"linear_cross_entropy: no tile of width D={e.shape[1]} fits into {budget >> 20} MiB of VMEM; "
        "use implementation='chunked'"
    )


def _multiple_of(unit, total):
    return pl.cdiv(total, unit) * unit


def part_of(rows: int) -> int:
    """How many rows of a tile are computed at a time."""
    return LANES if rows % (2 * LANES) else 2 * LANES


def core() -> tuple[int, int]:
    """(bytes of VMEM, side of the matrix unit) of what the program is lowered for."""
    mib, side = _CORES.get(dispatch.device_kind(), _LATER)
    return mib * 2**20, side


def kernel_dtype(dtype: Any) -> Any:
    """How the kernels hold ``dtype``: the TPU has no float16."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(
            f"implementation='mosaic_tpu' takes bfloat16, float16 or float32, got {dtype}; use implementation='chunked'"
        )
    return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def operand_dtype(spec: Spec) -> Any:
    """What the kernels multiply."""
    return kernel_dtype(spec.operand_dtype)


def vocabulary_size(spec: Spec, c: jax.Array) -> int:
    """V of a classifier [V, D] or [D, V]."""
    return c.shape[spec.classifier_layout.index("v")]
