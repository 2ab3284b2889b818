"""Unified Layer Skipping (arXiv 2404.06954): a target speed-up alone says which layers generated tokens go through.

The same evenly spread layers run for every token of every sequence, so batches and key/value caches work as they are,
and left-out layers cost nothing: no weights, no cache. Prompts are read by the whole network. The method fine-tunes the
network under its own skipping (`unified_skip_loss`); without that a deep network breaks down.

Shape letters: B batch, P prefix tokens, R response tokens, L layers, D width, G key/value heads, K head width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxskip.models import decoder
from jaxskip.skipping import cost
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.policy import Policy, check_layers


def unified_keep_layers(
    num_layers: int,
    speedup: float,
    *,
    rule: Literal["paper_code", "balanced"] = "paper_code",
    protect: Sequence[int] = (),
    importance: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """floor(L / speedup) layers, the first and the last among them.

    Args:
      num_layers: L.
      speedup: the target r; what decoding really gains is `decode_ceiling` at most.
      rule: "paper_code" is the authors' (arXiv 2404.06954, official code): every floor(L / (n - 1))-th layer from the
        first, until n are found. It is even for whole r >= 2 only; for 1 < r < 2 it leaves out one run of late layers,
        the worst choice there is. "balanced" rounds n evenly spaced numbers.
      protect: layers that stay, negative ones counted from the end; each takes the place of the nearest other one. Not
        in the paper, which does not ask which layers a model depends on.
      importance: L numbers; the layers of the largest ones stay instead of evenly spaced ones. Not in the paper.

    Raises ValueError where fewer than two layers would stay, and for more protected layers than stay.

    >>> unified_keep_layers(30, 5)
    (0, 6, 12, 18, 24, 29)
    >>> unified_keep_layers(30, 5, protect=(1, 11))
    (0, 1, 11, 18, 24, 29)
    """
    if not speedup >= 1:
        raise ValueError(f"speedup is {speedup}; it must be at least 1")
    count = int(num_layers / speedup + 1e-9)  # 1.6 is a little more than 8/5, and 24 layers at 1.6 leave 15
    if count < 2:
        raise ValueError(
            f"{num_layers} layers at a speedup of {speedup} leave {count}; the first and the last must stay, so take "
            f"at most {num_layers / 2:g}"
        )
    if rule not in ("paper_code", "balanced"):
        raise ValueError(f"rule is {rule!r}; it must be 'paper_code' or 'balanced'")
    fixed = sorted({0, num_layers - 1, *(layer + num_layers if layer < 0 else layer for layer in protect)})
    check_layers("protect", fixed, num_layers)
    if len(fixed) > count:
        raise ValueError(f"{count} layers stay at a speedup of {speedup}, fewer than the protected {fixed}")

    if importance is not None:
        if len(importance) != num_layers or not np.isfinite(importance).all():
            raise ValueError(f"importance needs {num_layers} finite numbers, not {importance}")
        ranked = [int(layer) for layer in np.argsort(-np.asarray(importance), kind="stable") if layer not in fixed]
        return tuple(sorted([*fixed, *ranked[: count - len(fixed)]]))
    if rule == "balanced":
        keep = np.round(np.linspace(0, num_layers - 1, count)).astype(int).tolist()
    else:
        interval = num_layers // (count - 1)
        keep = [*[layer for layer in range(num_layers - 1) if layer % interval == 0][: count - 1], num_layers - 1]
    for layer in fixed:
        if layer not in keep:
            free = [other for other in keep if other not in fixed]
            keep.remove(min(free, key=lambda other: abs(other - layer)))
            keep.append(layer)
    return tuple(sorted(keep))


def unified_layer_skipping(num_layers: int, speedup: float, **options: Any) -> Policy:
    """The policy that decodes through `unified_keep_layers(num_layers, speedup, **options)`.

    >>> unified_layer_skipping(30, 10).keep_layers
    (0, 15, 29)
    """
    return Policy(keep_layers=unified_keep_layers(num_layers, speedup, **options))


def decode_ceiling(
    params, config: decoder.DecoderConfig, keep_layers: Sequence[int], *, cached_tokens: int = 0, batch: int = 1
) -> float:
    """How many times faster a decoding step can be than the whole network's where reading bounds it.

    It falls short of the target speed-up because the output matrix is read in any case. `params` may be
    ShapeDtypeStructs (`jax.eval_shape`); their dtype counts. `cached_tokens` is how long the cache of each of `batch`
    sequences is.

    >>> config = decoder.decoder_config("gpt2-small")
    >>> model = decoder.Decoder(config)
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> round(decode_ceiling(params, config, unified_keep_layers(12, 2)), 2)
    1.52
    """
    sizes = cost.block_bytes(params, config)

    def read(policy: Policy) -> int:
        layout = policy.layout(config.num_layers)
        ran = np.zeros((config.num_layers, 2), int)
        ran[list(layout.layers)] = 1
        return cost.decode_bytes(sizes, config, ran, 1, batch, layout, (cached_tokens,))

    return read(Policy()) / read(Policy(tuple(keep_layers)))


def unified_skip_loss(
    config: decoder.DecoderConfig,
    params,
    prefix_BxP: jax.Array,
    response_BxR: jax.Array,
    keep_layers: Sequence[int],
    *,
    prefix_lengths: jax.Array | None = None,
    response_lengths: jax.Array | None = None,
    full_weight: float = 0.0,
    similarity_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What fine-tuning minimises (arXiv 2404.06954, official code): surprise of the response as `generate` would run.

    The prefix goes through all layers, the response through `keep_layers`, looking at the prefix's full-depth keys and
    values and at its own; L P + |keep| R layers of tokens in all. The authors' settings: Adam, 2e-5 on a cosine with
    3 % warm-up, 128 sequences of 512 tokens, 2 epochs, embeddings frozen (`optax.masked`), both weights 0.

    Args:
      prefix_BxP, response_BxR: token ids, each padded at the end of the rows.
      prefix_lengths, response_lengths: real tokens of each row, int [B], prefixes at least 1; None for all.
      full_weight: times the surprise of the response under the whole network, added.
      similarity_weight: times the mean cosine between the response's states after each kept layer with and without
        skipping, subtracted. Gradients flow into both sides. Either weight costs (L R) more.

    Returns the loss in nats per response token, and the scalars "skipped", and "full" and "similarity" with a weight.

    >>> config = decoder.decoder_config("gpt2-tiny", dtype=jnp.float32)
    >>> params = decoder.Decoder(config).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> tokens = jnp.arange(12)[None]
    >>> loss_fn = jax.jit(unified_skip_loss, static_argnums=(0, 4))
    >>> loss, scalars = loss_fn(config, params, tokens[:, :4], tokens[:, 4:], (0,))
    >>> loss.shape, bool(loss == scalars["skipped"])
    ((), True)
    """
    keep = check_layers("keep_layers", keep_layers, config.num_layers)
    length = prefix_BxP.shape[1]
    if length + response_BxR.shape[1] > config.context_length:
        raise ValueError(
            f"{length} tokens of prefix and {response_BxR.shape[1]} of response are more than {config.context_length}"
        )
    lengths = jnp.full(len(prefix_BxP), length) if prefix_lengths is None else prefix_lengths
    real = jnp.ones(response_BxR.shape, bool)
    if response_lengths is not None:
        real = jnp.arange(response_BxR.shape[1])[None] < response_lengths[:, None]

    prefix = whole_sequences(config, params, prefix_BxP, jnp.arange(length)[None] < lengths[:, None], generated=False)
    h = decoder.embed_tokens(params, config, prefix_BxP, prefix.positions)
    h, (keys_LxBxPxGxK, values_LxBxPxGxK) = _states_and_cache(prefix, h)
    last = prefix.last(h)

    def attend(q, k, v, _, layer, active):
        keys = jnp.concatenate([keys_LxBxPxGxK[layer], k], axis=1)
        values = jnp.concatenate([values_LxBxPxGxK[layer], v], axis=1)
        slot, row = jnp.arange(keys.shape[1])[None, None], jnp.arange(k.shape[1])[None, :, None]
        visible = (slot < lengths[:, None, None]) | ((slot >= length) & (slot - length <= row))
        return jax.nn.dot_product_attention(q, keys, values, mask=visible[:, None], implementation="xla"), None

    positions = lengths[:, None] + jnp.arange(response_BxR.shape[1])[None]
    network = dataclasses.replace(
        whole_sequences(config, params, response_BxR, real), positions=positions, attend=attend
    )
    h = decoder.embed_tokens(params, config, response_BxR, positions)

    def surprise(h):
        """Of the response under states [B, R, D]; its first token is foretold by the prefix's last state."""
        logits = decoder.output_logits(params, config, jnp.concatenate([last, h[:, :-1]], axis=1))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, response_BxR)
        return jnp.mean(nats, where=real)

    skipped, states = network.over(keep, lambda h, layer: (_layer(network, h, layer),) * 2, h)
    scalars = {"skipped": surprise(skipped)}
    loss = scalars["skipped"]
    if full_weight or similarity_weight:
        whole, whole_states = network.over(
            range(config.num_layers), lambda h, layer: (_layer(network, h, layer),) * 2, h
        )
        scalars["full"] = surprise(whole)
        cosine = optax.cosine_similarity(
            states.astype(jnp.float32), whole_states[np.array(keep)].astype(jnp.float32), epsilon=1e-8
        )
        scalars["similarity"] = jnp.mean(cosine, where=real)
        loss = loss + full_weight * scalars["full"] - similarity_weight * scalars["similarity"]
    return loss, scalars


def _layer(network, h, layer):
    h, _ = network.attention(h, None, layer)
    return network.feed_forward(h, layer)


def _states_and_cache(network, h):
    """Last states [B, P, D], and keys and values [L, B, P, G, K] of all layers."""

    def attend(q, k, v, _, layer, active):
        return decoder.causal_attention(network.config, q, k, v), (k, v)

    network = dataclasses.replace(network, attend=attend)

    def layer(h, index):
        h, cached = network.attention(h, None, index)
        return network.feed_forward(h, index), cached

    return network.over(range(network.num_layers), layer, h)
