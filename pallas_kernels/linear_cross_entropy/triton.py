"""NVIDIA Ampere and Ada (A100, L4): Triton kernels, called through the optional package jax-triton.

One kernel computes tiles of logits and keeps a running log-sum-exp of its rows over one part of the vocabulary; XLA
combines the parts. The other turns the logits of a slab of the vocabulary, computed again, into their gradient. Every
output has one writer and every sum one order: the results are the same in every run.
"""

# The annotations tl.constexpr are read by Triton as text: without Triton this module can still be imported.
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import jax_triton_call
from pallas_kernels.dispatch import Target
from pallas_kernels.linear_cross_entropy import slabs
from pallas_kernels.linear_cross_entropy.noise import Draw
from pallas_kernels.linear_cross_entropy.reference import Spec

try:
    import triton.language as tl
    from triton import jit as _jit
except ImportError:  # `unavailable` says so

    def _jit(function):
        return function


# KiB that one thread block may use, by compute capability. Not Turing (7.5): Triton has multiplied without tensor
# cores there since 3.3 and calls it unsupported, so that XLA's products ("chunked") are several times faster.
_SHARED_MEMORY: dict[tuple[int, int] | None, int] = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227}
_TOGETHER = 8  # tiles of rows at work at a time: what they read stays in the L2 cache
_PROGRAMS = 1024  # several waves of thread blocks on the largest GPU


def unavailable(dtype: Any, target: Target) -> str | None:
    """Why the kernels cannot run for operands of ``dtype`` on ``target`` with what is installed (None: they can)."""
    if target.compute_capability not in _SHARED_MEMORY:
        return "needs an NVIDIA GPU of compute capability 8.0 to 9.0"
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        return f"needs float16, bfloat16 or float32 operands, got {dtype}"
    return jax_triton_call.missing()


