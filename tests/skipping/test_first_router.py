import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.models import DECODER_PARTITION_RULES, decoder
from jaxskip.nn import init_lora, init_routers, merge_lora
from jaxskip.skipping import (
    FirstRouter,
    Policy,
    binarize,
    dual_ascent,
    forward,
    generate,
    non_skip_penalty,
    routed_forward,
    score,
    unstack_layers,
)
from jaxskip.skipping import cache as caches
from jaxskip.skipping.generate import whole_sequences
from jaxskip.skipping.scan import cached_attention
from jaxskip.training import make_mesh, param_shardings
from tests.skipping.hlo import sliced_weights
from tests.skipping.tiny import GPT2, LLAMA, TEXT, logits, nats, params

# Cached and uncached attention, and scans and unrolled loops, add the same float32 numbers in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPT = 8
IS_PROMPT = np.broadcast_to(np.arange(24) < PROMPT, TEXT.shape)
EVERYWHERE = {"protect": ()}


def routers_for(g, config=LLAMA):
    """Routers that decide g, bool [L, B], for the rows of TEXT: through the bias, or apart along a direction."""
    g = np.asarray(g)
    routers = {"kernel": np.zeros((config.num_layers, config.embed_dim), np.float32), "bias": np.zeros(len(g))}
    h = None if (g.all(axis=1) | ~g.any(axis=1)).all() else _means(config)
    for layer, row in enumerate(g):
        if row.all() or not row.any():
            routers["bias"][layer] = 4.0 if row.all() else -4.0
            continue
        apart = h[layer, 0] - h[layer, 1]
        apart *= (1 if row[0] else -1) * 8 / (apart @ apart)
        routers["kernel"][layer] = apart
        routers["bias"][layer] = -apart @ (h[layer, 0] + h[layer, 1]) / 2
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), routers)


@functools.cache
def _means(config):
    """What linear routers see of the prompts of TEXT, float64 [L, B, D]."""
    return np.asarray(_run_means(config, params(config)), np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _run_means(config, weights):
    network = whole_sequences(config, weights, jnp.asarray(TEXT[:, :PROMPT]))

    def layer(h, index):
        rms = jnp.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        after, _ = network.attention(h, None, index)
        return network.feed_forward(after, index), (h / rms).mean(axis=1)

    h = decoder.embed_tokens(weights, config, jnp.asarray(TEXT[:, :PROMPT]), network.positions)
    return network.over(range(config.num_layers), layer, h)[1]


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def routed(config, weights, routers, policy, gate):
    return routed_forward(config, weights, routers, jnp.asarray(TEXT), jnp.asarray(IS_PROMPT), gate=gate, policy=policy)


def mixed():
    """Row 0 leaves out layer 1, row 1 leaves out layer 2."""
    return np.array([[1, 1], [0, 1], [1, 0], [1, 1]], bool)


SLOW_GATES = [pytest.param(gate, marks=pytest.mark.slow) for gate in ("soft", "published")]


@pytest.mark.parametrize("gate", ["straight_through", *SLOW_GATES])
def test_open_routers_are_the_plain_network(gate):
    routers = {"kernel": jnp.zeros((4, 32)), "bias": jnp.full(4, 40.0)}  # rho is 1 in float32
    found, rho = routed(LLAMA, params(LLAMA), routers, FirstRouter(**EVERYWHERE, prompt="skip"), gate)
    assert (rho == 1).all()
    np.testing.assert_allclose(found, logits(LLAMA, TEXT), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["full", "skip"])
def test_a_layer_that_is_off_is_not_there(prompt):
    g = np.array([[1, 1], [0, 0], [1, 1], [1, 1]], bool)
    policy = FirstRouter(prompt=prompt)
    out, _ = routed(LLAMA, params(LLAMA), routers_for(g), policy, "hard")
    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=PROMPT, policy=policy, policy_params=routers_for(g))
    np.testing.assert_allclose(found, nats(out, TEXT, PROMPT), **CLOSE)
    assert np.asarray(ran).tolist() == [[15, 15], [0, 0], [15, 15], [15, 15]]
    without = Policy(keep_layers=(0, 2, 3))
    if prompt == "full":
        expected, _ = score(LLAMA, params(LLAMA), TEXT, prompt_length=PROMPT, policy=without)
    else:
        expected = nats(forward(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=without)[0], TEXT, PROMPT)
    np.testing.assert_allclose(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("prompt", "unroll", "config"),
    [
        pytest.param("full", False, LLAMA, id="full-stacked-llama", marks=pytest.mark.slow),
        pytest.param("skip", True, LLAMA, id="skip-unrolled-llama", marks=pytest.mark.slow),
        pytest.param("full", True, GPT2, id="full-unrolled-gpt2", marks=pytest.mark.slow),
    ],
)
def test_rows_that_disagree_decode_as_each_would_alone(prompt, unroll, config):
    """Both paths, beside each row alone through the static program of its own layers."""
    g = mixed()[: config.num_layers]
    routers = routers_for(g, config)
    weights = unstack_layers(params(config)) if unroll else params(config)
    prompts = [row[:PROMPT].tolist() for row in TEXT]
    arguments = {"max_new_tokens": 6, "policy_params": routers}
    policy = FirstRouter(protect=(0,), prompt=prompt)
    static = dataclasses.replace(policy, decoding="static")
    both = generate(config, weights, prompts, policy=policy, **arguments)
    assert both.ran.tolist() == [[5, 5]] * config.num_layers and both.policy == policy
    settled = generate(config, weights, prompts, policy=static, **arguments)
    assert [x.tolist() for x in settled.tokens] == [x.tolist() for x in both.tokens]
    for row in range(2):
        alone = generate(config, weights, prompts[row : row + 1], policy=static, **arguments)
        assert alone.policy == Policy(keep_layers=tuple(np.flatnonzero(g[:, row]).tolist()))
        assert alone.tokens[0].tolist() == both.tokens[row].tolist()
        assert alone.cache_bytes * config.num_layers == both.cache_bytes // 2 * g[:, row].sum()
        assert alone.bytes_read < alone.bytes_full and alone.ran[:, 0].tolist() == (5 * g[:, row]).tolist()


