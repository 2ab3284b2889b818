"""Sophia against transcripts of the paper and of the official code, optax 0.2.8, and the traps of its method card."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.optim import (
    ScaleBySophiaState,
    gnb_diag,
    hutchinson_diag,
    scale_by_sophia,
    sophia,
    sophia_win_rate,
    update_hessian,
)

CONVENTIONS = ["before", "after", "optax"]
CURVATURES = np.array([0.01, 0.3, 1.0, 20.0, -2.0], np.float32)
# Given in advance: in a closed loop a badly filled h makes the path chaotic, and rounding would drown the comparison.
GRADS = np.random.default_rng(0).normal(size=(37, 5)).astype(np.float32)
START = np.linspace(-1, 1, 5, dtype=np.float32)


# The state keeps b2 in float32, and 1 - b2 is 1e-6 away from 0.01 there: the transcripts start from the same numbers.
B1, B2 = float(np.float32(0.965)), float(np.float32(0.99))


def toy_diag(p, key=None):
    """A curvature that depends on where it is taken, scaled so that some coordinates clip and others do not."""
    return 100 * (CURVATURES - (np.sin(p) if isinstance(p, np.ndarray) else jnp.sin(p)))


def run(tx, grads=GRADS, params=START, **extra_args):
    """Parameters after each update [steps, ...], and the last state; one scan under jit."""

    def body(carry, grad):
        p, state = carry
        updates, state = tx.update(grad, state, p, **extra_args)
        p = optax.apply_updates(p, updates)
        return (p, state), p

    (_, state), path = jax.jit(lambda p, g: jax.lax.scan(body, (p, tx.init(p)), g))(params, grads)
    return path, state


def counting(diag_fn):
    """The estimator, and a list that grows by one each time it really runs."""
    runs = []

    def counted(p, key):
        jax.debug.callback(lambda: runs.append(1))
        return diag_fn(p, key)

    return counted, runs


# The rule


@pytest.mark.parametrize("refresh", CONVENTIONS)
def test_exact_curvature_gives_clipped_newton(refresh):
    """Card test 1: once h is filled (60 refreshes at b2 = 0.5) the direction is clip(m / (gamma c)) to 1e-6."""
    c = jnp.array([0.1, 1.0, 10.0, 1000.0])
    tx = scale_by_sophia(b1=0.0, b2=0.5, gamma=0.7, update_interval=1, refresh=refresh)
    state = tx.init(c)
    for _ in range(60):
        state = update_hessian(state, c)
    grads = jnp.array([0.05, -0.2, 30.0, 5.0])
    direction, _ = tx.update(grads, state)
    np.testing.assert_allclose(direction, jnp.clip(grads / (0.7 * c), -1, 1), rtol=1e-6)


@pytest.mark.parametrize("refresh", CONVENTIONS)
def test_negative_curvature_falls_back_to_the_sign(refresh):
    """Card test 4; under "after" a negative h would otherwise make the sum gamma h + eps tiny or negative."""
    learning_rate = 0.5
    tx = sophia(learning_rate, weight_decay=0.0, refresh=refresh)
    state = update_hessian(tx.init(jnp.zeros(4)), jnp.array([-1e-10, -1.0, -1e10, 0.0]))
    updates, _ = tx.update(jnp.array([1e-3, -2.0, 3.0, -4.0]), state, jnp.zeros(4))
    np.testing.assert_array_equal(updates, learning_rate * jnp.array([-1.0, 1.0, -1.0, 1.0]))


def test_transcript_of_the_paper():
    """Decay first, refresh first, defaults, in float64 numpy; 1e-6 is float32 rounding at |p| ~ 1."""
    lr, eps, gamma, decay, k = 0.05, 1e-12, 0.05, 0.2, 10
    ours, state = run(sophia(lr), hessian_diag_fn=toy_diag)
    assert 0.1 < float(sophia_win_rate(state)) < 0.9
    p, m, h = START.astype(np.float64), 0, 0
    for t, grad in enumerate(GRADS, start=1):
        m = B1 * m + (1 - B1) * grad
        if t % k == 1:
            h = B2 * h + (1 - B2) * toy_diag(p)
        p = p - lr * decay * p
        p = p - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        np.testing.assert_allclose(ours[t - 1], p, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_transcript_of_the_official_code(k):
    """Card test 5: squares stored without B, B at use, eps added, refresh behind the step of iterations k-1 (mod k)."""
    lr, rho, decay, bs = 0.05, 0.05, 0.2, 480

    def squared_sampled_grad(p):
        return (1e-3 * toy_diag(p)) ** 2

    tx = sophia(lr, eps=1e-15, gamma=rho, update_interval=k, weight_decay=decay, refresh="after")
    ours, state = run(tx, hessian_diag_fn=lambda p, key: bs * squared_sampled_grad(p))
    assert 0.1 < float(sophia_win_rate(state)) < 0.9
    p, m, h = START.astype(np.float64), 0, 0
    for i, grad in enumerate(GRADS):
        p = p * (1 - lr * decay)
        m = B1 * m + (1 - B1) * grad
        p = p - lr * np.sign(m) * np.minimum(np.abs(m) / (rho * bs * h + 1e-15), 1)
        if i % k == k - 1:
            h = B2 * h + (1 - B2) * squared_sampled_grad(p)
        np.testing.assert_allclose(ours[i], p, rtol=1e-6, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("k", [1, 4, 10])
def test_parity_with_optax(k):
    """Card test 5 and trap 4: bias-corrected m, refresh one step late, max with eps; rtol 1e-6 on identical inputs."""
    kwargs = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "gamma": 0.05, "update_interval": k, "weight_decay": 0.1}
    exact = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda grads, state, params, **_: (toy_diag(params), state)
    )
    wanted, peer_state = run(optax.contrib.sophia(0.05, hessian_diagonal_fn=exact, **kwargs))
    got, state = run(sophia(0.05, refresh="optax", **kwargs), hessian_diag_fn=toy_diag)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(state[0].h, peer_state[0].nu, rtol=1e-6)
    np.testing.assert_allclose(state[0].mu, peer_state[0].mu, rtol=1e-6, atol=1e-7)


@settings(deadline=None, max_examples=25)
@given(
    refresh=st.sampled_from(CONVENTIONS),
    grads=st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4),
    diag=st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4),
    clip=st.floats(0.125, 8.0, width=32),
)
def test_direction_is_bounded_and_downhill(refresh, grads, diag, clip):
    """Whatever the gradient and the curvature: |direction| <= clip_threshold and its sign is that of m, or zero."""
    tx = scale_by_sophia(refresh=refresh, clip_threshold=clip)
    grads = jnp.array(grads)
    state = update_hessian(tx.init(grads), jnp.array(diag))
    direction, state = tx.update(grads, state)
    assert np.all(np.abs(direction) <= clip)
    assert np.all(np.asarray(direction) * np.asarray(grads) >= 0)
    assert 0 <= float(state.win_rate) <= 1


@settings(deadline=None, max_examples=15)
@given(exponent=st.integers(-8, 8))
def test_rescaling_the_loss_changes_nothing(exponent):
    """m and h scale alike; powers of two make the quotient exact, so the tolerance is zero as long as eps is idle."""
    scale = 2.0**exponent
    tx = scale_by_sophia(gamma=1.0)
    grads, diag = jnp.array([1.0, -3.0, 0.01]), jnp.array([100.0, 700.0, 9.0])
    base, _ = tx.update(grads, update_hessian(tx.init(grads), diag))
    scaled, _ = tx.update(scale * grads, update_hessian(tx.init(grads), scale * diag))
    np.testing.assert_array_equal(base, scaled)


def test_steps_do_not_depend_on_the_condition_number():
    """Card 8(b): ½ Σ c θ², 40 curvatures, exact h: step counts equal (±1) for κ = 10 ... 1e7; plain descent slows."""
    start = jax.random.uniform(jax.random.key(0), (40,), minval=0.5, maxval=1.5)
    tx = sophia(0.1, weight_decay=0.0)

    @jax.jit
    def distances(c):
        def body(carry, _):
            p, state = carry
            updates, state = tx.update(c * p, state, p, hessian_diag_fn=lambda p, key: c)
            p = optax.apply_updates(p, updates)
            return (p, state), jnp.max(jnp.abs(p))

        return jax.lax.scan(body, (start, tx.init(start)), length=1500)[1]

    sophia_steps, descent_steps = [], []
    for kappa in (1e1, 1e3, 1e5, 1e7):
        c = np.logspace(0, np.log10(kappa), 40, dtype=np.float32)
        far = np.nonzero(np.asarray(distances(c)) >= 1e-3)[0]
        sophia_steps.append(far[-1] + 2)
        # Gradient descent at 1.9 / max(c), in closed form.
        descent_steps.append(np.log(1e-3) / np.log(np.max(np.abs(1 - 1.9 * c / kappa))))
    assert max(sophia_steps) <= 1400, sophia_steps
    assert max(sophia_steps) - min(sophia_steps) <= 1, sophia_steps
    assert descent_steps[1] > 30 * descent_steps[0]


# When and what is refreshed


@pytest.mark.parametrize(("refresh", "runs_of_37"), [("before", 4), ("after", 3), ("optax", 4)])
def test_estimator_really_runs_every_kth_step_only(refresh, runs_of_37):
    """Card test 6: ⌈37 / 10⌉ evaluations under jit and scan; "after" skips the one at count 0."""
    diag_fn, runs = counting(toy_diag)
    _, state = run(scale_by_sophia(refresh=refresh), hessian_diag_fn=diag_fn)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(runs) == runs_of_37 == int(state.num_refreshes)


def test_an_overridden_interval_takes_effect():
    """Trap 6: the official script reads its interval before the override."""
    tx = optax.inject_hyperparams(scale_by_sophia)(update_interval=10)
    state = tx.init(jnp.ones(5))
    state.hyperparams["update_interval"] = jnp.asarray(3)
    step = jax.jit(lambda s: tx.update(jnp.ones(5), s, jnp.ones(5), hessian_diag_fn=toy_diag)[1])
    for _ in range(7):
        state = step(state)
    assert int(state.inner_state.num_refreshes) == 3


def test_h_is_used_in_the_step_that_refreshes_it():
    """Trap 5: other packages leave h at zero for up to 19 steps."""
    tx = scale_by_sophia(b1=0.0, gamma=100.0)
    direction, state = tx.update(START, tx.init(START), START, hessian_diag_fn=lambda p, key: jnp.full(5, 4.0))
    np.testing.assert_allclose(state.h, 0.01 * 4.0, rtol=1e-5)
    np.testing.assert_allclose(direction, START / 4.0, rtol=1e-5)


def test_h_fills_slowly():
    """Trap 7: 1 - 0.99^(t/k), that is 26 % after 300 steps; bias_correct_h divides it out from the first step on."""
    diag, grads = jnp.array([100.0, 1000.0]), jnp.array([10.0, -10.0])
    _, state = run(scale_by_sophia(), jnp.zeros((300, 2)), jnp.ones(2), hessian_diag_fn=lambda p, key: diag)
    np.testing.assert_allclose(state.h, (1 - 0.99**30) * diag, rtol=1e-5)
    tx = scale_by_sophia(b1=0.0, gamma=1.0, bias_correct_h=True)
    path, _ = run(tx, jnp.tile(grads, (12, 1)), jnp.zeros(2), hessian_diag_fn=lambda p, key: diag)
    np.testing.assert_allclose(path, np.outer(np.arange(1, 13), grads / diag), rtol=1e-4)


@pytest.mark.parametrize("refresh", ["before", "after"])
def test_outside_refresh_equals_inside(refresh):
    """The two routes agree to rounding (1e-6); for "after" the outside call stands where the official code has it."""
    tx = sophia(0.05, update_interval=3, refresh=refresh)
    inside, _ = run(tx, hessian_diag_fn=toy_diag)
    refresh_fn = jax.jit(lambda s, p: update_hessian(s, toy_diag(p)), donate_argnums=0)
    step = jax.jit(tx.update, donate_argnums=1)
    params = jnp.asarray(START)
    state = tx.init(params)
    for i, grad in enumerate(GRADS):
        if refresh == "before" and i % 3 == 0:
            state = refresh_fn(state, params)
        old_h = state[0].h
        updates, state = step(grad, state, params)
        assert old_h.is_deleted()
        params = optax.apply_updates(params, updates)
        if refresh == "after" and i % 3 == 2:
            state = refresh_fn(state, params)
        np.testing.assert_allclose(params, inside[i], rtol=1e-6, atol=1e-6)
    assert step._cache_size() == refresh_fn._cache_size() == 1


def test_every_refresh_has_its_own_key():
    """The keys differ between refreshes and between seeds, and a run repeats itself."""

    def last_h(seed, steps):
        tx = scale_by_sophia(b2=0.0, update_interval=1, seed=seed)
        return run(tx, GRADS[:steps], hessian_diag_fn=lambda p, key: jax.random.normal(key, p.shape))[1].h

    assert not np.allclose(last_h(0, 1), last_h(0, 2))
    assert not np.allclose(last_h(0, 1), last_h(1, 1))
    np.testing.assert_array_equal(last_h(0, 1), last_h(0, 1))


def test_vmap_over_seeds():
    """Trap 8: a state batched over seeds turns the cond into a select, and the estimator runs on every update.

    update_hessian outside keeps the saving, and so does a vmap around the whole run, where the count is not batched.
    All three give the results of separate runs.
    """
    tx = sophia(0.05, update_interval=5)
    starts = jax.random.normal(jax.random.key(0), (3, 5))
    grads = GRADS[:10]
    (whole_fn, whole_runs), (select_fn, select_runs), (outside_fn, outside_runs) = (counting(toy_diag) for _ in "abc")

    whole, _ = jax.vmap(lambda p: run(tx, grads, p, hessian_diag_fn=whole_fn))(starts)
    select_step = jax.jit(jax.vmap(lambda g, s, p: tx.update(g, s, p, hessian_diag_fn=select_fn), (None, 0, 0)))
    outside_step = jax.jit(jax.vmap(tx.update, (None, 0, 0)))
    refresh_fn = jax.jit(jax.vmap(lambda s, p: update_hessian(s, outside_fn(p, None))))

    select, select_state = starts, jax.vmap(tx.init)(starts)
    outside, outside_state = starts, select_state
    for i, grad in enumerate(grads):
        updates, select_state = select_step(grad, select_state, select)
        select = optax.apply_updates(select, updates)
        if i % 5 == 0:
            outside_state = refresh_fn(outside_state, outside)
        updates, outside_state = outside_step(grad, outside_state, outside)
        outside = optax.apply_updates(outside, updates)
    jax.block_until_ready((whole, select, outside))
    jax.effects_barrier()
    for path in (whole[:, -1], select, outside):
        np.testing.assert_allclose(path[1], run(tx, grads, starts[1], hessian_diag_fn=toy_diag)[0][-1], rtol=1e-6)
    assert (len(whole_runs), len(select_runs), len(outside_runs)) == (2, 10, 2)


def test_forgetting_b_makes_sophia_signum():
    """Trap 1: without the token count every coordinate clips and the win rate falls to zero."""
    x = jax.random.normal(jax.random.key(0), (64, 32, 8))
    params = {"w": 0.1 * jax.random.normal(jax.random.key(1), (8, 16))}
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    diag = jax.jit(lambda: gnb_diag(lambda p, x: x @ p["w"], params, x, jax.random.key(2)))()
    tx = scale_by_sophia(b1=0.0, b2=0.0)

    def win_rate(factor):
        state = update_hessian(tx.init(params), jax.tree.map(lambda d: factor * d, diag))
        return float(sophia_win_rate(tx.update(grads, state)[1]))

    assert win_rate(1.0) > 0.3
    assert win_rate(1 / (64 * 32)) == 0.0


@pytest.mark.multidevice
@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("estimator", ["hutchinson", "gnb"])
def test_data_parallel_training_has_the_one_device_h(estimator, num_devices):
    """Trap 3 and card test 7 through the whole step: h on 2 and 8 devices as on one, rtol 1e-5 (summation order)."""
    x = jax.random.normal(jax.random.key(0), (8, 4))
    params = {"w": 0.3 * jax.random.normal(jax.random.key(1), (4, 3))}
    tx = optax.chain(optax.clip_by_global_norm(1.0), sophia(1e-2, update_interval=2))

    def logits_fn(p, x):
        return x @ p["w"]

    @jax.jit
    def step(params, state, x):
        def loss_fn(p):
            return jnp.mean(jax.nn.logsumexp(logits_fn(p, x), -1))

        def diag_fn(p, key):
            return hutchinson_diag(loss_fn, p, key) if estimator == "hutchinson" else gnb_diag(logits_fn, p, x, key)

        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, hessian_diag_fn=diag_fn)
        return optax.apply_updates(params, updates), state

    def train(params, x):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state, x)
        return state[1][0]

    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    many = train(jax.device_put(params, NamedSharding(mesh, P())), jax.device_put(x, NamedSharding(mesh, P("data"))))
    one = train(params, x)
    assert int(many.num_refreshes) == 2
    np.testing.assert_allclose(many.h["w"], one.h["w"], rtol=1e-5)


# The state, its neighbours in Optax, and errors


def test_bf16_params_have_a_float32_h():
    """Traps 4 and 10: in bf16 the average would stall below 1 % increments; here it is exact to 1e-5 after 100."""
    params = jnp.ones(3, jnp.bfloat16)
    tx = scale_by_sophia(mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    refresh_fn = jax.jit(update_hessian)
    for _ in range(100):
        state = refresh_fn(state, jnp.full(3, 1e-12, jnp.bfloat16))
    assert state.h.dtype == jnp.float32
    assert state.mu.dtype == jnp.bfloat16
    np.testing.assert_allclose(state.h, (1 - 0.99**100) * float(jnp.bfloat16(1e-12)), rtol=1e-5)
    updates, state = tx.update(params, state, params)
    assert updates.dtype == state.mu.dtype == jnp.bfloat16


def wrapped(name, tx):
    labels = {"a": "x", "b": "y"}
    return {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), tx),
        "inject": lambda: optax.inject_hyperparams(sophia)(1e-2),
        "multisteps": lambda: optax.MultiSteps(tx, 2),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
        "masked": lambda: optax.masked(tx, {"a": True, "b": False}),
        "partition": lambda: optax.partition({"x": tx, "y": sophia(1e-3)}, labels),
    }[name]()


@pytest.mark.parametrize("name", ["chain", "inject", "multisteps", "apply_if_finite", "masked", "partition"])
def test_update_hessian_finds_the_state_anywhere(name):
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    tx = wrapped(name, sophia(1e-2))
    diag = {"a": jnp.full(2, 100.0), "b": {"c": jnp.full(3, 200.0)}}
    before = tx.init(params)
    state = jax.jit(update_hessian)(before, diag)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, ScaleBySophiaState))
    found = [node.h for node in nodes if isinstance(node, ScaleBySophiaState)]
    means = sorted(float(jnp.mean(leaf)) for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(means, [1.0] if name == "masked" else [1.0, 2.0], rtol=1e-5)
    _, state = tx.update(params, state, params)
    assert 0 <= float(sophia_win_rate(state)) <= 1


def test_update_hessian_uses_the_injected_b2():
    tx = optax.inject_hyperparams(scale_by_sophia)(b2=lambda count: jnp.where(count < 1, 0.99, 0.5))
    state = tx.init(jnp.ones(2))
    for wanted in (0.99, 0.5):
        _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
        fed = update_hessian(state, jnp.ones(2))
        np.testing.assert_allclose(fed.inner_state.h, 1 - wanted, rtol=1e-5)


def test_inside_refresh_under_masked():
    """The estimate may cover all params: what optax.masked holds back is dropped, and passes through untouched."""
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}
    diag = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.ones(3)}}
    tx = optax.masked(scale_by_sophia(), {"a": True, "b": False})
    updates, state = tx.update(params, tx.init(params), params, hessian_diag_fn=lambda p, key: diag)
    np.testing.assert_allclose(state.inner_state.h["a"], 0.01 * diag["a"], rtol=1e-5)
    np.testing.assert_array_equal(updates["b"]["c"], params["b"]["c"])


def test_multisteps_runs_the_inside_estimator_on_every_micro_step():
    """As documented: the accumulated result is right, the saving is not; h moves once per real step."""
    diag_fn, runs = counting(toy_diag)
    tx = optax.MultiSteps(sophia(0.05), 4)
    path, state = run(tx, np.repeat(GRADS[:2], 4, axis=0), hessian_diag_fn=diag_fn)
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(runs) == 4
    assert int(state.inner_opt_state[0].num_refreshes) == 1
    np.testing.assert_allclose(path[7], run(sophia(0.05), GRADS[:2], hessian_diag_fn=toy_diag)[0][1], rtol=1e-5)


def test_apply_if_finite_keeps_the_state_on_nan_gradients():
    tx = optax.apply_if_finite(sophia(0.1), 5)
    params = jnp.ones(3)
    state = update_hessian(tx.init(params), params)
    step = jax.jit(tx.update)
    updates, after = step(jnp.array([1.0, jnp.nan, 1.0]), state, params)
    np.testing.assert_array_equal(updates, 0.0)
    np.testing.assert_array_equal(after.inner_state[0].h, state.inner_state[0].h)
    assert int(after.inner_state[0].count) == 0


def test_win_rate_counts_unclipped_coordinates():
    """|m| < gamma h in 2 of 4; the dead coordinate (m = h = 0) is not a win. Partitioned states average by size."""
    tx = scale_by_sophia(b1=0.0, b2=0.0, gamma=1.0)
    state = update_hessian(tx.init(jnp.ones(4)), jnp.array([1.0, 1.0, 1.0, 0.0]))
    _, state = tx.update(jnp.array([0.5, -0.9, 1.5, 0.0]), state)
    assert float(sophia_win_rate((optax.EmptyState(), {"opt": state}))) == 0.5
    one_of_one = state._replace(h=jnp.ones(1), win_rate=jnp.float32(1.0))
    assert float(sophia_win_rate([state, one_of_one])) == pytest.approx(3 / 5)


def test_zero_gradients_and_empty_params():
    tx = sophia(0.1, weight_decay=0.0)
    for params in ({}, {"w": jnp.ones((0, 3))}, {"w": jnp.ones(2)}):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, tx.init(params), params, hessian_diag_fn=lambda p, key: zeros)  # noqa: B023
        assert all(np.all(np.asarray(u) == 0) for u in jax.tree.leaves(updates))
        assert float(sophia_win_rate(state)) == 0.0


def test_more_than_two_to_the_31_parameters():
    """Their number is no int32; abstract evaluation is enough to see it."""
    params = jax.ShapeDtypeStruct((3, 2**30), jnp.bfloat16)
    tx = sophia(0.1)
    _, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, hessian_diag_fn=lambda p, key: p), params)
    assert jax.eval_shape(sophia_win_rate, state) == jax.ShapeDtypeStruct((), jnp.float32)


def test_errors_of_update():
    tx = sophia(0.1)
    params = {"w": jnp.ones(2)}
    state = tx.init(params)
    with pytest.raises(ValueError, match="params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="`params` was not passed"):
        scale_by_sophia().update(params, state[0], hessian_diag_fn=lambda p, key: p)
    with pytest.raises(ValueError, match=r"'w'.*shape \(3,\).*\(2,\)"):
        tx.update(params, state, params, hessian_diag_fn=lambda p, key: {"w": jnp.ones(3)})


def test_errors_of_update_hessian():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="no ScaleBySophiaState"):
        update_hessian(optax.adam(1e-3).init(params), params)
    with pytest.raises(ValueError, match="no ScaleBySophiaState"):
        sophia_win_rate(optax.adam(1e-3).init(params))
    state = sophia(0.1).init(params)
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        update_hessian(state, {"w": jnp.ones((2, 1))})
    for wrong in ({"v": jnp.ones(2)}, {"w": jnp.ones(2), "v": jnp.ones(2)}, jnp.ones(2), {"w": {"x": jnp.ones(2)}}):
        with pytest.raises(ValueError):
            update_hessian(state, wrong)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gamma": 0.0},
        {"b1": 1.0},
        {"b1": -0.1},
        {"b2": 1.0},
        {"eps": 0.0},
        {"clip_threshold": 0.0},
        {"update_interval": 0},
        {"update_interval": 2.5},
        {"refresh": "never"},
    ],
)
def test_bad_hyperparameters_are_refused(kwargs):
    name, value = next(iter(kwargs.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        sophia(1e-3, **kwargs)
