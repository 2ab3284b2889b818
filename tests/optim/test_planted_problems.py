import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.optim import hermite, partial_trace, single_index_problem, tensor_pca_problem

MAKERS = {
    "pca3": lambda: tensor_pca_problem(jax.random.key(0), d=5, k=3, lam=4.0),
    "pca4": lambda: tensor_pca_problem(jax.random.key(0), d=5, k=4, lam=4.0),
    "index3": lambda: single_index_problem(jax.random.key(0), d=5, n=60, k=3),
    "index4": lambda: single_index_problem(jax.random.key(0), d=5, n=60, k=4),
    "contracted5": lambda: single_index_problem(jax.random.key(0), d=4, n=60, k=5).contracted(),
}


@functools.cache
def made(name):
    return jax.jit(MAKERS[name])()


def uniform(n, d):
    z = np.random.default_rng(1).normal(size=(n, d)).astype(np.float32)
    return jnp.asarray(z / np.linalg.norm(z, axis=1, keepdims=True))


def without_trace(m):
    return m - jnp.trace(m) / len(m) * jnp.eye(len(m))


SLOW = {"pca4", "index4", "contracted5"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in MAKERS])
def test_the_drift_is_minus_the_tangent_gradient(name):
    """Card test 2: jax.grad of the loss, tangent to 1e-6 of its length."""
    problem = made(name)
    (theta,) = uniform(1, problem.theta_star.size)
    grad, drift = jax.jit(lambda p: (jax.grad(p.loss)(theta), p.drift(theta)))(problem)
    np.testing.assert_allclose(drift, -(grad - grad @ theta * theta), rtol=1e-4, atol=1e-5)
    assert abs(float(drift @ theta)) <= 1e-6 * max(float(jnp.linalg.norm(grad)), 1)


@pytest.mark.parametrize("name", ["pca3", pytest.param("pca4", marks=pytest.mark.slow)])
def test_the_mean_drift_is_what_uniform_points_average(name):
    """20,000 points: 0.05 of the largest entry is several standard errors."""
    problem = made(name)
    z = uniform(20_000, 5)
    b = jax.jit(jax.vmap(problem.drift))(z)
    if problem.parity == "odd":
        seen, wanted = b.mean(0), problem.mean_drift()
    else:
        cross = z.T @ b / len(z)
        seen, wanted = without_trace(cross + cross.T), without_trace(problem.mean_drift())
    np.testing.assert_allclose(seen, wanted, atol=0.05 * float(jnp.abs(wanted).max()))
    assert abs(float(seen.ravel() @ wanted.ravel())) > 0


@pytest.mark.slow
def test_contracting_the_data_changes_nothing():
    """Loss but for its constant, drift and mean drift, to the rounding of sums over polynomials of degree 5."""
    a, b = uniform(2, 4)

    @jax.jit
    def both():
        problems = [single_index_problem(jax.random.key(1), d=4, n=50, k=k, noise=0.5) for k in range(1, 6)]
        pairs = [(problem, problem.contracted()) for problem in problems]
        return [[(p.loss(a) - p.loss(b), p.drift(a), p.mean_drift()) for p in pair] for pair in pairs]

    for data, tensors in both():
        for ours, theirs in zip(data, tensors, strict=True):
            if ours.ndim == 2:
                ours, theirs = without_trace(ours), without_trace(theirs)
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sampling_the_data_averages_to_the_drift():
    problem = made("index3")
    (theta,) = uniform(1, 5)
    keys = jax.random.split(jax.random.key(0), 20_000)
    drifts = jax.jit(jax.vmap(lambda key: problem.sample_drift(theta, key, 4)))(keys)
    standard_error = np.asarray(drifts).std(0) / np.sqrt(len(keys))
    assert np.all(np.abs(drifts.mean(0) - problem.drift(theta)) < 5 * standard_error)


@pytest.mark.slow
def test_the_noise_is_symmetric_and_of_the_documented_variance():
    """Trap 9: 1 / k! where all indices differ. 220 such entries: 0.3 is three standard errors of the variance."""
    make = jax.jit(tensor_pca_problem, static_argnums=(1, 2))
    problem = make(jax.random.key(0), 12, 3, 1.0)
    signal = np.einsum("i,j,k->ijk", *[np.asarray(problem.theta_star)] * 3)
    noise = np.asarray(problem.tensors[0]) - signal
    for axes in itertools.permutations(range(3)):
        np.testing.assert_allclose(noise.transpose(axes), noise, atol=1e-6)
    different = [noise[i] for i in itertools.combinations(range(12), 3)]
    np.testing.assert_allclose(np.var(different), 1 / 6, rtol=0.3)
    stronger = np.asarray(make(jax.random.key(0), 12, 3, 4.0).tensors[0]) - signal
    np.testing.assert_allclose(noise, 4 * stronger, atol=1e-5)


def test_hermite_polynomials():
    """Trap 10: the pure links of degree 3, 4 and 5, orthonormal under N(0, 1) (Gauss-Hermite quadrature, exact)."""
    z, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    values = np.stack([hermite(k, jnp.asarray(z, jnp.float32)) for k in range(6)]).astype(np.float64)
    np.testing.assert_allclose(values * weights @ values.T, np.eye(6), atol=1e-4)
    np.testing.assert_allclose(values[3], (z**3 - 3 * z) / np.sqrt(6), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(values[4], (z**4 - 6 * z**2 + 3) / np.sqrt(24), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(values[5], (z**5 - 10 * z**3 + 15 * z) / np.sqrt(120), rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("k", [3, 4])
def test_the_partial_trace_finds_a_strong_signal_and_not_a_weak_one(k):

    @jax.jit
    def overlap(lam):
        problem = tensor_pca_problem(jax.random.key(2), d=8, k=k, lam=lam)
        oracle = partial_trace(problem)
        return oracle @ problem.theta_star, jnp.linalg.norm(oracle)

    assert abs(float(overlap(300.0)[0])) > 0.99
    assert abs(float(overlap(0.01)[0])) < 0.9
    assert float(overlap(300.0)[1]) == pytest.approx(1, abs=1e-5)


def test_products_run_at_full_precision():
    """Trap 6: the default on TPU is bfloat16, and the signal is 1 % of the noise."""
    for name in ("pca3", "index3"):
        text = jax.jit(lambda p: p.drift(p.theta_star)).lower(made(name)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products and all("HIGHEST" in line for line in products)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda key: tensor_pca_problem(key, d=1, k=3, lam=1.0), "d=1, k=3"),
        (lambda key: tensor_pca_problem(key, d=3, k=0, lam=1.0), "d=3, k=0"),
        (lambda key: single_index_problem(key, d=3, n=0, k=1), "n=0"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(jax.random.key(0))
