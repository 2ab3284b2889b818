import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.models import DECODER_PARTITION_RULES, decoder, fuse_projections
from jaxskip.skipping import (
    FFNSkip,
    Policy,
    calibrate_ffn_skip,
    ffn_ablation,
    ffn_similarity,
    ffn_skip_forward,
    forward,
    generate,
    score,
    simulate_ffn_skip,
    static_ffn_skip,
    unstack_layers,
)
from jaxskip.skipping.generate import whole_sequences
from jaxskip.training import make_mesh, param_shardings
from tests.skipping.hlo import sliced_weights
from tests.skipping.tiny import GPT2, LLAMA, TEXT, logits, nats, params

# Cached and uncached attention add the same float32 numbers in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
# About half of the similarities of the tiny network lie above this threshold: tokens decide differently.
OPEN = FFNSkip(tau=0.85, cold_start=0, cold_end=0, warm_up=3, window=2)


SIX = dataclasses.replace(LLAMA, num_layers=6)


def six_params():
    """The tiny network's layers and two of them again."""
    layers = jax.tree.map(lambda x: jnp.concatenate([x, x[:2]]), params(LLAMA)["layers"])
    return {**params(LLAMA), "layers": layers}


@functools.partial(jax.jit, static_argnums=(0, 2))
def run_whole(config, weights, policy):
    out, _, ran = forward(config, weights, jnp.asarray(TEXT), policy=policy)
    return out, ran


def loop_over_cosines(policy, cos):
    """The method's pseudo-code, token by token: bool [L] of the blocks that run, for the cosines [L] of one token."""
    ran, left, run = [], 0, 0
    for layer, similarity in enumerate(cos):
        eligible = policy.cold_start <= layer < len(cos) - policy.cold_end
        if eligible and left > 0 and (policy.max_run is None or run < policy.max_run):
            ran.append(False)
            left, run = left - 1, run + 1
            continue
        ran.append(True)
        run = 0
        if eligible and left == 0 and similarity >= policy.tau:
            left = policy.window
    return ran


@functools.partial(jax.jit, static_argnums=0)
def around_the_block(config, weights, h, layer):
    network = whole_sequences(config, weights, jnp.zeros(h.shape[:2], int))
    before, _ = network.attention(h, None, layer)
    return before, network.feed_forward(before, layer)


def loop_over_tokens(config, tokens, policy, mean_over_rows):
    """Reference for [B, T] tokens that all count as generated: (logits, bool [L, B, T] of what each token ran)."""
    h = decoder.embed_tokens(params(config), config, jnp.asarray(tokens), None)
    ran = np.ones((config.num_layers, *tokens.shape), bool)
    seen = np.zeros(ran.shape)
    for layer in range(config.num_layers):
        before, after = around_the_block(config, params(config), h, layer)
        x, y = np.asarray(before, np.float64), np.asarray(after, np.float64)
        cos = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        seen[layer] = cos.mean(0, keepdims=True) if mean_over_rows else cos
        for b, t in np.ndindex(tokens.shape):
            # What later layers see cannot change this layer's decision: look at the layers so far alone.
            padded = np.concatenate([seen[: layer + 1, b, t], np.zeros(config.num_layers - layer - 1)])
            ran[layer, b, t] = t < policy.warm_up or loop_over_cosines(policy, padded)[layer]
        h = jnp.where(ran[layer][..., None], after, before)
    return decoder.output_logits(params(config), config, h), ran


def test_the_cards_hand_trace():
    cos = np.array([0.5, 0.99, 0.99, 0.99, 0.99, 0.99]).reshape(6, 1, 1)
    policy = FFNSkip(tau=0.98, cold_start=1, cold_end=1, warm_up=0, window=2)
    assert simulate_ffn_skip(policy, cos).ravel().tolist() == [True, True, False, False, True, True]


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    cold=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    warm_up=st.integers(0, 3),
    window=st.integers(1, 9),
    max_run=st.none() | st.integers(1, 4),
    tau=st.floats(-1, 1.2),
)
def test_the_simulation_is_the_pseudo_code(seed, cold, warm_up, window, max_run, tau):
    cos = np.random.default_rng(seed).uniform(-1, 1, (8, 2, 4))
    policy = FFNSkip(tau=tau, cold_start=cold[0], cold_end=cold[1], warm_up=warm_up, window=window, max_run=max_run)
    for granularity, decided in (("token", cos), ("batch", np.broadcast_to(cos.mean(1, keepdims=True), cos.shape))):
        ran = simulate_ffn_skip(dataclasses.replace(policy, granularity=granularity), cos)
        for b, t in np.ndindex(2, 4):
            expected = [True] * 8 if t < warm_up else loop_over_cosines(policy, decided[:, b, t])
            assert ran[:, b, t].tolist() == expected


