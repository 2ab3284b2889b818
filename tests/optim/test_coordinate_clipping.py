"""Coordinate clipping against the official rules written down in NumPy, Optax, and the traps of its method card."""

import functools

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
    adafactor_coordinate_clip,
    adam_clip_first_moment,
    adam_clip_update,
    clip_top_coordinates,
    lion_coordinate_clip,
    scale_by_adafactor_clipped,
    scale_by_adam_clipped,
    sgd_coordinate_clip,
    top_coordinate_threshold,
)

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}
GRADS = [{name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()} for _ in range(6)]
START = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def clipped(tree, fraction):
    """clip_top_coordinates of the official landscape code, in NumPy."""
    magnitudes = np.sort(np.abs(np.concatenate([np.ravel(x) for x in tree.values()])))[::-1]
    tau = 0 if fraction == 1 else magnitudes[int(magnitudes.size * fraction)]
    return {name: np.clip(x, -tau, tau) for name, x in tree.items()} if fraction else tree


def run(tx, grads=GRADS, params=START):
    """The update of each step [steps, ...], and the last state; one scan under jit, the parameters stay."""

    def body(state, grad):
        updates, state = tx.update(grad, state, params)
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    state, updates = jax.jit(lambda g: jax.lax.scan(body, tx.init(params), g))(stacked)
    return updates, state


def assert_updates(got, wanted, rtol=1e-5):
    """Steps of a run against a list of trees; rtol and atol are a few float32 roundings of values around 1."""
    for step, tree in enumerate(wanted):
        for name, value in tree.items():
            np.testing.assert_allclose(got[name][step], value, rtol=rtol, atol=1e-6)


@functools.partial(jax.jit, static_argnames=("fraction", "scope", "method", "threshold_scale"))
def clip(tree, fraction, **options):
    tx = clip_top_coordinates(fraction, **options)
    return tx.update(tree, tx.init(tree))[0]


# The threshold


def test_ten_numbers():
    """Card test 1."""
    np.testing.assert_array_equal(clip(jnp.arange(1.0, 11.0), 0.5), [1, 2, 3, 4, 5, 5, 5, 5, 5, 5])


# One shape and few fractions, so that hypothesis compiles little; whole numbers, because XLA flushes subnormal ones.
trees = st.lists(st.integers(-300, 300), min_size=11, max_size=11).map(
    lambda x: {"a": np.array(x[:4], np.float32), "b": np.array(x[4:], np.float32)}
)


@settings(deadline=None, max_examples=25)
@given(tree=trees, fraction=st.sampled_from([0.05, 0.1, 0.5, 0.95]), exponent=st.integers(-8, 8))
def test_invariants(tree, fraction, exponent):
    """Card tests 2 and 3; powers of two scale exactly, so nothing here has a tolerance."""
    n = sum(x.size for x in tree.values())
    wanted = clipped(tree, fraction)
    got = clip(tree, fraction)
    scaled = clip({name: np.float32(2.0**exponent) * x for name, x in tree.items()}, fraction)
    for name, x in tree.items():
        np.testing.assert_array_equal(got[name], wanted[name])
        np.testing.assert_array_equal(scaled[name], np.float32(2.0**exponent) * wanted[name])
        np.testing.assert_array_equal(clip(tree, 0.0)[name], x)
        np.testing.assert_array_equal(clip(tree, 1.0)[name], 0)
    assert sum(np.sum(got[name] != x) for name, x in tree.items()) <= int(n * fraction)


@functools.partial(jax.jit, static_argnums=1)
def all_thresholds(x, fraction):
    pairs = [(y, method) for y in (x, x.astype(jnp.bfloat16)) for method in ("sort", "histogram")]
    return [top_coordinate_threshold(y, fraction, method=method) for y, method in pairs]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31 - 1), fraction=st.sampled_from([0.01, 0.1, 0.5, 0.9]), scale=st.floats(1e-20, 1e20))
def test_histogram_agrees_with_sort(seed, fraction, scale):
    """Card test 3: tau within 2 % (0.8 % by construction), from below; in bfloat16 they are equal."""
    x = np.float32(scale * np.random.default_rng(seed).standard_t(2, size=1000))
    exact, binned, half_exact, half_binned = all_thresholds(x, fraction)
    assert exact * (1 - 2.0**-7) <= binned <= exact
    assert half_exact == half_binned


@pytest.mark.parametrize("method", ["sort", "histogram"])
def test_edge_fractions_and_traced_fractions(method):
    x = {"a": jnp.arange(10.0)}
    threshold = jax.jit(lambda f: top_coordinate_threshold(x, f, method=method))
    for fraction, tau in ((0.0, np.inf), (0.05, 9.0), (0.1, 8.0), (0.95, 0.0), (1.0, 0.0)):
        assert float(threshold(fraction)) == float(top_coordinate_threshold(x, fraction, method=method)) == tau


