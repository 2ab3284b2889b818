"""XLA alone: loops over the lists with as many turns as there are blocks to visit, forward and backward.

Heads (and sequences) that share a list are worked on together. Under ``jax.vmap`` over lists, all make as many turns
as the longest. Shape letters: U units that have lists of their own, N sequences and key/value heads of a unit, G query
heads that share a key/value head, Q and K the queries and keys of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.skip_attention.reference import Places, Spec, Visits

_LOWEST = -1e30  # the score of what is not visible: finite, so that differences are


class _Layout(NamedTuple):
    """How [B, T, H, d] is cut into units and blocks."""

    batch: int
    units_batch: int
    units_heads: int
    kv_heads: int
    group: int

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, rows: Visits) -> "_Layout":
        batch, heads = rows.index.shape[:2]
        return cls(q.shape[0], batch, heads, k.shape[2], q.shape[2] // k.shape[2])

    def queries(self, x: jax.Array, block: int) -> jax.Array:
        """[B, T, Hq, ...] as [U, blocks, N, G, Q, ...]."""
        shared = self.units_heads == 1
        heads = (self.units_heads, self.kv_heads if shared else 1, self.group if shared else 1)
        return self._tiles(x, block, heads)

    def keys(self, x: jax.Array, block: int) -> jax.Array:
        """[B, S, Hkv, d] as [units of keys, blocks, N, K, d]."""
        shared = self.units_heads == 1
        tiles = self._tiles(x, block, (1, self.kv_heads, 1) if shared else (self.kv_heads, 1, 1))
        return tiles[:, :, :, 0]

    def key_unit(self, unit: jax.Array) -> jax.Array:
        return unit if self.units_heads == 1 else unit // self.group

    def untiled(self, tiles: jax.Array, length: int) -> jax.Array:
        """[U, blocks, N, G, Q, ...] as [B, T, H, ...], the heads those of the units."""
        units, blocks, many, group, block, *rest = tiles.shape
        batch = self.batch // self.units_batch
        x = tiles.reshape(
            self.units_batch, units // self.units_batch, blocks, batch, many // batch, group, block, *rest
        )
        x = jnp.moveaxis(x, (0, 3, 2, 6, 1, 4, 5), range(7))
        return x.reshape(self.batch, blocks * block, -1, *rest)[:, :length]

    def _tiles(self, x, block, heads):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
        batch = (self.units_batch, self.batch // self.units_batch)
        x = x.reshape(*batch, -1, block, *heads, *x.shape[3:])
        x = jnp.moveaxis(x, (0, 4, 2, 1, 5, 6, 3), range(7))
        units, many = batch[0] * heads[0], batch[1] * heads[1]
        return x.reshape(units, x.shape[2], many, heads[2], block, *x.shape[7:])


def forward(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, rows: Visits, places: Places
) -> tuple[jax.Array, jax.Array]:
    """As ``reference.forward``."""
    layout = _Layout.of(q, k, rows)
    q_tiles = layout.queries(q, spec.block_q)
    k_tiles, v_tiles = (layout.keys(x, spec.block_kv) for x in (k, v))
    wide = jnp.promote_types(q.dtype, jnp.float32)

    def row(unit, i):
        q_tile = q_tiles[unit, i]
        keys = layout.key_unit(unit)

        def visit(j, seen, carry):
            top, total, out = carry
            scores, _ = _scores(spec, q_tile, k_tiles[keys, j])
            scores = jnp.where(seen, scores, _LOWEST)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0)
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + _product(spec, "ngqk,nkd->ngqd", p.astype(v.dtype), v_tiles[keys, j])
            return new_top, total * shrink + p.sum(axis=-1), out

        zeros = jnp.zeros_like(q_tile, wide)
        start = jnp.full_like(zeros[..., 0], _LOWEST), zeros[..., 0], zeros
        seen = lambda j: _seen(spec, layout, places, unit, i, j)  # noqa: E731
        top, total, out = _visits(rows, unit, i, seen, visit, start)
        some = total > 0
        lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
        return (out / jnp.where(some, total, 1)[..., None]).astype(q.dtype), lse

    out, lse = _each_block(row, q_tiles.shape[:2])
    return layout.untiled(out, q.shape[1]), layout.untiled(lse, q.shape[1]).swapaxes(1, 2)


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
    """The gradients of q, k and v from that of the output, g, and delta [B, Hq, T] = sum of g * output over d, less
    the gradient of the log-sum-exp. ``columns`` lists the query blocks of each key block."""
    layout = _Layout.of(q, k, rows)
    q_tiles, g_tiles = (layout.queries(x, spec.block_q) for x in (q, g))
    k_tiles, v_tiles = (layout.keys(x, spec.block_kv) for x in (k, v))
    # A query that sees nothing has probabilities exp(score - inf) = 0.
    lse = jnp.where(lse == -jnp.inf, -_LOWEST, lse)
    lse_tiles, delta_tiles = (layout.queries(x.swapaxes(1, 2), spec.block_q) for x in (lse, delta))

    def gradient(unit, i, j, seen):
        """(probabilities, gradient of the scores before the scale) of a pair of blocks."""
        keys = layout.key_unit(unit)
        scores, slope = _scores(spec, q_tiles[unit, i], k_tiles[keys, j])
        p = jnp.where(seen, jnp.exp(scores - lse_tiles[unit, i][..., None]), 0)
        dp = _product(spec, "ngqd,nkd->ngqk", g_tiles[unit, i], v_tiles[keys, j])
        return p, p * (dp - delta_tiles[unit, i][..., None]) * slope * spec.scale

    def row(unit, i):
        def visit(j, seen, dq):
            ds = gradient(unit, i, j, seen)[1]
            return dq + _product(spec, "ngqk,nkd->ngqd", ds.astype(k.dtype), k_tiles[layout.key_unit(unit), j])

        seen = lambda j: _seen(spec, layout, places, unit, i, j)  # noqa: E731
        return _visits(rows, unit, i, seen, visit, jnp.zeros_like(q_tiles[unit, i], lse.dtype))

    def column(unit, j):
        def visit(i, seen, carry):
            dk, dv = carry
            p, ds = gradient(unit, i, j, seen)
            dk += _product(spec, "ngqk,ngqd->nkd", ds.astype(q.dtype), q_tiles[unit, i])
            dv += _product(spec, "ngqk,ngqd->nkd", p.astype(g.dtype), g_tiles[unit, i])
            return dk, dv

        zeros = jnp.zeros_like(k_tiles[layout.key_unit(unit), j], lse.dtype)
        seen = lambda i: _seen(spec, layout, places, unit, i, j)  # noqa: E731
        return _visits(columns, unit, j, seen, visit, (zeros, zeros))

    dq = layout.untiled(_each_block(row, q_tiles.shape[:2]), q.shape[1])
    dk, dv = _each_block(column, (q_tiles.shape[0], k_tiles.shape[1]))

    def of_keys(x):  # each unit has its own: those of query heads that share a key/value head are added
        x = layout.untiled(x[:, :, :, None], k.shape[1])
        return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).sum(axis=3)

    return dq.astype(q.dtype), of_keys(dk).astype(k.dtype), of_keys(dv).astype(v.dtype)


def _visits(lists: Visits, unit: jax.Array, block: jax.Array, seen, visit, carry):
    """``carry = visit(other, mask, carry)`` for each block on the list; fully visible ones get the mask True."""
    index, full, count = (x.reshape(-1, *x.shape[2:])[unit, block] for x in lists)
    carry = jax.lax.fori_loop(0, full, lambda t, carry: visit(index[t], True, carry), carry)
    return jax.lax.fori_loop(full, count, lambda t, carry: visit(index[t], seen(index[t]), carry), carry)


def _each_block(f, shape):
    """f(unit, block) for all of them, one after the other, stacked [units, blocks, ...]."""
    results = jax.lax.map(lambda n: f(n // shape[1], n % shape[1]), jnp.arange(shape[0] * shape[1]))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), results)


def _scores(spec: Spec, q_tile: jax.Array, k_tile: jax.Array) -> tuple[jax.Array, jax.Array | float]:
    """Scores [N, G, Q, K] and the derivative of the cap at them."""
    scores = spec.scale * _product(spec, "ngqd,nkd->ngqk", q_tile, k_tile)
    if spec.softcap is None:
        return scores, 1.0
    bent = jnp.tanh(scores / spec.softcap)
    return spec.softcap * bent, 1 - bent**2


def _product(spec: Spec, pattern: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if spec.target.platform == "cpu":  # which has no fast 16-bit products
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(pattern, a, b, preferred_element_type=wide)


def _seen(spec: Spec, layout: _Layout, places: Places, unit: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    """Which keys of block j the queries of block i see, [1, 1, Q, K]. Places are the same where lists are shared."""
    sequence = unit // layout.units_heads
    query = i * spec.block_q + jnp.arange(spec.block_q)[:, None]
    key = j * spec.block_kv + jnp.arange(spec.block_kv)[None, :]
    seen = (query < places.q_len[sequence]) & (key < places.kv_len[sequence])
    distance = key - query - places.offset[sequence]
    lowest, highest = spec.reach
    if lowest is not None:
        seen &= distance >= lowest
    if highest is not None:
        seen &= distance <= highest
    if spec.segmented:
        # Indices of padding are clamped; what they give is masked by the lengths.
        seen &= places.q_segments[sequence][query] == places.kv_segments[sequence][key]
    return seen[None, None]