@pytest.mark.parametrize(
    ("granularity", "unroll"), [("token", False), pytest.param("batch", True, marks=pytest.mark.slow)]
)
def test_whole_sequences_follow_the_loop(granularity, unroll):
    policy = dataclasses.replace(OPEN, granularity=granularity)
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    expected, ran = loop_over_tokens(LLAMA, TEXT, policy, granularity == "batch")
    assert 0.1 < 1 - ran[..., 3:].mean() < 0.9 and ran[..., :3].all()
    found, executed = run_whole(LLAMA, weights, policy)
    np.testing.assert_allclose(found, expected, **CLOSE)
    assert executed.tolist() == [[True, x] for x in ran.any(axis=(1, 2))]
    found, each = ffn_skip_forward(LLAMA, weights, jnp.asarray(TEXT), policy)
    np.testing.assert_allclose(found, expected, **CLOSE)
    np.testing.assert_array_equal(each, ran)


@pytest.mark.parametrize(
    ("granularity", "rows", "unroll"),
    [
        pytest.param("batch", 1, True, marks=pytest.mark.slow),
        pytest.param("batch", 2, False, marks=pytest.mark.slow),
        ("token", 2, False),
    ],
)
def test_decoding_executes_exactly_the_blocks_of_the_loop(granularity, rows, unroll):
    """From the first token on: the prompt of one token lies within the warm-up, so both see the same stream."""
    policy = dataclasses.replace(OPEN, granularity=granularity)
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    expected, ran = loop_over_tokens(LLAMA, TEXT[:rows], policy, granularity == "batch")
    found, executed = score(LLAMA, weights, TEXT[:rows], prompt_length=1, policy=policy)
    np.testing.assert_allclose(found, nats(expected, TEXT[:rows], 1), **CLOSE)
    union = ran[:, :, 1:-1].any(axis=1).sum(axis=1)  # a block is executed where any row wants it
    assert np.asarray(executed)[:, 1].tolist() == union.tolist()
    assert (np.asarray(executed)[:, 0] == 22).all()
    if granularity == "token":
        assert union.sum() > ran[:, :, 1:-1].sum(axis=(0, 2)).max()  # each row alone would have skipped more


@pytest.mark.parametrize("granularity", ["batch", pytest.param("token", marks=pytest.mark.slow)])
def test_fused_and_unrolled_layers_generate_the_same(granularity):
    """Blocks that are handed the decision, against conditionals around them."""
    policy = dataclasses.replace(OPEN, granularity=granularity)
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist()]
    expected = generate(LLAMA, params(LLAMA), prompts, max_new_tokens=8, policy=policy)
    fused, config = fuse_projections(params(LLAMA), LLAMA)
    found = generate(config, unstack_layers(fused), prompts, max_new_tokens=8, policy=policy)
    assert [x.tolist() for x in found.tokens] == [x.tolist() for x in expected.tokens]
    assert found.ran.tolist() == expected.ran.tolist() and 0 < found.share_skipped[1] < 1


@pytest.mark.slow
def test_a_row_that_has_ended_holds_nobody_up():
    """Granularity "token": the row that ends first may not make blocks run that the other one skips."""
    policy = dataclasses.replace(OPEN, granularity="token", warm_up=0)
    prompt = TEXT[0, :9].tolist()
    alone = generate(LLAMA, params(LLAMA), [prompt], max_new_tokens=9, policy=policy)
    first = np.argmax(logits(LLAMA, np.arange(61)[:, None])[:, 0], axis=1)  # new token of each prompt of one token
    other = int(np.flatnonzero(~np.isin(first, alone.tokens[0]))[0])
    stop = int(first[other])
    both = generate(LLAMA, params(LLAMA), [prompt, [other]], max_new_tokens=9, policy=policy, stop_tokens=(stop,))
    assert [len(x) for x in both.tokens] == [9, 1]
    assert both.ran.tolist() == alone.ran.tolist() and both.tokens[0].tolist() == alone.tokens[0].tolist()


