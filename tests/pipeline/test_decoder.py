import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxskip import training
from jaxskip.data import TokenWindows
from jaxskip.models import Decoder, DecoderConfig
from jaxskip.pipeline import (
    STAGE_RULES,
    Topology,
    compile_table,
    path_loss,
    pipelined_loss,
    split_decoder,
    stage_mesh,
)

SHAPE = {"vocab_size": 32, "context_length": 8, "num_layers": 4, "num_heads": 2, "embed_dim": 8, "dtype": jnp.float32}
TIED = DecoderConfig(**SHAPE, init_std=0.3, scale_attention_by_layer=True)
LLAMA = DecoderConfig(
    **SHAPE, init_std=0.3, position="rotary", norm="rmsnorm", activation="swiglu", tie_embeddings=False, remat="full"
)
EVEN = Topology([[0, 1], [2, 3], [4, 5], [6, 7]])
PATHS = [(0, 2, 4), (1, 5, 3), (0, 7, 4), (1, 3, 7)]
UNEVEN = Topology([[0, 1, 2, 3], [4, 5], [6, 7]])
UNEVEN_PATHS = [(0, 4), (1, 6), (2, 5), (3, 7)]
PAIR = ("stage", "replica")
TOKENS, TARGETS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 8, 8)))
BATCH = {"inputs": TOKENS, "targets": TARGETS}


def init(config):
    return lambda key: Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def one_device(config, topology, paths):
    """The mean loss of the microbatches by autodiff, each through the stages of its path."""

    def loss(params):
        parts = [x.reshape(len(paths), -1, *x.shape[1:]) for x in BATCH.values()]
        losses = [
            path_loss(params, config, len(topology.stages), [topology.stage_of[n] for n in path], *rows)
            for path, *rows in zip(paths, *parts, strict=True)
        ]
        return sum(losses) / len(losses)

    return loss