def test_zeros_count_and_scope_is_global():
    """Trap 4: unseen embedding rows lower tau for all; past the fraction they make it zero. Each leaf alone differs."""
    tree = {"embedding": jnp.array([[0.0, 0.0], [0.0, 0.0], [5.0, 6.0]]), "kernel": jnp.array([1.0, -9.0])}
    got = clip(tree, 0.25)
    np.testing.assert_array_equal(got["embedding"][2], [5, 5])
    np.testing.assert_array_equal(got["kernel"], [1, -5])
    assert float(top_coordinate_threshold(tree, 0.5)) == 0.0
    leaf = clip(tree, 0.5, scope="leaf")
    np.testing.assert_array_equal(leaf["embedding"], 0)
    np.testing.assert_array_equal(leaf["kernel"], [1, -1])


@pytest.mark.parametrize("method", ["sort", "histogram"])
def test_ties_in_bf16(method):
    """Trap 9: all entries that tie at tau stay, the dtype too."""
    g = jnp.array([1, 2, 2, 2, -2, 3], jnp.bfloat16)
    got = clip(g, 0.5, method=method)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.array([1, 2, 2, 2, -2, 2], jnp.bfloat16))


def test_order_with_the_global_norm():
    """Trap 6: after a global norm tau is the same up to its scale, so the clipped entries are the same."""
    tree = jax.tree.map(jnp.asarray, GRADS[0])
    norm = optax.global_norm(tree)
    after = clip(jax.tree.map(lambda g: g / norm, tree), 0.3)
    for name, value in clip(tree, 0.3).items():
        np.testing.assert_allclose(norm * after[name], value, rtol=1e-6)


def test_threshold_scale():
    np.testing.assert_array_equal(clip(jnp.arange(1.0, 11.0), 0.5, threshold_scale=0.4), [1, *[2] * 9])


def test_ema_follows_the_gradients():
    """Starts at the exact share, keeps it on average (within 20 %), and catches up with a jump of 100 in 15 steps."""
    rng = np.random.default_rng(0)
    grads = [scale * rng.standard_t(3, size=400).astype(np.float32) for scale in [1] * 40 + [100] * 40]
    updates, _ = run(clip_top_coordinates(0.1, method="ema"), grads, grads[0])
    share = np.mean(np.asarray(updates) != np.stack(grads), axis=1)
    assert 0.09 <= share[0] <= 0.12
    for steps in (share[5:40], share[55:80]):
        assert 0.08 < steps.mean() < 0.12
    assert share[40] > 0.5


def test_ema_recovers_from_zero_gradients():
    tx = clip_top_coordinates(0.5, method="ema")
    _, state = tx.update(jnp.zeros(4), tx.init(jnp.zeros(4)))
    assert float(state.threshold) == 0
    got, _ = tx.update(jnp.arange(1.0, 5.0), state)
    np.testing.assert_array_equal(got, [1, 2, 2, 2])