@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_decoding_is_the_skipped_network_given_the_text(decoding):
    """Teacher-forced, with rows that disagree; and with layer 3 off for both, so that "static" has a set to keep."""
    g = mixed() & np.array([[1], [1], [1], [0]], bool)
    policy = FirstRouter(protect=(0,), decoding=decoding)
    out, rho = routed(LLAMA, params(LLAMA), routers_for(g), policy, "hard")
    assert ((np.asarray(rho) > 0.5) == g).all()
    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=PROMPT, policy=policy, policy_params=routers_for(g))
    np.testing.assert_allclose(found, nats(out, TEXT, PROMPT), **CLOSE)
    assert np.asarray(ran)[:, 0].tolist() == [15, 15, 15, 0]


@pytest.mark.slow
def test_padding_changes_no_decision():
    """Prompts are padded to their bucket: 3 tokens beside 31 and beside 40 decide alike."""
    rng = np.random.default_rng(3)
    routers = {"kernel": jnp.asarray(rng.normal(size=(4, 32)), jnp.float32), "bias": jnp.zeros(4)}
    policy = FirstRouter(decoding="static", **EVERYWHERE)
    sets = set()
    for length in (3, 40):
        prompts = [[5, 6, 7], rng.integers(0, 61, length).tolist()]
        out = generate(LLAMA, params(LLAMA), prompts, max_new_tokens=2, policy=policy, policy_params=routers)
        sets.add(tuple(out.tokens[0].tolist()))
    assert len(sets) == 1


@pytest.mark.slow
def test_combines_with_sets_of_layers_and_blocks():
    routers = routers_for(np.array([[1, 1], [1, 1], [0, 0], [1, 1]], bool))
    policy = FirstRouter(keep_layers=(0, 2, 3), keep_feed_forwards=(0, 1, 2), prompt="skip", decoding="static")
    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=PROMPT, policy=policy, policy_params=routers)
    assert np.asarray(ran).tolist() == [[15, 15], [0, 0], [0, 0], [15, 0]]
    same, _, _ = forward(
        LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=Policy(keep_layers=(0, 3), keep_feed_forwards=(0,))
    )
    np.testing.assert_allclose(found, nats(same, TEXT, PROMPT), **CLOSE)
    out, _ = routed(LLAMA, params(LLAMA), routers, policy, "hard")
    np.testing.assert_allclose(out, same, **CLOSE)


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("decoding", ["dynamic", "static"])
def test_eight_devices_decide_as_one(decoding):
    """Whether a layer runs is known alike on all devices, or its collectives would wait for each other forever."""
    mesh = make_mesh(2, 2, 2)
    split = jax.device_put(params(LLAMA), param_shardings(params(LLAMA), mesh, DECODER_PARTITION_RULES))
    prompts = [row[:PROMPT].tolist() for row in TEXT] * 2
    policy = FirstRouter(protect=(0,), decoding=decoding)
    g = mixed() & np.array([[1], [1], [1], [0]], bool)
    arguments = {"max_new_tokens": 8, "policy": policy, "policy_params": routers_for(g)}
    one, many = (generate(LLAMA, weights, prompts, **arguments) for weights in (params(LLAMA), split))
    assert [x.tolist() for x in many.tokens] == [x.tolist() for x in one.tokens]
    assert many.ran.tolist() == one.ran.tolist() == [[7, 7]] * 3 + [[0, 0]]


