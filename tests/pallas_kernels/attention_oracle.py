"""Attention with gradients in NumPy's float64, by whole matrices and a mask of every pair: what all forms must give."""

import numpy as np


def pairs(shape, keys, *, block_mask=None, blocks=None, causal=False, window=(None, None), q_len=None, kv_len=None,
          q_segments=None, kv_segments=None, active=None):  # fmt: skip
    """Which key each query sees, bool [B, Hq, T, S], straight from the definition."""
    batch, queries, heads, _ = shape
    q_len = np.full(batch, queries) if q_len is None else np.asarray(q_len)
    kv_len = np.full(batch, keys) if kv_len is None else np.asarray(kv_len)
    seen = np.zeros((batch, heads, queries, keys), bool)
    left, right = window
    for b in range(batch):
        if active is not None and not active[b]:
            continue
        for i in range(q_len[b]):
            place = i + kv_len[b] - q_len[b]
            j = np.arange(kv_len[b])
            row = np.ones(kv_len[b], bool)
            if causal:
                row &= j <= place
            if left is not None:
                row &= place - j <= left
            if right is not None:
                row &= j - place <= right
            if q_segments is not None:
                row &= q_segments[b, i] == kv_segments[b, : kv_len[b]]
            seen[b, :, i, : kv_len[b]] = row
    if block_mask is not None:
        mask = block_mask.reshape((1,) * (4 - block_mask.ndim) + block_mask.shape)
        mask = mask.repeat(blocks[0], axis=2).repeat(blocks[1], axis=3)[:, :, :queries, :keys]
        seen &= mask
    return seen


def attention(q, k, v, seen, *, scale=None, softcap=None, g=None, g_lse=None):
    """(output, log-sum-exp) or, with the cotangents of both, (output, log-sum-exp, dq, dk, dv)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide_k, wide_v = k.repeat(group, axis=2), v.repeat(group, axis=2)
    scores, slope = scale * np.einsum("bthd,bshd->bhts", q, wide_k), 1.0
    if softcap is not None:
        slope = 1 - np.tanh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)
    top = np.where(seen, scores, -np.inf).max(axis=-1, keepdims=True)
    p = np.where(seen, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    total = p.sum(axis=-1, keepdims=True)
    p /= np.where(total > 0, total, 1)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + np.where(np.isfinite(top), top, 0))[..., 0]
    out = np.einsum("bhts,bshd->bthd", p, wide_v)
    if g is None:
        return out, lse
    g, g_lse = np.asarray(g, np.float64), np.asarray(g_lse, np.float64)
    dp = np.einsum("bthd,bshd->bhts", g, wide_v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True) + g_lse[..., None]) * slope * scale
    per_group = (*k.shape[:3], group, k.shape[3])
    dk = np.einsum("bhts,bthd->bshd", ds, q).reshape(per_group).sum(axis=3)
    dv = np.einsum("bhts,bthd->bshd", p, g).reshape(per_group).sum(axis=3)
    return out, lse, np.einsum("bhts,bshd->bthd", ds, wide_k), dk, dv
