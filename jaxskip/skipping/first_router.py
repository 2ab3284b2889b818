"""FiRST: a small router in front of each layer reads the prompt and decides whether the sequence needs the layer.

The decision is taken once, so a layer that is off writes no key and is never looked at: nothing has to be copied
between layers, and its cache can be dropped. Routers are trained on a frozen network first; then adapters
(`jaxskip.nn.init_lora`) are trained through the network that they leave.

Shape letters: B batch, T tokens, D width, L layers, V vocabulary.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models import decoder
from jaxskip.nn.router import POOLS, Pool, keep_probability
from jaxskip.skipping import cache as caches
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.policy import Policy, all_layers
from jaxskip.skipping.scan import Network, when

Gate = Literal["soft", "straight_through", "hard", "published"]
GATES = ("soft", "straight_through", "hard", "published")


@dataclasses.dataclass(frozen=True)
class FirstRouter(Policy):
    """Layers that the routers leave on for a sequence, decided from its prompt (arXiv 2410.12513, no official code).

    `policy_params` are the routers (`jaxskip.nn.init_routers`); the state is g, bool [L, B]. A layer is executed where
    any live row wants it, and changes the rows that do; rows that agree save most, so group prompts of one kind. For a
    conversation that goes on, begin again with the whole text: layers that were off have no keys of the old one.

    The paper does not say which form the router has, its threshold, or whether prompts skip too: these are ours.

    Attributes:
      threshold: a layer is on where its router's probability is above it.
      protect: layers that are always on; None for the first and the last.
      pool: how the router's logits over the prompt become one: "mean", "max" or "last".
      prompt: "full": the prompt runs every layer, and only new tokens skip. "skip": the prompt skips too, each layer
        as decided from the state that enters it. Train with the same.
      decoding: "dynamic": one program for all decisions, with conditionals. "static": g comes to the host after the
        prompt, and the layers that some row wants become a program of their own, with cache for these alone; each new
        set of layers is compiled, so take it where few sets occur.

    Raises ValueError for values that are not listed here, and for routers of another shape.

    >>> from jaxskip.nn import init_routers
    >>> from jaxskip.skipping import generate
    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=4, dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> routers = init_routers(jax.random.key(0), 4, 64, bias=-2.0)
    >>> out = generate(config, params, [[1, 2]], max_new_tokens=3, policy=FirstRouter(), policy_params=routers)
    >>> out.ran.tolist()
    [[2, 2], [0, 0], [0, 0], [2, 2]]
    """

    threshold: float = 0.5
    protect: tuple[int, ...] | None = None
    pool: Pool = "mean"
    prompt: Literal["full", "skip"] = "full"
    decoding: Literal["dynamic", "static"] = "dynamic"

    def __post_init__(self):
        for name, allowed in (("pool", POOLS), ("prompt", ("full", "skip")), ("decoding", ("dynamic", "static"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is compared with probabilities, so within 0 .. 1")

    def protected(self, num_layers: int) -> np.ndarray:
        """bool [L]: layers that are on whatever their routers say."""
        layers = (0, num_layers - 1) if self.protect is None else self.protect
        if any(not 0 <= layer < num_layers for layer in layers):
            raise ValueError(f"protect is {layers}; wanted layer indices out of 0 .. {num_layers - 1}")
        return np.isin(np.arange(num_layers), layers)

    def check(self, config: decoder.DecoderConfig, policy_params: Any) -> None:
        super().check(config, policy_params)
        self.protected(config.num_layers)
        _check_routers(policy_params, config)

    def prefill(self, network: Network, h, cache, policy_params) -> tuple[Any, Any, Any, Any]:
        num_layers = network.num_layers
        protected, feeds = self.protected(num_layers), self.feeds(num_layers)

        def decide(h, index):
            rho = keep_probability(policy_params, index, h, network.real, pool=self.pool)
            return (rho > self.threshold) | network.pick(protected, index)

        def whole(carry, index):
            h, cache = carry
            g = decide(h, index)
            h, cache = network.attention(h, cache, index)
            return (network.feed_forward(h, index), cache), (g, jnp.ones(2, bool))

        def skipping(carry, index):
            h, cache = carry
            g = decide(h, index)
            carry, ran = _routed_layer(network, h, cache, index, g, feeds)
            return carry, (g, ran)

        kept = self.kept(num_layers)
        layers = range(num_layers) if self.prompt == "full" else kept
        (h, cache), (g, ran) = network.over(layers, whole if self.prompt == "full" else skipping, (h, cache))
        g_LxB = jnp.zeros((num_layers, h.shape[0]), bool).at[np.asarray(layers)].set(g)
        g_LxB = g_LxB & np.isin(np.arange(num_layers), kept)[:, None]
        return h, cache, g_LxB, all_layers(ran, layers, num_layers)

    def decode(self, network: Network, h, cache, state, policy_params, phase: int) -> tuple[Any, Any, Any, Any]:
        shape = (network.num_layers, h.shape[0])
        if getattr(state, "shape", None) != shape:
            raise ValueError(
                f"FirstRouter decodes with the decisions of a prompt: state must be bool {shape} [layers, batch], as "
                "its prefill gives it; `routed_forward` decides by itself"
            )
        feeds = self.feeds(network.num_layers)

        def layer(carry, index):
            h, cache = carry
            return _routed_layer(network, h, cache, index, state[index], feeds)

        layers = self.kept(network.num_layers)
        (h, cache), ran = network.over(layers, layer, (h, cache))
        return h, cache, state, all_layers(ran, layers, network.num_layers)

    def settle(self, cache, state) -> tuple[Policy, Any, Any]:
        if self.decoding == "dynamic":
            return self, cache, state
        g = np.asarray(state)
        before = self.kept(len(g))
        wanted = tuple(layer for layer in before if g[layer].any())
        if not wanted:  # there is no program of no layers: conditionals skip them all
            return self, cache, state
        places = [before.index(layer) for layer in wanted]
        cache = caches.KVCache(*((_take(part, places),) for (part,) in cache))
        if g[list(wanted)].all():
            return Policy(wanted, self.keep_feed_forwards), cache, ()
        return dataclasses.replace(self, keep_layers=wanted), cache, state


def _routed_layer(network: Network, h, cache, index, g_B, feeds):
    """One layer for the rows of `g`, not executed where no live row is among them; ((h, cache), bool [2])."""
    feed = network.pick(feeds, index)
    executed = jnp.any(g_B & jnp.any(network.real, axis=1))

    def run(h, cache):
        new, cache = network.attention(h, cache, index, g_B)
        new = network.feed_forward(new, index, feed)
        return jnp.where(g_B[:, None, None], new, h), cache

    return when(executed, run, h, cache), jnp.stack([executed, executed & feed])


def _take(part, places: list[int]):
    return tuple(part[i] for i in places) if isinstance(part, tuple) else part[np.asarray(places)]


def routed_forward(
    config: decoder.DecoderConfig,
    params,
    routers,
    tokens_BxT: jax.Array,
    prompt_BxT: jax.Array,
    *,
    gate: Gate = "straight_through",
    policy: FirstRouter = FirstRouter(),
    real_BxT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The whole sequence as routers leave it: (logits [B, T, V], rho float32 [L, B]); to train routers and adapters.

    Routers read the tokens that `prompt` marks (bool [B, T]). With `policy.prompt` "full" these run every layer, and
    with "skip" all tokens are gated alike. `real` is False for padding at the ends of rows. Every layer is computed:
    training saves nothing. rho of protected layers is 1.

    `gate` is what multiplies a layer's change of the stream: "soft" rho itself; "straight_through" the decision 0 or 1,
    with the gradient of rho (train and test agree); "hard" the decision, without gradient for the routers.
    "published" is the equation of the paper's first version as reviews quote it, in which rho cancels: routers get no
    gradient from the loss. It is here to be tested, not used.

    Raises ValueError for an unknown gate and for shapes that do not fit.

    >>> from jaxskip.nn import init_routers
    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> tokens, routers = jnp.arange(8)[None], init_routers(jax.random.key(0), 2, 64)
    >>> logits, rho = routed_forward(config, params, routers, tokens, tokens < 4, policy=FirstRouter(protect=()))
    >>> logits.shape, rho.shape
    ((1, 8, 256), (2, 1))
    """
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}; it must be one of {GATES}")
    if prompt_BxT.shape != tokens_BxT.shape:
        raise ValueError(f"prompt has shape {prompt_BxT.shape}; wanted that of tokens, {tokens_BxT.shape}")
    _check_routers(routers, config)
    network = whole_sequences(config, params, tokens_BxT, real_BxT)
    protected, feeds = policy.protected(config.num_layers), policy.feeds(config.num_layers)
    seen, always = prompt_BxT & network.real, prompt_BxT & (policy.prompt == "full")

    def layer(h, index):
        rho = keep_probability(routers, index, h, seen, pool=policy.pool)
        rho = jnp.where(network.pick(protected, index), 1.0, rho)
        new, _ = network.attention(h, None, index)
        new = network.feed_forward(new, index, network.pick(feeds, index))
        on = jnp.where(always, 1.0, _opening(gate, rho, policy.threshold)[:, None])[..., None]
        change = new - h
        if gate == "published":
            return h + on * change + (1 - on) * change, rho
        return h + on.astype(h.dtype) * change, rho

    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    layers = policy.kept(config.num_layers)
    h, rho = network.over(layers, layer, h)
    rho_LxB = jnp.zeros((config.num_layers, len(tokens_BxT))).at[np.asarray(layers)].set(rho)
    return decoder.output_logits(params, config, h), rho_LxB


