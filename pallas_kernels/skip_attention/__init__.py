"""Attention that neither computes nor loads what it is told to skip.

``attention`` is the op for sequences, forward and backward; ``SkipSpec`` says which blocks to leave out, ``work_done``
what that saves. ``decode_attention`` is the form for one new token a sequence, over a cache of keys and values that
``append_kv`` fills.

An implementation of ``attention`` is a module of this package, named as in the registry below, with ``forward`` (see
``reference``) and ``backward`` (see ``chunked``); one without ``backward`` is differentiated by JAX. They get lists of
the blocks to visit, made in ``visits``, and operands whose padding is 0.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.manual_axes import same_manual_axes
from pallas_kernels.skip_attention import inputs
from pallas_kernels.skip_attention.decode import append_kv, decode_attention
from pallas_kernels.skip_attention.reference import Spec
from pallas_kernels.skip_attention.skip_spec import SkipSpec

__all__ = ["SkipSpec", "append_kv", "attention", "decode_attention", "work_done"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    skip: SkipSpec | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    active: Any = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * q k^T) v over the keys that each query sees; what no query of a block sees costs nothing.

    A block of keys that ``skip`` drops, or that lies outside the triangle, the window, the lengths or the segments of
    a block of queries, is neither loaded nor multiplied, forward and backward. The queries of a sequence are its last
    tokens: query i stands at the place of key i + key_value_seq_lengths - query_seq_lengths (``jax.nn`` compares bare
    indices: the same where T = S). A query that sees nothing gets 0, and all its gradients are 0.

    Args:
        q: [B, T, Hq, d], bfloat16, float16, float32 or float64.
        k, v: [B, S, Hkv, d] in the dtype of q; query head h looks at head h // (Hq / Hkv) of them.
        skip: the blocks to keep; None keeps all.
        is_causal: a query sees no key after its place.
        local_window_size: w or (left, right): a query sees keys from left before to right after its place; None on
            a side is without bound.
        q_segment_ids, kv_segment_ids: [B, T] and [B, S] integers; a query sees keys of its own segment only. Blocks
            are skipped by the range of the segments in them: ascending ones (packed documents) skip most.
        query_seq_lengths, key_value_seq_lengths: [B] integers; tokens past them are padding and may hold anything,
            NaN too. None: T and S. JAX arrays are clamped to [0, T] and [0, S]; others raise outside of it.
        active: bool [B]; the others get 0 and nothing of theirs is read.
        scale: None is 1 / sqrt(d).
        logits_soft_cap: c replaces the scaled products s by c * tanh(s / c).
        return_lse: also return the log-sum-exp of each query's scores, differentiable, -inf where it sees nothing.
        implementation: "mosaic_tpu" (TPU; bfloat16 or float32), "mosaic_gpu" (NVIDIA Hopper; 16 bits, d = 64 or 128),
            "triton" (NVIDIA Ampere, Ada; 16 bits, d up to 128; jax-triton), "chunked" (XLA, one pair of blocks at a
            time), "reference" (materialised) or None for the best.
        block_sizes: (queries, keys) of the blocks worked in; they divide those of ``skip``. None chooses.

    Returns:
        [B, T, Hq, d] in the dtype of q, or that and the log-sum-exp [B, Hq, T] in float32 (float64 for float64).
        Softmax and sums in float32. Gradients have their inputs' dtypes. Lengths, segments, ``active`` and the mask of
        ``skip`` may be traced: others of the same shape compile nothing anew; NumPy ones are listed while tracing.
        Reverse mode works for every implementation, forward mode over it (``jax.jvp(jax.grad(...))``) for "chunked"
        and "reference", forward mode alone for "reference". Heads or sequences that are sharded
        belong inside ``jax.shard_map``.

    Raises:
        ValueError, TypeError: shapes, dtypes or options do not fit; the message says which.
        NotImplementedError: ``implementation`` cannot run on the device.

    Source: ours; the inner loop is FlashAttention-2's (arXiv:2307.08691).

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from pallas_kernels.skip_attention import SkipSpec, attention
        >>> q, v = jnp.zeros((1, 4, 1, 8)), jnp.arange(4.0).reshape(1, 4, 1, 1) * jnp.ones((1, 4, 1, 8))
        >>> keep = SkipSpec.from_block_mask(np.array([[True, False], [True, False]]), 2, 2)
        >>> attention(q, q, v, skip=keep, is_causal=True)[0, :, 0, 0].tolist()
        [0.0, 0.5, 0.5, 0.5]
    """
    q, k, v = inputs.arrays(q, k, v)
    places = inputs.places(q, k, query_seq_lengths, key_value_seq_lengths, active, q_segment_ids, kv_segment_ids)
    chosen = _chosen(implementation, q)
    segmented = q_segment_ids is not None
    spec = inputs.spec(chosen, q, k, skip, is_causal, local_window_size, segmented, scale, logits_soft_cap, block_sizes)
    if 0 in (*q.shape[:3], k.shape[1]):
        wide = jnp.promote_types(q.dtype, jnp.float32)
        out, lse = jnp.zeros_like(q), jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, wide)
    else:
        lists = inputs.lists(spec, q, k, places, skip)
        padded = not all(x is None for x in (query_seq_lengths, key_value_seq_lengths, active))
        if padded:  # it may hold NaN, which times a probability of 0 is NaN still
            q, k, v = (_unpadded(x, n) for x, n in ((q, places.q_len), (k, places.kv_len), (v, places.kv_len)))
        # JAX sums the gradient of what all devices share over the devices, outside the custom derivative.
        q, k, v, lists, places = same_manual_axes(jax.tree.map(jnp.asarray, (q, k, v, lists, places)))
        run = _attention if hasattr(_module(spec), "backward") else _without_derivative
        out, lse = run(spec, q, k, v, lists, places)  # pyright: ignore[reportGeneralTypeIssues]
        if padded:  # nor does its gradient count
            out = _unpadded(out, places.q_len)
    return (out, lse) if return_lse else out


