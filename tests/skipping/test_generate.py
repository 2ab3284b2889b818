import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.models import DECODER_PARTITION_RULES, fuse_projections
from jaxskip.skipping import Policy, Sampling, forward, generate, score, take_layers, unstack_layers
from jaxskip.skipping.generate import _decode_chunk, _prefill
from jaxskip.training import make_mesh, param_shardings
from tests.skipping.tiny import GPT2, LLAMA, TEXT, logits, nats, params

MODELS = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
# Cached and uncached attention add the same float32 numbers in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def greedy(config, prompt, count, some_params=None):
    """Plain decoding, the whole network over the whole text for every token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, 32), int)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(logits(config, padded, some_params)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@MODELS
def test_prompts_of_different_lengths_continue_as_each_would_alone(config):
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist(), [5]]
    out = generate(config, params(config), prompts, max_new_tokens=12, chunk=4)
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        assert tokens.tolist() == greedy(config, prompt, 12)
    assert out.steps == 11 and (out.ran == 11).all() and out.prefill_ran.all()
    assert out.bytes_read == out.bytes_full and out.share_skipped.tolist() == [0, 0]


@MODELS
def test_decoding_step_by_step_scores_text_as_the_network_does(config):
    found, ran = score(config, params(config), TEXT, prompt_length=5)
    np.testing.assert_allclose(found, nats(logits(config, TEXT), TEXT, 5), **CLOSE)
    assert (np.asarray(ran) == 18).all()


@MODELS
@pytest.mark.parametrize(
    "change", [pytest.param("unrolled", marks=pytest.mark.slow), pytest.param("fused", marks=pytest.mark.slow), "both"]
)
def test_unrolled_and_fused_weights_are_the_same_network(config, change):
    weights = params(config)
    if change != "unrolled":
        weights, config = fuse_projections(weights, config)
        np.testing.assert_allclose(logits(config, TEXT, weights), logits_of_plain(config), **CLOSE)
    if change != "fused":
        weights = unstack_layers(weights)
    found, _ = score(config, weights, TEXT, prompt_length=5, policy=Policy(keep_layers=(0, 2)))
    plain = dataclasses.replace(config, fused=False)
    expected, _ = score(plain, params(plain), TEXT, prompt_length=5, policy=Policy(keep_layers=(0, 2)))
    np.testing.assert_allclose(found, expected, **CLOSE)


def logits_of_plain(config):
    return logits(dataclasses.replace(config, fused=False), TEXT)


@pytest.mark.slow
def test_left_out_layers_are_a_smaller_network_for_new_tokens():
    """Whole sequences: the network without the layers. Decoding: the same from the first new token on, over a prompt
    that the whole network read."""
    keep = (0, 3)
    policy = Policy(keep_layers=keep)
    small = dataclasses.replace(LLAMA, num_layers=2)
    small_params = {**params(LLAMA), "layers": take_layers(params(LLAMA)["layers"], keep)}
    out, _, ran = forward(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=policy)
    np.testing.assert_allclose(out, logits(small, TEXT, small_params), **CLOSE)
    assert ran.tolist() == [[True, True], [False, False], [False, False], [True, True]]

    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=8, policy=policy)
    np.testing.assert_allclose(found[:, 0], nats(logits(LLAMA, TEXT), TEXT, 8)[:, 0], **CLOSE)
    assert np.abs(found[:, 1:] - nats(logits(LLAMA, TEXT), TEXT, 9)).min(axis=1).max() > 1e-3
    np.testing.assert_allclose(found[:, 1:], two_passes(keep, 8), **CLOSE)
    assert np.asarray(ran)[:, 0].tolist() == [15, 0, 0, 15]


def two_passes(keep, length):
    """Teacher-forced reference: full-depth states and keys of the prompt, then kept layers over the rest."""
    from jaxskip.models import decoder
    from jaxskip.skipping import CacheLayout

    layers = params(LLAMA)["layers"]
    tokens = jnp.asarray(TEXT)
    positions = jnp.broadcast_to(jnp.arange(TEXT.shape[1])[None], TEXT.shape)
    h = decoder.embed_tokens(params(LLAMA), LLAMA, tokens, positions)
    prompt = h[:, :length]
    keys, values = [], []
    block, tables = decoder.Block(LLAMA), decoder.rotary(LLAMA, positions)
    first = tuple(table[:, :length] for table in tables)
    for i in range(LLAMA.num_layers):
        p = {"params": jax.tree.map(lambda x, i=i: x[i], layers)}
        q, k, v = block.apply(p, prompt, 1.0, first, method="heads")
        keys.append(k)
        values.append(v)
        prompt = block.apply(p, prompt, decoder.causal_attention(LLAMA, q, k, v), method="attended")
        prompt = block.apply(p, prompt, method="feed_forward")
    rest, second = h[:, length:], tuple(table[:, length:] for table in tables)
    mask = (jnp.arange(TEXT.shape[1])[None] <= jnp.arange(length, TEXT.shape[1])[:, None])[None, None]
    for i in keep:
        p = {"params": jax.tree.map(lambda x, i=i: x[i], layers)}
        q, k, v = block.apply(p, rest, 1.0, second, method="heads")
        k, v = jnp.concatenate([keys[i], k], axis=1), jnp.concatenate([values[i], v], axis=1)
        rest = block.apply(p, rest, jax.nn.dot_product_attention(q, k, v, mask=mask), method="attended")
        rest = block.apply(p, rest, method="feed_forward")
    assert CacheLayout((keep,)).layers == keep
    return nats(decoder.output_logits(params(LLAMA), LLAMA, rest), TEXT[:, length:], 1)


@pytest.mark.parametrize("unroll", [False, True], ids=["stacked", "unrolled"])
def test_feed_forward_blocks_left_out_keep_their_attention(unroll):
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    policy = Policy(keep_feed_forwards=(0, 3))
    found, ran = score(LLAMA, weights, TEXT, prompt_length=1, policy=policy)
    assert np.asarray(ran).tolist() == [[22, 22], [22, 0], [22, 0], [22, 22]]
    silent = jax.tree.map(lambda x: x, params(LLAMA))
    silent["layers"]["mlp"]["down"]["kernel"] = silent["layers"]["mlp"]["down"]["kernel"].at[1:3].set(0)
    whole = nats(logits(LLAMA, TEXT, silent), TEXT, 1)
    # The first token was read in full, and is looked at by the others: silence it too by giving it no weight.
    out, _, _ = forward(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=policy)
    np.testing.assert_allclose(nats(out, TEXT, 1), whole, **CLOSE)
    assert np.abs(found - whole).max() > 1e-3


def test_the_cache_has_slots_for_what_is_kept_only():
    whole = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=3)
    half = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=3, policy=Policy(keep_layers=(0, 3)))
    assert half.cache_bytes * 2 == whole.cache_bytes == 2 * 4 * (32 + 32) * 2 * 8 * 4
    assert half.bytes_read < half.bytes_full == whole.bytes_read and half.ceiling > 1.3
    assert half.share_skipped.tolist() == [0.5, 0.5]


@pytest.mark.slow
def test_programs_do_not_grow_with_the_number_of_prompts():
    _prefill.clear_cache(), _decode_chunk.clear_cache()
    for length in range(1, 70, 4):
        generate(LLAMA, params(LLAMA), [list(range(1, 1 + min(length, 60)))], max_new_tokens=1 + length % 30, chunk=8)
    assert _prefill._cache_size() == 2 and _decode_chunk._cache_size() == 2  # buckets 32 and 64


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(16, marks=pytest.mark.slow)]
)
def test_stop_tokens_end_their_own_sequence(chunk):
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist()]
    free = [greedy(LLAMA, prompt, 12) for prompt in prompts]
    stop = free[0][4]
    seen = []
    out = generate(
        LLAMA, params(LLAMA), prompts, max_new_tokens=12, stop_tokens=(stop,), chunk=chunk, on_tokens=seen.append
    )
    for tokens, whole in zip(out.tokens, free, strict=True):
        assert tokens.tolist() == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    streamed = np.concatenate(seen, axis=1)
    assert [row[row >= 0].tolist() for row in streamed] == [tokens.tolist() for tokens in out.tokens]
    assert out.steps == max(len(tokens) for tokens in out.tokens) - 1
    alone = generate(LLAMA, params(LLAMA), prompts[:1], max_new_tokens=12, stop_tokens=(stop,), chunk=chunk)
    assert alone.steps == len(alone.tokens[0]) - 1 == free[0].index(stop)


def test_a_key_gives_the_same_tokens_whatever_the_chunk():
    arguments = {"max_new_tokens": 20, "sampling": Sampling(1.0), "key": jax.random.key(3)}
    first, second = (generate(LLAMA, params(LLAMA), [[1, 2]], chunk=chunk, **arguments) for chunk in (3, 16))
    np.testing.assert_array_equal(first.tokens[0], second.tokens[0])
    other = generate(LLAMA, params(LLAMA), [[1, 2]], **(arguments | {"key": jax.random.key(4)}))
    assert (other.tokens[0] != first.tokens[0]).any()


@pytest.mark.multidevice
@pytest.mark.parametrize("policy", [Policy(), Policy(keep_layers=(0, 2, 3), keep_feed_forwards=(0, 3))], ids=str)
def test_eight_devices_give_the_tokens_of_one(policy):
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings(params(LLAMA), mesh, DECODER_PARTITION_RULES)
    split = jax.device_put(params(LLAMA), shardings)
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist(), [5], [7, 8]]
    one = generate(LLAMA, params(LLAMA), prompts, max_new_tokens=8, policy=policy)
    many = generate(LLAMA, split, prompts, max_new_tokens=8, policy=policy)
    assert [tokens.tolist() for tokens in many.tokens] == [tokens.tolist() for tokens in one.tokens]


@pytest.mark.slow
def test_bf16_decodes():
    config = dataclasses.replace(LLAMA, dtype=jnp.bfloat16)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params(LLAMA))
    found, _ = score(config, weights, TEXT, prompt_length=5)
    expected = nats(logits(config, TEXT, weights), TEXT, 5)
    # Logits of bf16 states: both sides round 4 layers of states to 8 bits, in the same places but for the softmax.
    np.testing.assert_allclose(found, expected, atol=0.15)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "none may be empty"),
        ([[61]], {}, "token ids 0 .. 60"),
        ([[1.5]], {}, "float64"),
        ([[1] * 120], {"max_new_tokens": 9}, "more than the context of 128"),
        ([[1]], {"max_new_tokens": 0}, "at least 1"),
        ([[1]], {"sampling": Sampling(1.0)}, "needs a key"),
        ([[1]], {"policy": Policy(keep_layers=(1, 4))}, "rising layer indices out of 0 .. 3"),
        ([[1]], {"policy": Policy(keep_layers=())}, "rising layer indices"),
        ([[1]], {"policy": Policy(keep_feed_forwards=(2, 1))}, "keep_feed_forwards is"),
    ],
)
def test_bad_input_is_refused(prompts, changes, message):
    with pytest.raises(ValueError, match=message):
        generate(LLAMA, params(LLAMA), prompts, **{"max_new_tokens": 2, **changes})
