"""LoRA-Drop (arXiv 2601.02569): most decoding steps reuse an earlier token's output of some middle layers.

Every `light_steps` + 1 steps one step runs the whole network and keeps what the dropped layers gave, their anchors. In
between, a dropped layer is not run: its output is its anchor plus a low-rank correction from its input. Only the
adapters of that correction are trained, by `lora_drop_loss`. Nothing depends on data, so every step is a fixed program
and dropped layers have cache slots for prompts and for the steps that run them, no others.

It is not "LoRA-drop" (COLING 2025), which prunes adapters.

Shape letters: B batch, T tokens, D width, R rank, L layers, N dropped layers.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxskip.models import decoder
from jaxskip.skipping import cost
from jaxskip.skipping.cache import CacheLayout
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.policy import Policy, all_layers, check_layers
from jaxskip.skipping.scan import Network, when


def lora_drop_layers(num_layers: int, ratio: float, *, first: int = 3, last: int = 1) -> tuple[int, ...]:
    """floor(ratio x eligible) layers, evenly spread; the `first` and the `last` layers are not eligible.

    The paper keeps the first three and the last; the authors' code drops all but layer 0 and every fourth, the last one
    included: `tuple(l for l in range(num_layers) if l % 4)`.

    >>> lora_drop_layers(12, 0.5)
    (4, 6, 8, 10)
    """
    eligible = num_layers - first - last
    count = int(ratio * eligible + 1e-9)
    if not 0 < ratio <= 1 or count < 1:
        raise ValueError(
            f"a ratio of {ratio} of {eligible} eligible layers leaves none to drop; the ratio is at most 1"
        )
    return tuple(int(first + (i + 0.5) * eligible / count) for i in range(count))


@dataclasses.dataclass(frozen=True)
class LoRADrop(Policy):
    """Decoding that runs `drop_layers` in every (`light_steps` + 1)-th step only.

    `policy_params` are the adapters of `init_lora_drop`, trained: with their zero start this policy is worse than
    leaving the layers out.

    Attributes:
      drop_layers: the layers that light steps do not run.
      light_steps: k, steps between two full ones. A step is a call of the network, the same for all sequences of a
        batch; the prompt's pass is the first full one.
      alpha: the correction is scaled by alpha / rank.
      base: what the correction is added to: "anchor" (the layer's output at the last full step; paper and code),
        "delta" (the layer's input plus what the layer added at the last full step; ours) or "identity" (the layer's
        input: plain skipping, the baseline to beat).
      reuse: "anchor", or "previous" to take the output at the previous step instead, an approximation of an
        approximation (the paper's formula as a summary gives it; the authors' code takes the anchor).
      correction_input: what the correction sees: the layer's input now ("current", the code) or at the previous step
        ("previous", the paper's formula).
      kv: "drop" stores no keys and values of dropped layers in light steps; "write" computes and stores them, from
        the layer's input: fewer bytes saved, no hole in what later full steps look at.

    Raises ValueError for values out of range and for adapters of another shape; warns of adapters that are all zero.
    """

    drop_layers: tuple[int, ...] = ()
    light_steps: int = 3
    alpha: float = 16.0
    base: Literal["anchor", "delta", "identity"] = "anchor"
    reuse: Literal["anchor", "previous"] = "anchor"
    correction_input: Literal["current", "previous"] = "current"
    kv: Literal["drop", "write"] = "drop"

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        if self.light_steps < 0:
            raise ValueError(f"light_steps is {self.light_steps}; it must be 0 or more")

    @property
    def period(self) -> int:
        return self.light_steps + 1

    def dropped(self, num_layers: int) -> tuple[int, ...]:
        """The dropped layers, checked."""
        layers = check_layers("drop_layers", self.drop_layers, num_layers, empty=True)
        if missing := set(layers) - set(self.kept(num_layers)):
            raise ValueError(f"drop_layers {sorted(missing)} are not among keep_layers: they never run at all")
        return layers

    def layout(self, num_layers: int) -> CacheLayout:
        kept, dropped = self.kept(num_layers), self.dropped(num_layers)
        others = tuple(layer for layer in kept if layer not in dropped)
        if self.kv == "write" or not dropped:
            return CacheLayout((kept,))
        return CacheLayout((others, dropped), (1, self.period)) if others else CacheLayout((dropped,), (self.period,))

    def check(self, config: decoder.DecoderConfig, policy_params: Any) -> None:
        super().check(config, policy_params)
        self._check_adapters(config, policy_params)
        if self.dropped(config.num_layers) and self.base != "identity" and not np.any(policy_params["up"]):
            warnings.warn(
                "LoRA-Drop with adapters that were never trained (all zero) is worse than leaving the layers out: "
                "train them by lora_drop_loss, or use base='identity'",
                stacklevel=3,
            )

    def prefill(self, network: Network, h, cache, policy_params):
        dropped, place = self._places(network)
        if not dropped.any():
            return super().prefill(network, h, cache, policy_params)

        def layer(carry, index):
            h, cache, state = carry
            new, cache = network.attention(h, cache, index)
            new = network.feed_forward(new, index)
            state = when(
                network.pick(dropped, index),
                lambda state: self._remember(state, network.pick(place, index), network.last(h), network.last(new)),
                state,
            )
            return (new, cache, state), None

        shape = (len(self.drop_layers), h.shape[0], 1, h.shape[2])
        state = Anchors(jnp.zeros(shape, h.dtype), jnp.zeros(shape, h.dtype))
        (h, cache, state), _ = network.over(range(network.num_layers), layer, (h, cache, state))
        return h, cache, state, jnp.ones((network.num_layers, 2), bool)

    def decode(self, network: Network, h, cache, state, policy_params, phase: int):
        dropped, place = self._places(network)
        if not dropped.any():
            return super().decode(network, h, cache, state, policy_params, phase)
        feeds = self.feeds(network.num_layers)
        light = phase != 0

        def run(index, h, cache, state):
            new, cache = network.attention(h, cache, index)
            new = network.feed_forward(new, index, network.pick(feeds, index))
            remember = lambda state: self._remember(state, network.pick(place, index), h, new)  # noqa: E731
            return new, cache, when(network.pick(dropped, index), remember, state)

        def reuse(index, h, cache, state):
            if self.kv == "write":
                cache = network.store(h, cache, index)
            position = network.pick(place, index)
            base = {"anchor": state.outputs[position], "delta": h + state.outputs[position], "identity": h}[self.base]
            seen = h if self.correction_input == "current" else state.inputs[position]
            new = base + _correction(policy_params, position, seen, self.alpha).astype(h.dtype)
            outputs = state.outputs if self.reuse == "anchor" else self._remember(state, position, h, new).outputs
            return new, cache, Anchors(outputs, _put(state.inputs, position, h))

        def layer(carry, index):
            left_out = network.pick(dropped, index) if light else np.bool_(False)
            carry = when(~left_out, functools.partial(run, index), *carry)
            carry = when(left_out, functools.partial(reuse, index), *carry)
            ran = ~left_out
            return carry, jnp.stack([jnp.asarray(ran), jnp.asarray(ran & network.pick(feeds, index))])

        layers = self.kept(network.num_layers)
        (h, cache, state), ran = network.over(layers, layer, (h, cache, state))
        return h, cache, state, all_layers(ran, layers, network.num_layers)

    def kv_fraction(self, num_layers: int, prompt_tokens: int, new_tokens: int) -> float:
        """Share of a whole network's cache that this one's takes, counted in slots."""
        layout = self.layout(num_layers)
        slots = layout.slots(prompt_tokens, new_tokens)
        held = sum(len(group) * size for group, size in zip(layout.groups, slots, strict=True))
        return held / (num_layers * (prompt_tokens + new_tokens))

    def decode_ceiling(self, params, config: decoder.DecoderConfig, *, cached_tokens: int = 0, batch: int = 1) -> float:
        """How many times faster decoding can be than the whole network's where reading bounds it.

        `cached_tokens` is how many tokens a layer that stores all of them holds, the prompt among them not told apart:
        a dropped layer is counted as holding every (light_steps + 1)-th.
        """
        sizes = cost.block_bytes(params, config)
        count, dropped, kept = config.num_layers, self.dropped(config.num_layers), self.kept(config.num_layers)
        ran = np.zeros((count, 2), int)
        ran[list(kept)] = self.period
        ran[:, 1] *= self.feeds(count)
        ran[list(dropped)] //= self.period
        layout = self.layout(count)
        slots = tuple(-(-cached_tokens // stride) for stride in layout.strides)
        read = cost.decode_bytes(sizes, config, ran, self.period, batch, layout, slots)
        whole = np.full((count, 2), self.period)
        full = cost.decode_bytes(sizes, config, whole, self.period, batch, Policy().layout(count), (cached_tokens,))
        return full / read

    def _check_adapters(self, config: decoder.DecoderConfig, adapters: Any) -> None:
        count, width = len(self.dropped(config.num_layers)), config.embed_dim
        if not count:
            return
        down, up = adapters["down"].shape, adapters["up"].shape
        if (down[0], down[2]) != (count, width) or up != (count, width, down[1]):
            raise ValueError(
                f"adapters down {down} and up {up} do not fit {count} dropped layers of width {width}; wanted "
                "[N, R, D] and [N, D, R]"
            )

    def _places(self, network: Network) -> tuple[np.ndarray, np.ndarray]:
        layers = self.dropped(network.num_layers)
        place = np.zeros(network.num_layers, int)
        place[list(layers)] = np.arange(len(layers))
        return np.isin(np.arange(network.num_layers), layers), place

    def _remember(self, state: "Anchors", position, h, new) -> "Anchors":
        kept = new - h if self.base == "delta" else new
        return Anchors(_put(state.outputs, position, kept), _put(state.inputs, position, h))


_CHOICES = {
    "base": ("anchor", "delta", "identity"),
    "reuse": ("anchor", "previous"),
    "correction_input": ("current", "previous"),
    "kv": ("drop", "write"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Anchors:
    """What dropped layers gave when they last ran, and what they last saw, both [N, B, 1, D]."""

    outputs: jax.Array
    inputs: jax.Array


def init_lora_drop(
    key: jax.Array, config: decoder.DecoderConfig, drop_layers: Sequence[int], rank: int = 16
) -> dict[str, jax.Array]:
    """Adapters in float32: "down" [N, R, D], Kaiming-uniform (a = sqrt 5), and "up" [N, D, R], zero.

    >>> adapters = init_lora_drop(jax.random.key(0), decoder.decoder_config("gpt2-tiny"), (1,), rank=4)
    >>> adapters["down"].shape, adapters["up"].shape
    ((1, 4, 64), (1, 64, 4))
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    shape = (len(drop_layers), rank, config.embed_dim)
    bound = 1 / math.sqrt(config.embed_dim)
    return {
        "down": jax.random.uniform(key, shape, minval=-bound, maxval=bound),
        "up": jnp.zeros((shape[0], shape[2], rank)),
    }


def lora_drop_forward(
    config: decoder.DecoderConfig,
    params,
    adapters,
    tokens_BxT: jax.Array,
    policy: LoRADrop,
    *,
    prompt_length: int = 1,
    train_kv: Literal["match", "all"] = "match",
) -> jax.Array:
    """Logits [B, T, V] as `policy` decodes them after a prompt of `prompt_length` tokens, all tokens at once.

    Every layer runs for all tokens, so this costs a whole forward pass. The tokens of light steps take their anchor's
    output, gradients flowing through it. `train_kv` "match" hides their keys and values in dropped layers from later
    tokens, as decoding does; "all" shows them (the authors' code, which trains on what it will not see).

    Raises NotImplementedError for `reuse="previous"`: each token then waits for the one before.

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> policy = LoRADrop(drop_layers=(1,))
    >>> adapters = init_lora_drop(jax.random.key(1), config, policy.drop_layers)
    >>> lora_drop_forward(config, params, adapters, jnp.arange(8)[None], policy).shape
    (1, 8, 256)
    """
    if policy.reuse == "previous":
        raise NotImplementedError("reuse='previous' has no parallel form; train with reuse='anchor'")
    if train_kv not in ("match", "all"):
        raise ValueError(f"train_kv is {train_kv!r}; it must be 'match' or 'all'")
    if not 0 < prompt_length <= tokens_BxT.shape[1]:
        raise ValueError(f"prompt_length is {prompt_length}; the sequences have {tokens_BxT.shape[1]} tokens")
    policy._check_adapters(config, adapters)
    network = whole_sequences(config, params, tokens_BxT)
    dropped, place = policy._places(network)
    feeds = policy.feeds(config.num_layers)
    token = np.arange(tokens_BxT.shape[1])
    age = np.maximum(token - prompt_length + 1, 0) % policy.period
    light, anchor, before = age > 0, token - age, np.maximum(token - 1, 0)
    causal = token[None] <= token[:, None]
    # Their own attention is of no account: the output of a light step's token is replaced.
    hidden = light if policy.kv == "drop" and train_kv == "match" else np.zeros_like(light)

    def attend(q, k, v, _, layer, active):
        mask = causal[None, None] & ~(network.pick(dropped, layer) & jnp.asarray(hidden)[None, None, None])
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla"), None

    network = dataclasses.replace(network, attend=attend)
    # Prompts go through every block, later tokens through those that the policy keeps.
    decoding, is_light = (jnp.asarray(x)[None, :, None] for x in (token >= prompt_length, light))
    kept = np.isin(np.arange(config.num_layers), policy.kept(config.num_layers))

    def layer(h, index):
        attended, _ = network.attention(h, None, index)
        new = jnp.where(decoding & ~network.pick(feeds, index), attended, network.feed_forward(attended, index))
        if dropped.any():
            base = {"anchor": new[:, anchor], "delta": h + (new - h)[:, anchor], "identity": h}[policy.base]
            seen = h if policy.correction_input == "current" else h[:, before]
            reused = base + _correction(adapters, network.pick(place, index), seen, policy.alpha).astype(h.dtype)
            new = jnp.where(is_light & network.pick(dropped, index), reused, new)
        return jnp.where(decoding & ~network.pick(kept, index), h, new), None

    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    h, _ = network.over(range(config.num_layers), layer, h)
    return decoder.output_logits(params, config, h)


def lora_drop_loss(
    config: decoder.DecoderConfig,
    params,
    adapters,
    tokens_BxT: jax.Array,
    policy: LoRADrop,
    *,
    prompt_length: int = 1,
    train_kv: Literal["match", "all"] = "match",
    teacher_weight: float = 0.0,
) -> jax.Array:
    """Mean surprise, in nats, of the tokens after the prompt under `lora_drop_forward`: what trains the adapters.

    The base stays frozen: differentiate in `adapters` alone. `teacher_weight` (0.05 in a variant that the authors'
    code holds but does not use) adds the mean squared distance of the logits from the whole network's.
    """
    logits = lora_drop_forward(
        config, params, adapters, tokens_BxT, policy, prompt_length=prompt_length, train_kv=train_kv
    )[:, prompt_length - 1 : -1]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxT[:, prompt_length:]).mean()
    if teacher_weight:
        whole: Any = jax.lax.stop_gradient(decoder.Decoder(config).apply({"params": params}, tokens_BxT))
        whole = whole[:, prompt_length - 1 : -1]
        loss = loss + teacher_weight * jnp.mean((logits - whole) ** 2)
    return loss


def _correction(adapters, position, h_BxTxD, alpha: float) -> jax.Array:
    down, up = adapters["down"][position].astype(jnp.float32), adapters["up"][position].astype(jnp.float32)
    low = jnp.einsum("btd,rd->btr", h_BxTxD.astype(jnp.float32), down)
    return alpha / down.shape[0] * jnp.einsum("btr,dr->btd", low, up)


def _put(stack, position, x):
    return jax.lax.dynamic_update_index_in_dim(stack, x.astype(stack.dtype), position, 0)
