"""One `generate` for every policy: prefill, then a decoding loop that stays on the device for many tokens.

Programs are compiled for buckets of prompt length, room for new tokens and batch size, so their number does not grow
with the number of different prompts.

Shape letters: B batch, P prompt slots, T tokens, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.models import decoder
from jaxskip.skipping import cache as caches
from jaxskip.skipping import cost, scan
from jaxskip.skipping.policy import Policy
from jaxskip.skipping.sampling import Sampling, sample

LEAST_SLOTS = 32


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` gives back.

    Attributes:
      tokens: for each prompt the new token ids, int32 [n], the stop token included where one came.
      steps: decoding steps that ran; the first new token comes from the prompt's pass and needs none.
      prefill_ran: whether attention and feed-forward block of each layer ran for the prompts, bool [L, 2].
      ran: in how many of the steps each of them ran, int [L, 2]: executed and read, not just asked for.
      bytes_read: bytes that these steps read, weights and cache (see `cost.decode_bytes`).
      bytes_full: the same for a network that skips nothing.
      cache_bytes: size of the cache.
      policy: the policy that decoded, as it settled after the prompts.
    """

    tokens: list[np.ndarray]
    steps: int
    prefill_ran: np.ndarray
    ran: np.ndarray
    bytes_read: int
    bytes_full: int
    cache_bytes: int
    policy: Policy

    @property
    def share_skipped(self) -> np.ndarray:
        """Share of attention and of feed-forward blocks that decoding did not execute, float [2]."""
        return 1 - self.ran.sum(axis=0) / max(1, self.steps * len(self.ran))

    @property
    def ceiling(self) -> float:
        """How many times faster decoding can be than the whole network where reading bounds it."""
        return self.bytes_full / max(1, self.bytes_read)


