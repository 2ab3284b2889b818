"""FFN-SkipLLM: feed-forward blocks that hardly turn the residual stream are left out, token by token.

Attention runs in every layer, so every key and value is written and the cache needs no repair. Where the cosine
between the stream before and after a feed-forward block (after the residual sum) reaches a threshold, the blocks of the
next layers are skipped: that block itself had to run for the test, so the test can only steer what comes later.

Shape letters: B batch, T tokens, L layers.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models import decoder
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.policy import Policy, all_layers
from jaxskip.skipping.scan import Network


@dataclasses.dataclass(frozen=True)
class FFNSkip(Policy):
    """Skips the feed-forward blocks of the next `window` layers after one that turned the stream little.

    Of the sources of arXiv 2404.03865 (no official code) this fixes what they leave open: a window that ends arms
    again with the next block that runs, prompts are read by the whole network, and nothing is carried from token to
    token. Layers that the base class leaves out do not count; blocks that it leaves out count for `max_run` alone.

    Attributes:
      tau: least cosine similarity that starts a window; above 1 nothing is skipped. See `calibrate_ffn_skip`.
      cold_start, cold_end: layers at the bottom and at the top whose blocks always run; None for a tenth of L each,
        at least 2.
      warm_up: generated tokens that the whole network computes first (the first of them comes from the prompt's pass).
      window: k, blocks skipped at a time.
      granularity: "batch": one decision for all rows, on the mean over the live ones. "token": each row decides, and a
        block is executed where any live row wants it; with B independent rows that skip with probability p, only
        p^B of the blocks are saved.
      max_run: most blocks in a row that are skipped; the rest of a window goes on behind the one that runs. None for
        no limit.

    Raises ValueError for values out of range, and where the cold layers leave none.

    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=6, dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> from jaxskip.skipping import generate
    >>> policy = FFNSkip(tau=0.9, cold_start=1, cold_end=1, warm_up=0, window=2)
    >>> generate(config, params, [[1, 2, 3]], max_new_tokens=5, policy=policy).ran[:, 1].tolist()
    [4, 4, 0, 0, 4, 4]
    """

    tau: float = 0.98
    cold_start: int | None = None
    cold_end: int | None = None
    warm_up: int = 16
    window: int = 3
    granularity: Literal["batch", "token"] = "batch"
    max_run: int | None = None

    def __post_init__(self):
        if self.granularity not in ("batch", "token"):
            raise ValueError(f"granularity is {self.granularity!r}; it must be 'batch' or 'token'")
        for name, least in (("cold_start", 0), ("cold_end", 0), ("warm_up", 0), ("window", 1), ("max_run", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")

    def check(self, config: decoder.DecoderConfig, policy_params: Any) -> None:
        super().check(config, policy_params)
        self.warm_layers(config.num_layers)

    def warm_layers(self, num_layers: int) -> np.ndarray:
        """bool [L]: layers whose blocks may be skipped."""
        tenth = max(2, round(num_layers / 10))
        start = tenth if self.cold_start is None else self.cold_start
        stop = num_layers - (tenth if self.cold_end is None else self.cold_end)
        if start >= stop:
            raise ValueError(
                f"cold_start {self.cold_start} and cold_end {self.cold_end} leave none of {num_layers} layers to skip; "
                "None means a tenth of the layers, at least 2"
            )
        return (np.arange(num_layers) >= start) & (np.arange(num_layers) < stop)

    def decode(self, network: Network, h, cache, state, policy_params, phase: int) -> tuple[Any, Any, Any, Any]:
        h, cache, ran, _ = self._run(network, h, cache)
        return h, cache, state, ran

    def _run(self, network: Network, h, cache):
        """(h, cache, bool [L, 2] of what was executed, bool [L, B, T] of the blocks that changed each token)."""
        feeds, warm = self.feeds(network.num_layers), self.warm_layers(network.num_layers)
        warmed_up = network.index >= self.warm_up
        if self.granularity == "batch":
            warmed_up = warmed_up[:1]

        def layer(carry, index):
            h, cache, left, run = carry
            h, cache = network.attention(h, cache, index)
            feed = network.pick(feeds, index)
            eligible = warmed_up & network.pick(warm, index) & feed
            skips = self._skips(eligible, left, run)
            wanted = ~skips & network.real & feed

            absent = isinstance(feed, np.bool_) and not feed
            executed = False if absent else jnp.any(wanted)
            if not absent:  # decided once: else every kernel of a layer goes through the history of those before it
                left, run, skips, executed = jax.lax.optimization_barrier((left, run, skips, executed))
            new = network.feed_forward(h, index, executed)
            similarity = jnp.where(executed, self._similarity(h, new, network.real), 0)
            h = jnp.where(wanted[..., None], new, h)
            left, run = self._after(skips, eligible, feed, similarity, left, run)
            return (h, cache, left, run), (jnp.stack([jnp.bool_(True), jnp.asarray(executed)]), wanted)

        layers, zeros = self.kept(network.num_layers), jnp.zeros(warmed_up.shape, jnp.int32)
        (h, cache, _, _), (ran, wanted) = network.over(layers, layer, (h, cache, zeros, zeros))
        each = jnp.zeros((network.num_layers, *h.shape[:2]), bool).at[np.asarray(layers)].set(wanted)
        return h, cache, all_layers(ran, layers, network.num_layers), each

    def _similarity(self, before, after, real):
        similarity = cosine(before, after)
        if self.granularity == "token":
            return similarity
        live = jnp.maximum(real.sum(axis=0, keepdims=True), 1)
        return jnp.where(real, similarity, 0).sum(axis=0, keepdims=True) / live

    # The recurrence over layers, for NumPy and JAX alike: `left` blocks of the window, and a `run` of skips so far.
    def _skips(self, eligible, left, run):
        skips = eligible & (left > 0)
        return skips if self.max_run is None else skips & (run < self.max_run)

    def _after(self, skips, eligible, feed, similarity, left, run):
        armed = eligible & ~skips & (left == 0) & (similarity >= self.tau)
        return left - skips + self.window * armed, (run + 1) * (skips | ~feed)


def cosine(x, y):
    """Cosine similarity along the last axis, in float32 whatever the dtype: near 0.98 a step of bfloat16 is 0.004.

    >>> float(cosine(jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])))
    1.0
    """
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-12)


class FFNTrace(NamedTuple):
    """What feed-forward blocks do to the stream when all run, float32 [L, B, T].

    `cos` compares the stream before and after a block: the signal of FFN-SkipLLM. `block_cos` compares it with the
    block's output alone, without the residual sum: near 0, and no signal.
    """

    cos: jax.Array
    block_cos: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def ffn_similarity(config: decoder.DecoderConfig, params, tokens_BxT: jax.Array) -> FFNTrace:
    """Runs the whole network over whole sequences and measures every feed-forward block; for calibration.

    >>> config = decoder.decoder_config("gpt2-tiny")
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> ffn_similarity(config, params, jnp.arange(8)[None]).cos.shape
    (2, 1, 8)
    """
    network = whole_sequences(config, params, tokens_BxT)

    def layer(h, index):
        before, _ = network.attention(h, None, index)
        after = network.feed_forward(before, index)
        return after, FFNTrace(cosine(before, after), cosine(before, after - before))

    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    return network.over(range(config.num_layers), layer, h)[1]


@functools.partial(jax.jit, static_argnums=(0, 3))
def ffn_skip_forward(
    config: decoder.DecoderConfig, params, tokens_BxT: jax.Array, policy: FFNSkip
) -> tuple[jax.Array, jax.Array]:
    """As `forward`: logits float32 [B, T, V]; and which blocks each token ran, bool [L, B, T].

    This is the ratio that was asked for. What a batch saves is less: a block is executed where any token runs it.

    >>> config = decoder.decoder_config("gpt2-tiny", num_layers=4, dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> policy = FFNSkip(tau=-1.0, cold_start=0, cold_end=1, warm_up=2, window=1)
    >>> _, ran = ffn_skip_forward(config, params, jnp.arange(4)[None], policy)
    >>> ran[:, 0].astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    """
    network = whole_sequences(config, params, tokens_BxT)
    h = decoder.embed_tokens(params, config, tokens_BxT, network.positions)
    h, _, _, ran = policy._run(network, h, None)
    return decoder.output_logits(params, config, h), ran


def simulate_ffn_skip(policy: FFNSkip, cos_LxBxT) -> np.ndarray:
    """bool [L, B, T]: which blocks each token would run, did skipping not change the similarities themselves.

    On the host. Rows are one batch, and token t of a row is its generated token number t.

    >>> cos = np.array([0.5, 0.99, 0.99, 0.99, 0.99, 0.99]).reshape(6, 1, 1)
    >>> policy = FFNSkip(tau=0.98, cold_start=1, cold_end=1, warm_up=0, window=2)
    >>> simulate_ffn_skip(policy, cos)[:, 0, 0].astype(int).tolist()
    [1, 1, 0, 0, 1, 1]
    """
    cos = np.asarray(cos_LxBxT)
    if cos.ndim != 3:
        raise ValueError(f"cos has shape {cos.shape}; wanted [layers, batch, tokens]")
    decided = cos.mean(axis=1, keepdims=True) if policy.granularity == "batch" else cos
    warmed_up = np.arange(cos.shape[2])[None] >= policy.warm_up
    left = run = np.zeros(decided.shape[1:], int)
    ran = np.ones(cos.shape, bool)
    for index, warm in enumerate(policy.warm_layers(len(cos))):
        eligible = warmed_up & warm
        skips = policy._skips(eligible, left, run)
        left, run = policy._after(skips, eligible, np.True_, decided[index], left, run)
        ran[index] = ~skips
    return ran


def calibrate_ffn_skip(cos_LxBxT, *, target_ratio: float = 0.25, policy: FFNSkip = FFNSkip()) -> FFNSkip:
    """`policy` with the threshold at which the simulation skips `target_ratio` of all blocks behind the warm-up.

    Cold regions that `policy` leaves open (None) become those outside the widest range of layers that begins and ends
    with a mean similarity of at least the median layer's. Rows of `cos`, from `ffn_similarity`, are one batch where
    granularity is "batch": calibrate for batch 1 with "token".

    Raises ValueError for a ratio that this window and these cold regions cannot reach, and for a trace that ends
    within the warm-up.

    >>> cos = np.random.default_rng(0).uniform(0.9, 1.0, (12, 4, 50))
    >>> policy = calibrate_ffn_skip(cos, target_ratio=0.3, policy=FFNSkip(granularity="token"))
    >>> bool(abs(1 - simulate_ffn_skip(policy, cos)[..., 16:].mean() - 0.3) < 0.01)
    True
    """
    cos = np.asarray(cos_LxBxT)
    if cos.ndim != 3 or cos.shape[2] <= policy.warm_up:
        raise ValueError(
            f"cos has shape {cos.shape}; wanted [layers, batch, tokens], more tokens than a warm-up of {policy.warm_up}"
        )
    means = cos.mean(axis=(1, 2))
    saturated = np.flatnonzero(means >= np.median(means))
    policy = dataclasses.replace(
        policy,
        cold_start=int(saturated[0]) if policy.cold_start is None else policy.cold_start,
        cold_end=int(len(cos) - 1 - saturated[-1]) if policy.cold_end is None else policy.cold_end,
    )

    def skipped(tau) -> float:
        ran = simulate_ffn_skip(dataclasses.replace(policy, tau=float(tau)), cos)
        return 1 - ran[..., policy.warm_up :].mean()

    decided = cos.mean(axis=1) if policy.granularity == "batch" else cos
    candidates = np.unique(decided[policy.warm_layers(len(cos))])
    most = skipped(candidates[0])
    if not 0 < target_ratio <= most:
        raise ValueError(
            f"target_ratio is {target_ratio}; a window of {policy.window} between {policy.cold_start} and "
            f"{policy.cold_end} cold layers can skip more than 0 and at most {most:.3f} of the blocks"
        )
    low, high = 0, len(candidates) - 1  # the ratio falls with tau, as good as monotonically
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if skipped(candidates[middle]) >= target_ratio else (low, middle)
    nearest = min(candidates[low], candidates[high], key=lambda tau: abs(skipped(tau) - target_ratio))
    return dataclasses.replace(policy, tau=float(nearest))


def static_ffn_skip(scores_L, skip: int, *, policy: FFNSkip = FFNSkip()) -> Policy:
    """The same `skip` blocks left out for every token: those with the highest scores, decided once.

    `scores` [L] are mean similarities of a calibration trace, or `-ffn_ablation(...)`. The cold regions and `max_run`
    of `policy` hold here too. Nothing is tested while decoding, and no conditional is left in the program.

    Raises ValueError where fewer than `skip` blocks may go.

    >>> static_ffn_skip([0.1, 0.5, 0.9, 0.7, 0.6, 0.2], 2, policy=FFNSkip(cold_start=1, cold_end=1)).keep_feed_forwards
    (0, 1, 4, 5)
    """
    scores = np.asarray(scores_L)
    warm = policy.warm_layers(len(scores))
    ran = np.ones(len(scores), bool)
    for layer in np.argsort(-scores, kind="stable"):
        if (~ran).sum() == skip:
            break
        ran[layer] = not (warm[layer] and _run_through(~ran, layer) <= (policy.max_run or len(scores)))
    if (~ran).sum() != skip:
        raise ValueError(
            f"skip is {skip}; cold regions and max_run {policy.max_run} leave {(~ran).sum()} blocks to skip"
        )
    return Policy(keep_feed_forwards=tuple(np.flatnonzero(ran).tolist()))


def _run_through(skipped, layer) -> int:
    """Length of the run of skips that `layer` would be part of."""
    below, above = layer, layer
    while below > 0 and skipped[below - 1]:
        below -= 1
    while above < len(skipped) - 1 and skipped[above + 1]:
        above += 1
    return above - below + 1


@functools.partial(jax.jit, static_argnums=0)
def ffn_ablation(config: decoder.DecoderConfig, params, tokens_BxT: jax.Array) -> jax.Array:
    """Rise of the next-token loss in nats, float32 [L], when one feed-forward block alone is left out everywhere.

    Costs L passes. It ranks blocks by what they do to the loss, which similarity does not: a block that turns the
    stream little may still write what later layers rely on. Ours, not the paper's.

    >>> config = decoder.decoder_config("gpt2-tiny")
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> ffn_ablation(config, params, jnp.arange(8)[None]).shape
    (2,)
    """
    network = whole_sequences(config, params, tokens_BxT)
    h0 = decoder.embed_tokens(params, config, tokens_BxT, network.positions)

    def loss_without(absent):
        def layer(h, index):
            h, _ = network.attention(h, None, index)
            return network.feed_forward(h, index, index != absent), None

        h, _ = network.over(range(config.num_layers), layer, h0)
        scores = jax.nn.log_softmax(decoder.output_logits(params, config, h)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(scores, tokens_BxT[:, 1:, None], axis=-1))

    losses = jax.lax.map(loss_without, jnp.arange(-1, config.num_layers))
    return losses[1:] - losses[0]
