"""L2 adaptive computation, LAC: layers that hardly change the length of a token's residual stream are voids.

A layer is active for a token where the length of the stream grows across it by at least a share of the range of growths
seen so far; no training, no parameters. The paper (arXiv 2505.14467) reads the final state off the last active layer.
"30 % of the layers are used" is therefore a statement about a mask: every layer has run, because its own output decides
whether it was needed, and where the last layer is active the logits are exactly the network's. Only two variants save
anything: layers that are void for nearly every token, left out for good (`void_keep_layers`), and the parent method's
exit (`LACHalt`).

Shape letters: B batch, T tokens, D width, L layers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models import decoder
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.policy import Policy, all_layers, check_layers
from jaxskip.skipping.scan import Network, when


def lac_decision(delta: jax.Array, alpha: float) -> jax.Array:
    """Which layers are active, bool [L, ...], from the signed changes of length across them [L, ...].

    Layer l is active where delta[l] >= alpha (max - min of delta[:l]); the first one where its length does not shrink.
    So the first two are active whenever they make the stream longer, and one that shortens it never is (alpha > 0).
    The authors' code (arXiv 2505.14467) takes the first layer's range over the batch instead; this agrees with it at
    one sequence at a time.

    >>> lac_decision(jnp.array([5.0, 3.0, -1.0, 1.0, 4.0]), 0.5).tolist()
    [True, True, False, False, True]
    """
    high, low = jax.lax.cummax(delta), jax.lax.cummin(delta)
    spread = jnp.concatenate([jnp.zeros_like(delta[:1]), (high - low)[:-1]])
    return ~(delta < alpha * spread)


def _check_alpha(alpha: float) -> None:
    if np.isnan(alpha):
        raise ValueError("alpha is nan; it is a share of the range of changes, 0.8 in the authors' code")


@dataclasses.dataclass(frozen=True)
class LAC(Policy):
    """Runs every layer and lets each token keep the outputs of its active ones; saves nothing.

    Attributes:
      alpha: share of the range of changes so far that a layer must reach; 0.8 in the authors' code. -inf: all are
        active.
      mode: "readout" is the paper's: layers see the ordinary stream, and what leaves the network is the output of the
        last active one (of none: the embedding). "true_skip": a void layer's output is dropped and the next layer
        continues from what entered it. "trace": no effect; see `lac_trace`.

    Prompts are read by the same rule. Keys and values are those that the layers computed, of void ones too. Lengths are
    float32 (in the authors' 16 bits a long stream is rounded by more than most layers change it).

    Raises ValueError for another mode or an alpha that is not a number.

    >>> LAC(alpha=0.5, mode="true_skip").layout(4).layers
    (0, 1, 2, 3)
    """

    alpha: float = 0.8
    mode: Literal["readout", "true_skip", "trace"] = "readout"

    def __post_init__(self):
        if self.mode not in ("readout", "true_skip", "trace"):
            raise ValueError(f"mode is {self.mode!r}; it must be 'readout', 'true_skip' or 'trace'")
        _check_alpha(self.alpha)

    def prefill(self, network: Network, h, cache, policy_params):
        layers = range(network.num_layers)
        h, cache, _, ran = self.run(network, h, cache, layers, np.ones(network.num_layers, bool))
        return h, cache, (), ran

    def decode(self, network: Network, h, cache, state, policy_params, phase: int):
        layers = self.kept(network.num_layers)
        h, cache, _, ran = self.run(network, h, cache, layers, self.feeds(network.num_layers))
        return h, cache, state, all_layers(ran, layers, network.num_layers)

    def run(self, network: Network, h, cache, layers: Sequence[int], feeds: np.ndarray):
        """(h, cache, (delta, active) each [layers, B, T], ran [layers, 2]) of these layers."""

        def layer(carry, index):
            h, cache, out, length, high, low = carry
            y, cache = network.attention(h, cache, index)
            feed = network.pick(feeds, index)
            y = network.feed_forward(y, index, feed)
            reached = _length(y)
            delta = reached - length
            first = index == layers[0]
            high, low = jnp.where(first, delta, high), jnp.where(first, delta, low)
            active = ~(delta < self.alpha * (high - low))
            high, low = jnp.maximum(high, delta), jnp.minimum(low, delta)
            taken = active[..., None]
            if self.mode == "true_skip":
                y, reached = jnp.where(taken, y, h), jnp.where(active, reached, length)
            out = y if self.mode == "trace" else jnp.where(taken, y, out)
            ran = jnp.stack([jnp.bool_(True), jnp.asarray(feed)])
            return (y, cache, out, reached, high, low), (delta, active, ran)

        length = _length(h)
        carry, (delta, active, ran) = network.over(layers, layer, (h, cache, h, length, length, length))
        return carry[2], carry[1], (delta, active), ran


@dataclasses.dataclass(frozen=True)
class LACHalt(Policy):
    """Leaves the remaining layers out once no token's length moves any more: the parent method, and a real saving.

    As in manishemirani/L2-Norm-Guided-Adaptive-Computation, and unlike `LAC`: changes count without their sign; the
    history they are measured against begins with zeros and is one for all tokens and sequences; and the test is on
    what is known before a layer runs, one layer late: layer l is left out, with all above it, where the stream's length
    changed across layer l - 2 by less than alpha times the range of the changes across the layers below that one, for
    every token. So three layers always run. That code's blending by mask (`use_mask`) is left out: its two weights do
    not add up to one.

    Prompts are read by the whole network. A token that left early gives the layers above its last state to compute
    their keys and values from, which later tokens may look at; that reads the weights of these two projections, and
    they are not in `ran` and `bytes_read`.

    Attributes:
      alpha: share of the range; 0.8 in the authors' configuration.
      norm: whose length it is: "B" all live tokens of the batch in one, "E" each sequence's, "T" each token's. The
        batch leaves together in any case. When decoding one token at a time "E" and "T" are the same.

    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=6, dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> from jaxskip.skipping import forward
    >>> run = jax.jit(functools.partial(forward, config, policy=LACHalt(alpha=100.0)))
    >>> run(params, jnp.arange(4)[None])[2][:, 0].tolist()
    [True, True, True, False, False, False]
    """

    alpha: float = 0.8
    norm: Literal["B", "E", "T"] = "T"

    def __post_init__(self):
        if self.norm not in ("B", "E", "T"):
            raise ValueError(f"norm is {self.norm!r}; it must be 'B', 'E' or 'T'")
        _check_alpha(self.alpha)

    def decode(self, network: Network, h, cache, state, policy_params, phase: int):
        feeds = self.feeds(network.num_layers)
        real = network.real
        counted = {"B": jnp.any(real), "E": jnp.any(real, axis=1), "T": real}[self.norm]

        def layer(carry, index):
            _, _, _, delta, _, _, threshold = carry
            going = ~jnp.all((jnp.abs(delta) < threshold) | ~counted)

            def run(h, cache, length, delta, high, low, threshold):
                reached = self._length(h, real)
                high = jnp.maximum(high, jnp.max(delta, where=counted, initial=-jnp.inf))
                low = jnp.minimum(low, jnp.min(delta, where=counted, initial=jnp.inf))
                out, new = network.attention(h, cache, index)
                out = network.feed_forward(out, index, network.pick(feeds, index))
                return out, new, reached, reached - length, high, low, self.alpha * (high - low)

            def pass_on(h, cache):  # what else attention computes has no use and is not compiled
                return h, network.attention(h, cache, index)[1]

            ran = jnp.stack([going, going & network.pick(feeds, index)])
            carry = when(going, run, *carry)
            if cache is not None:
                carry = (*when(~going, pass_on, *carry[:2]), *carry[2:])
            return carry, ran

        layers = self.kept(network.num_layers)
        length, zero = self._length(h, real), jnp.float32(0)
        start = (h, cache, length, jnp.zeros_like(length), zero, zero, zero)
        carry, ran = network.over(layers, layer, start)
        return carry[0], carry[1], state, all_layers(ran, layers, network.num_layers)

    def _length(self, h_BxTxD, real_BxT):
        axes = {"B": None, "E": (1, 2), "T": 2}[self.norm]
        squares = jnp.square(h_BxTxD.astype(jnp.float32)) * real_BxT[..., None]
        return jnp.sqrt(jnp.sum(squares, axis=axes))


class LACTrace(NamedTuple):
    """How the stream's length changed across every layer, and which layers were active.

    Attributes:
      delta: signed change of length, float32 [L, B, T].
      active: bool [L, B, T].
      real: False for padding, which no average counts, bool [B, T].

    Averages take `where_BxT`, the tokens that count: those of the prompt and those of the answer are different things
    to the paper. Position t stands for the token fed there (the authors' files name the one it led to). The first
    position is usually an attention sink, with a length of its own: leave it out.
    """

    delta: jax.Array
    active: jax.Array
    real: jax.Array

    def frequency(self, where_BxT=True) -> np.ndarray:
        """Share of tokens for which each layer is active, float [L]."""
        counted = np.asarray(self.real) & where_BxT
        return np.asarray(self.active)[:, counted].mean(axis=1)

    def usage(self, where_BxT=True) -> float:
        """Share of layers that are active, averaged over tokens: of a mask, not of what ran."""
        return float(self.frequency(where_BxT).mean())


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def lac_trace(
    config: decoder.DecoderConfig, params, tokens_BxT: jax.Array, *, policy: LAC = LAC(), real_BxT=None
) -> LACTrace:
    """Which layers are active for each token of given text under `policy`.

    For generated text give prompt and answer together. The paper traces prompts and answers apart; apart from the
    choice of tokens that is this, because a network with `LAC()` fills its cache as without.

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> trace = lac_trace(config, params, jnp.arange(8)[None])
    >>> trace.active.shape, bool((trace.active == lac_decision(trace.delta, 0.8)).all())
    ((2, 1, 8), True)
    """
    network = whole_sequences(config, params, tokens_BxT, real_BxT)
    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    _, _, traced, _ = policy.run(network, h, None, policy.kept(config.num_layers), policy.feeds(config.num_layers))
    return LACTrace(*traced, network.real)


def void_keep_layers(
    trace: LACTrace, *, min_frequency: float = 0.05, protect: Sequence[int] = (0, -1), where_BxT: Any = True
) -> tuple[int, ...]:
    """The layers that are active for at least `min_frequency` of the tokens: for `Policy(keep_layers=...)`.

    Ours: the paper leaves no layer out. `protect` stay in any case, negative ones counted from the end.

    >>> active = jnp.array([[True, True], [False, False], [True, False], [False, False]])[:, None]
    >>> void_keep_layers(LACTrace(active * 1.0, active, jnp.ones((1, 2), bool)), min_frequency=0.5)
    (0, 2, 3)
    """
    if not 0 <= min_frequency <= 1:
        raise ValueError(f"min_frequency is {min_frequency}; it is a share, 0 .. 1")
    frequency = trace.frequency(where_BxT)
    count = len(frequency)
    fixed = check_layers("protect", sorted({i + count if i < 0 else i for i in protect}), count, empty=True)
    return tuple(i for i in range(count) if i in fixed or frequency[i] >= min_frequency)


def _length(h_BxTxD):
    return jnp.linalg.norm(h_BxTxD.astype(jnp.float32), axis=-1)
