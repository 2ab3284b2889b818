import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip import training
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, decoder_config
from jaxskip.optim import sophia, sophia_win_rate

MODEL = Decoder(decoder_config("gpt2-tiny", embed_dim=32, context_length=16, vocab_size=64, dtype=jnp.float32))
TOKENS = np.random.default_rng(0).integers(0, 64, (16, 17)).astype(np.int32)
BATCH = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def start(tx, mesh, seed=0):
    return training.init_state(
        lambda key: MODEL.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        tx,
        jax.random.key(seed),
        mesh,
        DECODER_PARTITION_RULES,
    )


def run(tx, axes=(1, 1, 1), steps=3, refresh=False, **options):
    mesh = training.make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    state = start(tx, mesh)
    step = training.make_train_step(training.next_token_loss(MODEL), tx, **options)
    if refresh:
        renew = training.make_hessian_refresh(training.gauss_newton_curvature(MODEL), rows=8)
        step = training.with_hessian_refresh(step, renew, every=2)
    losses = []
    with jax.set_mesh(mesh):
        batch = training.shard_batch(BATCH, mesh)
        for n in range(steps):
            state, metrics = step(state, batch, n)
            losses.append(float(metrics["loss"]))
    return state, losses, metrics


def assert_close(a, b, rtol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "axes",
    [pytest.param((8, 1, 1), marks=pytest.mark.slow), pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 2, 2)],
    ids=str,
)
def test_every_mesh_trains_as_one_device_does(axes):
    """Float32 sums in another order, over three steps of SGD with momentum (Adam would blow up rounding at 0)."""
    tx = optax.sgd(0.5, momentum=0.9)
    one, losses, _ = run(tx)
    many, sharded_losses, _ = run(tx, axes)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)
    assert_close(many.params, one.params, rtol=1e-3)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.multidevice
def test_sophias_curvature_is_the_same_on_eight_devices():
    """The labels that Sophia-G draws do not depend on the mesh."""
    tx = sophia(1e-3, update_interval=2)
    one, _, metrics = run(tx, refresh=True, state_metrics=lambda s: {"win_rate": sophia_win_rate(s.opt_state)})
    many, _, _ = run(tx, (2, 2, 2), refresh=True)
    assert int(one.opt_state[0].num_refreshes) == 2
    assert_close(jax.tree.map(jnp.sqrt, many.opt_state[0].h), jax.tree.map(jnp.sqrt, one.opt_state[0].h), rtol=1e-3)
    np.testing.assert_allclose(metrics["win_rate"], sophia_win_rate(one.opt_state))


@pytest.mark.parametrize(
    "axes", [(1, 1, 1), pytest.param((4, 1, 1), marks=[pytest.mark.multidevice, pytest.mark.slow])], ids=str
)
def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(axes):
    tx = optax.sgd(0.5)
    whole, losses, _ = run(tx)
    parts, part_losses, _ = run(tx, axes, accumulate=4)
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    assert_close(parts.params, whole.params, rtol=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    tx = optax.adam(0.1)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    state = training.init_state(lambda key: {"w": jnp.ones(3)}, tx, jax.random.key(0), mesh)
    step = training.make_train_step(lambda p, batch, key: (jnp.sum(p["w"] * batch["x"]), {}), tx)
    state, metrics = step(state, {"x": jnp.ones(3)})
    assert metrics["skipped"] == 0
    before = jax.device_get((state.params, state.opt_state))
    for bad in (jnp.nan, jnp.inf):
        state, metrics = step(state, {"x": jnp.full(3, bad)})
        assert metrics["skipped"] == 1
        jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
    assert int(state.step) == 3


def test_the_state_is_donated_and_the_key_differs_from_step_to_step():
    tx = optax.sgd(0.0)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    state = training.init_state(lambda key: {"w": jnp.ones(3)}, tx, jax.random.key(0), mesh)
    step = training.make_train_step(lambda p, batch, key: (jax.random.normal(key) + 0 * p["w"].sum(), {}), tx)
    second, first_metrics = step(state, {"x": jnp.ones(1)})
    assert state.params["w"].is_deleted()
    _, second_metrics = step(second, {"x": jnp.ones(1)})
    assert first_metrics["loss"] != second_metrics["loss"]


def test_refresh_order_follows_paper_or_official_code():
    calls = []
    step = training.with_hessian_refresh
    for first, expected in ((0, [0, 3, 6]), (3, [3, 6])):
        calls.clear()
        combined = step(lambda s, b, n: (s, {}), lambda s, b: calls.append(s) or s, every=3, first=first)
        for n in range(8):
            combined(n, None, n)
        assert calls == expected


def test_impossible_settings_are_refused():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate is 0"):
        training.make_train_step(training.next_token_loss(MODEL), tx, accumulate=0)
    with pytest.raises(ValueError, match="every is 0"):
        training.with_hessian_refresh(None, None, every=0)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    state = start(sophia(1e-3), mesh)
    refresh = training.make_hessian_refresh(training.gauss_newton_curvature(MODEL), rows=5)
    with pytest.raises(ValueError, match="sub-batch of 5 rows must divide the batch of 16"):
        refresh(state, BATCH)
    flash = MODEL.clone(config=dataclasses.replace(MODEL.config, attention="cudnn"))
    with pytest.raises(ValueError, match="attention='xla'"):
        training.hutchinson_curvature(flash)


def test_an_estimate_that_is_not_finite_is_dropped():
    tx = sophia(1e-3)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    state = training.init_state(lambda key: {"w": jnp.ones(3)}, tx, jax.random.key(0), mesh)
    refresh = training.make_hessian_refresh(lambda p, batch, key: {"w": batch["h"][0]})
    state = refresh(state, {"h": jnp.array([[1.0, 2.0, 3.0]])})
    before = jax.device_get(state.opt_state[0].h["w"])
    state = refresh(state, {"h": jnp.array([[1.0, jnp.nan, 3.0]])})
    np.testing.assert_array_equal(state.opt_state[0].h["w"], before)
    assert int(state.opt_state[0].num_refreshes) == 1 and before.all()


@pytest.mark.slow
def test_hutchinsons_estimate_goes_through_the_loop():
    tx = sophia(1e-3, gamma=0.01)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    refresh = training.make_hessian_refresh(training.hutchinson_curvature(MODEL), rows=2)
    state = refresh(start(tx, mesh), BATCH)
    h = jax.tree.leaves(state.opt_state[0].h)
    assert all(np.isfinite(x).all() for x in h) and any((x < 0).any() for x in h)