def _opening(gate: Gate, rho_B, threshold: float):
    if gate in ("soft", "published"):
        return rho_B
    g = (rho_B > threshold).astype(jnp.float32)
    return g + rho_B - jax.lax.stop_gradient(rho_B) if gate == "straight_through" else g


def _check_routers(routers, config) -> None:
    shape = (config.num_layers, config.embed_dim)
    found = getattr(routers.get("kernel"), "shape", None) if isinstance(routers, dict) else None
    if found != shape:
        raise ValueError(f"routers must be those of init_routers, with a kernel of shape {shape}, not {found}")


def non_skip_penalty(rho_LxB: jax.Array) -> jax.Array:
    """What the paper adds to the loss, times lambda (0.01 there): the sum of rho over layers, averaged over the batch.

    >>> float(non_skip_penalty(jnp.full((4, 3), 0.5)))
    2.0
    """
    return jnp.mean(jnp.sum(rho_LxB, axis=0))


def binarize(rho_LxB: jax.Array) -> jax.Array:
    """Sum of rho (1 - rho) over layers, averaged over the batch: pulls soft routers towards 0 and 1. Ours.

    >>> float(binarize(jnp.full((4, 3), 0.5)))
    1.0
    """
    return jnp.mean(jnp.sum(rho_LxB * (1 - rho_LxB), axis=0))


def dual_ascent(lam: jax.Array, rho_LxB: jax.Array, *, target_keep: float, rate: float = 0.01) -> jax.Array:
    """Next lambda, so that on average `target_keep` layers stay: raised while more are kept, lowered while fewer are.

    The paper's number of skipped layers follows from a fixed lambda; this is ours. Call it after each step, with rho or
    with the decisions.

    >>> rho = jnp.full((8, 3), 0.75)
    >>> round(float(dual_ascent(jnp.float32(0.01), rho, target_keep=5.0)), 4)
    0.02
    """
    return lam + rate * (non_skip_penalty(jax.lax.stop_gradient(rho_LxB)) - target_keep)