@pytest.mark.multidevice
def test_sharded_like_one_device():
    """Card test 4: the same tau from 8 devices, exactly; the histogram gathers nothing."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
    many = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data")))
    for method in ("sort", "histogram"):
        threshold = jax.jit(lambda g, method=method: top_coordinate_threshold(g, 0.1, method=method))
        assert float(threshold(many)) == float(threshold(x))
    assert "all-gather" not in threshold.lower(many).compile().as_text()


# The optimizers


def test_sgd_is_the_papers():
    """First m is g_c, then 0.9 m + 0.1 g_c; normalised to sqrt(numel) a tensor."""
    wanted, m = [], None
    for grads in GRADS:
        g_c = clipped(grads, 0.1)
        m = g_c if m is None else {name: 0.9 * m[name] + 0.1 * g_c[name] for name in m}
        wanted.append({name: -0.5 * x for name, x in m.items()})
    assert_updates(run(sgd_coordinate_clip(0.5))[0], wanted)
    normalized = [{n: x / np.linalg.norm(x) * np.sqrt(np.size(x)) for n, x in tree.items()} for tree in wanted]
    assert_updates(run(sgd_coordinate_clip(1.0, normalize=True))[0], normalized)


def test_normalized_sgd_leaves_zeros_alone():
    """The official code divides by the zero norm."""
    tx = sgd_coordinate_clip(1.0, normalize=True)
    updates, _ = tx.update({"a": jnp.zeros(3), "b": jnp.ones(3)}, tx.init({"a": jnp.zeros(3), "b": jnp.ones(3)}))
    np.testing.assert_array_equal(updates["a"], 0)
    np.testing.assert_allclose(updates["b"], -1)


def test_adam_takes_the_first_moment_alone_from_clipped_gradients():
    """Card test 6: nu equals optax.adam's exactly (without jit, whose fused multiply-adds round differently).

    mu is the average of clipped gradients, and the direction has Adam's bias corrections.
    """
    ours, adam = scale_by_adam_clipped(), optax.scale_by_adam(np.float32(0.9), np.float32(0.999))
    state, raw, of_clipped = ours.init(START), adam.init(START), adam.init(START)
    for t, grads in enumerate(GRADS[:3], start=1):
        updates, state = ours.update(grads, state)
        _, raw = adam.update(grads, raw)
        _, of_clipped = adam.update(clipped(grads, 0.5), of_clipped)
        for name in SHAPES:
            np.testing.assert_array_equal(state.nu[name], raw.nu[name])
            np.testing.assert_allclose(state.mu[name], of_clipped.mu[name], rtol=1e-6)
            direction = of_clipped.mu[name] / (1 - 0.9**t) / (np.sqrt(raw.nu[name] / (1 - 0.999**t)) + 1e-8)
            np.testing.assert_allclose(updates[name], direction, rtol=1e-4)


def test_fraction_zero_is_the_plain_rule():
    """Trap 2: Adam's bias correction is Adam's, not one step ahead as in the official landscape code."""
    b1, b2 = np.float32(0.9), np.float32(0.999)
    for ours, plain in (
        (adam_clip_first_moment(0.1, fraction=0.0), optax.adam(0.1, b1, b2)),
        (adam_clip_update(0.1, fraction=0.0), optax.adam(0.1, b1, b2)),
        (lion_coordinate_clip(0.1, fraction=0.0, clip="gradient"), optax.lion(0.1, weight_decay=0.0)),
    ):
        wanted, _ = run(plain)
        assert_updates(run(ours)[0], [jax.tree.map(lambda x, i=i: x[i], wanted) for i in range(6)])


def test_adam_clip_update_clips_adams_direction():
    adam, _ = run(optax.adam(1.0))
    wanted = [clipped({name: np.asarray(x[i]) for name, x in adam.items()}, 0.5) for i in range(6)]
    assert_updates(run(adam_clip_update(1.0))[0], wanted, rtol=1e-4)


def test_lion_with_a_clip_for_its_sign_and_on_clipped_gradients():
    m, by_update, by_gradient = {name: 0 * x for name, x in START.items()}, [], []
    for grads in GRADS:
        mixed = {name: 0.9 * m[name] + 0.1 * g for name, g in grads.items()}
        by_update.append({name: -x for name, x in clipped(mixed, 0.5).items()})
        m = {name: 0.99 * m[name] + 0.01 * g for name, g in grads.items()}
    m = {name: 0 * x for name, x in START.items()}
    for g_c in (clipped(grads, 0.5) for grads in GRADS):
        by_gradient.append({name: -np.sign(0.9 * m[name] + 0.1 * g) for name, g in g_c.items()})
        m = {name: 0.99 * m[name] + 0.01 * g for name, g in g_c.items()}
    assert_updates(run(lion_coordinate_clip(1.0))[0], by_update)
    assert_updates(run(lion_coordinate_clip(1.0, clip="gradient"))[0], by_gradient)


@pytest.mark.parametrize("rule", [adam_clip_update, functools.partial(lion_coordinate_clip, clip="update")])
def test_a_direction_is_clipped_at_the_threshold_that_follows_it_and_is_never_an_operand(rule):
    """Method "ema" behind the rule alone gives the same steps; its branch takes what is in memory anyhow."""
    plain = rule(-1.0, fraction=0.0)
    wanted, _ = run(optax.chain(plain, clip_top_coordinates(0.3, method="ema"), optax.scale(-1.0)))
    tx = rule(1.0, fraction=0.3, method="ema")
    got, _ = run(tx)
    assert_updates(got, [jax.tree.map(lambda x, i=i: x[i], wanted) for i in range(6)])
    jaxpr = jax.make_jaxpr(tx.update)(GRADS[0], jax.eval_shape(tx.init, START)).jaxpr
    (branch,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "cond"]
    arrays = {id(variable) for variable in branch.invars if variable.aval.ndim}
    assert arrays and arrays <= {id(variable) for variable in jaxpr.invars}


@pytest.mark.parametrize("factored", [True, False])
def test_adafactor_takes_second_moments_from_unclipped_gradients(factored):
    """The official rule in float64 NumPy, then the relative step times the parameter's size; rtol 1e-4 (rsqrt)."""
    rms = lambda x: np.sqrt(np.mean(np.square(x)))  # noqa: E731
    v = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    row, column, wanted = 0, 0, []
    for t, grads in enumerate(GRADS, start=1):
        decay = 1 - t**-0.8
        squares = {name: np.float64(g) ** 2 + 1e-30 for name, g in grads.items()}
        v = {name: decay * v[name] + (1 - decay) * squares[name] for name in v}
        row = decay * row + (1 - decay) * squares["a"].mean(1)
        column = decay * column + (1 - decay) * squares["a"].mean(0)
        if factored:
            v["a"] = np.outer(row, column) / row.mean()
        u = {name: x / np.sqrt(v[name]) for name, x in clipped(grads, 0.5).items()}
        wanted.append({n: -1e-2 * max(1e-3, rms(START[n])) * x / max(1, rms(x)) for n, x in u.items()})
    size = 3 if factored else 4
    assert_updates(run(adafactor_coordinate_clip(min_dim_size_to_factor=size))[0], wanted, rtol=1e-4)
    state = scale_by_adafactor_clipped(min_dim_size_to_factor=size).init(START)
    assert jax.tree.map(jnp.shape, state.nu["a"]) == (((3,), (4,)) if factored else (3, 4))


