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
    return exponential_of(bits.reshape(-1, blocks * PERIOD)[:, :size])


def exponential_columns(
    key: tuple[jax.Array, jax.Array], token_ids: jax.Array, start: int | jax.Array, size: int
) -> jax.Array:
    """``exponential`` the other way round, [size, N], for token_ids [1, N]: operations that a TPU kernel has."""
    blocks = -(-size // PERIOD)
    shape = (blocks * _LANES, token_ids.shape[1])
    first = jax.lax.convert_element_type(start // 2, jnp.uint32)
    pairs = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0).astype(jnp.uint32)
    words = threefry(key, jnp.broadcast_to(token_ids, shape), pairs)
    parts = [word[block * _LANES : (block + 1) * _LANES] for block in range(blocks) for word in words]
    return exponential_of(jnp.concatenate(parts)[:size])


def threefry(key: tuple[jax.Array, jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two words of a block, elementwise: ``jax.extend.random.threefry_2x32`` in operations that kernels have."""
    keys = *key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA)
    x, y = x + keys[0], y + keys[1]
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))) ^ x
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


def exponential_of(bits: jax.Array) -> jax.Array:
    return -jnp.log1p(-uniform_of(bits))


def uniform_of(bits: jax.Array) -> jax.Array:
    """Random bits as float32 in (0, 1), below 1 - 2**-24."""
    # In two halves, because TPU kernels convert signed integers only; rounded once, as by the direct conversion.
    high, low = ((half.astype(jnp.int32)).astype(jnp.float32) for half in (bits >> 16, bits & 0xFFFF))
    # Winners have a small exponential: keep all 32 bits there, which float32 does near 0 and would not near 1.
    return jnp.minimum((high * 2.0**16 + low + 0.5) * 2.0**-32, 1 - 2.0**-24)
