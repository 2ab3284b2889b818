"""What a skipping policy is, and the policies that need nothing but a set of layers.

A policy is a small frozen dataclass. What it knows at trace time are its fields; what it learns from the prompt or
from token to token is a pytree, its state. Three methods say what runs: `prefill` for prompts, `decode` for one step,
`layout` for the cache that both fill. Layers return which of their two blocks ran.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxskip.models.decoder import DecoderConfig
from jaxskip.skipping.cache import CacheLayout
from jaxskip.skipping.scan import Network


@dataclasses.dataclass(frozen=True)
class Policy:
    """Layers and feed-forward blocks that decoding runs, the same for every token; by default all of them.

    Prompts are read by the whole network. Layers that are not kept have no cache slots, and what is not kept is not
    in the decoding program at all. Every other policy is a subclass, and takes these sets as well.

    Attributes:
      keep_layers: indices of the layers that run; None for all.
      keep_feed_forwards: indices of the feed-forward blocks that run, out of the layers that run; None for all.

    Raises ValueError for an index twice, out of order or out of range.

    >>> Policy(keep_layers=(0, 2, 3)).layout(4).layers
    (0, 2, 3)
    """

    keep_layers: tuple[int, ...] | None = None
    keep_feed_forwards: tuple[int, ...] | None = None

    # Steps after which the program of a step repeats; `decode` gets the step's phase, 0 <= phase < period.
    period: ClassVar[int] = 1

    def kept(self, num_layers: int) -> tuple[int, ...]:
        """The layers that decoding may run, in order."""
        return check_layers("keep_layers", self.keep_layers, num_layers)

    def feeds(self, num_layers: int) -> np.ndarray:
        """bool [L]: whether decoding may run this feed-forward block."""
        kept = check_layers("keep_feed_forwards", self.keep_feed_forwards, num_layers, empty=True)
        return np.isin(np.arange(num_layers), kept)

    def layout(self, num_layers: int) -> CacheLayout:
        """Who owns cache slots."""
        return CacheLayout((self.kept(num_layers),))

    def check(self, config: DecoderConfig, policy_params: Any) -> None:
        """Raises ValueError where the policy does not fit the decoder or its own parameters; `generate` asks it."""
        self.kept(config.num_layers), self.feeds(config.num_layers)

    def prefill(self, network: Network, h, cache, policy_params) -> tuple[Any, Any, Any, Any]:
        """Runs the prompts [B, P, D]; returns (h, cache, state, ran bool [L, 2])."""

        def layer(carry, index):
            h, cache = carry
            h, cache = network.attention(h, cache, index)
            return (network.feed_forward(h, index), cache), None

        (h, cache), _ = network.over(range(network.num_layers), layer, (h, cache))
        return h, cache, (), jnp.ones((network.num_layers, 2), bool)

    def decode(self, network: Network, h, cache, state, policy_params, phase: int) -> tuple[Any, Any, Any, Any]:
        """Runs one step [B, 1, D], or all tokens of a sequence [B, T, D] without a cache; returns as `prefill`."""
        feeds = self.feeds(network.num_layers)

        def layer(carry, index):
            h, cache = carry
            h, cache = network.attention(h, cache, index)
            feed = network.pick(feeds, index)
            return (network.feed_forward(h, index, feed), cache), jnp.stack([jnp.bool_(True), jnp.asarray(feed)])

        layers = self.kept(network.num_layers)
        (h, cache), ran = network.over(layers, layer, (h, cache))
        return h, cache, state, all_layers(ran, layers, network.num_layers)

    def settle(self, cache, state) -> tuple["Policy", Any, Any]:
        """Called once, outside of any program, between prefill and decoding: (policy, cache, state) to decode with."""
        return self, cache, state


def all_layers(ran, layers: Sequence[int], num_layers: int):
    """bool [L, 2] of what ran from the rows of `layers` alone."""
    return jnp.zeros((num_layers, 2), bool).at[np.asarray(layers)].set(ran)


def check_layers(name: str, layers, num_layers: int, *, empty: bool = False) -> tuple[int, ...]:
    """`layers`, or all of them for None; ValueError unless they rise within 0 .. num_layers - 1."""
    if layers is None:
        return tuple(range(num_layers))
    layers = tuple(layers)
    rising = all(a < b for a, b in itertools.pairwise(layers))
    if not rising or (not layers and not empty) or (layers and not (layers[0] >= 0 and layers[-1] < num_layers)):
        raise ValueError(f"{name} is {layers}; wanted rising layer indices out of 0 .. {num_layers - 1}")
    return layers


def early_exit(num_layers: int, keep: int) -> Policy:
    """The first `keep` layers: a baseline.

    >>> early_exit(5, 3).keep_layers
    (0, 1, 2)
    """
    return Policy(check_layers("early exit", tuple(range(keep)), num_layers))


def without_middle(num_layers: int, keep: int) -> Policy:
    """All but a contiguous run in the middle: a baseline, and the best untrained one on SmolLM2.

    >>> without_middle(6, 4).keep_layers
    (0, 1, 4, 5)
    """
    drop = num_layers - keep
    first = (num_layers - drop) // 2
    layers = tuple(layer for layer in range(num_layers) if not first <= layer < first + drop)
    return Policy(check_layers("without middle", layers, num_layers))


def even_comb(num_layers: int, keep: int) -> Policy:
    """The `num_layers - keep` layers left out lie evenly between the first and the last: a baseline.

    >>> even_comb(30, 28).keep_layers[8:12]
    (8, 9, 11, 12)
    """
    drop = set(np.round(np.linspace(1, num_layers - 2, num_layers - keep + 2))[1:-1].astype(int).tolist())
    return Policy(check_layers("even comb", tuple(i for i in range(num_layers) if i not in drop), num_layers))


def random_layers(num_layers: int, keep: int, seed: int = 0) -> Policy:
    """The first and the last layer, and others drawn without replacement: a baseline.

    >>> len(random_layers(30, 20).keep_layers)
    20
    """
    middle = np.random.default_rng(seed).choice(np.arange(1, num_layers - 1), keep - 2, replace=False)
    return Policy((0, *sorted(middle.tolist()), num_layers - 1))
