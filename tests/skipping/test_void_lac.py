import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxskip.models import decoder
from jaxskip.skipping import (
    LAC,
    LACHalt,
    LACTrace,
    Policy,
    forward,
    generate,
    lac_decision,
    lac_trace,
    score,
    unstack_layers,
    void_keep_layers,
)
from jaxskip.skipping.generate import whole_sequences
from tests.skipping.tiny import GPT2, LLAMA, TEXT, logits, nats, params

# The same float32 numbers, added in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ALPHA = 0.8


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def run(config, some_params, policy, real_BxT=None):
    out, _, ran = forward(config, some_params, jnp.asarray(TEXT), policy=policy, real_BxT=real_BxT)
    return out, ran


@functools.partial(jax.jit, static_argnums=0)
def _states(config, some_params):
    network = whole_sequences(config, some_params, jnp.asarray(TEXT))
    h = decoder.embed_tokens(some_params, config, jnp.asarray(TEXT), network.positions)
    states = [h]
    for layer in range(config.num_layers):
        h, _ = network.attention(h, None, layer)
        h = network.feed_forward(h, layer)
        states.append(h)
    return jnp.stack(states)


@functools.cache
def states(config):
    """Residual stream before the first layer and after each, [L + 1, B, T, D]."""
    return np.asarray(_states(config, params(config)))


@functools.partial(jax.jit, static_argnums=0)
def read(config, some_params, h):
    return decoder.output_logits(some_params, config, h)


@functools.partial(jax.jit, static_argnums=0)
def over_layers(config, some_params, taken_LxBxT):
    """Last states [B, T, D] where tokens take the outputs that `taken` says, and changes of length [L, B, T]."""
    network = whole_sequences(config, some_params, jnp.asarray(TEXT))
    h = decoder.embed_tokens(some_params, config, jnp.asarray(TEXT), network.positions)
    changes = []
    for layer in range(config.num_layers):
        y, _ = network.attention(h, None, layer)
        y = network.feed_forward(y, layer)
        changes.append(jnp.linalg.norm(y, axis=-1) - jnp.linalg.norm(h, axis=-1))
        h = jnp.where(taken_LxBxT[layer][..., None], y, h)
    return h, jnp.stack(changes)


def hook(states, alpha):
    """The authors' forward hook for one sequence: active [L, T], and the state that replaces the last layer's."""
    previous_norm, kept = np.linalg.norm(states[0], axis=-1), states[0]
    num_layers = len(states) - 1
    deltas, activated = np.zeros((num_layers, states.shape[1]), np.float32), []
    for layer in range(num_layers):
        norm = np.linalg.norm(states[layer + 1], axis=-1)
        deltas[layer] = norm - previous_norm
        history = deltas[:layer] if layer else deltas[:1]
        halted = deltas[layer] < (history.max(axis=0) - history.min(axis=0)) * np.float32(alpha)
        activated.append(~halted)
        kept = np.where(halted[:, None], kept, states[layer + 1])
        previous_norm = norm
    return np.array(activated), kept


def test_decisions_of_the_card():
    delta = jnp.array([5.0, 3.0, -1.0, 1.0, 4.0])
    assert lac_decision(delta, 0.5).tolist() == [True, True, False, False, True]
    assert lac_decision(delta, 0.0).tolist() == [True, True, False, True, True]
    assert lac_decision(delta, -jnp.inf).all()
    # Two layers in: the second one's range is still 0, and equality counts as active.
    assert lac_decision(jnp.array([-1.0, 0.0, 1.0]), 1.0).tolist() == [False, True, True]


@settings(deadline=None, max_examples=25)
@given(arrays(np.float32, (6, 3), elements=st.floats(-8, 8, width=16)), st.floats(0, 2, width=16))
def test_decisions_one_by_one(delta, alpha):
    found = np.asarray(lac_decision(delta, alpha))
    for layer, token in np.ndindex(delta.shape):
        past = delta[:layer, token]
        threshold = np.float32(alpha) * (past.max() - past.min()) if layer else 0
        assert found[layer, token] == (delta[layer, token] >= threshold)


@pytest.mark.parametrize(
    ("config", "unroll"),
    [pytest.param(GPT2, True, marks=pytest.mark.slow), (LLAMA, False)],
    ids=["unrolled", "stacked"],
)
def test_trace_and_readout_are_the_authors_hook(config, unroll):
    weights = unstack_layers(params(config)) if unroll else params(config)
    trace = lac_trace(config, weights, jnp.asarray(TEXT), policy=LAC(alpha=ALPHA))
    out, ran = run(config, weights, LAC(alpha=ALPHA))
    assert ran.all()  # the mask says nothing about what ran
    active = np.asarray(trace.active)
    assert 0.2 < active.mean() < 0.9 and trace.delta.dtype == jnp.float32
    np.testing.assert_array_equal(active, lac_decision(trace.delta, ALPHA))
    for row in range(2):
        activated, kept = hook(states(config)[:, row], ALPHA)
        np.testing.assert_array_equal(active[:, row], activated)
        expected = read(config, params(config), kept[None])
        np.testing.assert_allclose(out[row], expected[0], **CLOSE)


