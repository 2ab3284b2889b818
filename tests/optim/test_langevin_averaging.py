"""Langevin averaging against the theory of Brownian motion on the sphere, and the traps of its method card."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.optim import (
    LangevinResult,
    add_langevin_noise,
    minibatch_averaging,
    params_average,
    partial_trace,
    project_tangent,
    project_to_sphere,
    running_average,
    single_index_problem,
    spherical_langevin,
    spherical_sgd,
    tensor_pca_problem,
)
from jaxskip.training import Checkpoints, make_mesh

KEY = jax.random.key(0)


def no_drift(theta):
    return jnp.zeros_like(theta)


def unit_rows(n, d, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


# Brownian motion


def test_autocorrelation_and_the_scale_of_the_noise():
    """Card test 1 and trap 3: e^(-(d-1) t / 2) within 5 % at dt = 1e-3; noise of variance 2 would square it."""
    start = unit_rows(4000, 10)
    run = jax.jit(lambda key: spherical_langevin(no_drift, key, 10, 0.0, 0.2, dt=1e-3, chains=4000, start=start))
    result = run(KEY)
    np.testing.assert_allclose(jnp.mean(jnp.sum(start * result.last, -1)), np.exp(-9 * 0.2 / 2), rtol=0.05)
    np.testing.assert_allclose(jnp.linalg.norm(result.last, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(result.snapshots, axis=-1), 1, atol=1e-6)


@pytest.mark.slow
def test_time_averages_of_pure_noise():
    """Card test 1: the mean's variance is (1/d) (4/(d-1)) / T within 20 %; E theta theta^T = I/d within 3 s.e."""
    d, time, chains = 10, 10.0, 200
    run = jax.vmap(lambda key: spherical_langevin(no_drift, key, d, 0.0, time, dt=0.01, order="second"))
    result = jax.jit(run)(jax.random.split(KEY, chains))
    np.testing.assert_allclose(jnp.mean(result.mean**2), 4 / d / (d - 1) / time, rtol=0.2)
    moments = result.second_moment
    standard_error = moments.std(0) / chains**0.5
    # Over 55 entries three standard errors are passed now and then, four are not.
    assert np.all(np.abs(moments.mean(0) - jnp.eye(d) / d) < 4 * standard_error + 1e-6)
    assert np.mean(np.abs(moments.mean(0) - jnp.eye(d) / d) < 3 * standard_error + 1e-6) > 0.95
    np.testing.assert_allclose(moments, moments.swapaxes(1, 2), atol=1e-6)
    np.testing.assert_allclose(jnp.trace(moments, axis1=1, axis2=2), 1, atol=1e-5)


# The averages


@pytest.mark.slow
def test_linear_response():
    """Card test 3: a weak drift moves the mean along the partial trace, twice as far for twice the drift.

    Seeds differ in the mean by 2 / sqrt(d T), a third of the effect at T = 8000; the same noise without drift,
    subtracted, leaves the effect (0.0266 at eps = 0.5) after a fiftieth of that.
    """

    @jax.jit
    def run(eps):
        problem = tensor_pca_problem(KEY, d=10, k=3, lam=30.0)
        result = spherical_langevin(problem.drift, jax.random.key(1), 10, eps, 5.0, dt=0.02, chains=128)
        return result.mean, partial_trace(problem)

    (still, oracle), (weak, _), (strong, _) = run(0.0), run(0.25), run(0.5)
    weak, strong = weak - still, strong - still
    assert float(strong @ oracle / jnp.linalg.norm(strong)) >= 0.95
    assert float(weak @ oracle / jnp.linalg.norm(weak)) >= 0.95
    np.testing.assert_allclose(jnp.linalg.norm(weak) / jnp.linalg.norm(strong), 0.5, rtol=0.1)
    np.testing.assert_allclose(jnp.linalg.norm(strong), 0.0266, rtol=0.2)


@functools.cache
def planted(**changes):
    """An easy problem, d = 10: the result of 8 chains and the overlap of its mean."""
    options = {"eps": 3.0, "T": 40.0, "dt": 0.02, "chains": 8} | changes

    def run(start):
        problem = tensor_pca_problem(KEY, d=10, k=3, lam=60.0)
        result = spherical_langevin(problem.drift, jax.random.key(1), 10, start=start, **options)
        return result, result.estimate("odd") @ problem.theta_star

    return jax.jit(run)(unit_rows(8, 10))


