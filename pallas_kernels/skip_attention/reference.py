"""The definition: materialised scores and JAX's own derivatives. Tests compare every other file with this one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


class Spec(NamedTuple):
    """The static options that implementations see.

    ``window`` is how far a query sees to the left and to the right of its place; None: without bound. ``segmented``:
    the segments of ``Places`` are given. ``masked_blocks``: which blocks are listed depends on a block mask, not on
    ``Places`` and these options alone. Blocks are ``block_q`` queries and ``block_kv`` keys.
    """

    implementation: str
    target: dispatch.Target
    scale: float
    softcap: float | None
    causal: bool
    window: tuple[int | None, int | None]
    block_q: int
    block_kv: int
    segmented: bool
    masked_blocks: bool

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """(lowest, highest) distance from a query's place to a key that it sees; None: without bound."""
        left, right = self.window
        return None if left is None else -left, 0 if self.causal else right


class Places(NamedTuple):
    """Where the tokens of each sequence are, int32: query i of sequence b is at the place of key i + offset[b].

    q_len, kv_len, offset are [B]; queries and keys past the lengths are padding, and hold 0. q_segments [B, T]
    and kv_segments [B, S] are None, or each query sees keys of its own segment only.
    """

    q_len: Any
    kv_len: Any
    offset: Any
    q_segments: Any = None
    kv_segments: Any = None


class Visits(NamedTuple):
    """Which blocks each row of blocks visits: lists, so that the others cost nothing.

    index [Bm, Hm, n, most], Bm 1 or B and Hm 1 or Hq: first the ``full`` [Bm, Hm, n] blocks whose every pair of query
    and key is visible, ascending, then those that need the masks of ``Places``, ascending; the first ``count``
    [Bm, Hm, n] count, the last of them repeats after them.
    """

    index: Any
    full: Any
    count: Any


def allowed(spec: Spec, rows: Visits, places: Places, queries: int, keys: int) -> jax.Array:
    """Which key each query sees, bool [B, Hq or 1, T, S]."""
    i, j = jnp.arange(queries)[None, :, None], jnp.arange(keys)[None, None, :]
    q_len, kv_len, offset = (jnp.asarray(x)[:, None, None] for x in (places.q_len, places.kv_len, places.offset))
    distance = j - i - offset
    seen = (i < q_len) & (j < kv_len)
    lowest, highest = spec.reach
    if lowest is not None:
        seen &= distance >= lowest
    if highest is not None:
        seen &= distance <= highest
    if spec.segmented:
        seen &= places.q_segments[:, :, None] == places.kv_segments[:, None, :]
    seen = seen[:, None]
    if spec.masked_blocks:
        index = jnp.asarray(rows.index)
        listed = jax.lax.broadcasted_iota(jnp.int32, index.shape, 3) < jnp.asarray(rows.count)[..., None]
        blocks = -(-keys // spec.block_kv)
        block = (index[..., None] == jnp.arange(blocks).reshape(1, 1, 1, 1, -1)) & listed[..., None]
        block = jnp.repeat(jnp.repeat(block.any(axis=-2), spec.block_q, axis=-2), spec.block_kv, axis=-1)
        seen &= block[..., :queries, :keys]
    return seen


def forward(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, rows: Visits, places: Places
) -> tuple[jax.Array, jax.Array]:
    """(output [B, T, Hq, d] in the dtype of q, log-sum-exp [B, Hq, T]) of q [B, T, Hq, d], k and v [B, S, Hkv, d]."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    seen = allowed(spec, rows, places, q.shape[1], k.shape[1])
    group = q.shape[2] // k.shape[2]
    q_wide, k_wide, v_wide = (x.astype(wide) for x in (q, k, v))
    k_wide, v_wide = (jnp.repeat(x, group, axis=2) for x in (k_wide, v_wide))
    scores = spec.scale * jnp.einsum("bthd,bshd->bhts", q_wide, k_wide)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    some = seen.any(axis=-1, keepdims=True)
    # A row that sees nothing is treated as one that sees all, so that no derivative is undefined, and dropped after.
    scores = jnp.where(seen | ~some, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    p = jnp.where(some, jnp.exp(scores - lse), 0)
    out = jnp.einsum("bhts,bshd->bthd", p, v_wide).astype(q.dtype)
    return out, jnp.where(some, lse, -jnp.inf)[..., 0]
