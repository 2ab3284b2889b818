"""What ``attention`` accepts: shapes, dtypes and options are checked here, before any work is traced."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.skip_attention import visits
from pallas_kernels.skip_attention.reference import Places, Spec, Visits
from pallas_kernels.skip_attention.skip_spec import SkipSpec

_DTYPES = ("bfloat16", "float16", "float32", "float64")
# (queries, keys) of a block, where nothing else decides.
_BLOCKS = {"mosaic_tpu": (512, 512), "mosaic_gpu": (128, 128), "triton": (64, 64)}


def arrays(q: Any, k: Any, v: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The operands as JAX arrays that fit together."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [B, T, Hq, d], k and v [B, S, Hkv, d] alike; got shapes {q.shape}, {k.shape} and {v.shape}"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in _DTYPES:
        raise TypeError(f"q, k and v must have the same dtype, one of {_DTYPES}; got {q.dtype}, {k.dtype}, {v.dtype}")
    (batch, _, heads, width), (kv_batch, _, kv_heads, kv_width) = q.shape, k.shape
    if (batch, width) != (kv_batch, kv_width) or kv_heads == 0 or width == 0 or heads % kv_heads:
        raise ValueError(f"q {q.shape} and k {k.shape} must agree in B and d, and Hq must be a multiple of Hkv")
    return q, k, v


def spec(
    implementation: str,
    q: jax.Array,
    k: jax.Array,
    skip: SkipSpec | None,
    is_causal: bool,
    local_window_size: Any,
    segmented: bool,
    scale: Any,
    logits_soft_cap: Any,
    block_sizes: Any,
) -> Spec:
    """The static options, checked."""
    if logits_soft_cap is not None:
        logits_soft_cap = _number("logits_soft_cap", logits_soft_cap, lambda x: 0 < x < math.inf, "positive, or None")
    block_q, block_kv = _blocks(implementation, q.shape[1], k.shape[1], skip, block_sizes)
    return Spec(
        implementation=implementation,
        target=dispatch.target(),
        scale=q.shape[-1] ** -0.5 if scale is None else _number("scale", scale, math.isfinite, "finite, or None"),
        softcap=logits_soft_cap,
        causal=bool(is_causal),
        window=_window(local_window_size),
        block_q=block_q,
        block_kv=block_kv,
        segmented=segmented,
        masked_blocks=skip is not None,
    )


def places(
    q: jax.Array, k: jax.Array, query_lengths: Any, key_lengths: Any, active: Any, q_segments: Any, kv_segments: Any
) -> Places:
    """Where the tokens are; NumPy where that is known while tracing. An inactive sequence has no tokens."""
    batch, queries, keys = *q.shape[:2], k.shape[1]
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("q_segment_ids and kv_segment_ids must be given together")
    q_len = _integers("query_seq_lengths", query_lengths, (batch,), queries)
    kv_len = _integers("key_value_seq_lengths", key_lengths, (batch,), keys)
    offset = kv_len - q_len
    if active is not None:
        active = active if isinstance(active, jax.Array) else np.asarray(active)
        if active.shape != (batch,) or active.dtype != bool:
            raise ValueError(f"active must be bool [{batch}], got {active.dtype} {active.shape}")
        q_len, kv_len = (_where(active, x) for x in (q_len, kv_len))
    if q_segments is not None:
        q_segments = _integers("q_segment_ids", q_segments, (batch, queries), None)
        kv_segments = _integers("kv_segment_ids", kv_segments, (batch, keys), None)
    return Places(q_len, kv_len, offset, q_segments, kv_segments)


def lists(spec: Spec, q: jax.Array, k: jax.Array, places: Places, skip: SkipSpec | None) -> tuple[Visits, Visits]:
    """What each row and each column of blocks visits."""
    queries, keys = q.shape[1], k.shape[1]
    if skip is None:
        return visits.lists(spec, places, queries, keys)
    mask = skip.mask if isinstance(skip.mask, jax.Array) else np.asarray(skip.mask)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    blocks = (-(-queries // skip.block_q), -(-keys // skip.block_kv))
    if mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] not in (1, q.shape[2]) or mask.shape[2:] != blocks:
        raise ValueError(
            f"skip.mask {skip.mask.shape} must end in (query blocks, key blocks) {blocks} for {queries} queries and "
            f"{keys} keys in blocks of {skip.block_q} and {skip.block_kv}, with {q.shape[2]} heads (or 1) and batch "
            f"{q.shape[0]} (or 1) before"
        )
    finer = skip.block_q // spec.block_q, skip.block_kv // spec.block_kv
    mask = mask.repeat(finer[0], axis=2).repeat(finer[1], axis=3)
    mask = mask[:, :, : -(-queries // spec.block_q), : -(-keys // spec.block_kv)]
    most = None if skip.most is None else min(skip.most * finer[1], mask.shape[3])
    return visits.lists(spec, places, queries, keys, mask, most)


def _blocks(implementation: str, queries: int, keys: int, skip: SkipSpec | None, block_sizes: Any) -> tuple[int, int]:
    if block_sizes is None:
        sizes = _BLOCKS.get(implementation, (128, 128))
        if skip is not None:
            return math.gcd(sizes[0], skip.block_q), math.gcd(sizes[1], skip.block_kv)
        if implementation != "mosaic_gpu":  # short sequences need no more than themselves, in whole tiles
            tile = (16, 128) if implementation == "mosaic_tpu" else (1, 1)
            sizes = [min(size, -(-n // t) * t) for size, n, t in zip(sizes, (queries, keys), tile, strict=True)]
        return sizes[0], sizes[1]
    if len(block_sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in block_sizes):
        raise ValueError(f"block_sizes must be two positive ints (queries, keys), got {block_sizes!r}")
    if skip is not None and (skip.block_q % block_sizes[0] or skip.block_kv % block_sizes[1]):
        raise ValueError(
            f"block_sizes {tuple(block_sizes)} must divide the blocks of skip, {(skip.block_q, skip.block_kv)}"
        )
    return block_sizes[0], block_sizes[1]


def _window(value: Any) -> tuple[int | None, int | None]:
    if value is None:
        return None, None
    if isinstance(value, int | np.integer):
        value = (value, value)
    if len(value) != 2 or not all(x is None or (isinstance(x, int | np.integer) and x >= 0) for x in value):
        raise ValueError(f"local_window_size must be an int or (left, right), each at least 0 or None, got {value!r}")
    left, right = (None if x is None else int(x) for x in value)
    return left, right


def _integers(name: str, value: Any, shape: tuple[int, ...], most: int | None) -> Any:
    """Int32 of ``shape``, NumPy unless given as a JAX array; None stands for ``most`` everywhere.

    With ``most`` they are lengths; a JAX array is clamped to it, for looking at it would wait for the device.
    """
    if value is None:
        return np.full(shape, most, np.int32)
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if value.shape != shape or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers {list(shape)}, got {value.dtype} {value.shape}")
    if most is None:
        return value.astype(np.int32)
    if isinstance(value, jax.Array):
        return jnp.clip(value, 0, most).astype(np.int32)
    if value.size and (value.min() < 0 or value.max() > most):
        raise ValueError(f"{name} must lie in [0, {most}], got {value.min()} to {value.max()}")
    return value.astype(np.int32)


def _where(active: Any, length: Any) -> Any:
    """``length`` of the active sequences, 0 of the others; NumPy if both are."""
    known = isinstance(active, np.ndarray) and isinstance(length, np.ndarray)
    return (np if known else jnp).where(active, length, 0).astype(np.int32)


def _number(name: str, value: Any, legal: Any, text: str) -> float:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a Python number, it is part of the program, got {value!r}")
    if not legal(value):
        raise ValueError(f"{name} must be {text}, got {value!r}")
    return float(value)
