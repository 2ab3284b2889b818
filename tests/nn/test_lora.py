import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip.models import Decoder, DecoderConfig, fuse_projections
from jaxskip.nn import init_lora, merge_lora, train_labels
from jaxskip.skipping import unstack_layers

CONFIG = DecoderConfig(
    vocab_size=31,
    context_length=16,
    num_layers=2,
    num_heads=4,
    embed_dim=16,
    num_kv_heads=2,
    norm="rmsnorm",
    activation="swiglu",
    dtype=jnp.float32,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 8)))
PARAMS = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), TOKENS)["params"]
ALL = {"attention/" + name for name in ("query", "key", "value", "out")} | {"mlp/gate", "mlp/up", "mlp/down"}


def full(adapters):
    """Adapters whose `b` is no longer zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), adapters)


def test_every_matrix_of_the_layers_has_an_adapter_and_the_start_changes_nothing():
    adapters = init_lora(jax.random.key(1), PARAMS, rank=3)
    assert set(adapters) == {"layers/" + name for name in ALL}
    assert adapters["layers/mlp/down"]["a"].shape == (2, 64, 3) and adapters["layers/mlp/down"]["b"].shape == (2, 3, 16)
    assert np.std(adapters["layers/mlp/down"]["a"]) == pytest.approx(1 / 8, rel=0.15)  # 384 draws
    merged = merge_lora(PARAMS, adapters)
    jax.tree.map(np.testing.assert_array_equal, merged, PARAMS)


def test_merging_adds_the_scaled_product():
    adapters = full(init_lora(jax.random.key(1), PARAMS, rank=3, targets=("query", "down")))
    merged = merge_lora(PARAMS, adapters, alpha=6.0)
    for name, inner in (("attention", "query"), ("mlp", "down")):
        a, b = (np.asarray(adapters[f"layers/{name}/{inner}"][part], np.float64) for part in "ab")
        change = np.asarray(merged["layers"][name][inner]["kernel"]) - PARAMS["layers"][name][inner]["kernel"]
        np.testing.assert_allclose(change, 2 * a @ b, atol=1e-5)  # sums of 3 products of size 10, in float32
    assert (merged["layers"]["mlp"]["up"]["kernel"] == PARAMS["layers"]["mlp"]["up"]["kernel"]).all()


@pytest.mark.slow
def test_only_what_is_labelled_is_trained():
    start = {"base": PARAMS, "lora": init_lora(jax.random.key(1), PARAMS, rank=2)}
    tx = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, train_labels(start, "lora"))

    def loss(p):
        logits = Decoder(CONFIG).apply({"params": merge_lora(p["base"], p["lora"])}, TOKENS[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    @jax.jit
    def step(p, state):
        value, grads = jax.value_and_grad(loss)(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state, value

    p, state, losses = start, tx.init(start), []
    for _ in range(20):
        p, state, value = step(p, state)
        losses.append(float(value))
    jax.tree.map(np.testing.assert_array_equal, p["base"], start["base"])
    assert losses[-1] < losses[0] - 0.1


def test_merged_weights_keep_their_dtype():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    merged = merge_lora(half, full(init_lora(jax.random.key(1), half, rank=2)))
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: init_lora(jax.random.key(0), PARAMS, targets=("query", "qkv")), "no projection is called qkv"),
        (lambda: init_lora(jax.random.key(0), PARAMS, rank=0), "rank is 0"),
        (lambda: init_lora(jax.random.key(0), unstack_layers(PARAMS)), "before unstack_layers"),
        (lambda: init_lora(jax.random.key(0), fuse_projections(PARAMS, CONFIG)[0]), "before fuse_projections"),
        (
            lambda: merge_lora(fuse_projections(PARAMS, CONFIG)[0], init_lora(jax.random.key(0), PARAMS)),
            "no matrix for the adapters of layers/attention/key",
        ),
        (lambda: train_labels({"base": 0}, "lora"), "no parameters are called lora"),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