@pytest.mark.slow
def test_thinning_loses_little():
    """Card test 4 and trap 5: every 10th iterate instead of all, on the same path, moves the overlap by < 0.02."""
    every, overlap = planted()
    tenth, thinned_overlap = planted(thin=10)
    assert float(overlap) > 0.9
    assert float(thinned_overlap) == pytest.approx(float(overlap), abs=0.02)
    np.testing.assert_array_equal(every.last, tenth.last)


@pytest.mark.slow
def test_blocks_make_up_the_mean_and_burn_in_is_left_out():
    """Trap 5: blocks are averaged as they are. Half of the time burnt leaves the mean of the second half."""
    whole, _ = planted()
    half, _ = planted(burn_in=0.5)
    assert whole.block_means.shape == (2, 10) and whole.snapshots.shape == (2, 8, 10)
    np.testing.assert_allclose(whole.mean, whole.block_means.mean(0), atol=1e-7)
    np.testing.assert_allclose(half.mean, whole.block_means[1], atol=1e-6)
    trace = whole.trace_overlap(jnp.eye(10)[0])
    np.testing.assert_allclose(trace[-1], whole.mean[0] / jnp.linalg.norm(whole.mean), rtol=1e-4)
    np.testing.assert_allclose(trace[0], whole.block_means[0, 0] / jnp.linalg.norm(whole.block_means[0]), rtol=1e-4)


@pytest.mark.slow
def test_a_run_starts_where_it_is_told_or_anywhere():
    start = unit_rows(8, 10)
    run = jax.jit(lambda key, start: spherical_langevin(no_drift, key, 10, 0.0, 1e-5, dt=1e-5, chains=8, start=start))
    np.testing.assert_allclose(run(KEY, start).last, start, atol=0.02)
    anywhere = [run(key, None).last for key in jax.random.split(KEY, 2)]
    assert float(jnp.abs(anywhere[0] - anywhere[1]).max()) > 0.5


def test_a_drift_that_is_not_tangent_is_projected():
    """Trap 4: the radial part would be cancelled by normalising to first order only."""
    tangent_drift = lambda theta: theta[::-1] - (theta[::-1] @ theta) * theta  # noqa: E731
    run = jax.jit(lambda: [spherical_langevin(f, KEY, 6, 5.0, 1.0, dt=0.02).last for f in (
        tangent_drift, lambda theta: tangent_drift(theta) + 100 * theta)])  # fmt: skip
    clean, radial = run()
    np.testing.assert_allclose(clean, radial, atol=1e-3)