@pytest.mark.slow
def test_no_layer_wanted_leaves_the_embedding():
    routers = init_routers(jax.random.key(0), 4, 32, bias=-9.0)
    policy = FirstRouter(**EVERYWHERE, prompt="skip", decoding="static")
    out = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=3, policy=policy, policy_params=routers)
    assert out.ran.sum() == out.prefill_ran.sum() == 0 and out.policy == policy


def test_weights_are_sliced_inside_the_branch_that_runs_them():
    state = jnp.asarray(mixed())
    step = jax.jit(lambda w: forward(LLAMA, w, jnp.asarray(TEXT), policy=FirstRouter(), state=state)[0])
    inside, outside = sliced_weights(step.lower(params(LLAMA)).compile().as_text(), "32,48|48,32|32,32|32,16")
    assert inside >= 7 and outside == 0


def loss(routers, gate, weights=None):
    out, rho = routed_forward(
        LLAMA,
        weights or params(LLAMA),
        routers,
        jnp.asarray(TEXT),
        jnp.asarray(IS_PROMPT),
        gate=gate,
        policy=FirstRouter(**EVERYWHERE, prompt="skip"),
    )
    picked = jnp.take_along_axis(jax.nn.log_softmax(out[:, :-1]), jnp.asarray(TEXT)[:, 1:, None], axis=2)
    return -jnp.mean(picked), rho


def most_gradient(gate):
    routers = init_routers(jax.random.key(0), 4, 32)
    grads = jax.jit(jax.grad(lambda r: loss(r, gate)[0]))(routers)
    return float(jnp.abs(grads["kernel"]).max())


@pytest.mark.slow
def test_the_published_equation_gives_routers_no_gradient():
    assert most_gradient("published") <= 1e-7
    assert most_gradient("straight_through") > 1e-4


@pytest.mark.slow
def test_soft_gates_have_a_gradient_and_hard_ones_none():
    assert most_gradient("soft") > 1e-4
    assert most_gradient("hard") == 0