def test_an_active_last_layer_gives_the_networks_logits_bit_for_bit():
    last = np.asarray(lac_trace(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=LAC(alpha=ALPHA)).active)[-1]
    readout, _ = run(LLAMA, params(LLAMA), LAC(alpha=ALPHA))
    whole, _ = run(LLAMA, params(LLAMA), Policy())
    assert 0 < last.mean() < 1
    np.testing.assert_array_equal(np.asarray(readout)[last], np.asarray(whole)[last])
    assert (np.abs(np.asarray(readout) - np.asarray(whole)).max(axis=-1)[~last] > 1e-3).all()


def test_where_no_layer_is_active_the_embedding_is_read_out():
    shrinking = jax.tree.map(jnp.zeros_like, params(GPT2))
    towards = jax.random.normal(jax.random.key(2), (1, 32))
    shrinking["final_norm"] = params(GPT2)["final_norm"]
    shrinking["embed"]["embedding"] = 10 * towards + params(GPT2)["embed"]["embedding"]
    shrinking["layers"]["mlp"]["down"]["bias"] -= towards
    out, _ = run(GPT2, shrinking, LAC(alpha=0.0))
    np.testing.assert_allclose(out, read(GPT2, shrinking, shrinking["embed"]["embedding"][TEXT]), **CLOSE)


def test_nothing_changes_where_all_layers_are_active():
    policy = LAC(alpha=-np.inf, mode="true_skip")
    np.testing.assert_allclose(run(LLAMA, params(LLAMA), policy)[0], logits(LLAMA, TEXT), **CLOSE)


def test_true_skip_continues_from_what_entered_a_void():
    policy = LAC(alpha=ALPHA, mode="true_skip")
    trace = lac_trace(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=policy)
    active = np.asarray(trace.active)
    np.testing.assert_array_equal(active, lac_decision(trace.delta, ALPHA))
    assert not active.all()
    h, changes = over_layers(LLAMA, params(LLAMA), active)
    np.testing.assert_allclose(trace.delta, changes, rtol=1e-3, atol=1e-4)  # differences of lengths near 10
    np.testing.assert_allclose(run(LLAMA, params(LLAMA), policy)[0], read(LLAMA, params(LLAMA), h), **CLOSE)


@pytest.mark.parametrize(("mode", "unroll"), [("readout", True), ("true_skip", False)])
def test_decoding_scores_text_as_whole_sequences_do(mode, unroll):
    """Keys and values are those of the whole pass: the ordinary ones, or those of the stream without its voids."""
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    policy = LAC(alpha=ALPHA, mode=mode)
    found, ran = score(LLAMA, weights, TEXT, prompt_length=5, policy=policy)
    np.testing.assert_allclose(found, nats(run(LLAMA, params(LLAMA), policy)[0], TEXT, 5), **CLOSE)
    assert (np.asarray(ran) == 18).all()


def test_padding_changes_no_real_tokens_usage():
    trace = lac_trace(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=LAC(alpha=ALPHA))
    padded = np.concatenate([TEXT, np.zeros((2, 8), int)], axis=1)
    real = jnp.asarray(np.arange(32)[None] < 24) & jnp.ones((2, 1), bool)
    with_padding = lac_trace(LLAMA, params(LLAMA), jnp.asarray(padded), policy=LAC(alpha=ALPHA), real_BxT=real)
    np.testing.assert_array_equal(with_padding.active[:, :, :24], trace.active)
    assert with_padding.usage() == trace.usage()
    prompt = np.arange(32)[None] < 9
    shares = [with_padding.usage(prompt), with_padding.usage(~prompt)]
    assert shares[0] * 9 + shares[1] * 15 == pytest.approx(trace.usage() * 24)


def test_lengths_of_16_bit_streams_are_float32():
    config = dataclasses.replace(LLAMA, dtype=jnp.bfloat16)
    delta = lac_trace(config, params(LLAMA), jnp.asarray(TEXT)).delta
    assert delta.dtype == jnp.float32 and (delta.astype(jnp.bfloat16).astype(jnp.float32) != delta).mean() > 0.9


@pytest.mark.parametrize(
    ("policy", "unroll"), [(LAC(mode="trace"), True), (LACHalt(alpha=0.0), False)], ids=["lac", "halt"]
)
def test_static_sets_compose(policy, unroll):
    sets = {"keep_layers": (0, 2, 3), "keep_feed_forwards": (0, 3)}
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    found, ran = score(LLAMA, weights, TEXT, prompt_length=20, policy=dataclasses.replace(policy, **sets))
    expected, ran_too = score(LLAMA, params(LLAMA), TEXT, prompt_length=20, policy=Policy(**sets))
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert ran.tolist() == ran_too.tolist() == [[3, 3], [0, 0], [3, 0], [3, 3]]