def check_tree(got, want):
    """1e-5 of the largest entry of each leaf: float32, sums in another order."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.parametrize(
    "config", [pytest.param(TIED, id="gpt2"), pytest.param(LLAMA, id="llama", marks=pytest.mark.slow)]
)
def test_the_path_through_all_stages_is_the_decoder(config):
    params, rows = init(config)(jax.random.key(0)), tuple(BATCH.values())

    @jax.jit
    def losses(params, path):
        whole, _ = training.next_token_loss(Decoder(config))(params, BATCH, jax.random.key(0))
        same = [path_loss(params, config, s, range(n), *rows) for s, n in ((4, 4), (2, 2), ((1, 3), 2))]
        return whole, same, [path_loss(params, config, 4, p, *rows) for p in ((0, 3), path)]

    whole, same, missing = losses(params, jnp.array([0, 3]))
    np.testing.assert_allclose(same, whole, rtol=1e-5)  # float32
    assert missing[0] == missing[1] and abs(missing[0] - whole) > 1e-3


def test_a_stage_that_is_missing_is_not_read():
    params = init(TIED)(jax.random.key(0))
    broken = params | {"layers": jax.tree.map(lambda leaf: leaf.at[1:3].set(jnp.nan), params["layers"])}
    loss = jax.jit(lambda p: path_loss(p, TIED, 4, (0, 3), *BATCH.values()))
    losses = [loss(p) for p in (params, broken)]
    assert losses[0] == losses[1]


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("config", "grad_norm"),
    [pytest.param(TIED, "total", id="gpt2"), pytest.param(LLAMA, "visits", id="llama", marks=pytest.mark.slow)],
)
def test_gradients_through_the_training_step(config, grad_norm):
    """SGD without momentum shows them: parameters lie along the stages before and after."""
    mesh, tx = stage_mesh(EVEN), optax.sgd(1.0)
    state = training.init_state(init(config), tx, jax.random.key(0), mesh, STAGE_RULES)
    before = jax.device_get(state.params)
    loss_fn = pipelined_loss(config, compile_table(PATHS, EVEN), mesh, PAIR, grad_norm)
    state, metrics = training.make_train_step(loss_fn, tx)(state, BATCH)
    loss, grads = jax.jit(jax.value_and_grad(one_device(config, EVEN, PATHS)))(before)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    if grad_norm == "visits":  # of four microbatches, 4 visit stage 0, 3 stage 1, 3 stage 2, 2 stage 3
        factor = 4 / np.array([4, 3, 3, 2])
        grads["layers"] = jax.tree.map(lambda leaf: (np.asarray(leaf).T * factor).T, grads["layers"])
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)
    check_tree(jax.tree.map(lambda a, b: a - b, before, jax.device_get(state.params)), jax.device_get(grads))
    assert jax.tree.leaves(state.params["layers"])[0].sharding.spec == P("stage")


@pytest.mark.multidevice
@pytest.mark.slow
def test_stages_with_unequal_numbers_of_nodes():
    mesh = Mesh(np.array(jax.devices()[:8]), ("node",))
    config = DecoderConfig(**(SHAPE | {"num_layers": 3}), init_std=0.3)
    params = init(config)(jax.random.key(0))
    loss_fn = pipelined_loss(config, compile_table(UNEVEN_PATHS, UNEVEN), mesh, "node")
    got = jax.jit(jax.value_and_grad(lambda p: loss_fn(p, BATCH, jax.random.key(0))[0]))(params)
    want = jax.jit(jax.value_and_grad(one_device(config, UNEVEN, UNEVEN_PATHS)))(params)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    check_tree(got[1], jax.device_get(want[1]))


@pytest.mark.multidevice
def test_a_run_that_was_stopped_continues_bit_for_bit(tmp_path):
    """AdamW with a clip by global norm, through the one training loop, evaluated with stages missing."""
    mesh, tx = stage_mesh(EVEN), training.make_optimizer("adamw", 1e-2)
    step = training.make_train_step(pipelined_loss(TIED, compile_table(PATHS, EVEN), mesh, PAIR), tx)
    missing = jax.jit(lambda p: path_loss(p, TIED, 4, (0, 2), BATCH["inputs"], BATCH["targets"]))

    def fit(folder, steps):
        state = training.init_state(init(TIED), tx, jax.random.key(0), mesh, STAGE_RULES)
        tokens = np.random.default_rng(0).integers(0, 8, 500).astype(np.uint8)
        batches = TokenWindows(tokens, batch_size=8, context_length=8, vocab_size=32)
        evaluate = lambda params: {"missing": float(missing(params))}  # noqa: E731
        return training.fit(state, step, batches, mesh=mesh, steps=steps, directory=folder, evaluate=evaluate)

    whole, rows = fit(tmp_path / "whole", 5)
    fit(tmp_path / "parts", 2)
    parts, continued = fit(tmp_path / "parts", 5)
    assert [row["loss"] for row in continued] == [row["loss"] for row in rows]
    assert continued[-1]["missing"] == rows[-1]["missing"] and rows[-1]["loss"] < rows[0]["loss"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.params), jax.device_get(whole.params))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.opt_state), jax.device_get(whole.opt_state))


def test_bad_arguments():
    params = init(TIED)(jax.random.key(0))
    with pytest.raises(ValueError, match="stages=3; give a divisor of the 4 layers"):
        split_decoder(params, TIED, 3)
    with pytest.raises(ValueError, match=r"stages=\(1, 0, 3\)"):
        split_decoder(params, TIED, (1, 0, 3))
    with pytest.raises(ValueError, match=r"path is \[0, 4\]; stages are 0..3"):
        path_loss(params, TIED, 4, (0, 4), BATCH["inputs"], BATCH["targets"])
    loss_fn = pipelined_loss(TIED, compile_table([(0, 1)] * 3, Topology([[0], [1]])), stage_mesh(Topology([[0], [1]])))
    with pytest.raises(ValueError, match="a batch of 8 sequences; the paths are of 3 microbatches"):
        loss_fn(params, BATCH, jax.random.key(0))
