"""Attention of one new token a sequence over a cache: the public op, its definition and its form for XLA."""

import importlib

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels import dispatch


def decode_attention(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    lengths: jax.Array,
    recent: tuple[ArrayLike, ArrayLike] | None = None,
    active: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * query . keys) . values over the slots of a cache that hold something.

    A sequence sees its first ``lengths[b]`` slots and, with ``recent = (start, count)``, slots start to
    start + count - 1 too: prompts of different lengths, padded to one length, and what was generated after them. A
    sequence that is not ``active`` (it skips this layer) sees nothing. One that sees nothing gets exactly 0, and with
    the kernel nothing of its cache is read.

    Args:
        query: [B, H, K], bfloat16, float16 or float32.
        keys, values: [B, S, G, K] in the query's dtype; query head h looks at head h // (H / G) of them. The kernel
            copies a cache whose S is no multiple of 8.
        lengths: [B], integers in [0, S]. Slots that are not seen may hold anything finite.
        recent: start and count, integers or scalar arrays, start + count <= S.
        active: bool [B], None for all; traced, so that another choice compiles nothing anew.
        scale: of the products; None is 1 / sqrt(K).
        implementation: "mosaic_gpu" (NVIDIA Hopper; 16 bits, K = 64 or 128), "xla", "reference" or None for the best.

    Returns:
        [B, H, K] in the query's dtype; softmax and sums in float32. It has no derivative.

    Raises:
        ValueError, TypeError: shapes or dtypes do not fit; the message says which.
        NotImplementedError: ``implementation`` cannot run on the device.

    Source: ours; flash-decoding, splitting the cache over the multiprocessors.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.skip_attention import decode_attention
        >>> keys, values = jnp.zeros((2, 4, 1, 8)), jnp.arange(4.0).reshape(1, 4, 1, 1) * jnp.ones((2, 4, 1, 8))
        >>> decode_attention(jnp.ones((2, 2, 8)), keys, values, lengths=jnp.array([3, 0]))[:, 0, 0].tolist()
        [1.0, 0.0]
    """
    _check(query, keys, values, lengths, active)
    start, count = (jnp.broadcast_to(jnp.asarray(x, jnp.int32), lengths.shape) for x in recent or (0, 0))
    if active is not None:
        lengths, count = (jnp.where(active, x, 0) for x in (lengths, count))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = _chosen(query, implementation)
    if chosen == "mosaic_gpu":
        # Imported on first use: older versions of JAX lack what it needs.
        kernel = importlib.import_module("pallas_kernels.skip_attention.decode_mosaic_gpu").attend
        return kernel(query, keys, values, lengths, start, count, scale)
    slot = jnp.arange(keys.shape[1])[None]
    visible = (slot < lengths[:, None]) | ((slot >= start[:, None]) & (slot < (start + count)[:, None]))
    form = _xla if chosen == "xla" else reference
    return jnp.where(visible.any(axis=1)[:, None, None], form(query, keys, values, visible, scale), 0)


def append_kv(
    keys: jax.Array,
    values: jax.Array,
    new_keys: jax.Array,
    new_values: jax.Array,
    *,
    lengths: jax.Array,
    active: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(keys, values, lengths) of a cache with one more slot for each active sequence; nothing of the others changes.

    A sequence that skips a layer writes nothing there, so that each layer has lengths of its own; rotate keys by the
    token's place in its sequence before they go in, for their slot says nothing about it. Donate the cache: the slots
    are then written in place.

    Args:
        keys, values: [B, S, G, K].
        new_keys, new_values: [B, G, K] in the dtype of the cache.
        lengths: [B] integers: slots that are taken. A cache that is full stays as it is.
        active: bool [B], None for all.

    Returns:
        The new cache and ``lengths + active``, at most S.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> from pallas_kernels.skip_attention import append_kv
        >>> cache, new = jnp.zeros((2, 3, 1, 1)), jnp.ones((2, 1, 1))
        >>> k, _, n = append_kv(cache, cache, new, new, lengths=jnp.array([1, 1]), active=jnp.array([True, False]))
        >>> k[:, :, 0, 0].tolist(), n.tolist()
        ([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [2, 1])
    """
    batch, slots = keys.shape[:2]
    if values.shape != keys.shape or not new_keys.shape == new_values.shape == (batch, *keys.shape[2:]):
        raise ValueError(
            "keys and values must be [B, S, G, K] and what is new [B, G, K]; got shapes "
            f"{keys.shape}, {values.shape}, {new_keys.shape} and {new_values.shape}"
        )
    at = lengths if active is None else jnp.where(active, lengths, slots)
    rows = jnp.arange(batch)
    keys, values = (
        x.at[rows, at].set(new, mode="drop", unique_indices=True) for x, new in ((keys, new_keys), (values, new_values))
    )
    return keys, values, lengths + (at < slots)


def reference(query, keys, values, visible_BxS, scale):
    """The definition, for sequences that see something; in float32, or float64 for float64 inputs."""
    group = query.shape[1] // keys.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    keys, values = (jnp.repeat(x.astype(wide), group, axis=2) for x in (keys, values))
    scores = scale * jnp.einsum("bhk,bshk->bhs", query.astype(wide), keys)
    p = jax.nn.softmax(jnp.where(visible_BxS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhs,bshk->bhk", p, values).astype(query.dtype)


def _xla(query, keys, values, visible_BxS, scale):
    mask = visible_BxS[:, None, None, :]
    return jax.nn.dot_product_attention(query[:, None], keys, values, mask=mask, scale=scale, implementation="xla")[
        :, 0
    ]


def _chosen(query, implementation: str | None) -> str:
    def mosaic_gpu(target: dispatch.Target) -> str | None:
        if reason := dispatch.mosaic_gpu(target):
            return reason
        if query.dtype.itemsize != 2 or query.shape[-1] not in (64, 128):
            return f"reads bfloat16 or float16 heads of width 64 or 128, not {query.dtype} of {query.shape[-1]}"
        return None

    registry = {"mosaic_gpu": mosaic_gpu, "xla": dispatch.anywhere, "reference": dispatch.anywhere}
    return dispatch.choose("decode_attention", implementation, registry)


def _check(query, keys, values, lengths, active):
    if query.ndim != 3 or keys.ndim != 4 or keys.shape != values.shape:
        raise ValueError(
            "query must be [B, H, K], keys and values [B, S, G, K] alike; got shapes "
            f"{query.shape}, {keys.shape} and {values.shape}"
        )
    (batch, heads, width), (rows, slots, groups, key_width) = query.shape, keys.shape
    if (batch, width) != (rows, key_width) or groups == 0 or heads % groups or slots == 0:
        raise ValueError(
            f"query {query.shape} and keys {keys.shape} must agree in B and K, H must be a multiple of G, S at least 1"
        )
    if not query.dtype == keys.dtype == values.dtype or not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query, keys and values must be floats alike, not {query.dtype}, {keys.dtype}, {values.dtype}")
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths must be integers [{batch}], not {lengths.dtype} {lengths.shape}")
    if active is not None and (active.shape != (batch,) or active.dtype != bool):
        raise ValueError(f"active must be bool [{batch}], not {active.dtype} {active.shape}")
