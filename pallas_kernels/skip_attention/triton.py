"""NVIDIA Ampere and Ada (A100, L4): Triton kernels, called through the optional package jax-triton.

A program takes one block of queries (or, for the gradients of keys and values, of keys) of one head and walks along its
list. Every output has one writer and every sum one order: the results are the same in every run.
"""

# The annotations tl.constexpr are read by Triton as text: without Triton this module can still be imported.
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import jax_triton_call
from pallas_kernels.dispatch import Target
from pallas_kernels.linear_cross_entropy import triton as others
from pallas_kernels.skip_attention.reference import Places, Spec, Visits

try:
    import triton.language as tl
    from triton import jit as _jit
except ImportError:  # `unavailable` says so

    def _jit(function):
        return function


_WIDEST = 128  # heads: what shared memory holds on every GPU


def unavailable(dtype: Any, width: int, target: Target) -> str | None:
    """Why the kernels cannot run for heads of ``width`` and ``dtype`` on ``target`` with what is installed."""
    if dtype.itemsize != 2 or width > _WIDEST:
        return f"reads bfloat16 or float16 heads of width up to {_WIDEST}, not {dtype} of {width}"
    return others.unavailable(dtype, target)


def forward(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, rows: Visits, places: Places
) -> tuple[jax.Array, jax.Array]:
    """As ``reference.forward``."""
    batch, queries, heads, _ = q.shape
    outputs = (q.shape, q.dtype), ((batch, heads, queries), jnp.float32)
    return _call(spec, _forward_kernel, (q, k, v), rows, places, (), outputs, heads, spec.block_q, queries)


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Visits,
    columns: Visits,
    places: Places,
    lse: jax.Array,
    delta: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``chunked.backward``."""
    # A query that sees nothing has probabilities exp(score - inf) = 0.
    extra = jnp.where(lse == -jnp.inf, jnp.inf, lse), delta, g
    of_queries = ((q.shape, q.dtype),)
    (dq,) = _call(spec, _dq_kernel, (q, k, v), rows, places, extra, of_queries, q.shape[2], spec.block_q, q.shape[1])
    of_keys = (k.shape, k.dtype), (v.shape, v.dtype)
    dk, dv = _call(spec, _dkv_kernel, (q, k, v), columns, places, extra, of_keys, k.shape[2], spec.block_kv, k.shape[1])
    return dq, dk, dv


def _call(spec, kernel, operands, lists, places, extra, outputs, heads, block, length):
    """The outputs [(shape, dtype), ...] of a kernel with a program for each ``block`` of ``length`` and each head."""
    for name, size in (("queries", spec.block_q), ("keys", spec.block_kv)):
        if size & (size - 1) or not 16 <= size <= 128:
            raise ValueError(
                f"implementation='triton' works in blocks of 16, 32, 64 or 128 {name}, not {size}: choose block_sizes, "
                "and blocks of skip, accordingly"
            )
    q, k, _ = operands
    numbers = jnp.stack([jnp.asarray(x, jnp.int32) for x in places[:3]])
    segments = places[3:] if spec.segmented else (numbers, numbers)
    lowest, highest = spec.reach
    return jax_triton_call.call(
        kernel,
        (*operands, *lists, numbers, *segments, *extra),
        outputs,
        spec,
        grid=(-(-length // block), q.shape[0] * heads),
        num_warps=8 if spec.block_q * spec.block_kv > 64 * 64 else 4,
        num_stages=2,
        BATCH=q.shape[0],
        QUERIES=q.shape[1],
        KEYS=k.shape[1],
        HEADS=q.shape[2],
        KV_HEADS=k.shape[2],
        WIDTH=q.shape[3],
        DIM=max(16, 1 << (q.shape[3] - 1).bit_length()),
        UNITS_BATCH=lists.index.shape[0],
        UNITS_HEADS=lists.index.shape[1],
        BLOCKS=lists.index.shape[2],
        MOST=lists.index.shape[3],
        ROWS=spec.block_q,
        COLUMNS=spec.block_kv,
        SCALE=spec.scale,
        SOFTCAP=spec.softcap or 0.0,
        LOWEST=-(2**30) if lowest is None else lowest,
        HIGHEST=2**30 if highest is None else highest,
        SEGMENTED=spec.segmented,
    )


@_jit
def _tile(x, b, first, h, LENGTH: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
          SIZE: tl.constexpr):  # fmt: skip
    """Pointers to a block [SIZE, DIM] of x [B, LENGTH, HEADS, WIDTH], and which of them exist."""
    at = tl.arange(0, SIZE)
    dim = tl.arange(0, DIM)
    base = x + ((b.to(tl.int64) * LENGTH + first) * HEADS + h) * WIDTH
    inside = (at < LENGTH - first)[:, None] & (dim < WIDTH)[None, :]
    return base + at[:, None] * (HEADS * WIDTH) + dim[None, :], inside


@_jit
def _of_queries(x, b, h, first, QUERIES: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """A value for each query of a block, of x [B, HEADS, QUERIES]."""
    at = tl.arange(0, ROWS)
    base = x + (b.to(tl.int64) * HEADS + h) * QUERIES + first
    return tl.load(base + at, mask=at < QUERIES - first, other=0.0)


@_jit
def _list(index, full, count, b, h, block, UNITS_BATCH: tl.constexpr, UNITS_HEADS: tl.constexpr, BLOCKS: tl.constexpr,
          MOST: tl.constexpr):  # fmt: skip
    """(pointer to the list, how many of it are fully visible, how many count)."""
    unit = (b if UNITS_BATCH > 1 else 0) * UNITS_HEADS + (h if UNITS_HEADS > 1 else 0)
    row = unit * BLOCKS + block
    return index + row.to(tl.int64) * MOST, tl.load(full + row), tl.load(count + row)


@_jit
def _seen(places, q_segments, kv_segments, b, first_q, first_kv, BATCH: tl.constexpr, QUERIES: tl.constexpr,
          KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
          SEGMENTED: tl.constexpr):  # fmt: skip
    """Which key each query sees, [ROWS, COLUMNS]."""
    query = first_q + tl.arange(0, ROWS)
    key = first_kv + tl.arange(0, COLUMNS)
    distance = key[None, :] - query[:, None] - tl.load(places + 2 * BATCH + b)
    seen = (query < tl.load(places + b))[:, None] & (key < tl.load(places + BATCH + b))[None, :]
    seen = seen & (distance >= LOWEST) & (distance <= HIGHEST)
    if SEGMENTED:
        q_id = tl.load(q_segments + b.to(tl.int64) * QUERIES + query, mask=query < QUERIES, other=0)
        kv_id = tl.load(kv_segments + b.to(tl.int64) * KEYS + key, mask=key < KEYS, other=0)
        seen = seen & (q_id[:, None] == kv_id[None, :])
    return seen


@_jit
def _scores(q_tile, k_tile, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    z = tl.dot(q_tile, tl.trans(k_tile)) * SCALE
    if SOFTCAP > 0:
        z = SOFTCAP * (2 * tl.sigmoid(z * (2 / SOFTCAP)) - 1)
    return z


@_jit
def _gradient(q_tile, k_tile, v_tile, g_tile, lse, delta, seen, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """(probabilities, gradient of the scores before the scale), [ROWS, COLUMNS]."""
    z = _scores(q_tile, k_tile, SCALE, SOFTCAP)
    p = tl.where(seen, tl.exp(z - lse[:, None]), 0.0)
    dz = p * (tl.dot(g_tile, tl.trans(v_tile)) - delta[:, None]) * SCALE
    if SOFTCAP > 0:
        dz = dz * (1 - (z / SOFTCAP) * (z / SOFTCAP))
    return p, dz


@_jit
def _forward_kernel(
    q, k, v, index, full, count, places, q_segments, kv_segments, out, lse,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, UNITS_BATCH: tl.constexpr, UNITS_HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    b = tl.program_id(1) // HEADS
    h = tl.program_id(1) % HEADS
    first_q = block * ROWS
    pointer, inside = _tile(q, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
    q_tile = tl.load(pointer, mask=inside, other=0.0)
    entry, sure, visits = _list(index, full, count, b, h, block, UNITS_BATCH, UNITS_HEADS, BLOCKS, MOST)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for t in range(visits):
        first_kv = tl.load(entry + t) * COLUMNS
        pointer, there = _tile(k, b, first_kv, h // (HEADS // KV_HEADS), KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
        k_tile = tl.load(pointer, mask=there, other=0.0)
        z = _scores(q_tile, k_tile, SCALE, SOFTCAP)
        if t >= sure:
            seen = _seen(places, q_segments, kv_segments, b, first_q, first_kv, BATCH, QUERIES, KEYS, ROWS, COLUMNS,
                         LOWEST, HIGHEST, SEGMENTED)  # fmt: skip
            z = tl.where(seen, z, float("-inf"))
        new_top = tl.maximum(top, tl.max(z, 1))  # at least -1e30: scores of -inf have probability 0
        p = tl.exp(z - new_top[:, None])
        shrink = tl.exp(top - new_top)
        pointer, there = _tile(v, b, first_kv, h // (HEADS // KV_HEADS), KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
        v_tile = tl.load(pointer, mask=there, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    pointer, inside = _tile(out, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
    tl.store(pointer, acc.to(q_tile.dtype), mask=inside)
    at = tl.arange(0, ROWS)
    base = lse + (b.to(tl.int64) * HEADS + h) * QUERIES + first_q
    found = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(base + at, found, mask=at < QUERIES - first_q)


@_jit
def _dq_kernel(
    q, k, v, index, full, count, places, q_segments, kv_segments, lse, delta, g, dq,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, UNITS_BATCH: tl.constexpr, UNITS_HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    b = tl.program_id(1) // HEADS
    h = tl.program_id(1) % HEADS
    first_q = block * ROWS
    pointer, inside = _tile(q, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
    q_tile = tl.load(pointer, mask=inside, other=0.0)
    pointer, inside = _tile(g, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
    g_tile = tl.load(pointer, mask=inside, other=0.0)
    row_lse = _of_queries(lse, b, h, first_q, QUERIES, HEADS, ROWS)
    row_delta = _of_queries(delta, b, h, first_q, QUERIES, HEADS, ROWS)
    entry, sure, visits = _list(index, full, count, b, h, block, UNITS_BATCH, UNITS_HEADS, BLOCKS, MOST)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for t in range(visits):
        first_kv = tl.load(entry + t) * COLUMNS
        pointer, there = _tile(k, b, first_kv, h // (HEADS // KV_HEADS), KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
        k_tile = tl.load(pointer, mask=there, other=0.0)
        pointer, there = _tile(v, b, first_kv, h // (HEADS // KV_HEADS), KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
        v_tile = tl.load(pointer, mask=there, other=0.0)
        seen = tl.full((ROWS, COLUMNS), True, tl.int1)
        if t >= sure:
            seen = _seen(places, q_segments, kv_segments, b, first_q, first_kv, BATCH, QUERIES, KEYS, ROWS, COLUMNS,
                         LOWEST, HIGHEST, SEGMENTED)  # fmt: skip
        _, dz = _gradient(q_tile, k_tile, v_tile, g_tile, row_lse, row_delta, seen, SCALE, SOFTCAP)
        acc += tl.dot(dz.to(k_tile.dtype), k_tile)
    pointer, inside = _tile(dq, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
    tl.store(pointer, acc.to(q_tile.dtype), mask=inside)


@_jit
def _dkv_kernel(
    q, k, v, index, full, count, places, q_segments, kv_segments, lse, delta, g, dk, dv,
    BATCH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, UNITS_BATCH: tl.constexpr, UNITS_HEADS: tl.constexpr, BLOCKS: tl.constexpr,
    MOST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """The lists are those of the blocks of keys; the heads of a group add to the same sums, one after the other."""
    block = tl.program_id(0)
    b = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    first_kv = block * COLUMNS
    pointer, inside = _tile(k, b, first_kv, kv_head, KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
    k_tile = tl.load(pointer, mask=inside, other=0.0)
    pointer, inside = _tile(v, b, first_kv, kv_head, KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
    v_tile = tl.load(pointer, mask=inside, other=0.0)
    of_k = tl.zeros((COLUMNS, DIM), tl.float32)
    of_v = tl.zeros((COLUMNS, DIM), tl.float32)
    for member in range(HEADS // KV_HEADS):
        h = kv_head * (HEADS // KV_HEADS) + member
        entry, sure, visits = _list(index, full, count, b, h, block, UNITS_BATCH, UNITS_HEADS, BLOCKS, MOST)
        for t in range(visits):
            first_q = tl.load(entry + t) * ROWS
            pointer, there = _tile(q, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
            q_tile = tl.load(pointer, mask=there, other=0.0)
            pointer, there = _tile(g, b, first_q, h, QUERIES, HEADS, WIDTH, DIM, ROWS)
            g_tile = tl.load(pointer, mask=there, other=0.0)
            row_lse = _of_queries(lse, b, h, first_q, QUERIES, HEADS, ROWS)
            row_delta = _of_queries(delta, b, h, first_q, QUERIES, HEADS, ROWS)
            seen = tl.full((ROWS, COLUMNS), True, tl.int1)
            if t >= sure:
                seen = _seen(places, q_segments, kv_segments, b, first_q, first_kv, BATCH, QUERIES, KEYS, ROWS,
                             COLUMNS, LOWEST, HIGHEST, SEGMENTED)  # fmt: skip
            p, dz = _gradient(q_tile, k_tile, v_tile, g_tile, row_lse, row_delta, seen, SCALE, SOFTCAP)
            of_v += tl.dot(tl.trans(p).to(g_tile.dtype), g_tile)
            of_k += tl.dot(tl.trans(dz).to(q_tile.dtype), q_tile)
    pointer, inside = _tile(dk, b, first_kv, kv_head, KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
    tl.store(pointer, of_k.to(k_tile.dtype), mask=inside)
    pointer, inside = _tile(dv, b, first_kv, kv_head, KEYS, KV_HEADS, WIDTH, DIM, COLUMNS)
    tl.store(pointer, of_v.to(v_tile.dtype), mask=inside)
