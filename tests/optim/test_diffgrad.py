"""diffGrad against the authors' notebook, torch_optimizer 0.3.0, Adam at half the rate, and its method card's traps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.optim import ScaleByDiffGradState, diffgrad, diffgrad_friction, scale_by_diffgrad

x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64

FRICTIONS = ["abs_sigmoid", "sigmoid", "wide_abs_sigmoid", "std", "variance", "sqrt_std"]
SHAPES = {"a": (3, 2), "b": (4,), "c": ()}
RNG = np.random.default_rng(0)
GRADS = [{name: np.float32(RNG.normal(size=shape)) for name, shape in SHAPES.items()} for _ in range(50)]
START = {name: np.float32(RNG.normal(size=shape)) for name, shape in SHAPES.items()}


def run(tx, grads, params):
    """Parameters after each update, and the last state; one scan under jit."""

    def body(carry, grad):
        p, state = carry
        updates, state = tx.update(grad, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    (_, state), path = jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g))(params, stacked)
    return path, state


# The rule


def slope_1(x):
    return jnp.where(x <= 0, 2 * x + 0.6, 2 * x - 0.4)


def slope_2(x):
    return jnp.where(x <= -0.9, -40.0, x * jnp.cos(8 * x) + jnp.sin(8 * x) + 3 * x * x)


def slope_3(x):
    conditions = [x <= -0.5, x <= -0.4, x <= 0, x <= 0.4, x <= 0.5]
    return jnp.select(conditions, [2 * x, jnp.ones_like(x), -7 / 8, 7 / 8, -jnp.ones_like(x)], 2 * x)


# Position after 299 updates with lr 0.1, b1 0.95, b2 0.999, eps 1e-8 from x = -1 (section 4 of the method card).
TOYS = {
    "F1": (slope_1, {"abs_sigmoid": -0.300071, "sigmoid": -0.300231, "wide_abs_sigmoid": -0.300039, None: -0.300300}),
    "F2": (slope_2, {"abs_sigmoid": -0.812145, "sigmoid": -0.845578, "wide_abs_sigmoid": -0.000275, None: -0.835063}),
    "F3": (slope_3, {"abs_sigmoid": 0.013565, "sigmoid": 0.000132, "wide_abs_sigmoid": 0.021399, None: 0.002133}),
}
EARLY = {"F1": (-0.464024, -0.377654), "F2": (-0.604532, -0.687887), "F3": (-0.426936, -0.086673)}


@pytest.mark.parametrize("name", TOYS)
def test_the_notebooks_toys(name):
    """Card test 1, with Adam at half the rate as fourth version; 1e-5 in float64, the table has six digits."""
    slope, wanted = TOYS[name]

    def train(friction):
        tx = optax.adam(0.05, b1=0.95) if friction is None else diffgrad(
            0.1, b1=0.95, friction=friction, eps_mode="optax")  # fmt: skip

        def body(carry, _):
            x, state = carry
            updates, state = tx.update(slope(x), state, x)
            return (x + updates, state), x + updates

        start = jnp.asarray(-1.0)
        return jax.lax.scan(body, (start, tx.init(start)), length=299)[1]

    with x64(True):
        paths = jax.jit(lambda: {friction: train(friction) for friction in wanted if friction} | {"": train(None)})()
    paths = {friction or None: np.asarray(path) for friction, path in paths.items()}
    np.testing.assert_allclose([paths[f][-1] for f in wanted], list(wanted.values()), atol=1e-5, rtol=0)
    np.testing.assert_allclose(paths["abs_sigmoid"][[9, 49]], EARLY[name], atol=1e-5, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parity_with_torch_optimizer(weight_decay):
    """Card test 2 and trap 5, version 0.3.0; rtol 1e-5 after 50 float32 steps. L2 decay is in prev_grad, trap 6."""
    torch, torch_optimizer = pytest.importorskip("torch"), pytest.importorskip("torch_optimizer")
    path, state = run(diffgrad(0.01, weight_decay=weight_decay), GRADS, START)
    peers = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in START.items()}
    optimizer = torch_optimizer.DiffGrad(peers.values(), lr=0.01, weight_decay=weight_decay)
    for step, grads in enumerate(GRADS):
        for name, parameter in peers.items():
            parameter.grad = torch.tensor(grads[name], dtype=torch.float32)
        optimizer.step()
        for name, parameter in peers.items():
            np.testing.assert_allclose(path[name][step], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    inner = next(s for s in state if isinstance(s, ScaleByDiffGradState))
    for name, parameter in peers.items():
        wanted = optimizer.state[parameter]["previous_grad"]
        np.testing.assert_allclose(inner.prev_grad[name], wanted, rtol=1e-5, atol=1e-6)


def test_first_step_is_the_sigmoid_of_the_gradient():
    """Traps 3 to 5: not 0.5, not 31.6 times too far, bias corrections the right way round."""
    grads = jnp.array([1.0, 2.0, -3.0])
    updates, _ = diffgrad(0.01).update(grads, diffgrad(0.01).init(grads), grads)
    np.testing.assert_allclose(updates, [-0.0073106, -0.0088080, 0.0095257], rtol=1e-5)


@pytest.mark.parametrize("eps_mode", ["official", "optax"])
def test_a_constant_gradient_makes_it_adam_at_half_the_rate(eps_mode):
    """Card test 3; eps 0, float64, where both eps modes are the same number."""
    with x64(True):
        grads = jnp.array([1e-3, 0.5, -40.0])
        path, _ = run(diffgrad(0.1, eps=0.0, eps_mode=eps_mode), [grads] * 6, jnp.zeros(3))
        half, _ = run(optax.adam(0.05, eps=0.0), [grads] * 6, jnp.zeros(3))
        np.testing.assert_allclose(path[0], -0.1 * jax.nn.sigmoid(jnp.abs(grads)) * jnp.sign(grads), rtol=1e-6)
        np.testing.assert_allclose(np.diff(path, axis=0), np.diff(half, axis=0), rtol=1e-6)


def test_large_alternating_gradients_make_it_adam():
    """Card test 4: |d| = 40 from the second step on; the first xi is sigmoid(20), 2e-9 below 1."""
    grads = [jnp.array([20.0, -20.0]) * (-1) ** t for t in range(6)]
    path, _ = run(diffgrad(0.1, eps=1e-30), grads, jnp.zeros(2))
    adam, _ = run(optax.adam(0.1, eps=1e-30), grads, jnp.zeros(2))
    np.testing.assert_allclose(path, adam, rtol=1e-5, atol=1e-6)
    assert float(diffgrad_friction(grads[0], grads[1]).min()) > 0.999999


def test_eps_modes_differ_by_the_stated_factor():
    """At t = 1 the official eps counts 1 / sqrt(1 - b2) = 31.6 times; eps_root stands under the root of each mode."""
    g = jnp.array([1e-3])
    for eps_mode, times in (("official", 1 / np.sqrt(0.001)), ("optax", 1.0)):
        tx = scale_by_diffgrad(eps=1e-3, eps_mode=eps_mode)
        got, _ = tx.update(g, tx.init(g))
        np.testing.assert_allclose(got, jax.nn.sigmoid(g) * g / (g + times * 1e-3), rtol=1e-4)
    tx = scale_by_diffgrad(eps=0.0, eps_root=1e-6, eps_mode="optax")
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], jax.nn.sigmoid(g) * g / jnp.sqrt(g * g + 1e-6), rtol=1e-4)


def test_decoupled_decay_is_outside_of_the_rule_and_masked():
    params, grads = {"w": jnp.full(2, 4.0), "b": jnp.full(2, 4.0)}, {"w": jnp.ones(2), "b": jnp.ones(2)}
    mask = {"w": True, "b": False}
    plain = diffgrad(0.1)
    decayed = diffgrad(0.1, weight_decay=0.5, decoupled=True, mask=mask)
    wanted, _ = plain.update(grads, plain.init(params), params)
    got, state = decayed.update(grads, decayed.init(params), params)
    np.testing.assert_allclose(got["w"], wanted["w"] - 0.1 * 0.5 * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(got["b"], wanted["b"])
    np.testing.assert_array_equal(state[0].prev_grad["w"], 1.0)


# The friction


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4), st.sampled_from(FRICTIONS))
def test_friction_stays_in_its_range(values, friction):
    """Card test 5 and trap 7: no overflow at any size, also in float16 with negative differences."""
    prev, g = jnp.array(values[:2]), jnp.array(values[2:])
    xi = np.asarray(diffgrad_friction(prev, g, friction))
    low, high = {"abs_sigmoid": (0.5, 1.0), "wide_abs_sigmoid": (0.5, 5.0)}.get(friction, (0.0, 1.0))
    assert np.all((xi >= low) & (xi <= high)), xi
    half = diffgrad_friction(jnp.array([-6e4], jnp.float16), jnp.array([6e4], jnp.float16), friction)
    assert half.dtype == jnp.float32 and np.all(np.isfinite(half))


def test_friction_formulas():
    d = jnp.array([-3.0, 0.0, 2.0])
    logistic = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
    wanted = {
        "abs_sigmoid": logistic(abs(d)),
        "sigmoid": logistic(d),
        "wide_abs_sigmoid": 9 * logistic(0.5 * abs(d)) - 4,
        "std": logistic(0.25 * abs(d) - 0.5),
        "variance": logistic(0.0625 * abs(d) - 0.5),
        "sqrt_std": logistic(0.5 * abs(d) - 0.5),
    }
    for friction, xi in wanted.items():
        got = diffgrad_friction(d, jnp.zeros(3), friction, mean=0.5, std=0.25)
        np.testing.assert_allclose(got, xi, rtol=1e-6)


@pytest.mark.parametrize("friction", ["std", "variance", "sqrt_std"])
def test_statistics_are_those_of_the_past_gradients(friction):
    """Mean 0 and std 1 at the first step, then those of the gradients before this one; float64 numpy to 1e-5."""
    past = np.array([[1.0, -2.0], [3.0, 0.5], [-1.5, 0.7], [0.2, 0.1]])
    path, state = run(scale_by_diffgrad(b1=0.0, b2=0.0, friction=friction), list(past.astype(np.float32)), jnp.zeros(2))
    steps = np.diff(np.concatenate([np.zeros((1, 2)), path]), axis=0)
    for t, g in enumerate(past):
        mean, std = (past[:t].mean(0), past[:t].std(0)) if t else (0.0, 1.0)
        slope = {"std": std, "variance": std**2, "sqrt_std": np.sqrt(std)}[friction]
        d = abs(g - (past[t - 1] if t else 0))
        np.testing.assert_allclose(steps[t], np.sign(g) / (1 + np.exp(mean - slope * d)), rtol=1e-4)
    np.testing.assert_allclose(state.s2, (past**2).sum(0), rtol=1e-6)
    assert scale_by_diffgrad().init(jnp.zeros(2)).s1 is None


def test_friction_depends_on_the_scale_of_the_loss():
    """Card test 6 and trap 2; diff_scale takes the factor out again, Adam never had it."""
    prev, g = jnp.full(3, 1e-3), jnp.array([2e-3, -1e-3, 0.0])
    small, large = (float(diffgrad_friction(s * prev, s * g).mean()) for s in (1, 1000))
    assert small < 0.501 and large > 0.7
    undone = diffgrad_friction(1000 * prev, 1000 * g, diff_scale=1e-3)
    np.testing.assert_allclose(undone, diffgrad_friction(prev, g), rtol=1e-6)
    scaled, _ = run(scale_by_diffgrad(eps=0.0, diff_scale=1e-3), [1000 * prev, 1000 * g], jnp.zeros(3))
    plain, _ = run(scale_by_diffgrad(eps=0.0), [prev, g], jnp.zeros(3))
    np.testing.assert_allclose(scaled, plain, rtol=1e-5)


def test_it_is_per_coordinate():
    """Trap 10: one coefficient a tensor would give both coordinates the same."""
    tx = scale_by_diffgrad(b1=0.0, b2=0.0, eps=0.0)
    _, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
    updates, _ = tx.update(jnp.array([1.0, 9.0]), state)
    np.testing.assert_allclose(updates, [0.5, jax.nn.sigmoid(8.0)], rtol=1e-5)


# The state


def test_prev_grad_is_a_copy_also_when_gradients_are_donated():
    """Trap 1: the published code compared the gradient with itself."""
    tx = diffgrad(0.1)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    params = jnp.zeros(3)
    state = tx.init(params)
    for g in (1.0, -4.0):
        old = state[1].prev_grad
        grads = jnp.full(3, g)
        updates, state = step(grads, state, params)
        assert old.is_deleted()
        np.testing.assert_array_equal(state[1].prev_grad, g)
    path, _ = run(tx, [jnp.full(3, 1.0), jnp.full(3, -4.0)], params)
    np.testing.assert_allclose(updates, path[1] - path[0], rtol=1e-5)


def test_multi_steps_keeps_the_accumulated_gradient_and_dropped_steps_keep_the_old():
    """Trap 8."""
    multi = optax.MultiSteps(diffgrad(0.1), 2)
    params = jnp.zeros(2)
    state = multi.init(params)
    for g in (1.0, 5.0, 100.0):
        _, state = multi.update(jnp.full(2, g), state, params)
    np.testing.assert_allclose(state.inner_opt_state[1].prev_grad, 3.0)
    guarded = optax.apply_if_finite(diffgrad(0.1), 3)
    _, state = guarded.update(jnp.full(2, 2.0), guarded.init(params), params)
    _, after = jax.jit(guarded.update)(jnp.array([jnp.nan, 1.0]), state, params)
    np.testing.assert_array_equal(after.inner_state[1].prev_grad, 2.0)
    assert int(after.inner_state[1].count) == 1 and not bool(after.last_finite)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    """Card test 7: updates like the gradients, state at least float32, no silent down-cast under x64."""
    with x64(dtype == jnp.float64):
        params = jnp.ones(3, dtype)
        tx = diffgrad(0.1)
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        wide = jnp.promote_types(dtype, jnp.float32)
        assert updates.dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {wide}


def test_low_precision_buffers():
    """Trap 9: bfloat16 for the previous gradient moves xi by at most 2^-9 |prev|."""
    tx = scale_by_diffgrad(mu_dtype=jnp.bfloat16, prev_dtype=jnp.bfloat16)
    g = jnp.linspace(-3.0, 3.0, 101)
    _, state = tx.update(g, tx.init(g))
    assert state.mu.dtype == state.prev_grad.dtype == jnp.bfloat16 and state.nu.dtype == jnp.float32
    error = jnp.abs(diffgrad_friction(state.prev_grad, 0.3 * g) - diffgrad_friction(g, 0.3 * g))
    assert bool(jnp.all(error <= 2.0**-9 * jnp.abs(g))) and float(error.max()) > 0


def test_jit_is_eager_and_vmap_is_a_loop():
    """Card test 7; a few float32 roundings of values around 1."""
    tx = diffgrad(0.05, friction="wide_abs_sigmoid")
    path, _ = run(tx, GRADS[:4], START)
    params, state = START, tx.init(START)
    for step, grads in enumerate(GRADS[:4]):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in params.items():
            np.testing.assert_allclose(value, path[name][step], rtol=1e-5, atol=1e-6)
    starts = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x), jnp.asarray(x) + 1]), START)
    both, _ = jax.vmap(lambda p: run(diffgrad(0.05, weight_decay=0.1), GRADS[:4], p))(starts)
    second, _ = run(diffgrad(0.05, weight_decay=0.1), GRADS[:4], jax.tree.map(lambda x: x + 1, START))
    for name in second:
        np.testing.assert_allclose(both[name][1], second[name], rtol=1e-5, atol=1e-6)


def test_it_is_elementwise():
    """Everything in the program is a scalar or elementwise, so that XLA can make one pass of it on an accelerator."""
    tx = scale_by_diffgrad(friction="std")
    params = {"w": jnp.zeros((8, 4)), "b": jnp.zeros(4)}
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    operations = set(re.findall(r"stablehlo\.(\w+)", text))
    assert "multiply" in operations
    assert not operations & {"reduce", "transpose", "reshape", "dot_general", "gather", "concatenate", "all_reduce"}


@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros((0, 3))}, {"a": None, "b": jnp.ones(2)}], ids=str)
def test_degenerate_trees(tree):
    tx = diffgrad(0.1)
    updates, _ = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, "b1=1.0; it must be in"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"eps": -1e-8}, "eps=-1e-08; it must be >= 0"),
        ({"eps_root": -1.0}, "eps_root"),
        ({"friction": "abs"}, "friction='abs'; choose one of"),
        ({"eps_mode": "torch"}, "eps_mode='torch'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        diffgrad(0.1, **arguments)


def test_bad_friction_of_the_function():
    with pytest.raises(ValueError, match="friction=0; choose one of"):
        diffgrad_friction(jnp.ones(2), jnp.ones(2), 0)


def test_checkpoints_through_orbax(tmp_path):
    """With a low-precision buffer and without the sums; the run goes on as if it had not stopped."""
    from jaxskip.training import Checkpoints

    tx = diffgrad(0.1, prev_dtype=jnp.bfloat16)
    _, state = run(tx, GRADS[:3], START)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {})
        _, restored, _ = checkpoints.restore(tx.init(START))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    step = jax.jit(lambda s: tx.update(GRADS[3], s, START)[0])
    jax.tree.map(np.testing.assert_array_equal, step(restored), step(state))