def generate(
    config: decoder.DecoderConfig,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    policy: Policy = Policy(),
    policy_params: Any = None,
    sampling: Sampling = Sampling(),
    key: jax.Array | None = None,
    stop_tokens: Sequence[int] = (),
    on_tokens: Callable[[np.ndarray], None] | None = None,
    chunk: int = 16,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens, running what `policy` does not skip.

    `params` are the decoder's, stacked, or unrolled by `unstack_layers`; on a mesh, the cache is split as they are.
    `prompts` are token ids, of any lengths. Weights are used as they are stored: cast them to `config.dtype` before.
    `policy_params` are the arrays that some policies need (routers, adapters).
    `key` is needed when `sampling.temperature` is above 0; the same key gives the same tokens whatever `chunk` is.
    A sequence ends with its first token out of `stop_tokens`; when all have ended, decoding ends with the chunk.
    `on_tokens` gets the new tokens of all sequences, int32 [B, n], as they come, -1 where a sequence has ended.
    `chunk` steps are one call of the device program, rounded up to whole periods of the policy.

    Raises ValueError for empty or too long prompts, tokens outside the vocabulary, and a missing key.

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> out = generate(config, params, [[1, 2, 3], [4]], max_new_tokens=5, policy=Policy(keep_layers=(1,)))
    >>> [tokens.shape for tokens in out.tokens], out.ran.tolist()
    ([(5,), (5,)], [[0, 0], [4, 4]])
    """
    policy.check(config, policy_params)
    tokens, lengths = _checked_prompts(config, prompts, max_new_tokens)
    if sampling.temperature > 0 and key is None:
        raise ValueError("sampling at a temperature above 0 needs a key, such as jax.random.key(0)")
    key = jax.random.key(0) if key is None else key
    chunk = -(-chunk // policy.period) * policy.period
    room = bucket(-(-max(1, max_new_tokens - 1) // chunk) * chunk)
    slots, batch = tokens.shape[1], tokens.shape[0]
    stop = jnp.asarray(sorted(stop_tokens) or [-1], jnp.int32)

    stacked = not isinstance(params["layers"], tuple)
    layout = policy.layout(config.num_layers)
    sharding = _cache_sharding(config, params, batch, stacked)
    cache = caches.empty_cache(config, layout, batch, slots, room, stacked, sharding)
    logits, cache, state, prefill_ran = _prefill(config, policy, params, policy_params, tokens, lengths, cache)
    config = _config_on(sharding, config)
    policy, cache, state = policy.settle(cache, state)
    layout = policy.layout(config.num_layers)

    token = sample(logits, jax.random.fold_in(key, 0), sampling)
    loop = Loop(cache, state, token, jnp.isin(token, stop), jnp.zeros((config.num_layers, 2), jnp.int32), jnp.int32(0))
    outputs = [token[:, None]]
    if on_tokens is not None:
        on_tokens(np.asarray(outputs[0]))
    ended = np.asarray(loop.ended)
    for start in range(1, max_new_tokens, chunk):
        if ended.all():
            break
        loop, new = _decode_chunk(
            config, policy, sampling, chunk, params, policy_params, loop, lengths, jnp.int32(slots),
            jnp.int32(start), jnp.int32(max_new_tokens), stop, key,
        )  # fmt: skip
        new = new[:, : max_new_tokens - start]
        outputs.append(new)
        ended = np.asarray(loop.ended)
        if on_tokens is not None:
            on_tokens(np.asarray(new))
    tokens = np.concatenate([np.asarray(x) for x in outputs], axis=1)
    steps, ran = int(loop.steps), np.asarray(loop.ran)
    sizes = cost.block_bytes(params, config)
    whole = np.full_like(ran, steps)
    return Generation(
        tokens=[row[row >= 0] for row in tokens],
        steps=steps,
        prefill_ran=np.asarray(prefill_ran),
        ran=ran,
        bytes_read=cost.decode_bytes(sizes, config, ran, steps, batch, layout, layout.slots(slots, room)),
        bytes_full=cost.decode_bytes(
            sizes, config, whole, steps, batch, Policy().layout(config.num_layers), (slots + room,)
        ),
        cache_bytes=loop.cache.nbytes,
        policy=policy,
    )


def score(
    config: decoder.DecoderConfig,
    params,
    tokens: Any,
    *,
    prompt_length: int,
    policy: Policy = Policy(),
    policy_params: Any = None,
) -> tuple[jax.Array, np.ndarray]:
    """Surprise of given text under the very program that `generate` runs, one decoding step a token.

    `tokens` int [B, T] have their first `prompt_length` tokens read as the prompt. Returns the negative log-likelihood
    in nats of the tokens after it, float32 [B, T - prompt_length], and in how many of the T - prompt_length - 1 steps
    each block ran, int [L, 2].

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> nats, ran = score(config, params, jnp.arange(12)[None], prompt_length=4)
    >>> nats.shape, ran.tolist()
    ((1, 8), [[7, 7], [7, 7]])
    """
    policy.check(config, policy_params)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not 0 < prompt_length < tokens.shape[1]:
        raise ValueError(
            f"tokens have shape {tokens.shape}; wanted [B, T] with T > prompt_length = {prompt_length} > 0"
        )
    prompts, lengths = _checked_prompts(config, tokens[:, :prompt_length], tokens.shape[1] - prompt_length)
    batch, slots = prompts.shape
    steps = tokens.shape[1] - prompt_length - 1
    rounds = -(-steps // policy.period)
    stacked = not isinstance(params["layers"], tuple)
    layout = policy.layout(config.num_layers)
    sharding = _cache_sharding(config, params, batch, stacked)
    cache = caches.empty_cache(config, layout, batch, slots, max(1, rounds * policy.period), stacked, sharding)
    logits, cache, state, _ = _prefill(config, policy, params, policy_params, prompts, lengths, cache)
    config = _config_on(sharding, config)
    policy, cache, state = policy.settle(cache, state)
    given = np.zeros((batch, rounds * policy.period + 1), np.int32)
    given[:, : steps + 1] = tokens[:, prompt_length:]
    nats, ran = _score(
        config, policy, params, policy_params, cache, state, lengths, jnp.int32(slots), given, jnp.int32(steps), logits
    )
    return nats[:, : steps + 1], np.asarray(ran)


def forward(
    config: decoder.DecoderConfig,
    params,
    tokens_BxT: jax.Array,
    *,
    policy: Policy = Policy(),
    policy_params: Any = None,
    state: Any = (),
    real_BxT: jax.Array | None = None,
) -> tuple[jax.Array, Any, jax.Array]:
    """The network as `policy` decodes, for all tokens of a sequence at once and without a cache; can be differentiated.

    Returns logits [B, T, V], the policy's last state, and bool [L, 2] of what ran. Every token counts as generated.
    `real` is False for padding at the ends of rows. A policy that carries state from token to token has a function of
    its own for this.

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> forward(config, params, jnp.arange(8)[None], policy=Policy(keep_layers=(0,)))[0].shape
    (1, 8, 256)
    """
    network = whole_sequences(config, params, tokens_BxT, real_BxT)
    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    h, _, state, ran = policy.decode(network, h, None, state, policy_params, 0)
    return decoder.output_logits(params, config, h), state, ran


def whole_sequences(config, params, tokens_BxT, real_BxT=None, layout=None, generated: bool = True) -> scan.Network:
    """The network at all positions of sequences, from the first; with `layout`, what it computes can be cached."""
    if tokens_BxT.ndim != 2 or tokens_BxT.shape[1] > config.context_length:
        raise ValueError(f"tokens have shape {tokens_BxT.shape}; wanted [B, T] with T <= {config.context_length}")
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1])[None], tokens_BxT.shape)
    return scan.Network(
        config=config,
        params=params,
        positions=positions,
        index=positions if generated else jnp.zeros_like(positions),
        real=jnp.ones(tokens_BxT.shape, bool) if real_BxT is None else real_BxT,
        attend=scan.prompt_attention(config, layout),
    )


def bucket(length: int) -> int:
    """The smallest power of two that is at least `length` and `LEAST_SLOTS`.

    >>> bucket(5), bucket(32), bucket(33)
    (32, 32, 64)
    """
    return max(LEAST_SLOTS, 1 << (length - 1).bit_length())


class Loop(NamedTuple):
    """What goes from one decoding step to the next; donated."""

    cache: caches.KVCache
    state: Any  # the policy's
    token: jax.Array  # int32 [B], sampled and not yet fed back
    ended: jax.Array  # bool [B]
    ran: jax.Array  # int32 [L, 2]
    steps: jax.Array  # int32


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(6,))
def _prefill(config, policy, params, policy_params, tokens, lengths, cache):
    real = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    network = whole_sequences(config, params, tokens, real, policy.layout(config.num_layers), generated=False)
    h = decoder.embed_tokens(params, config, tokens, network.positions)
    h, cache, state, ran = policy.prefill(network, h, cache, policy_params)
    logits = decoder.output_logits(params, config, network.last(h))
    return logits[:, 0], cache, state, ran


def _decode_step(config, policy, params, policy_params, cache, state, token, live, lengths, prompt_slots, step, phase):
    """Feeds token number `step` - 1 of the new ones; returns logits [B, V] of the next and the rest of the state."""
    positions = (lengths + step - 1)[:, None]
    network = scan.Network(
        config=config,
        params=params,
        positions=positions,
        index=jnp.broadcast_to(step, positions.shape),
        real=live[:, None],
        attend=scan.cached_attention(config, policy.layout(config.num_layers), lengths, prompt_slots, step, live),
    )
    h = decoder.embed_tokens(params, config, token[:, None], positions)
    h, cache, state, ran = policy.decode(network, h, cache, state, policy_params, phase)
    return decoder.output_logits(params, config, h)[:, 0], cache, state, ran


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def _decode_chunk(
    config, policy, sampling, chunk, params, policy_params, loop, lengths, prompt_slots, start, limit, stop, key
):
    def one(loop, step, phase):
        going = ~loop.ended & (step < limit)
        logits, cache, state, ran = _decode_step(
            config, policy, params, policy_params, loop.cache, loop.state, loop.token, going, lengths, prompt_slots,
            step, phase,
        )  # fmt: skip
        token = sample(logits, jax.random.fold_in(key, step), sampling)
        new = jnp.where(going, token, -1)
        alive = jnp.any(going)
        counted = loop.ran + jnp.where(alive, ran.astype(jnp.int32), 0)
        ended = loop.ended | jnp.isin(new, stop)
        return Loop(cache, state, jnp.maximum(new, 0), ended, counted, loop.steps + alive), new

    def several(loop, first):
        new = []
        for offset in range(policy.period):
            loop, token = one(loop, first + offset, (1 + offset) % policy.period)
            new.append(token)
        return loop, jnp.stack(new)

    loop, new = jax.lax.scan(several, loop, start + jnp.arange(0, chunk, policy.period))
    return loop, new.reshape(chunk, -1).T


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(config, policy, params, policy_params, cache, state, lengths, prompt_slots, given, steps, logits):
    live = jnp.ones(given.shape[0], bool)

    def nats(logits, token):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]

    def several(carry, first):
        cache, state, counts = carry
        losses = []
        for offset in range(policy.period):
            step = first + offset
            token, target = given[:, step - 1], given[:, step]
            logits, cache, state, ran = _decode_step(
                config, policy, params, policy_params, cache, state, token, live, lengths, prompt_slots, step,
                (1 + offset) % policy.period,
            )  # fmt: skip
            counts = counts + jnp.where(step <= steps, ran.astype(jnp.int32), 0)
            losses.append(nats(logits, target))
        return (cache, state, counts), jnp.stack(losses)

    counts = jnp.zeros((config.num_layers, 2), jnp.int32)
    first_steps = jnp.arange(1, given.shape[1], policy.period)
    (_, _, counts), losses = jax.lax.scan(several, (cache, state, counts), first_steps)
    losses = jnp.concatenate([nats(logits, given[:, 0])[None], losses.reshape(-1, given.shape[0])])
    return losses.T, counts


def _checked_prompts(config, prompts, max_new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded tokens int32 [B, P] and lengths int32 [B]."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if len(prompts) == 0 or min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("there must be at least one prompt, and none may be empty: begin with the start token")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths.max() + max_new_tokens > config.context_length:
        raise ValueError(
            f"the longest prompt has {lengths.max()} tokens; with {max_new_tokens} new ones that is more than the "
            f"context of {config.context_length}"
        )
    tokens = np.zeros((len(prompts), min(bucket(int(lengths.max())), config.context_length)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        prompt = np.asarray(prompt)
        if not np.issubdtype(prompt.dtype, np.integer) or prompt.min() < 0 or prompt.max() >= config.vocab_size:
            raise ValueError(f"prompts hold token ids 0 .. {config.vocab_size - 1}, not {prompt[:8]} ({prompt.dtype})")
        row[: len(prompt)] = prompt
    return tokens, lengths


def _config_on(sharding, config):
    """The configuration for decoding: XLA cannot split the kernels of a step over a mesh."""
    return config if sharding is None else dataclasses.replace(config, attention="xla")


def _cache_sharding(config, params, batch: int, stacked: bool):
    """Batch over the batch axes and key/value heads over "tensor", on the mesh of the parameters, where they divide."""
    sharding = getattr(params["embed"]["embedding"], "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
        return None
    mesh = sharding.mesh
    rows = [axis for axis in ("data", "fsdp") if axis in mesh.shape]
    split_rows = rows and batch % int(np.prod([mesh.shape[axis] for axis in rows])) == 0
    split_heads = "tensor" in mesh.shape and config.kv_heads % mesh.shape["tensor"] == 0
    spec = (tuple(rows) if split_rows else None, None, "tensor" if split_heads else None)
    return NamedSharding(mesh, P(None, *spec) if stacked else P(*spec))