@pytest.mark.slow
def test_even_problems_need_the_second_moment():
    """Trap 2 and card test 5: k = 2, where the first order is a random direction and the second finds the signal."""
    problem = tensor_pca_problem(KEY, d=6, k=2, lam=20.0)
    run = lambda p: spherical_langevin(p.drift, KEY, 6, 2.0, 50.0, dt=0.02, order="both", chains=8)  # noqa: E731
    result = jax.jit(run)(problem)
    assert abs(float(result.estimate("even") @ problem.theta_star)) > 0.9
    np.testing.assert_allclose(result.second_moment, result.second_moment.T, atol=1e-6)
    np.testing.assert_allclose(jnp.trace(result.second_moment), 1, atol=1e-5)
    first = result._replace(second_moment=None)
    with pytest.raises(ValueError, match="order='second'"):
        first.estimate("even")
    with pytest.raises(ValueError, match="parity='both'"):
        result.estimate("both")
    odd = LangevinResult(jnp.array([3.0, 4.0]), None, *[jnp.zeros(())] * 3).estimate("odd")
    np.testing.assert_allclose(odd, [0.6, 0.8], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.multidevice
def test_thousands_of_chains_over_eight_devices():
    """Keys spread over a mesh spread the chains; the results are those of one device, to float32 over 60 steps."""
    problem = tensor_pca_problem(KEY, d=6, k=3, lam=20.0)
    run = jax.jit(jax.vmap(lambda key, p: spherical_langevin(p.drift, key, 6, 1.0, 0.6, dt=0.01), (0, None)))
    keys = jax.random.split(KEY, 2048)
    one = run(keys, problem)
    many = run(jax.device_put(keys, NamedSharding(make_mesh(), P("data"))), problem)
    assert len(many.mean.sharding.device_set) == 8
    np.testing.assert_allclose(many.mean, one.mean, atol=1e-5)


# SGD on one example at a time


@pytest.mark.slow
def test_minibatch_averaging_is_spherical_sgd_under_a_running_average():
    """The scan and the Optax pieces take the same steps when they draw the same examples."""
    problem = single_index_problem(KEY, d=6, n=50, k=3)
    key = jax.random.key(3)
    start = unit_rows(1, 6)
    result = minibatch_averaging(problem.sample_drift, key, 6, learning_rate=0.05, steps=40, start=start)
    chain_key = jax.random.split(jax.random.split(key)[1], 1)[0]
    tx = running_average(spherical_sgd(0.05))

    @jax.jit
    def run(theta):
        def body(carry, n):
            theta, state = carry
            grad = -problem.sample_drift(theta, jax.random.fold_in(chain_key, n))
            updates, state = tx.update(grad, state, theta)
            return (optax.apply_updates(theta, updates), state), None

        return jax.lax.scan(body, (theta, tx.init(theta)), jnp.arange(40))[0]

    theta, state = run(start[0])
    np.testing.assert_allclose(theta, result.last[0], atol=1e-5)
    np.testing.assert_allclose(params_average(state), result.mean, atol=1e-5)


# The Optax pieces


@pytest.mark.slow
def test_langevin_from_optax_pieces_is_brownian_motion_on_the_sphere():
    """Trap 3: variance=dt decorrelates a step by (1 + (d-1) dt)^(-1/2), 2 dt would by twice as much; 4000 draws."""
    dt, theta = 0.05, unit_rows(1, 10)[0]

    def move(seed):
        tx = optax.chain(optax.sgd(dt), add_langevin_noise(dt, seed=seed), project_tangent(), project_to_sphere())
        updates, _ = tx.update(jnp.zeros_like(theta), tx.init(theta), theta)
        return theta + updates

    moved = jax.jit(jax.vmap(move))(jnp.arange(4000))
    np.testing.assert_allclose(jnp.linalg.norm(moved, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(jnp.mean(moved @ theta), (1 + 9 * dt) ** -0.5, rtol=0.01)


def test_noise_of_each_update_and_leaf_is_its_own():
    tx = add_langevin_noise(lambda count: jnp.where(count < 2, 4.0, 0.0))
    zeros = {"a": jnp.zeros(2000), "b": jnp.zeros(2000, jnp.bfloat16)}
    step = jax.jit(tx.update)
    first, state = step(zeros, tx.init(zeros))
    second, state = step(zeros, state)
    third, _ = step(zeros, state)
    draws = np.stack([np.asarray(x, np.float32) for u in (first, second) for x in jax.tree.leaves(u)])
    np.testing.assert_allclose(np.cov(draws), 4 * np.eye(4), atol=0.6)
    assert first["b"].dtype == jnp.bfloat16
    assert all(np.all(np.asarray(x, np.float32) == 0) for x in jax.tree.leaves(third))


def test_spherical_sgd_keeps_every_leaf_on_its_sphere():
    params = {"a": unit_rows(1, 6)[0].reshape(2, 3), "b": unit_rows(1, 4)[0].astype(jnp.bfloat16)}
    tx = spherical_sgd(0.3)
    grads = jax.tree.map(lambda p: jnp.cos(3 * p), params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["b"].dtype == jnp.bfloat16
    moved = optax.apply_updates(params, updates)
    np.testing.assert_allclose(jnp.linalg.norm(moved["a"]), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(moved["b"].astype(jnp.float32)), 1, rtol=1e-2)
    assert float(jnp.sum((moved["a"] - params["a"]) * grads["a"])) < 0


def test_the_average_of_a_hundred_thousand_iterates():
    """Trap 6: a plain float32 sum of 100,000 terms near 0.1 is off by 1e-4; the compensated one by 1e-6."""
    tx = running_average(optax.set_to_zero())
    value = jnp.float32(0.1)

    def body(carry, _):
        state, naive = carry
        return (tx.update(value, state, value)[1], naive + value), None

    run = jax.jit(lambda: jax.lax.scan(body, (tx.init(value), jnp.float32(0)), length=100_000)[0])
    state, naive = run()
    assert abs(float(naive) / 1e5 / float(value) - 1) > 1e-4
    assert float(params_average(state)) == pytest.approx(float(value), rel=1e-6)


def test_which_iterates_are_averaged():
    """w runs 1, 2, 3, ...: two left out, then every third, 5 and 8."""
    tx = running_average(optax.sgd(1.0), start=2, every=3)
    w = jnp.zeros(())
    state = tx.init(w)
    assert np.isnan(params_average(state))
    step = jax.jit(tx.update)
    for _ in range(10):
        updates, state = step(-jnp.ones(()), state, w)
        w = optax.apply_updates(w, updates)
    assert float(params_average(state)) == 6.5 and int(state.averaged) == 2


@pytest.mark.parametrize("name", ["chain", "multi_steps", "apply_if_finite", "masked", "inject"])
def test_the_average_inside_other_transformations(name, tmp_path):
    """Found wherever it is; MultiSteps averages real steps, a rejected step leaves it alone, Orbax keeps it."""
    average = functools.partial(running_average, optax.sgd(0.5))
    tx = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(10.0), average()),
        "multi_steps": lambda: optax.MultiSteps(average(), 2),
        "apply_if_finite": lambda: optax.apply_if_finite(average(), 3),
        "masked": lambda: optax.masked(average(), {"w": True}),
        "inject": lambda: running_average(optax.inject_hyperparams(optax.sgd)(0.5)),
    }[name]()
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    seen = []
    for n in range(4):
        grads = {"w": jnp.full(3, jnp.nan if name == "apply_if_finite" and n == 1 else 0.5, jnp.bfloat16)}
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        if not (name == "multi_steps" and n % 2 == 0) and not (name == "apply_if_finite" and n == 1):
            seen.append(float(params["w"][0]))
    got = params_average(state)["w"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.mean(seen), rtol=1e-6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(tx.init({"w": jnp.ones(3, jnp.bfloat16)}))[1]
    np.testing.assert_array_equal(params_average(restored)["w"], got)


def test_an_average_of_noisy_descent_beats_its_iterates():
    """The extension at work: SGD with Langevin noise around a minimum; the average is ten times closer."""
    tx = running_average(optax.chain(optax.sgd(0.1), add_langevin_noise(2 * 0.1 * 0.01)), start=100)

    def body(carry, _):
        w, state = carry
        updates, state = tx.update(w - 3.0, state, w)
        return (optax.apply_updates(w, updates), state), None

    run = jax.jit(lambda w: jax.lax.scan(body, (w, tx.init(w)), length=5000)[0])
    w, state = run(jnp.zeros(20))
    last, averaged = (float(jnp.linalg.norm(x - 3.0)) for x in (w, params_average(state)))
    assert averaged < 0.25 * last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dt": 0.1}, "dt=0.1 with d=10"),
        ({"dt": 0.0}, "dt=0.0"),
        ({"T": 0.0}, "T=0.0"),
        ({"order": "third"}, "order='third'"),
        ({"chains": 0}, "chains=0"),
        ({"thin": 0}, "thin=0"),
        ({"burn_in": 1.0}, "burn_in=1.0"),
        ({"start": jnp.ones((1, 9))}, r"shape \(1, 9\).*\(8, 10\)"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        spherical_langevin(no_drift, KEY, 10, 1.0, **({"T": 1.0, "dt": 0.02, "chains": 8} | changes))


def test_errors_of_the_optax_pieces():
    w = jnp.ones(3)
    for tx in (project_tangent(), project_to_sphere(), running_average(optax.sgd(0.1))):
        with pytest.raises(ValueError, match="pass `params`"):
            tx.update(w, tx.init(w))
    with pytest.raises(ValueError, match="variance=-1.0"):
        add_langevin_noise(-1.0)
    with pytest.raises(ValueError, match="start=-1, every=1"):
        running_average(optax.sgd(0.1), start=-1)
    with pytest.raises(ValueError, match="start=0, every=0"):
        running_average(optax.sgd(0.1), every=0)
    with pytest.raises(ValueError, match="0 RunningAverageStates"):
        params_average(optax.sgd(0.1).init(w))
    with pytest.raises(ValueError, match="steps=0"):
        minibatch_averaging(lambda theta, key: theta, KEY, 3, 0.1, steps=0)
