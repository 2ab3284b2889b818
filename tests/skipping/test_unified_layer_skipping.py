import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.models import Decoder, DecoderConfig
from jaxskip.skipping import (
    Policy,
    decode_ceiling,
    forward,
    score,
    unified_keep_layers,
    unified_layer_skipping,
    unified_skip_loss,
    unstack_layers,
)
from jaxskip.skipping.cache import empty_cache
from tests.skipping.tiny import GPT2, LLAMA, TEXT, logits, nats, params

# The same float32 numbers, added in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KEEP = (0, 2, 3)


@pytest.mark.parametrize(
    ("speedup", "keep"),
    [
        (2, (*range(0, 27, 2), 29)),
        (3, (*range(0, 25, 3), 29)),
        (5, (0, 6, 12, 18, 24, 29)),
        (10, (0, 15, 29)),
        (1.2, (*range(24), 29)),  # below 2 the authors' rule leaves out one run of late layers
        (1, tuple(range(30))),
    ],
)
def test_the_authors_sets(speedup, keep):
    assert unified_keep_layers(30, speedup) == keep == unified_layer_skipping(30, speedup).keep_layers


def authors_rule(num_layers, speedup):
    """As the card spells their loop."""
    wanted = int(num_layers / speedup + 1e-9)
    kept = {0, num_layers - 1}
    interval = num_layers // (wanted - 1)
    for i in range(1, num_layers - 1):
        if i % interval == 0 and len(kept) < wanted:
            kept.add(i)
    return tuple(sorted(kept))


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 80), st.floats(1, 40), st.sampled_from(["paper_code", "balanced"]))
def test_the_speedup_alone_says_how_many(num_layers, speedup, rule):
    if num_layers / speedup + 1e-9 < 2:
        with pytest.raises(ValueError, match="the first and the last must stay"):
            unified_keep_layers(num_layers, speedup, rule=rule)
        return
    keep = unified_keep_layers(num_layers, speedup, rule=rule)
    assert len(keep) == len(set(keep)) == int(num_layers / speedup + 1e-9)
    assert keep[0] == 0 and keep[-1] == num_layers - 1
    assert rule == "balanced" or keep == authors_rule(num_layers, speedup)


def test_balanced_sets_are_balanced_where_the_authors_are_not():
    for num_layers in range(4, 81):
        for count in range(2, num_layers + 1):
            keep = unified_keep_layers(num_layers, num_layers / count, rule="balanced")
            gaps = np.diff(keep)
            assert len(keep) == count and gaps.max() - gaps.min() <= 1
    assert np.diff(unified_keep_layers(30, 1.2)).max() == 6


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 40), st.sets(st.integers(-8, 7), max_size=2), st.sampled_from(["paper_code", "balanced"]))
def test_protected_layers_replace_others(num_layers, protect, rule):
    keep = unified_keep_layers(num_layers, 2, rule=rule, protect=tuple(protect))
    assert {layer % num_layers for layer in protect} | {0, num_layers - 1} <= set(keep)
    assert len(keep) == num_layers // 2 and list(keep) == sorted(set(keep))


def test_importance_takes_the_place_of_even_spacing():
    importance = [0, 5, 1, 1, 9, 0, 2, 0]
    assert unified_keep_layers(8, 2, importance=importance) == (0, 1, 4, 7)
    assert unified_keep_layers(8, 2, importance=importance, protect=(-2,)) == (0, 4, 6, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speedup": 0.5}, "at least 1"),
        ({"speedup": 5}, "take at most 4"),
        ({"speedup": 2, "rule": "even"}, "'paper_code' or 'balanced'"),
        ({"speedup": 2, "protect": (8,)}, "rising layer indices out of 0 .. 7"),
        ({"speedup": 4, "protect": (3,)}, "fewer than the protected"),
        ({"speedup": 2, "importance": [1, 2]}, "8 finite numbers"),
    ],
)
def test_sets_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        unified_keep_layers(8, **arguments)


def test_a_speedup_of_one_is_the_network():
    run = jax.jit(functools.partial(forward, LLAMA, policy=unified_layer_skipping(4, 1)))
    out, _, ran = run(params(LLAMA), jnp.asarray(TEXT))
    np.testing.assert_allclose(out, logits(LLAMA, TEXT), rtol=0, atol=1e-5)
    assert ran.all()


def test_the_cache_has_one_slot_a_kept_layer():
    cache = empty_cache(LLAMA, Policy(keep_layers=KEEP).layout(4), 2, 32, 32, stacked=True)
    assert {x.shape[0] for x in jax.tree.leaves(cache)} == {len(KEEP)}
    cache = empty_cache(LLAMA, Policy(keep_layers=KEEP).layout(4), 2, 32, 32, stacked=False)
    assert len(jax.tree.leaves(cache)) == 2 * len(KEEP)


@functools.partial(jax.jit, static_argnames=("config", "keep_layers", "full_weight", "similarity_weight"))
def loss_of(config, some_params, prefix, response, keep_layers, **options):
    return unified_skip_loss(config, some_params, prefix, response, keep_layers, **options)


