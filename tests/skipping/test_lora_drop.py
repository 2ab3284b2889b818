import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.skipping import (
    LoRADrop,
    Policy,
    generate,
    init_lora_drop,
    lora_drop_forward,
    lora_drop_layers,
    lora_drop_loss,
    score,
    unstack_layers,
)
from jaxskip.skipping.lora_drop import _correction
from tests.skipping.tiny import LLAMA, TEXT, logits, nats, params

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # cached and uncached attention add the same float32 numbers in another order
DROPPED = (1, 2)


def adapters(seed=0, rank=3, layers=DROPPED):
    found = init_lora_drop(jax.random.key(seed), LLAMA, layers, rank)
    return found | {"up": 0.3 * jax.random.normal(jax.random.key(seed + 1), found["up"].shape)}


def test_layers_are_spread_among_the_eligible():
    assert [len(lora_drop_layers(30, ratio)) for ratio in (0.25, 0.5, 0.75)] == [6, 13, 19]
    for ratio in (0.25, 0.5, 0.75, 1.0):
        layers = lora_drop_layers(30, ratio)
        assert layers[0] >= 3 and layers[-1] <= 28 and len(set(layers)) == len(layers)
    with pytest.raises(ValueError, match="leaves none to drop"):
        lora_drop_layers(4, 0.5)


@pytest.mark.parametrize("change", [{"light_steps": 0}, {"drop_layers": ()}], ids=str)
def test_without_light_steps_or_dropped_layers_it_is_plain_decoding(change):
    policy = dataclasses.replace(LoRADrop(drop_layers=DROPPED), **change)
    found, ran = score(LLAMA, params(LLAMA), TEXT, prompt_length=5, policy=policy, policy_params=adapters())
    np.testing.assert_allclose(found, nats(logits(LLAMA, TEXT), TEXT, 5), **CLOSE)
    assert (np.asarray(ran) == 18).all()


@pytest.mark.parametrize("unroll", [False, True], ids=["stacked", "unrolled"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        pytest.param({"base": "delta"}, marks=pytest.mark.slow),
        pytest.param({"base": "identity"}, marks=pytest.mark.slow),
        pytest.param({"correction_input": "previous"}, marks=pytest.mark.slow),
        {"kv": "write"},
        pytest.param({"light_steps": 1}, marks=pytest.mark.slow),
        pytest.param({"keep_layers": (0, 1, 2), "keep_feed_forwards": (0, 2)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_sees_what_decoding_does(change, unroll):
    """Step by step with anchors and a strided cache, and all tokens at once with a mask: the same numbers."""
    policy = LoRADrop(**{"drop_layers": DROPPED, **change})
    weights = unstack_layers(params(LLAMA)) if unroll else params(LLAMA)
    for length in (1, 6):
        if unroll and length == 1:
            continue
        found, ran = score(LLAMA, weights, TEXT, prompt_length=length, policy=policy, policy_params=adapters())
        whole = jax.jit(lora_drop_forward, static_argnums=(0, 4), static_argnames="prompt_length")(
            LLAMA, params(LLAMA), adapters(), jnp.asarray(TEXT), policy, prompt_length=length
        )
        np.testing.assert_allclose(found, nats(whole, TEXT, length), **CLOSE)
        steps = TEXT.shape[1] - length - 1
        full = steps // policy.period
        kept = policy.kept(4)
        wanted = [(steps if i not in DROPPED else full) if i in kept else 0 for i in range(4)]
        assert np.asarray(ran)[:, 0].tolist() == wanted


def test_showing_the_keys_of_light_tokens_is_another_network():
    policy = LoRADrop(drop_layers=DROPPED)
    arguments = (LLAMA, params(LLAMA), adapters(), jnp.asarray(TEXT), policy)
    loss = jax.jit(lora_drop_loss, static_argnums=(0, 4), static_argnames="train_kv")
    assert abs(loss(*arguments) - loss(*arguments, train_kv="all")) > 1e-3


@pytest.mark.slow
def test_a_full_step_is_plain_decoding_where_no_light_step_came_before():
    policy = LoRADrop(drop_layers=DROPPED, light_steps=0)
    once = LoRADrop(drop_layers=DROPPED, light_steps=3)
    arguments = {"prompt_length": 20, "policy_params": adapters()}
    plain, _ = score(LLAMA, params(LLAMA), TEXT, policy=policy, **arguments)
    found, _ = score(LLAMA, params(LLAMA), TEXT, policy=once, **arguments)
    np.testing.assert_allclose(found[:, 0], plain[:, 0], **CLOSE)  # from the prompt's pass
    assert np.abs(found[:, 1:] - plain[:, 1:]).min() > 1e-4


def test_zero_adapters_give_the_anchor_itself():
    """With the last layer dropped, every light step's logits are those of the last full step."""
    policy = LoRADrop(drop_layers=(3,), light_steps=3)
    zero = init_lora_drop(jax.random.key(0), LLAMA, (3,), 3)
    out = lora_drop_forward(LLAMA, params(LLAMA), zero, jnp.asarray(TEXT), policy)
    rows = np.asarray(out).reshape(2, 6, 4, -1)
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:, :, :1], rows.shape))
    assert np.abs(rows[:, 1:, 0] - rows[:, :-1, 0]).max() > 0.1


def test_the_correction_has_the_rank_of_its_adapter():
    h = jax.random.normal(jax.random.key(2), (4, 16, 32))
    found = _correction(adapters(layers=(3,)), 0, h, 16.0).reshape(-1, 32)
    singular = np.linalg.svd(np.asarray(found), compute_uv=False)
    assert singular[2] > 1e-2 and singular[3] < 1e-4 * singular[0]


def test_slots():
    policy = LoRADrop(drop_layers=DROPPED, light_steps=3)
    out = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=33, policy=policy, policy_params=adapters())
    dense, strided = 32 + 32, 32 + 8
    assert out.cache_bytes == 2 * (2 * dense + 2 * strided) * 2 * 8 * 4
    assert policy.kv_fraction(4, 32, 32) == (2 * dense + 2 * strided) / (4 * dense)
    assert out.steps == 32 and out.ran[:, 0].tolist() == [32, 8, 8, 32]
    written = dataclasses.replace(policy, kv="write")
    whole = generate(LLAMA, params(LLAMA), [[1, 2]], max_new_tokens=33, policy=written, policy_params=adapters())
    assert whole.cache_bytes == 2 * 4 * dense * 2 * 8 * 4