@pytest.mark.parametrize(
    ("config", "granularity"),
    [
        pytest.param(GPT2, "batch", id="gpt2", marks=pytest.mark.slow),
        pytest.param(LLAMA, "token", id="llama", marks=pytest.mark.slow),
        pytest.param(LLAMA, "batch", id="llama-batch"),
    ],
)
def test_a_threshold_above_one_changes_no_bit(config, granularity):
    policy = FFNSkip(tau=1.01, cold_start=0, cold_end=0, warm_up=0, granularity=granularity)
    expected, all_ran = score(config, params(config), TEXT, prompt_length=5)
    found, ran = score(config, params(config), TEXT, prompt_length=5, policy=policy)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ran, all_ran)


def test_the_lowest_threshold_runs_one_block_a_token():
    policy = FFNSkip(tau=-1.0, cold_start=0, cold_end=0, warm_up=0, window=4)
    _, ran = run_whole(LLAMA, params(LLAMA), policy)
    assert ran.tolist() == [[True, True]] + [[True, False]] * 3


def test_warm_up_counts_generated_tokens_and_runs_of_skips_are_bounded():
    """The first generated token comes from the prompt's pass, so a warm-up of 4 leaves 3 steps whole."""
    policy = FFNSkip(tau=-1.0, cold_start=0, cold_end=0, warm_up=4, window=6, max_run=1)
    out = generate(LLAMA, params(LLAMA), [[1, 2, 3]], max_new_tokens=10, policy=policy)
    assert out.ran[:, 1].tolist() == [9, 3, 9, 3] and (out.ran[:, 0] == 9).all()
    assert out.bytes_read < out.bytes_full and out.share_skipped[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [False, True], ids=["stacked", "unrolled"])
def test_it_combines_with_sets_of_layers_and_blocks(unroll):
    """Layers of Unified Layer Skipping's kind gone whole, one block gone always, the others by similarity."""
    weights = unstack_layers(six_params()) if unroll else six_params()
    sets = {"keep_layers": (0, 2, 3, 4, 5), "keep_feed_forwards": (0, 2, 4, 5)}
    policy = FFNSkip(**sets, tau=-1.0, cold_start=0, cold_end=1, warm_up=0, window=2)
    found, ran = run_whole(SIX, weights, policy)
    # Layer 0 arms; 2 and 4 are skipped (3 has no block and takes nothing off the window); 5 is cold.
    assert ran[:, 0].tolist() == [True, False, True, True, True, True]
    assert ran[:, 1].tolist() == [True, False, False, False, False, True]
    same = Policy(keep_layers=sets["keep_layers"], keep_feed_forwards=(0, 5))
    np.testing.assert_allclose(found, run_whole(SIX, weights, same)[0], **CLOSE)
    bounded = dataclasses.replace(policy, window=3, max_run=2)
    _, ran = run_whole(SIX, weights, bounded)
    assert ran[:, 1].tolist() == [True, False, False, False, True, True]  # 2 and 3 are a run of two


def test_it_decodes_with_a_set_of_layers():
    """The cache has slots for the kept layers alone, and every step writes them: steps that look back agree."""
    policy = FFNSkip(keep_layers=(0, 2, 3), tau=-1.0, cold_start=0, cold_end=1, warm_up=0, window=1)
    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=5, policy=policy)
    assert np.asarray(ran).tolist() == [[18, 18], [0, 0], [18, 0], [18, 18]]
    same = Policy(keep_layers=(0, 2, 3), keep_feed_forwards=(0, 3))
    expected, _ = score(LLAMA, params(LLAMA), TEXT, prompt_length=5, policy=same)
    np.testing.assert_allclose(found, expected, **CLOSE)


def test_weights_are_sliced_inside_the_branch_that_runs_them():
    """What is sliced out of the stack before a conditional is read whether the block runs or not."""
    hlo = run_whole.lower(LLAMA, params(LLAMA), OPEN).compile().as_text()
    inside, outside = sliced_weights(hlo, "32,48|48,32")  # one layer's gate, up or down
    assert inside >= 3 and outside == 0


@pytest.mark.slow
@pytest.mark.multidevice
def test_eight_devices_decide_as_one():
    """The predicate comes from replicated states: shards that disagreed would wait for each other forever."""
    mesh = make_mesh(2, 2, 2)
    split = jax.device_put(params(LLAMA), param_shardings(params(LLAMA), mesh, DECODER_PARTITION_RULES))
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist(), [5], [7, 8]]
    one, many = (generate(LLAMA, weights, prompts, max_new_tokens=8, policy=OPEN) for weights in (params(LLAMA), split))
    assert [x.tolist() for x in many.tokens] == [x.tolist() for x in one.tokens]
    assert many.ran.tolist() == one.ran.tolist() and one.share_skipped[1] > 0


