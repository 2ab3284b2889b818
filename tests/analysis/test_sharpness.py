"""Sharpness measurements against closed forms and full Hessians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.analysis import (
    best_local_step,
    directional_sharpness,
    hessian_eigenpairs,
    hvp,
    landscape_search,
    update_report,
)

A = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32)
A = (A + A.T) / 2
VALUES, VECTORS = np.linalg.eigh(A.astype(np.float64))


def quadratic(p):
    x = jnp.concatenate([p["a"].ravel(), p["b"]])
    return 0.5 * x @ A @ x


def tree(x):
    return {"a": jnp.asarray(x[:12], jnp.float32).reshape(3, 4), "b": jnp.asarray(x[12:], jnp.float32)}


POINT = tree(np.linspace(-1, 1, 20))


def mlp():
    """300 parameters, 4 batches of 16 examples: (loss(params, batch), params, batches)."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w1": normal(8, 20), "b1": normal(20), "w2": normal(20, 6)}
    batches = {"x": normal(4, 16, 8), "y": normal(4, 16, 6)}

    def loss(p, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ p["w1"] + p["b1"][None]) @ p["w2"] - batch["y"]) ** 2)

    assert sum(x.size for x in jax.tree.leaves(params)) == 300
    return loss, params, batches


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-3, 1e3))
def test_directional_sharpness_of_a_quadratic(seed, scale):
    """Card test 5: v'Av / v'v, whatever the length of v; rtol 1e-5 of the largest eigenvalue, float32 sums of 400."""
    v = np.random.default_rng(seed).normal(size=20)
    got = directional_sharpness(quadratic, POINT, tree(scale * v))
    np.testing.assert_allclose(got, v @ A @ v / (v @ v), rtol=1e-5, atol=1e-5 * abs(VALUES).max())


def test_eigenvectors_give_eigenvalues():
    sharpness = jax.jit(lambda v: directional_sharpness(quadratic, POINT, v))
    got = [sharpness(tree(VECTORS[:, i])) for i in range(20)]
    np.testing.assert_allclose(got, VALUES, rtol=1e-5, atol=1e-5)
    assert min(got) < 0


def test_against_the_full_hessian_of_a_network():
    """Card test 5, 300 parameters, rtol 1e-4; also that batches are averaged, and one program does them all."""
    loss, params, batches = mlp()
    flat, unravel = ravel_pytree(params)
    u = unravel(jnp.asarray(np.random.default_rng(5).normal(size=flat.shape), jnp.float32))

    def whole(x):
        return jnp.mean(jax.vmap(lambda batch: loss(unravel(x), batch))(batches))

    @jax.jit
    def measured():
        return (
            hvp(loss, params, u, batches=batches),
            directional_sharpness(loss, params, u, batches=batches),
            jax.hessian(whole)(flat),
        )

    product, sharpness, full = measured()
    full, direction = np.asarray(full, np.float64), np.asarray(ravel_pytree(u)[0], np.float64)
    wanted = full @ direction
    np.testing.assert_allclose(ravel_pytree(product)[0], wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())
    np.testing.assert_allclose(sharpness, direction @ wanted / (direction @ direction), rtol=1e-4)


def test_masked_directions_need_their_own_product():
    """Trap 3: the official masked sharpness takes (H u) . u_masked; ours is that of the masked direction itself."""
    u = tree(np.ones(20))
    masked = {"a": u["a"], "b": jnp.zeros_like(u["b"])}
    reused = sum(np.sum(hvp(quadratic, POINT, u)[name] * masked[name]) for name in masked) / 12
    got = directional_sharpness(quadratic, POINT, masked)
    np.testing.assert_allclose(got, A[:12, :12].sum() / 12, rtol=1e-4)
    assert abs(got - reused) > 0.1