class Tiles(NamedTuple):
    """Tiles of rows x columns logits, summed over ``depth`` of the embedding width at a time by ``warps``."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiles(spec: Spec, tokens: int, drawing: bool = False) -> Tiles:
    """As asked for, else as large as the registers allow; raises ValueError for what the GPU cannot hold."""
    wide = spec.operand_dtype == jnp.float32
    logits_of_a_thread = 32 if drawing or wide else 128  # more would spill registers
    most = 8 * 32 * logits_of_a_thread
    if spec.block_sizes is None:
        columns = 64 if drawing or wide else 128
        rows = min(most // columns, max(16, 1 << (tokens - 1).bit_length()))
    else:
        rows, columns = spec.block_sizes
    if any(size < 16 or size & (size - 1) for size in (rows, columns)) or rows * columns > most:
        raise ValueError(
            f"block_sizes={spec.block_sizes}: implementation='triton' has tiles whose sides are powers of two of at "
            f"least 16, here with at most {most} logits; use such sizes, or None"
        )
    warps = 8 if rows * columns > most // 2 else 4
    chosen = Tiles(rows, columns, depth=16 if wide else 32, warps=warps, stages=3)
    limit = _SHARED_MEMORY[spec.target.compute_capability] * 1024
    if shared_memory(spec, chosen) > limit:
        raise ValueError(
            f"block_sizes={spec.block_sizes} takes {shared_memory(spec, chosen)} bytes of shared memory, this GPU has "
            f"{limit} for a thread block; use sides that differ less, or None"
        )
    return chosen


def shared_memory(spec: Spec, tile: Tiles) -> int:
    """An upper bound of the bytes that Triton takes: what is loaded ahead, operands that are converted, reductions."""
    loaded = [jnp.dtype(dtype).itemsize for dtype in spec.dtypes[:2]]
    operand = spec.operand_dtype.itemsize
    ahead = tile.stages * (tile.rows * loaded[0] + tile.columns * loaded[1])
    converted = sum(side * operand for side, size in zip(tile[:2], loaded, strict=True) if size != operand)
    epilogue = tile.rows * tile.columns * operand  # the gradient's tile, on its way to wide stores
    return max(tile.depth * (ahead + converted), epilogue) + 4096


@functools.partial(jax.jit, static_argnums=0)
def forward(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``reference.forward``."""
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    drawing = isinstance(target, Draw)
    if tokens == 0:
        nothing = jnp.zeros_like(e, spec.dtype, shape=(0,))
        return nothing, nothing, jnp.zeros_like(e, jnp.int32, shape=(0,))
    tile = tiles(spec, tokens, drawing)
    row_tiles, column_tiles = -(-tokens // tile.rows), -(-vocabulary // tile.columns)
    steps = -(-column_tiles // max(_PROGRAMS // row_tiles, 2 * _TOGETHER))
    splits = -(-column_tiles // steps)
    statistics, drawn = _call(
        spec,
        _forward_kernel,
        tile,
        (e, c, e if b is None else b, *((target.token_ids, target.key) if drawing else (target, target))),
        (((4, splits, tokens), spec.dtype), ((splits, tokens) if drawing else (1,), jnp.int32)),
        row_tiles * splits,
        BIAS=b is not None,
        TOKENS=tokens,
        SPLITS=splits,
        STEPS=steps,
        SUMMING=bool(spec.label_smoothing),
        DRAWING=drawing,
    )
    return combined(spec, statistics, drawn, target)


def combined(
    spec: Spec, statistics: jax.Array, drawn: jax.Array, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What ``forward`` returns, from what ``_forward_kernel`` found in the parts of the vocabulary."""
    top, total, picked, other = statistics
    highest = top.max(0)
    lse = highest + jnp.log((total * jnp.exp(top - highest[None])).sum(0))
    if isinstance(target, Draw):
        winner = jnp.argmax(other, 0)[None]
        picked, label = (jnp.take_along_axis(x, winner, 0)[0] for x in (picked, drawn))
        return lse - picked, lse, label
    nll = lse - (1 - spec.label_smoothing) * picked.sum(0)
    if spec.label_smoothing:
        nll -= spec.label_smoothing / spec.classes * other.sum(0)
    return nll, lse, target


@functools.partial(jax.jit, static_argnums=0)
def backward(
    spec: Spec,
    e: jax.Array,
    c: jax.Array,
    b: jax.Array | None,
    labels: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    h: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """As ``chunked.backward``."""
    tokens = e.shape[0]

    def logit_gradients(g, h, start, size):
        if tokens == 0:
            return jnp.zeros_like(e, spec.operand_dtype, shape=(0, size))
        tile = tiles(spec, tokens)
        (gradients,) = _call(
            spec,
            _gradient_kernel,
            tile,
            (e, c, e if b is None else b, labels, lse, g, h, jnp.asarray(start, jnp.int32)),
            (((tokens, size), spec.operand_dtype),),
            -(-tokens // tile.rows) * -(-size // tile.columns),
            BIAS=b is not None,
            TOKENS=tokens,
            SIZE=size,
            KEPT=1 - spec.label_smoothing,
            SPREAD=spec.label_smoothing / spec.classes,
        )
        return gradients

    return slabs.backward(spec, e, c, b, g, h, scale, logit_gradients)


def _call(spec, kernel, tile, arrays, outputs, programs, **constants):
    """The outputs [(shape, dtype), ...] of a kernel; ``arrays`` begin with embeddings and classifier."""
    e, c = arrays[:2]
    return jax_triton_call.call(
        kernel,
        arrays,
        outputs,
        spec,
        grid=(programs,),
        num_warps=tile.warps,
        num_stages=tile.stages,
        VOCABULARY=c.shape[spec.classifier_layout.index("v")],
        WIDTH=e.shape[1],
        TRANSPOSED=spec.classifier_layout == "dv",
        OPERAND=getattr(tl, spec.operand_dtype.name),
        SOFTCAP=spec.softcap or 0.0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        TOGETHER=_TOGETHER,
        **constants,
    )


@_jit
def _turn(index, TILES: tl.constexpr, OTHERS: tl.constexpr, TOGETHER: tl.constexpr):
    """(tile of rows, other) of a program: TOGETHER tiles of rows take turns before the next ``other`` starts."""
    group = index // (TOGETHER * OTHERS)
    rest = index % (TOGETHER * OTHERS)
    together = tl.minimum(TOGETHER, TILES - group * TOGETHER)
    return group * TOGETHER + rest % together, rest // together


@_jit
def _logits(
    e,
    c,
    b,
    row,
    column,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The tile of logits at (row, column). Rows past the end repeat the last one, columns past the end are not zero."""
    V_STRIDE: tl.constexpr = 1 if TRANSPOSED else WIDTH
    D_STRIDE: tl.constexpr = VOCABULARY if TRANSPOSED else 1
    rows = tl.minimum(tl.arange(0, ROWS), TOKENS - 1 - row)
    columns = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside = columns < VOCABULARY - column
    # The tile's address takes 64 bits, an offset within the tile 32.
    e += row.to(tl.int64) * WIDTH
    c += column.to(tl.int64) * V_STRIDE
    e_offsets = rows[:, None] * WIDTH + depth[None, :]
    c_offsets = depth[:, None] * D_STRIDE + columns[None, :] * V_STRIDE
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, DEPTH):
        if WIDTH % DEPTH == 0:
            e_part = tl.load(e + e_offsets)
            c_part = tl.load(c + c_offsets, mask=inside[None, :], other=0.0)
        else:
            deep = depth < WIDTH - start
            e_part = tl.load(e + e_offsets, mask=deep[None, :], other=0.0)
            c_part = tl.load(c + c_offsets, mask=deep[:, None] & inside[None, :], other=0.0)
        z = tl.dot(e_part.to(OPERAND), c_part.to(OPERAND), z, input_precision="ieee")
        e += DEPTH
        c += DEPTH * D_STRIDE
    if BIAS:
        z += tl.load(b + column + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP > 0:
        z = SOFTCAP * (2 * tl.sigmoid(z * (2 / SOFTCAP)) - 1)
    return z


@_jit
def _forward_kernel(
    e,
    c,
    b,
    target,
    key,
    statistics,
    drawn,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    SUMMING: tl.constexpr,
    DRAWING: tl.constexpr,
):
    """``statistics`` [4, SPLITS, TOKENS] of one part of the vocabulary: the largest logit, the sum of exp(logit -
    largest), the label's logit, and the sum of the logits (SUMMING) or how well the label drawn did (DRAWING).
    """
    ROW_TILES: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    row_tile, split = _turn(tl.program_id(0), ROW_TILES, SPLITS, TOGETHER)
    row = row_tile * ROWS
    rows = tl.arange(0, ROWS)
    stored = rows < TOKENS - row
    targets = tl.load(target + row + rows, mask=stored, other=0)
    # Not from -inf: a tile whose logits are all -inf (a bias that masks them) must not give NaN.
    top = tl.full((ROWS,), -3.4028235e38, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    other = tl.zeros((ROWS,), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)
    if DRAWING:
        other = tl.full((ROWS,), float("-inf"), tl.float32)
        key_0 = tl.load(key)
        key_1 = tl.load(key + 1)
    for step in range(STEPS):  # the last part's last steps may lie past the end: they change nothing
        column = (split * STEPS + step) * COLUMNS
        z = _logits(
            e, c, b, row, column, BIAS, TOKENS, VOCABULARY, WIDTH, TRANSPOSED, OPERAND, SOFTCAP, ROWS, COLUMNS, DEPTH
        )  # fmt: skip
        columns = column + tl.arange(0, COLUMNS)
        inside = (columns < VOCABULARY)[None, :]
        if SUMMING:
            other += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        above = tl.exp(z - new_top[:, None])
        total = total * tl.exp(top - new_top) + tl.sum(above, 1)
        top = new_top
        if DRAWING:
            score, winner = tl.max(above / _exponential(key_0, key_1, targets, columns), 1, return_indices=True)
            score = tl.log(score) + top
            winner += column
            better = score > other
            winners_logit = tl.sum(tl.where(columns[None, :] == winner[:, None], z, 0.0), 1)
            picked = tl.where(better, winners_logit, picked)
            label = tl.where(better, winner, label)
            other = tl.where(better, score, other)
        else:
            picked += tl.sum(tl.where(columns[None, :] == targets[:, None], z, 0.0), 1)
    statistics += split.to(tl.int64) * TOKENS + row
    tl.store(statistics + rows, top, mask=stored)
    tl.store(statistics + SPLITS * TOKENS + rows, total, mask=stored)
    tl.store(statistics + 2 * SPLITS * TOKENS + rows, picked, mask=stored)
    tl.store(statistics + 3 * SPLITS * TOKENS + rows, other, mask=stored)
    if DRAWING:
        tl.store(drawn + split.to(tl.int64) * TOKENS + row + rows, label, mask=stored)


@_jit
def _gradient_kernel(
    e,
    c,
    b,
    labels,
    lse,
    g,
    h,
    first,
    gradients,
    BIAS: tl.constexpr,
    TOKENS: tl.constexpr,
    VOCABULARY: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    OPERAND: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """``gradients`` [TOKENS, SIZE] of the logits from ``first`` (a multiple of 16, or 0), before the bias is added."""
    ROW_TILES: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    row_tile, column_tile = _turn(tl.program_id(0), ROW_TILES, (SIZE + COLUMNS - 1) // COLUMNS, TOGETHER)
    row = row_tile * ROWS
    start = tl.multiple_of(tl.load(first), 16)
    z = _logits(
        e, c, b, row, start + column_tile * COLUMNS,
        BIAS, TOKENS, VOCABULARY, WIDTH, TRANSPOSED, OPERAND, SOFTCAP, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    stored = rows < TOKENS - row
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    label = tl.load(labels + row + rows, mask=stored, other=-1) - start
    log_sum = tl.load(lse + row + rows, mask=stored, other=0.0)
    of_loss = tl.load(g + row + rows, mask=stored, other=0.0)
    of_lse = tl.load(h + row + rows, mask=stored, other=0.0)
    dz = tl.exp(z - log_sum[:, None]) * (of_loss + of_lse)[:, None]
    dz -= tl.where(columns[None, :] == label[:, None], KEPT * of_loss[:, None], 0.0)
    if SPREAD > 0:
        dz -= SPREAD * of_loss[:, None]
    if SOFTCAP > 0:
        dz *= 1 - (z / SOFTCAP) * (z / SOFTCAP)
    gradients += row.to(tl.int64) * SIZE
    tl.store(
        gradients + rows[:, None] * SIZE + columns[None, :],
        dz.to(OPERAND),
        mask=stored[:, None] & (columns < SIZE)[None, :],
    )


@_jit
def _exponential(key_0, key_1, tokens, columns):
    """As ``noise.exponential``."""
    pairs = (columns // 256 * 128 + columns % 128).to(tl.uint32)
    key_2 = key_0 ^ key_1 ^ 0x1BD11BDA
    x = tl.zeros((tokens.shape[0], columns.shape[0]), tl.uint32) + tokens[:, None] + key_0
    y = tl.zeros((tokens.shape[0], columns.shape[0]), tl.uint32) + pairs[None, :] + key_1
    x, y = _threefry_rounds(x, y, 13, 15, 26, 6)
    x, y = _threefry_rounds(x + key_1, y + key_2 + 1, 17, 29, 16, 24)
    x, y = _threefry_rounds(x + key_2, y + key_0 + 2, 13, 15, 26, 6)
    x, y = _threefry_rounds(x + key_0, y + key_1 + 3, 17, 29, 16, 24)
    x, y = _threefry_rounds(x + key_1, y + key_2 + 4, 13, 15, 26, 6)
    bits = tl.where((columns // 128 % 2 == 0)[None, :], x + key_2, y + key_0 + 5)
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # -log(1 - u); near 0, where winners are, by the series of 2 artanh(u / (2 - u)), which rounds nothing away.
    s = uniform / (2 - uniform)
    q = s * s
    near = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(uniform < 0.25, near, -tl.log(1 - uniform))


@_jit
def _threefry_rounds(x, y, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    x, y = _threefry_round(x, y, A)
    x, y = _threefry_round(x, y, B)
    x, y = _threefry_round(x, y, C)
    return _threefry_round(x, y, D)


@_jit
def _threefry_round(x, y, TURN: tl.constexpr):
    x += y
    return x, ((y << TURN) | (y >> (32 - TURN))) ^ x
