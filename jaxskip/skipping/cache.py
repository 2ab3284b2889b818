"""The key/value cache of decoding: slots only for the layers, and the tokens, that a policy keeps.

Shape letters: B batch, P prompt slots, N slots for new tokens, G key/value heads, K head width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Which layers own slots, and how many: a static argument of every program that decodes.

    Attributes:
      groups: layers that share one shape of cache; a layer in no group keeps nothing.
      strides: for each group, how many decoding steps pass between the tokens that it stores (1: it stores all).

    >>> CacheLayout(((0, 1, 3),)).layers
    (0, 1, 3)
    """

    groups: tuple[tuple[int, ...], ...]
    strides: tuple[int, ...] = (1,)

    def __post_init__(self):
        if len(self.groups) != len(self.strides) or len(set(self.layers)) != len(self.layers):
            raise ValueError(f"groups {self.groups} must be disjoint, with one stride each, not {self.strides}")

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that own slots."""
        return tuple(layer for group in self.groups for layer in group)

    def slots(self, prompt_slots: int, new_tokens: int) -> tuple[int, ...]:
        """Tokens that each group has room for."""
        return tuple(prompt_slots + -(-new_tokens // stride) for stride in self.strides)

    def place(self, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
        """Group and position within it of every layer, both int [L]; -1 where a layer keeps nothing."""
        group, position = np.full((2, num_layers), -1)
        for number, layers in enumerate(self.groups):
            group[list(layers)], position[list(layers)] = number, np.arange(len(layers))
        return group, position


class KVCache(NamedTuple):
    """Keys and values: for each group [layers, B, P + N, G, K], or a tuple over layers where these are not stacked."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(self))


def empty_cache(
    config, layout: CacheLayout, batch: int, prompt_slots: int, new_tokens: int, stacked: bool, sharding=None
):
    """A KVCache of zeros in `config.dtype` for `batch` sequences, as `layout` says.

    `sharding` places each array [layers, B, P + N, G, K] (its first axis is left out where layers are not stacked).
    """

    def zeros():
        parts = []
        for layers, slots in zip(layout.groups, layout.slots(prompt_slots, new_tokens), strict=True):
            shape = (batch, slots, config.kv_heads, config.head_width)
            if stacked:
                parts.append(jnp.zeros((len(layers), *shape), config.dtype, device=sharding))
            else:
                parts.append(tuple(jnp.zeros(shape, config.dtype, device=sharding) for _ in layers))
        return tuple(parts)

    return KVCache(zeros(), zeros())


def write(cache: KVCache, group: int, position, keys_BxTxGxK, values_BxTxGxK, at) -> KVCache:
    """`cache` with T tokens of one layer put at slots `at`, `at` + 1, ..."""

    def put(parts, x):
        part = parts[group]
        if isinstance(part, tuple):
            new = jax.lax.dynamic_update_slice_in_dim(part[position], x, at, axis=1)
            part = (*part[:position], new, *part[position + 1 :])
        else:
            part = jax.lax.dynamic_update_slice(part, x[None], (position, 0, at, 0, 0))
        return (*parts[:group], part, *parts[group + 1 :])

    return KVCache(put(cache.keys, keys_BxTxGxK), put(cache.values, values_BxTxGxK))


def read(cache: KVCache, group: int, position) -> tuple[jax.Array, jax.Array]:
    """All slots of one layer: keys and values [B, P + N, G, K]."""
    return cache.keys[group][position], cache.values[group][position]
