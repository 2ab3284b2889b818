"""Noise that depends on (key, token, vocabulary entry) alone, whatever the tiling and the placement."""

from typing import NamedTuple

import jax
import jax.extend.random
import jax.numpy as jnp

# One threefry block has two output words: one for entry v, one for entry v + _LANES (v < _LANES modulo PERIOD).
_LANES = 128
PERIOD = 2 * _LANES


class Draw(NamedTuple):
    """Labels are to be drawn: ``key`` uint32 [2] are the words of a threefry key, ``token_ids`` uint32 [N]."""

    key: jax.Array
    token_ids: jax.Array


def key_words(key: jax.Array) -> jax.Array:
    """The two threefry words, uint32 [2], of a JAX key: typed or raw, of any implementation."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise ValueError(f"key must be a single key, got keys of shape {key.shape}; use jax.vmap over them")
    if jax.random.key_impl(key) == "threefry2x32":
        return jax.random.key_data(key)
    return jax.random.bits(key, (2,), jnp.uint32)


def exponential(draw: Draw, start: int | jax.Array, size: int) -> jax.Array:
    """Exponential noise float32 [N, size] for the vocabulary entries from ``start``, a multiple of ``PERIOD``.

    Its negative logarithm is Gumbel noise.
    """
    blocks = -(-size // PERIOD)
    pairs = jnp.asarray(start, jnp.uint32) // 2 + jnp.arange(blocks * _LANES, dtype=jnp.uint32)
    shape = (draw.token_ids.shape[0], blocks * _LANES)
    counters = jnp.stack([jnp.broadcast_to(draw.token_ids[:, None], shape), jnp.broadcast_to(pairs[None, :], shape)])
    words = jax.extend.random.threefry_2x32((draw.key[0], draw.key[1]), counters)
    bits = jnp.stack([word.reshape(-1, blocks, _LANES) for word in words], axis=2)
    bits = bits.reshape(-1, blocks * PERIOD)[:, :size]
    # Winners have a small exponential: keep all 32 bits there, which float32 does near 0 and would not near 1.
    uniform = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24))