def test_shift_measures_away_from_the_point():
    """f = |p|^4 / 4 along p: second derivative 3 (|p| + shift)^2."""
    p = jnp.array([0.6, 0.8])
    quartic = lambda p: jnp.sum(p**2) ** 2 / 4  # noqa: E731
    for shift in (0.0, 1.0):
        got = directional_sharpness(quartic, p, 7 * p, shift=shift)
        np.testing.assert_allclose(got, 3 * (1 + shift) ** 2, rtol=1e-5)


def test_bf16_parameters_are_measured_in_float32():
    """Trap 7: the loss sees a float32 copy, so a curvature of 1e-3 beside one of 1 keeps its sign."""
    curvature = jnp.array([1.0, -1e-3])
    loss = lambda p: 0.5 * jnp.sum(curvature * p**2)  # noqa: E731
    got = directional_sharpness(loss, jnp.full(2, 100, jnp.bfloat16), jnp.array([0, 1], jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, -1e-3, rtol=1e-6)


# Steps along a direction


def test_best_local_step_finds_the_minimum_of_a_parabola():
    """f = (|p| - s)^2 - |p|^2 along -p; a direction uphill has a negative drop; nan losses lose."""
    p = jnp.array([3.0, 4.0])
    square = lambda p: jnp.sum(p**2)  # noqa: E731
    drop, step = jax.jit(lambda u: best_local_step(square, p, u))(-2 * p)
    grid = np.geomspace(1e-3, 10, 24)
    best = grid[np.argmin(abs(grid - 5))]
    np.testing.assert_allclose([drop, step], [25 - (5 - best) ** 2, best], rtol=1e-5)
    assert best_local_step(square, p, p)[0] < 0
    drop, step = best_local_step(lambda p: jnp.sum(jnp.sqrt(p)), p, -p, grid=jnp.array([1.0, 6.0]))
    assert step == 1 and drop > 0


def test_landscape_search_walks_like_the_official_code():
    """Stops at the first loss above the start; three points or less: again with a fifth of eps."""
    parabola = lambda p: p**2  # noqa: E731
    one, down = jnp.array(1.0), jnp.array(-1.0)
    search = jax.jit(lambda u, eps: landscape_search(parabola, one, u, eps, max_retries=2))
    steps, losses = search(down, 5.0)
    np.testing.assert_allclose(steps, [0, 1, 2, 3, *[np.nan] * 17], rtol=1e-5)
    np.testing.assert_allclose(losses, [1, 0, 1, 4, *[np.nan] * 17], atol=1e-5)
    steps, losses = search(down, 0.01)
    np.testing.assert_allclose(steps, 0.01 * np.arange(21), rtol=1e-5)
    steps, losses = search(-down, 1.0)
    assert int(np.sum(~np.isnan(losses))) == 2
    np.testing.assert_allclose(steps[:2], [0, 0.04], rtol=1e-5)


def test_update_report_agrees_with_its_parts():
    """With two batches, of which each adds its own slope: f = x'Ax / 2 + mean(batches) . x."""
    slopes = np.random.default_rng(1).normal(size=(2, 20)).astype(np.float32)
    batches = {"a": slopes[:, :12].reshape(2, 3, 4), "b": slopes[:, 12:]}
    loss = lambda p, batch: quadratic(p) + sum(jnp.sum(p[name] * batch[name]) for name in p)  # noqa: E731
    x = np.linspace(-1, 1, 20)
    gradient = A @ x + slopes.mean(0)
    directions = {"down": -0.3 * gradient, "sign": -np.sign(gradient)}
    updates = {name: tree(u) for name, u in directions.items()}
    report = jax.jit(lambda p, u: update_report(loss, p, u, batches=batches))(POINT, updates)
    grid = np.geomspace(1e-3, 10, 24)
    for name, u in directions.items():
        unit = u / np.linalg.norm(u)
        drops = -grid * (gradient @ unit) - 0.5 * grid**2 * (unit @ A @ unit)
        wanted = unit @ A @ unit, -gradient @ unit / np.linalg.norm(gradient), drops.max(), grid[drops.argmax()]
        got = [report[name][key] for key in ("sharpness", "cos", "best_drop", "best_step")]
        np.testing.assert_allclose(got, wanted, rtol=1e-4)


# Eigenvalues


def test_lanczos_gives_the_whole_spectrum_of_a_small_matrix():
    """All 20 steps: exact to float32. The smallest through the negated loss; 6 steps have residuals that bound them."""

    @jax.jit
    def pairs(sign, key):
        loss = lambda p: sign * quadratic(p)  # noqa: E731
        return hessian_eigenpairs(loss, POINT, key, k=20), hessian_eigenpairs(loss, POINT, key, k=2, num_iters=6)

    whole, few = pairs(1.0, jax.random.key(0))
    np.testing.assert_allclose(whole.values, VALUES[::-1], atol=1e-4)
    flat = np.concatenate([np.reshape(whole.vectors[name], (20, -1)) for name in ("a", "b")], axis=1)
    np.testing.assert_allclose(abs(np.sum(flat * VECTORS.T[::-1], axis=1)), 1, atol=1e-3)
    np.testing.assert_allclose(-pairs(-1.0, jax.random.key(0))[0].values[0], VALUES[0], atol=1e-4)
    error = abs(np.asarray(few.values)[:, None] - VALUES).min(1)
    assert np.all(error <= few.residuals + 1e-5) and np.all(few.residuals > 1e-4)


def test_exhausted_krylov_space_is_said():
    """Two distinct eigenvalues, both negative: two values, then nan, never a made-up zero. A linear loss has 0."""
    pairs = jax.jit(
        lambda curvature: hessian_eigenpairs(
            lambda p: jnp.sum(p + 0.5 * curvature * p**2), jnp.zeros(4), jax.random.key(0), k=3
        )
    )
    np.testing.assert_allclose(pairs(jnp.array([-1.0, -2.0, -2.0, -1.0])).values, [-1.0, -2.0, np.nan], atol=1e-5)
    np.testing.assert_array_equal(pairs(jnp.zeros(4)).values, [0.0, np.nan, np.nan])


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "measurement",
    [
        lambda loss, p, batches: directional_sharpness(loss, p, p, batches=batches),
        pytest.param(
            lambda loss, p, batches: hessian_eigenpairs(
                loss, p, jax.random.key(0), num_iters=4, batches=batches
            ).values[0],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sharpness", "eigenvalue"],
)
def test_sharded_parameters_and_batches(measurement):
    """On eight devices as on one; rtol 1e-4 for another order of summation."""
    mesh = Mesh(np.array(jax.devices()), ("data",))
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    params, x = jnp.linspace(-1.0, 1.0, 16).reshape(8, 2), jnp.sin(jnp.arange(96.0)).reshape(3, 8, 4)

    def loss(p, batch):
        return jnp.mean(batch @ p[:4] @ p[4:6] * jnp.cos(p[6:].sum()))

    measure = jax.jit(lambda p, batches: measurement(loss, p, batches))
    one, many = measure(params, x), measure(put(params, "data"), put(x, None, "data"))
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert abs(one) > 1e-2


# Errors


def test_bad_input():
    loss = lambda p, *batch: jnp.sum(p**2)  # noqa: E731
    p = jnp.ones(3)
    with pytest.raises(ValueError, match=r"direction has the shapes \(4,\); the parameters have \(3,\)"):
        hvp(loss, p, jnp.ones(4))
    with pytest.raises(ValueError, match="direction has the shapes"):
        directional_sharpness(loss, {"a": p}, {"b": p})
    with pytest.raises(ValueError, match="one common leading axis"):
        hvp(loss, p, p, batches={"x": jnp.ones((2, 3)), "y": jnp.ones(3)})
    with pytest.raises(ValueError, match="one common leading axis"):
        hvp(loss, p, p, batches=jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="k=4; it must be between 1 and 3"):
        hessian_eigenpairs(loss, p, jax.random.key(0), k=4)
    assert jnp.isnan(directional_sharpness(loss, p, jnp.zeros(3)))