def test_voids_of_nearly_every_token_are_left_out_for_good():
    trace = lac_trace(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=LAC(alpha=ALPHA))
    frequency = trace.frequency()
    np.testing.assert_allclose(frequency, np.asarray(trace.active).mean(axis=(1, 2)), rtol=1e-6)
    weakest = 1 + int(np.argmin(frequency[1:-1]))
    between = np.sort(frequency[1:-1])[:2].mean()
    keep = void_keep_layers(trace, min_frequency=between)
    assert keep == tuple(layer for layer in range(4) if layer != weakest)
    assert void_keep_layers(trace, min_frequency=between, protect=(weakest, 0, -1)) == (0, 1, 2, 3)
    assert void_keep_layers(trace, min_frequency=1.0, protect=(-2,)) == tuple(
        layer for layer in range(4) if layer == 2 or frequency[layer] == 1
    )
    out = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=3, policy=Policy(keep_layers=keep))
    assert out.ran[weakest].tolist() == [0, 0]


def exit_layer(lengths, alpha):
    """The parent's loop over the lengths [L + 1, ...] of its states: how many layers run."""
    num_layers = len(lengths) - 1
    previous_norm, previous_delta = lengths[0], np.zeros_like(lengths[0])
    delta, threshold, step = np.zeros_like(lengths[0]), 0.0, 0
    history = np.zeros((num_layers, *np.shape(lengths[0])), np.float32)
    for _ in range(num_layers):
        if np.all(np.abs(delta) < threshold):
            continue
        norm = lengths[step]  # of the state that enters this layer
        history[step] = previous_delta
        threshold = abs(history.max() - history.min()) * np.float32(alpha)
        delta = norm - previous_norm
        previous_norm, previous_delta = norm, delta
        step += 1
    return step


AXES = {"B": (1, 2, 3), "E": (2, 3), "T": 3}


@pytest.mark.parametrize("norm", ["B", "E", "T"])
def test_halting_is_the_parents(norm):
    """Whole sequences, and the first four tokens of each with padding behind, which neither stays nor leaves."""
    parts = [np.sqrt(np.square(h).sum(axis=AXES[norm])) for h in (states(LLAMA), states(LLAMA)[:, :, :4])]
    needed = [np.max(np.abs(n[2] - n[1])) / np.ptp([0, *np.ravel(n[1] - n[0])]) for n in parts]
    alpha = float(np.sqrt(np.prod(needed)))  # one of the two leaves early
    layers = [exit_layer(lengths, alpha) for lengths in parts]
    assert sorted(layers) == [3, 4]
    for count, end in zip(layers, (24, 4), strict=True):
        real = jnp.asarray(np.arange(24)[None] < end) & jnp.ones((2, 1), bool)
        out, ran = run(LLAMA, params(LLAMA), LACHalt(alpha=alpha, norm=norm), real)
        assert ran[:, 0].tolist() == ran[:, 1].tolist() == [True] * count + [False] * (4 - count)
        expected = read(LLAMA, params(LLAMA), states(LLAMA)[count])
        np.testing.assert_allclose(out[:, :end], expected[:, :end], **CLOSE)


@pytest.mark.slow
def test_tokens_that_leave_early_pass_their_state_on():
    """The same, all tokens at once: a token's state stands still from its exit on, and gives keys and values."""
    change = np.abs(np.diff(np.linalg.norm(states(LLAMA)[:, :1], axis=-1), axis=0))[:2, 0, 6:]
    alpha = float(np.median(change[1] / change[0]))
    found, ran = score(LLAMA, unstack_layers(params(LLAMA)), TEXT[:1], prompt_length=6, policy=LACHalt(alpha=alpha))
    assert ran[:, 0].tolist()[:3] == [17, 17, 17] and 3 < ran[3, 0] < 14

    lengths = np.linalg.norm(states(LLAMA)[:, 0], axis=-1)
    left = np.array([exit_layer(lengths[:, t], alpha) == 3 and t >= 6 for t in range(24)])
    taken = np.ones((4, 2, 24), bool)
    taken[3, 0] = ~left
    h, _ = over_layers(LLAMA, params(LLAMA), taken)
    np.testing.assert_allclose(found[0], nats(read(LLAMA, params(LLAMA), h), TEXT, 6)[0], **CLOSE)


def test_halting_saves_what_it_reports():
    out = generate(LLAMA, params(LLAMA), [[1, 2], [3]], max_new_tokens=5, policy=LACHalt(alpha=1e3))
    assert out.ran.tolist() == [[4, 4], [4, 4], [4, 4], [0, 0]] and out.prefill_ran.all()
    assert out.bytes_read < out.bytes_full
    same = generate(LLAMA, params(LLAMA), [[1, 2], [3]], max_new_tokens=5, policy=Policy(keep_layers=(0, 1, 2)))
    assert [tokens.tolist() for tokens in out.tokens] == [tokens.tolist() for tokens in same.tokens]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LAC(mode="skip"), "'readout', 'true_skip' or 'trace'"),
        (lambda: LAC(alpha=float("nan")), "alpha is nan"),
        (lambda: LACHalt(norm="D"), "'B', 'E' or 'T'"),
        (lambda: void_keep_layers(LACTrace(*np.zeros((3, 2, 1, 1))), min_frequency=5), "a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