def test_adafactors_relative_step_shrinks_late():
    """min(1e-2, 1 / sqrt(t)): constant until t = 10^4."""
    tx = adafactor_coordinate_clip(fraction=0.0, multiply_by_parameter_scale=False)
    state = tx.init(jnp.ones(2))
    late = optax.tree.set(state, count=jnp.asarray(39_999))
    for s, rate in ((state, 1e-2), (late, 5e-3)):
        updates, _ = tx.update(jnp.ones(2), s, jnp.ones(2))
        np.testing.assert_allclose(updates, -rate * np.ones(2) / np.maximum(1, abs(updates).max() / rate), rtol=1e-3)


def test_composes_with_decay_and_other_stages():
    """Weight decay is Optax's and stays unclipped; masked leaves are not counted."""
    tx = optax.chain(sgd_coordinate_clip(1.0, fraction=0.5), optax.add_decayed_weights(-0.1))
    p = jnp.array([1.0, 10.0])
    updates, _ = tx.update(jnp.array([1.0, 4.0]), tx.init(p), p)
    np.testing.assert_allclose(updates, [-1.1, -2.0], rtol=1e-6)
    masked = optax.masked(clip_top_coordinates(0.5), {"w": True, "e": False})
    tree = {"w": jnp.array([1.0, 2.0, 3.0, 4.0]), "e": jnp.full(9, 100.0)}
    got, _ = masked.update(tree, masked.init(tree))
    np.testing.assert_array_equal(got["w"], [1, 2, 2, 2])


def test_vmap_over_seeds():
    """Each member has its own threshold."""
    grads = jnp.stack([jnp.arange(1.0, 5.0), 10 * jnp.arange(1.0, 5.0)])
    clip_all = jax.jit(jax.vmap(lambda g: [clip(g, 0.5, method=method) for method in ("sort", "histogram", "ema")]))
    for got in clip_all(grads):
        np.testing.assert_array_equal(got, [[1, 2, 2, 2], [10, 20, 20, 20]])


@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("method", ["sort", "histogram", "ema"])
@pytest.mark.parametrize("tree", [{}, {"a": jnp.zeros((0, 3)), "b": jnp.ones(2)}, {"a": None, "b": jnp.ones(())}])
def test_degenerate_trees(tree, method, scope):
    got = clip(tree, 0.5, method=method, scope=scope)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_top_coordinates(1.5), "fraction=1.5; it must be in"),
        (lambda: clip_top_coordinates(-0.1), "fraction=-0.1"),
        (lambda: clip_top_coordinates(0.1, scope="tensor"), "scope='tensor'; choose one of"),
        (lambda: clip_top_coordinates(0.1, method="topk"), "method='topk'; choose one of"),
        (lambda: clip_top_coordinates(0.1, threshold_scale=0), "threshold_scale=0; it must be > 0"),
        (lambda: top_coordinate_threshold(jnp.ones(3), 0.5, method="ema"), "method='ema'; choose one of"),
        (lambda: top_coordinate_threshold({}, 0.5), "the tree has 0 entries"),
        (lambda: lion_coordinate_clip(0.1, clip="sign"), "clip='sign'; choose"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_entries_than_int32_counts():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match="2147483648 entries"):
        jax.eval_shape(lambda g: top_coordinate_threshold(g, 0.5), huge)


@pytest.mark.slow
def test_checkpoints_through_orbax(tmp_path):
    """Factored moments (pairs) and the threshold of each leaf come back; the run goes on as if it had not stopped."""
    from jaxskip.training import Checkpoints

    tx = scale_by_adafactor_clipped(min_dim_size_to_factor=3, method="ema", scope="leaf")
    _, state = run(tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, state, {})
        _, restored, _ = checkpoints.restore(tx.init(START))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    step = jax.jit(lambda s: tx.update(GRADS[0], s)[0])
    jax.tree.map(np.testing.assert_array_equal, step(restored), step(state))
