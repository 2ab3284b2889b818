"""AdaGrad and AdaGrad-Norm against torch and closed forms, and learning rates that follow samples."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip.optim import (
    adagrad,
    adagrad_norm,
    scale_by_adagrad,
    scale_by_adagrad_norm,
    scale_by_sample_schedule,
)
from jaxskip.training import Checkpoints

GRADS = np.random.default_rng(0).normal(size=(10, 6, 4)).astype(np.float32)


def run(tx, grads, **extra):
    state, out = tx.init(jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)), []
    step = jax.jit(tx.update)
    for t in range(len(jax.tree.leaves(grads)[0])):
        updates, state = step(jax.tree.map(lambda g: jnp.asarray(g[t]), grads), state, **extra)  # noqa: B023
        out.append(updates)
    return jax.tree.map(lambda *x: np.stack(x), *out), state


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("start", [0.0, 0.1])
def test_adagrad_is_torch_s(start):
    """Trap 7; rtol 1e-6: one float32 rounding a step."""
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.zeros(6, 4))
    peer = torch.optim.Adagrad([weight], lr=0.1, initial_accumulator_value=start)
    for grad in GRADS:
        weight.grad = torch.tensor(grad)
        peer.step()
    ours, _ = run(adagrad(0.1, initial_accumulator_value=start), GRADS)
    np.testing.assert_allclose(ours.sum(0), weight.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_adagrad_is_not_optax_s():
    """Trap 7: Optax starts from 0.1 and puts eps under the root; with both undone the two agree to 1e-5."""
    ours, _ = run(adagrad(0.1), GRADS)
    theirs, _ = run(optax.adagrad(0.1), GRADS)
    assert np.abs(ours - theirs).max() > 1e-2
    same, _ = run(optax.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-30), GRADS)
    np.testing.assert_allclose(ours, same, rtol=1e-5)


def test_adagrad_norm_on_a_parabola():
    """Card test 8: x^2 / 2, ten steps: acc_t = acc_0 + sum g^2 and x by hand, 1e-6."""
    tx = adagrad_norm()
    x, acc, wanted = jnp.float32(2.0), 1e-2, 2.0
    state = tx.init(x)
    for _ in range(10):
        updates, state = tx.update(x, state)
        x = x + updates
        acc += wanted**2
        wanted -= wanted / np.sqrt(acc)
        np.testing.assert_allclose(state[0].sum_of_squares, acc, rtol=1e-6)
        np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scope", ["global", "leaf", "row"])
def test_scopes(scope):
    """Trap 5: the paper has one number for the tree; rows are output units, the last axis of a Flax kernel."""
    grads = {"kernel": GRADS, "bias": GRADS[:, 0]}
    got, state = run(scale_by_adagrad_norm(initial_accumulator_value=1.0, scope=scope), grads)
    squares = {name: np.cumsum(g.astype(np.float64) ** 2, axis=0) for name, g in grads.items()}
    if scope == "global":
        total = 1 + squares["kernel"].sum((1, 2)) + squares["bias"].sum(1)
        wanted = {"kernel": total[:, None, None], "bias": total[:, None]}
        assert state.sum_of_squares.shape == ()
    elif scope == "leaf":
        wanted = {
            "kernel": 1 + squares["kernel"].sum((1, 2), keepdims=True),
            "bias": 1 + squares["bias"].sum(1)[:, None],
        }
        assert jax.tree.map(jnp.shape, state.sum_of_squares) == {"kernel": (), "bias": ()}
    else:
        wanted = {"kernel": 1 + squares["kernel"].sum(1, keepdims=True), "bias": 1 + squares["bias"]}
        assert jax.tree.map(jnp.shape, state.sum_of_squares) == {"kernel": (1, 4), "bias": (4,)}
    for name, g in grads.items():
        np.testing.assert_allclose(got[name], g / np.sqrt(wanted[name]), rtol=1e-5)


def test_row_scope_is_the_official_rule_for_a_layer():
    """The authors' code: torch rows [out, in], eps 1e-10 behind the root, without its rules for biases and decay."""
    weights = GRADS.swapaxes(1, 2)
    acc, wanted = np.full(weights.shape[1:], 1e-2), []
    for g in weights:
        acc = acc + np.linalg.norm(g, axis=1)[:, None] ** 2
        wanted.append(g / (np.sqrt(acc) + 1e-10))
    got, _ = run(scale_by_adagrad_norm(eps=1e-10, scope="row"), GRADS)
    np.testing.assert_allclose(got.swapaxes(1, 2), wanted, rtol=1e-5)


def test_zero_gradients_are_zero_updates():
    for tx in (scale_by_adagrad(eps=0.0), scale_by_adagrad_norm()):
        updates, _ = tx.update(jnp.zeros(3), tx.init(jnp.zeros(3)))
        np.testing.assert_array_equal(updates, 0.0)


def test_the_schedule_follows_samples_not_steps():
    """The same samples in few or many steps see the same rate; the sizes are traced: one compilation."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, 1000, 0.1)
    tx = optax.chain(optax.identity(), scale_by_sample_schedule(schedule))
    step = jax.jit(lambda s, b: tx.update(jnp.ones(()), s, batch_size=b))
    for sizes in ([10] * 60, [8, 16, 32, 64, 128, 256, 96]):
        state, seen = tx.init(jnp.ones(())), 0
        for size in sizes:
            update, state = step(state, size)
            np.testing.assert_allclose(update, -schedule(seen), rtol=1e-5, atol=1e-7)
            seen += size
        assert int(state[1].samples) == seen == 600
    assert step._cache_size() == 1


def test_the_count_of_samples_saturates():
    tx = scale_by_sample_schedule(lambda samples: 1.0, flip_sign=False)
    state = tx.init(jnp.ones(()))
    for _ in range(3):
        update, state = tx.update(jnp.ones(()), state, batch_size=2**30)
    assert int(state.samples) == 2**31 - 1 and float(update) == 1.0
    with pytest.raises(ValueError, match="batch_size=b"):
        tx.update(jnp.ones(()), state)


def test_checkpoint(tmp_path):
    tx = optax.chain(scale_by_adagrad_norm(scope="row"), scale_by_sample_schedule(lambda samples: 0.1))
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), batch_size=7)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        _, restored, _ = checkpoints.restore(tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: adagrad(0.1, eps=-1.0), "eps=-1.0"),
        (lambda: adagrad(0.1, initial_accumulator_value=-1.0), "initial_accumulator_value=-1.0"),
        (lambda: adagrad_norm(initial_accumulator_value=0.0), "both 0"),
        (lambda: adagrad_norm(scope="layer"), "scope='layer'"),
    ],
)
def test_bad_arguments_are_refused(factory, message):
    with pytest.raises(ValueError, match=message):
        factory()
