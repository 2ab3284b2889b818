"""NVIDIA Turing, Ampere and Ada (T4, A100, L4): a Triton kernel, called through the optional package jax-triton.

A program owns a band of columns and takes every SPLITS-th tile of rows, so that its channels' coefficients and the sums
of their gradients stay in registers. It writes the sums once and XLA adds up the programs': every sum has one order.
"""

# The annotations tl.constexpr are read by Triton as text: without Triton this module can still be imported.
from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import jax_triton_call
from pallas_kernels.dispatch import Target
from pallas_kernels.group_rational.reference import Spec, flat

try:
    import triton.language as tl
    from triton import jit as _jit
except ImportError:  # `unavailable` says so

    def _jit(function):
        return function


_WARPS = 4
_ELEMENTS = 512  # of a tile: four a thread, whose sums and coefficients fit the registers
_PROGRAMS = 2048  # several for every multiprocessor of the largest GPU


def unavailable(dtype: Any, target: Target) -> str | None:
    """Why the kernel cannot run for x of ``dtype`` on ``target`` with what is installed (None: it can)."""
    capability = target.compute_capability
    if capability is None or not (7, 5) <= capability <= (9, 0):
        return "needs an NVIDIA GPU of compute capability 7.5 to 9.0"
    if dtype not in (jnp.float16, jnp.bfloat16, jnp.float32):
        return f"reads float16, bfloat16 or float32, not {dtype}"
    return jax_triton_call.missing()


class Tiles(NamedTuple):
    """Tiles of rows x channels, both powers of two."""

    rows: int
    channels: int


def tiles(spec: Spec, channels: int) -> Tiles:
    """As asked for, else of 512 elements; raises ValueError for what the kernel does not have."""
    if spec.block_sizes is None:
        width = min(128, 1 << (channels - 1).bit_length())
        return Tiles(_ELEMENTS // width, width)
    rows, width = spec.block_sizes
    if rows & (rows - 1) or width & (width - 1) or not 32 * _WARPS <= rows * width <= 4 * _ELEMENTS:
        raise ValueError(
            f"block_sizes={spec.block_sizes}: implementation='triton' has tiles whose sides are powers of two, of "
            f"{32 * _WARPS} to {4 * _ELEMENTS} elements; use such sizes, or None"
        )
    return Tiles(rows, width)


@functools.partial(jax.jit, static_argnums=0)
def forward(spec: Spec, x: jax.Array, table: jax.Array) -> jax.Array:
    """As ``reference.forward``."""
    return _run(spec, table, x)[0]


@functools.partial(jax.jit, static_argnums=0)
def backward(spec: Spec, x: jax.Array, table: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As ``chunked.backward``."""
    dx, sums = _run(spec, table, x, g)
    return dx, sums.sum(0)


def _run(spec, table, *operands):
    """(value or gradient of x, the programs' gradients of the table: with a cotangent, else nothing of use)."""
    x = operands[0]
    if x.size == 0:
        return x, jnp.zeros_like(table)[None]
    rows = [flat(array) for array in operands]
    count, channels = rows[0].shape
    tile = tiles(spec, channels)
    column_tiles, row_tiles = -(-channels // tile.channels), -(-count // tile.rows)
    splits = min(row_tiles, max(1, _PROGRAMS // column_tiles))
    differentiating = len(operands) == 2
    out, sums = jax_triton_call.call(
        _kernel,
        (rows[0], rows[-1], table),
        ((rows[0].shape, x.dtype), ((splits, *table.shape) if differentiating else (1,), jnp.float32)),
        spec,
        grid=(column_tiles * splits,),
        num_warps=_WARPS,
        num_stages=2,
        COUNT=count,
        CHANNELS=channels,
        M=spec.degree[0],
        N=spec.degree[1],
        SPLITS=splits,
        ROWS=tile.rows,
        COLUMNS=tile.channels,
        DIFFERENTIATING=differentiating,
    )
    return out.reshape(x.shape), sums


@_jit
def _kernel(
    x_ptr,
    g_ptr,
    table_ptr,
    out_ptr,
    sums_ptr,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIFFERENTIATING: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    column = (tl.program_id(0) // SPLITS) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < CHANNELS
    row = tl.arange(0, ROWS)
    coefficients = ()
    sums = ()
    for k in tl.static_range(M + 1 + N):
        coefficient = tl.load(table_ptr + k * CHANNELS + column, mask=inside, other=0.0)
        coefficients = coefficients + (coefficient[None, :],)  # noqa: RUF005  (Triton knows no *)
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)  # noqa: RUF005
    for start in range(split * ROWS, COUNT, SPLITS * ROWS):
        here = (start + row).to(tl.int64)[:, None] * CHANNELS + column[None, :]
        exists = (start + row < COUNT)[:, None] & inside[None, :]
        x = tl.load(x_ptr + here, mask=exists, other=0.0).to(tl.float32)
        size = tl.abs(x)
        # P and Q, each with its derivative.
        p = tl.zeros((ROWS, COLUMNS), tl.float32) + coefficients[M]
        dp = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(M):
            dp = dp * x + p
            p = p * x + coefficients[M - 1 - i]
        q = tl.zeros((ROWS, COLUMNS), tl.float32) + coefficients[M + N]
        dq = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(N):
            dq = dq * size + q
            q = q * size + (coefficients[M + N - 1 - i] if i < N - 1 else 1.0)
        r = 1.0 / q
        f = p * r
        if DIFFERENTIATING:
            # As in arithmetic.gradients.
            power = tl.load(g_ptr + here, mask=exists, other=0.0).to(tl.float32) * r
            turned = tl.where(x < 0, -f, f)
            out = power * (dp - turned * dq)
            new = ()
            below = ()
            for i in tl.static_range(M + 1 if M > N else N + 1):
                if i <= M:
                    new = new + (sums[i] + power,)  # noqa: RUF005
                if i > 0 and i <= N:
                    below = below + (sums[M + i] - (turned if i % 2 else f) * power,)  # noqa: RUF005
                power = power * x
            sums = new + below
        else:
            out = f
        tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), mask=exists)
    if DIFFERENTIATING:
        for k in tl.static_range(M + 1 + N):
            place = sums_ptr + (split * (M + 1 + N) + k) * CHANNELS + column
            tl.store(place, tl.sum(sums[k], 0), mask=inside)