@pytest.mark.slow
def test_the_penaltys_gradient_is_rho_times_its_complement_times_the_feature():
    routers = init_routers(jax.random.key(0), 4, 32)
    policy = FirstRouter(**EVERYWHERE)  # "full": routers of later layers see the same states

    def penalty(routers):
        return 0.01 * non_skip_penalty(routed(LLAMA, params(LLAMA), routers, policy, "soft")[1])

    grads = jax.grad(penalty)(routers)
    _, rho = routed(LLAMA, params(LLAMA), routers, policy, "soft")
    rho = np.asarray(rho, np.float64)
    expected = 0.01 * (rho * (1 - rho))[..., None] * _means(LLAMA)
    # Means over 2 rows in float32; later layers' states pass several float32 layers.
    np.testing.assert_allclose(grads["kernel"], expected.mean(axis=1), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_protected_layers_stay_and_feel_no_pressure():
    routers = init_routers(jax.random.key(0), 4, 32, bias=-9.0)
    _, rho = routed(LLAMA, params(LLAMA), routers, FirstRouter(), "straight_through")
    assert (np.asarray(rho) > 0.5).tolist() == [[True, True], [False, False], [False, False], [True, True]]
    grads = jax.grad(lambda r: non_skip_penalty(routed(LLAMA, params(LLAMA), r, FirstRouter(), "soft")[1]))(routers)
    assert (grads["bias"][jnp.array([0, 3])] == 0).all() and (grads["bias"][1:3] > 0).all()


@pytest.mark.slow
def test_adapters_learn_through_the_network_that_routers_leave():
    """Phase 2: hard routers. Adapters of the layer that no row runs get no gradient, those of the others do."""
    routers = routers_for(np.array([[1, 1], [0, 0], [1, 1], [1, 1]], bool))
    adapters = init_lora(jax.random.key(1), params(LLAMA), rank=2, targets=("up",))

    def tuned(adapters):
        return loss(routers, "hard", merge_lora(params(LLAMA), adapters))[0]

    grads = jax.jit(jax.grad(tuned))(adapters)["layers/mlp/up"]["b"]
    assert (np.abs(grads).max(axis=(1, 2)) > 1e-6).tolist() == [True, False, True, True]
    assert (grads[1] == 0).all()


def test_binarisation_is_least_at_zero_and_one():
    rho = jnp.array([[0.0, 0.5], [1.0, 0.5]])
    assert float(binarize(rho)) == 0.25 and float(binarize(jnp.round(rho))) == 0


def test_dual_ascent_settles_at_the_target():
    """On a response that falls with lambda, as a network's kept layers do: 8 sigmoid(2 - 40 lambda)."""
    lam = jnp.float32(0.0)
    for _ in range(200):
        kept = jnp.full((8, 1), jax.nn.sigmoid(2 - 40 * lam))
        lam = dual_ascent(lam, kept, target_keep=5.0, rate=0.005)
    assert float(8 * jax.nn.sigmoid(2 - 40 * lam)) == pytest.approx(5.0, abs=0.01)  # 200 steps of a contraction


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FirstRouter(pool="sum"), "pool is 'sum'"),
        (lambda: FirstRouter(prompt="half"), "prompt is 'half'"),
        (lambda: FirstRouter(decoding="jit"), "decoding is 'jit'"),
        (lambda: FirstRouter(threshold=2.0), "threshold is 2.0"),
        (lambda: FirstRouter(protect=(4,)).protected(4), "out of 0 .. 3"),
        (lambda: forward(LLAMA, params(LLAMA), jnp.asarray(TEXT), policy=FirstRouter()), "decisions of a prompt"),
        (
            lambda: generate(LLAMA, params(LLAMA), [[1]], max_new_tokens=2, policy=FirstRouter()),
            "routers must be those of init_routers",
        ),
        (lambda: loss(init_routers(jax.random.key(0), 4, 32), "mean"), "gate is 'mean'"),
        (lambda: loss(init_routers(jax.random.key(0), 3, 32), "soft"), "kernel of shape \\(4, 32\\)"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_sequences_that_skip_a_layer_are_left_out_of_its_attention():
    """The rows that want the layer get what all of them get without skipping; the others 0, their cache of no use."""
    layout = caches.CacheLayout(((0,),))
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 1, heads, LLAMA.head_width)), jnp.float32)
        for heads in (LLAMA.num_heads, LLAMA.kv_heads, LLAMA.kv_heads)
    )
    empty = caches.empty_cache(LLAMA, layout, 2, 4, 2, True)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), empty)
    live, lengths = jnp.ones(2, bool), jnp.array([3, 4])
    attend = cached_attention(LLAMA, layout, lengths, 4, 1, live)
    whole, _ = attend(q, k, v, cache, 0, None)
    some, _ = attend(q, k, v, cache, 0, jnp.array([False, True]))
    assert (some[0] == 0).all() and (some[1] == whole[1]).all() and (whole[0] != 0).all()
    ended, _ = cached_attention(LLAMA, layout, lengths, 4, 1, ~live)(q, k, v, cache, 0, None)
    assert (ended == 0).all()


def test_prompts_that_skip_layers_do_so_in_the_attention_that_skips():
    g = np.array([[1, 1], [0, 1], [1, 0], [1, 1]], bool)
    policy = FirstRouter(prompt="skip", **EVERYWHERE)
    found = {}
    for attention in ("xla", "skip"):
        config = dataclasses.replace(LLAMA, attention=attention)
        routers = routers_for(g)
        found[attention], _ = score(
            config, params(LLAMA), TEXT, prompt_length=PROMPT, policy=policy, policy_params=routers
        )
    np.testing.assert_allclose(found["skip"], found["xla"], **CLOSE)