def test_similarity_is_that_of_the_stream_around_the_block():
    trace = ffn_similarity(LLAMA, params(LLAMA), jnp.asarray(TEXT))
    assert trace.cos.shape == trace.block_cos.shape == (4, 2, 24)
    h = decoder.embed_tokens(params(LLAMA), LLAMA, jnp.asarray(TEXT), None)
    x, y = (np.asarray(v, np.float64) for v in around_the_block(LLAMA, params(LLAMA), h, 0))
    for found, other in ((trace.cos, y), (trace.block_cos, y - x)):
        cos = (x * other).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(other, axis=-1)
        np.testing.assert_allclose(found[0], cos, atol=1e-5)  # float32 sums over 32 features


@pytest.mark.slow
def test_similarity_of_bf16_states_is_taken_in_float32():
    config = dataclasses.replace(LLAMA, dtype=jnp.bfloat16)
    cos = ffn_similarity(config, params(LLAMA), jnp.asarray(TEXT)).cos
    assert cos.dtype == jnp.float32
    rounded = cos.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != cos).mean() > 0.9


@pytest.mark.parametrize("granularity", ["batch", "token"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.3])
def test_calibration_reaches_the_ratio(granularity, ratio):
    rng = np.random.default_rng(0)
    cos = rng.normal(0.97, 0.01, (20, 4, 120)) + 0.02 * np.sin(np.linspace(0, np.pi, 20))[:, None, None]
    policy = calibrate_ffn_skip(cos, target_ratio=ratio, policy=FFNSkip(granularity=granularity))
    skipped = 1 - simulate_ffn_skip(policy, cos)[..., 16:].mean()
    # One decision is 1 / (20 x 104) of a batch's; a threshold moves a window of 3 at a time.
    assert abs(skipped - ratio) < 0.01
    assert policy.cold_start == policy.cold_end == 5  # the sine lies above its median from a quarter to three quarters
    given_regions = dataclasses.replace(FFNSkip(granularity=granularity), cold_start=2, cold_end=3)
    assert calibrate_ffn_skip(cos, target_ratio=ratio, policy=given_regions).cold_start == 2


def test_static_sets_take_the_highest_scores_within_their_bounds():
    scores = [9.0, 1.0, 8.0, 7.0, 6.0, 2.0, 3.0, 9.0]
    edges = FFNSkip(cold_start=1, cold_end=1)
    assert static_ffn_skip(scores, 3, policy=edges) == Policy(keep_feed_forwards=(0, 1, 5, 6, 7))
    spread = dataclasses.replace(edges, max_run=1)
    assert static_ffn_skip(scores, 3, policy=spread) == Policy(keep_feed_forwards=(0, 1, 3, 5, 7))
    assert static_ffn_skip(scores, 0, policy=edges) == Policy(keep_feed_forwards=tuple(range(8)))


@pytest.mark.slow
def test_ablation_is_the_loss_without_the_block():
    rise = ffn_ablation(LLAMA, params(LLAMA), jnp.asarray(TEXT))
    whole = nats(logits(LLAMA, TEXT), TEXT, 1).mean()
    for layer in (0, 3):
        kept = tuple(i for i in range(4) if i != layer)
        out, _ = run_whole(LLAMA, params(LLAMA), Policy(keep_feed_forwards=kept))
        np.testing.assert_allclose(rise[layer], nats(out, TEXT, 1).mean() - whole, atol=1e-5)  # means of 46 nats


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FFNSkip(granularity="row"), "granularity is 'row'"),
        (lambda: FFNSkip(window=0), "window is 0"),
        (lambda: FFNSkip(warm_up=-1), "warm_up is -1"),
        (lambda: FFNSkip(max_run=0), "max_run is 0"),
        (lambda: FFNSkip(cold_start=-1), "cold_start is -1"),
        (lambda: FFNSkip(cold_start=3, cold_end=1).warm_layers(4), "leave none of 4 layers"),
        (lambda: simulate_ffn_skip(FFNSkip(), np.ones((4, 3))), "shape \\(4, 3\\)"),
        (lambda: calibrate_ffn_skip(np.ones((8, 1, 16))), "more tokens than a warm-up of 16"),
        (lambda: calibrate_ffn_skip(np.ones((8, 1, 20)), target_ratio=0.9), "at most 0.750"),
        (lambda: static_ffn_skip(np.ones(8), 5), "leave 4 blocks"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