def work_done(
    q_shape: tuple[int, int, int, int],
    kv_shape: tuple[int, int, int, int],
    *,
    block_sizes: tuple[int, int] = (128, 128),
    skip: SkipSpec | None = None,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    active: Any = None,
    itemsize: int = 2,
) -> dict[str, int]:
    """What one forward pass of ``attention`` on such arguments computes and reads, counted from its own lists.

    Args:
        q_shape, kv_shape: [B, T, Hq, d] and [B, S, Hkv, d]; the other arguments are those of ``attention``, known.
        itemsize: bytes of a number.

    Returns:
        blocks_visited and blocks_total (pairs of blocks, all heads and sequences), flops (4 d for each pair of a query
        and a key in a visited block) and kv_bytes (keys and values of each visited block, once a query head).

    Raises:
        ValueError: shapes or options do not fit.

    Example:
        >>> from pallas_kernels.skip_attention import work_done
        >>> done = work_done((1, 512, 1, 64), (1, 512, 1, 64), is_causal=True)
        >>> done["blocks_visited"], done["blocks_total"]
        (10, 16)
    """
    q: Any = jax.ShapeDtypeStruct(q_shape, jnp.bfloat16)
    k: Any = jax.ShapeDtypeStruct(kv_shape, jnp.bfloat16)
    places = inputs.places(q, k, query_seq_lengths, key_value_seq_lengths, active, q_segment_ids, kv_segment_ids)
    segmented = q_segment_ids is not None
    spec = inputs.spec("reference", q, k, skip, is_causal, local_window_size, segmented, None, None, block_sizes)
    rows, _ = inputs.lists(spec, q, k, places, skip)
    batch, _, heads, width = q_shape
    count = np.asarray(rows.count)
    visited = int(np.broadcast_to(count, (batch, heads, count.shape[-1])).sum())
    blocks_q, blocks_kv = -(-q_shape[1] // spec.block_q), -(-kv_shape[1] // spec.block_kv)
    return {
        "blocks_visited": visited,
        "blocks_total": batch * heads * blocks_q * blocks_kv,
        "flops": 4 * width * spec.block_q * spec.block_kv * visited,
        "kv_bytes": 2 * width * spec.block_kv * itemsize * visited,
    }


def _chosen(implementation: str | None, q: jax.Array) -> str:
    """The name of the implementation to use: a module of this package. The registry lists them best first."""

    def mosaic_gpu(target: dispatch.Target) -> str | None:
        if reason := dispatch.mosaic_gpu(target):
            return reason
        if q.dtype.itemsize != 2 or q.shape[-1] not in (64, 128):
            return f"reads bfloat16 or float16 heads of width 64 or 128, not {q.dtype} of {q.shape[-1]}"
        return None

    def triton(target: dispatch.Target) -> str | None:
        # It needs jax-triton too, which is optional: where that is missing, None goes on to what comes next.
        return dispatch.triton(target) or importlib.import_module(f"{__name__}.triton").unavailable(
            q.dtype, q.shape[-1], target
        )

    def mosaic_tpu(target: dispatch.Target) -> str | None:
        if q.dtype not in (jnp.bfloat16, jnp.float32):
            return f"reads bfloat16 or float32, not {q.dtype}"
        return dispatch.mosaic_tpu(target)

    registry = {
        "mosaic_tpu": mosaic_tpu,
        "mosaic_gpu": mosaic_gpu,
        "triton": triton,
        "chunked": dispatch.anywhere,
        "reference": dispatch.anywhere,
    }
    return dispatch.choose("attention", implementation, registry)


def _unpadded(x: jax.Array, length: jax.Array) -> jax.Array:
    """x [B, T, ...] with 0 past the lengths [B]."""
    real = jnp.arange(x.shape[1])[None] < jnp.asarray(length)[:, None]
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec, q, k, v, lists, places):
    """(output, log-sum-exp); the backward pass computes the scores again."""
    return _run(spec, "forward")(q, k, v, lists[0], places)


def _without_derivative(spec, q, k, v, lists, places):
    return _module(spec).forward(spec, q, k, v, lists[0], places)


def _attention_forward(spec, q, k, v, lists, places):
    out, lse = _run(spec, "forward")(q, k, v, lists[0], places)
    return (out, lse), (q, k, v, lists, places, out, lse)


def _attention_backward(spec, residuals, cotangents):
    q, k, v, lists, places, out, lse = residuals
    g, g_lse = cotangents
    delta = jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=lse.dtype)
    delta -= jnp.where(lse == -jnp.inf, 0, g_lse)
    return *_run(spec, "backward")(q, k, v, *lists, places, lse, delta, g), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _run(spec: Spec, name: str) -> Any:
    """``forward`` or ``backward`` of the arrays."""
    f = getattr(_module(spec), name)
    return dispatch.once_differentiated(spec, f if spec.implementation == "chunked" else dispatch.looped(f))


def _module(spec: Spec) -> ModuleType:
    """Imported on first use: an implementation may need what older versions of JAX lack."""
    return importlib.import_module(f"{__name__}.{spec.implementation}")