@pytest.mark.slow
def test_reuse_of_the_previous_step_moves_on():
    anchor = LoRADrop(drop_layers=DROPPED)
    previous = dataclasses.replace(anchor, reuse="previous")
    arguments = {"prompt_length": 5, "policy_params": adapters()}
    first, _ = score(LLAMA, params(LLAMA), TEXT, policy=anchor, **arguments)
    second, _ = score(LLAMA, params(LLAMA), TEXT, policy=previous, **arguments)
    # Steps 0 and 1 reuse the same thing; from step 2 on the approximation's own output.
    np.testing.assert_allclose(first[:, :2], second[:, :2], **CLOSE)
    assert np.abs(first[:, 2] - second[:, 2]).min() > 1e-4
    with pytest.raises(NotImplementedError, match="no parallel form"):
        lora_drop_forward(LLAMA, params(LLAMA), adapters(), jnp.asarray(TEXT), previous)


@pytest.mark.slow
def test_the_cycle_starts_with_the_prompt_and_leaves_nothing_behind():
    """Alone or beside a longer prompt, first or second: the same tokens."""
    policy = LoRADrop(drop_layers=DROPPED)
    arguments = {"max_new_tokens": 9, "policy": policy, "policy_params": adapters()}
    prompts = [TEXT[0, :9].tolist(), TEXT[1, :3].tolist()]
    together = generate(LLAMA, params(LLAMA), prompts, **arguments)
    again = generate(LLAMA, params(LLAMA), prompts, **arguments)
    for i, prompt in enumerate(prompts):
        alone = generate(LLAMA, params(LLAMA), [prompt], **arguments)
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_array_equal(together.tokens[i], again.tokens[i])


def test_only_adapters_need_gradients_and_they_help():
    policy = LoRADrop(drop_layers=DROPPED)
    state = adapters()
    step = jax.jit(
        lambda a: jax.value_and_grad(
            lambda a: lora_drop_loss(LLAMA, params(LLAMA), a, jnp.asarray(TEXT), policy, teacher_weight=0.05)
        )(a)
    )
    losses = []
    for _ in range(20):
        loss, gradient = step(state)
        state = jax.tree.map(lambda x, g: x - 0.05 * g, state, gradient)
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05


def test_ceiling_is_the_bytes_by_hand():
    policy = LoRADrop(drop_layers=DROPPED, light_steps=3)
    attention, mlp, head = 4 * (32 + 32 * 64 + 32 * 32), 4 * (32 + 3 * 32 * 48), 4 * (61 * 32 + 32)
    layer = attention + mlp
    assert policy.decode_ceiling(params(LLAMA), LLAMA) == pytest.approx(
        (4 * layer + head) / (2.5 * layer + head), rel=1e-6
    )
    token = 2 * 2 * 8 * 4
    assert policy.decode_ceiling(params(LLAMA), LLAMA, cached_tokens=100) == pytest.approx(
        (4 * (layer + 100 * token) + head) / (2 * (layer + 100 * token) + 0.5 * (layer + 25 * token) + head), rel=1e-6
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_layers": (4,)}, "drop_layers is"),
        ({"drop_layers": (1, 2), "keep_layers": (0, 2, 3)}, "not among keep_layers"),
        ({"base": "nothing"}, "base is 'nothing'"),
        ({"light_steps": -1}, "light_steps is -1"),
        ({"drop_layers": (1,)}, "do not fit 1 dropped layers"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        policy = LoRADrop(**{"drop_layers": DROPPED, **change})
        generate(LLAMA, params(LLAMA), [[1]], max_new_tokens=2, policy=policy, policy_params=adapters())


def test_untrained_adapters_are_warned_of():
    policy = LoRADrop(drop_layers=DROPPED)
    zero = init_lora_drop(jax.random.key(0), LLAMA, DROPPED, 3)
    with pytest.warns(UserWarning, match="never trained"):
        generate(LLAMA, params(LLAMA), [[1]], max_new_tokens=2, policy=policy, policy_params=zero)
    identity = dataclasses.replace(policy, base="identity")
    assert Policy().kept(4) == identity.kept(4)
    generate(LLAMA, params(LLAMA), [[1]], max_new_tokens=2, policy=identity, policy_params=zero)