@pytest.mark.parametrize(
    ("config", "unroll"),
    [pytest.param(GPT2, True, marks=pytest.mark.slow), (LLAMA, False)],
    ids=["unrolled", "stacked"],
)
def test_the_loss_is_what_decoding_meets(config, unroll):
    """Prefix in full, response through kept layers over the prefix's full-depth keys: teacher-forced in two passes."""
    keep = (0, config.num_layers - 1)
    weights = unstack_layers(params(config)) if unroll else params(config)
    loss, scalars = loss_of(config, weights, TEXT[:, :8], TEXT[:, 8:], keep)
    found, _ = score(config, params(config), TEXT, prompt_length=8, policy=Policy(keep_layers=keep))
    np.testing.assert_allclose(loss, found.mean(), **CLOSE)
    assert loss == scalars["skipped"] and abs(loss - nats(logits(config, TEXT), TEXT, 8).mean()) > 1e-3


def test_padding_of_prefix_and_response_does_not_count():
    def padded(filling, prefix_lengths, response_lengths):
        prefix, response = np.full((2, 10), filling), np.full((2, 20), filling)
        for row, (p, r) in enumerate(zip(prefix_lengths, response_lengths, strict=True)):
            prefix[row, :p], response[row, :r] = TEXT[row, :p], TEXT[row, p : p + r]
        lengths = {"prefix_lengths": jnp.array(prefix_lengths), "response_lengths": jnp.array(response_lengths)}
        return loss_of(LLAMA, params(LLAMA), prefix, response, (0, 3), **lengths)[0]

    alone, _ = loss_of(LLAMA, params(LLAMA), TEXT[:, :8], TEXT[:, 8:], (0, 3))
    np.testing.assert_allclose(padded(0, (8, 8), (16, 16)), alone, **CLOSE)
    ragged = padded(0, (8, 5), (16, 7))
    assert ragged == padded(9, (8, 5), (16, 7)) and abs(ragged - alone) > 1e-3
    # Every response token counts the same: sums over both rows, the second one longer by a token.
    one, two = padded(0, (8, 5), (16, 7)) * 23, padded(0, (8, 5), (16, 8)) * 24
    assert 0 < two - one < 20


@pytest.mark.slow
def test_the_optional_terms():
    weights = {"full_weight": 0.5, "similarity_weight": 2.0}
    loss, scalars = loss_of(LLAMA, params(LLAMA), TEXT[:, :8], TEXT[:, 8:], KEEP, **weights)
    np.testing.assert_allclose(scalars["full"], nats(logits(LLAMA, TEXT), TEXT, 8).mean(), **CLOSE)
    np.testing.assert_allclose(loss, scalars["skipped"] + 0.5 * scalars["full"] - 2 * scalars["similarity"], rtol=1e-6)
    # Before the first layer is left out both paths are one; behind it they are not.
    assert 1 / 3 < scalars["similarity"] < 0.999
    _, scalars = loss_of(LLAMA, params(LLAMA), TEXT[:, :8], TEXT[:, 8:], tuple(range(4)), **weights)
    np.testing.assert_allclose(scalars["similarity"], 1, atol=1e-6)
    np.testing.assert_allclose(scalars["full"], scalars["skipped"], rtol=1e-6)


def feed_forward_gradients(grads):
    return np.abs(grads["layers"]["mlp"]["down"]["kernel"]).max(axis=(1, 2))


def test_left_out_layers_get_no_gradient_where_nothing_runs_in_full():
    loss = lambda p: forward(GPT2, p, jnp.asarray(TEXT), policy=Policy((0, 2)))[0].std()  # noqa: E731
    assert (feed_forward_gradients(jax.jit(jax.grad(loss))(params(GPT2))) > 0).tolist() == [True, False, True]


@pytest.mark.slow
def test_fine_tuning_with_frozen_embeddings():
    """Left-out layers learn too: from the prefix."""
    tx = optax.chain(optax.adam(3e-3), optax.masked(optax.set_to_zero(), {n: n == "embed" for n in params(LLAMA)}))

    @jax.jit
    def step(p, state):
        loss = lambda p: unified_skip_loss(LLAMA, p, TEXT[:, :8], TEXT[:, 8:], KEEP)  # noqa: E731
        (loss, _), grads = jax.value_and_grad(loss, has_aux=True)(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, loss, grads

    weights, state = params(LLAMA), tx.init(params(LLAMA))
    losses = []
    for _ in range(10):
        weights, state, loss, grads = step(weights, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0] and feed_forward_gradients(grads).min() > 0
    np.testing.assert_array_equal(weights["embed"]["embedding"], params(LLAMA)["embed"]["embedding"])


def test_too_long_a_text_is_refused():
    with pytest.raises(ValueError, match="more than 128"):
        unified_skip_loss(LLAMA, params(LLAMA), np.zeros((1, 100), int), np.zeros((1, 29), int), KEEP)


SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    context_length=8192,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    embed_dim=576,
    mlp_dim=1536,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
)
# BLOOMZ-7B1 but for its positions, which have next to no weights.
BLOOMZ = DecoderConfig(
    vocab_size=250880, context_length=2048, num_layers=30, num_heads=32, embed_dim=4096, use_bias=True
)


@pytest.mark.parametrize(("config", "speedup", "ceiling"), [(SMOLLM2, 2, 1.65), (BLOOMZ, 2, 1.75), (BLOOMZ, 5, 3.16)])
def test_ceilings(config, speedup, ceiling):
    keep = unified_keep_layers(30, speedup)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    assert decode_ceiling(shapes, config, keep) == pytest.approx(ceiling, abs=0.01)
    # A long cache is read by kept layers alone.
    assert decode_ceiling(shapes, config, keep, cached_tokens=10**8, batch=4) == pytest.approx(speedup, rel=1e-3)
