"""The curvature estimators against closed forms, over data-parallel layouts, and through remat and custom_vjp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.optim import gnb_diag, hutchinson_diag, sampled_gnb_diag

NUM_DRAWS = 20_000


def linear_logits(params, x):
    return x @ params["w"]


def sampled_loss(x, mask=None):
    """Mean cross-entropy of a linear softmax on labels drawn from it, and how many terms that mean has."""
    mask = jnp.ones(x.shape[:-1]) if mask is None else mask

    def loss(params, key):
        z = linear_logits(params, x)
        labels = jax.random.categorical(key, z)
        terms = jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, labels[..., None], -1)[..., 0]
        return jnp.sum(mask * terms) / jnp.sum(mask)

    return loss


def diag_gauss_newton(params, x, mask=None):
    """diag of J^T (diag p - p p^T) J averaged over the kept positions: x_i^2 p_c (1 - p_c) for a linear softmax."""
    x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    p = np.asarray(jax.nn.softmax(jnp.asarray(x, jnp.float32) @ params["w"]), np.float64)
    keep = np.ones(len(x)) if mask is None else np.asarray(mask, np.float64).reshape(-1)
    return np.einsum("b,bi,bc->ic", keep, x**2, p * (1 - p)) / keep.sum()


def linear_problem(shape, classes=3):
    kx, kw = jax.random.split(jax.random.key(1))
    return {"w": 0.5 * jax.random.normal(kw, (shape[-1], classes))}, jax.random.normal(kx, shape)


def mean_over_draws(estimator):
    keys = jax.random.split(jax.random.key(7), NUM_DRAWS)
    return np.asarray(jax.jit(lambda: jnp.mean(jax.vmap(estimator)(keys), 0))())


# Hutchinson


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(1e-3, 1e3))
def test_rademacher_is_exact_on_a_diagonal_hessian(seed, scale):
    """u_i^2 = 1, so that one probe gives the diagonal; rtol 1e-6 is a few float32 roundings."""
    c = scale * jnp.array([-3.0, 0.5, 1.0, 7.0])
    diag = hutchinson_diag(lambda p: 0.5 * jnp.sum(c * p["w"] ** 2), {"w": jnp.ones(4)}, jax.random.key(seed))
    np.testing.assert_allclose(diag["w"], c, rtol=1e-6)


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_bias_and_variance_on_a_dense_hessian(distribution):
    """20k samples: bias under 0.05 (about 4 standard errors here), variance within 5 % (its own error is about 1 %)."""
    a = np.random.default_rng(0).normal(size=(20, 20))
    hessian = (a + a.T) / np.sqrt(80)
    matrix = jnp.asarray(hessian, jnp.float32)
    keys = jax.random.split(jax.random.key(3), NUM_DRAWS)

    @jax.jit
    @jax.vmap
    def estimate(key):
        return hutchinson_diag(lambda p: 0.5 * p @ matrix @ p, jnp.zeros(20), key, distribution=distribution)

    samples = np.asarray(estimate(keys), np.float64)
    squares, diag = hessian**2, np.diag(hessian)
    variance = squares.sum(1) - diag**2 if distribution == "rademacher" else squares.sum(1) + diag**2
    np.testing.assert_allclose(samples.mean(0), diag, atol=0.05)
    np.testing.assert_allclose(samples.var(0), variance, rtol=0.05)


def test_num_samples_averages_independent_probes():
    """With H = [[0, 1], [1, 0]] a probe gives u0 u1 = ±1, so that the mean of 64 has standard deviation 1/8."""
    loss = lambda p: p[0] * p[1]  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 500)
    draws = jax.jit(jax.vmap(lambda k: hutchinson_diag(loss, jnp.zeros(2), k, num_samples=64)))(keys)
    assert np.asarray(draws)[:, 0].std() == pytest.approx(1 / 8, rel=0.15)
    assert len(np.unique(np.asarray(draws)[:, 0])) > 10


def test_hutchinson_of_bf16_params_is_computed_in_float32():
    """Trap 10: 1.001 is not a bf16 number, so that it survives only if the Hessian-vector product is float32."""
    c = jnp.array([1.001, 3.003])
    diag = hutchinson_diag(lambda p: 0.5 * jnp.sum(c * p**2), jnp.ones(2, jnp.bfloat16), jax.random.key(0))
    assert diag.dtype == jnp.float32
    np.testing.assert_allclose(diag, c, rtol=1e-6)


@pytest.mark.parametrize(("kwargs", "words"), [({"distribution": "gauss"}, "rademacher"), ({"num_samples": 0}, "1")])
def test_hutchinson_refuses_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        hutchinson_diag(lambda p: jnp.sum(p**2), jnp.ones(2), jax.random.key(0), **kwargs)


# Gauss-Newton-Bartlett


def test_gnb_is_unbiased_for_the_gauss_newton_diagonal():
    """Card test 3, 6 x 4 x 3: 3 % is the card's bound on the mean of 20k label draws."""
    params, x = linear_problem((6, 4))
    mean = mean_over_draws(lambda k: gnb_diag(linear_logits, params, x, k)["w"])
    np.testing.assert_allclose(mean, diag_gauss_newton(params, x), rtol=0.03)


def test_b_counts_unmasked_tokens_not_sequences():
    """Trap 1: on [2, 3] tokens with one masked B is 5, neither 6 nor 2. 5 % separates 5 from 6."""
    params, x = linear_problem((2, 3, 4))
    mask = jnp.array([[1, 1, 0], [1, 1, 1]])
    mean = mean_over_draws(lambda k: gnb_diag(linear_logits, params, x, k, mask=mask)["w"])
    np.testing.assert_allclose(mean, diag_gauss_newton(params, x, mask), rtol=0.05)


def test_masked_positions_have_no_influence():
    """Trap 1, exactly: whatever stands at a masked position, the estimate is the same."""
    params, x = linear_problem((2, 3, 4))
    mask = jnp.array([[True, True, False], [True, True, True]])
    estimate = jax.jit(lambda x: gnb_diag(linear_logits, params, x, jax.random.key(2), mask=mask)["w"])
    np.testing.assert_array_equal(estimate(x), estimate(x.at[0, 2].set(100.0)))


def test_all_masked_gives_zeros():
    params, x = linear_problem((2, 3, 4))
    diag = gnb_diag(linear_logits, params, x, jax.random.key(0), mask=jnp.zeros((2, 3)))
    np.testing.assert_array_equal(diag["w"], 0.0)


def test_sampled_route_agrees_with_the_logits_route():
    """The same labels give the same estimate whichever way the gradient is taken; rtol 1e-5 is float32 summation."""
    params, x = linear_problem((2, 3, 4))
    mask = jnp.array([[1.0, 1, 0], [1, 1, 1]])
    key = jax.random.key(5)
    sampled = jax.jit(lambda n: sampled_gnb_diag(sampled_loss(x, mask), params, key, n))(jnp.float32(5))
    np.testing.assert_allclose(sampled["w"], gnb_diag(linear_logits, params, x, key, mask=mask)["w"], rtol=1e-5)


def test_empirical_fisher_is_not_gnb():
    """Trap 2: with confidently right labels the squared true-label gradient is far below the diagonal."""
    x = jnp.eye(4)
    params = {"w": 3.0 * jnp.eye(4)[:, :3]}
    labels = jnp.array([0, 1, 2, 0])

    def true_loss(p):
        z = linear_logits(p, x)
        return jnp.mean(jax.nn.logsumexp(z, -1) - z[jnp.arange(4), labels])

    fisher = 4 * jax.grad(true_loss)(params)["w"] ** 2
    gnb = mean_over_draws(lambda k: gnb_diag(linear_logits, params, x, k)["w"])
    exact = diag_gauss_newton(params, x)
    # Draws of a class of probability 0.043 have a standard error of 5 % here.
    np.testing.assert_allclose(gnb, exact, rtol=0.15)
    assert np.min(np.asarray(fisher) / exact) < 0.1


def test_max_norm_clips_the_gradient_before_squaring():
    """Official variant: the norm of g is max_norm when it acts, so the sum of N g^2 is N max_norm^2; else no change."""
    params, x = linear_problem((6, 4))
    key = jax.random.key(0)
    clipped = gnb_diag(linear_logits, params, x, key, max_norm=1e-2)
    assert float(jnp.sum(clipped["w"])) == pytest.approx(6 * 1e-4, rel=1e-5)
    free = sampled_gnb_diag(sampled_loss(x), params, key, 6)
    np.testing.assert_array_equal(sampled_gnb_diag(sampled_loss(x), params, key, 6, max_norm=1e3)["w"], free["w"])


def test_gnb_squares_in_float32():
    """Trap 10: bf16 params and logits, but the result is float32 and within bf16's error of the float32 estimate."""
    params, x = linear_problem((6, 4))
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    key = jax.random.key(0)
    diag = gnb_diag(linear_logits, half, x.astype(jnp.bfloat16), key)["w"]
    assert diag.dtype == jnp.float32
    exact = gnb_diag(linear_logits, rounded, x, key)["w"]
    np.testing.assert_allclose(diag, exact, atol=0.03 * float(jnp.max(exact)))
    grad = jax.grad(sampled_loss(x))(half, key)["w"].astype(jnp.float32)
    sampled = sampled_gnb_diag(sampled_loss(x), half, key, 6)["w"]
    assert sampled.dtype == jnp.float32
    np.testing.assert_allclose(sampled, 6 * grad**2, rtol=1e-6)


def test_gnb_refuses_bad_input():
    params, x = linear_problem((6, 4))
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"mask has shape \(4,\).*\(6,\)"):
        gnb_diag(linear_logits, params, x, key, mask=jnp.ones(4))
    with pytest.raises(ValueError, match="last axis"):
        gnb_diag(lambda p, x: jnp.sum(p["w"]), params, x, key)
    with pytest.raises(ValueError, match="max_norm=0"):
        gnb_diag(linear_logits, params, x, key, max_norm=0)


# Through remat and custom_vjp


def test_both_estimators_pass_through_remat():
    """Trap 9: jax.checkpoint changes memory, not values (rtol 1e-5: XLA may fuse differently)."""
    params, x = linear_problem((6, 4))
    layer = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    key = jax.random.key(0)

    def both(layer):
        h = hutchinson_diag(lambda p: jnp.mean(layer(p, x) ** 2), params, key)
        return h, gnb_diag(layer, params, x, key)

    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), both(jax.checkpoint(layer)), both(layer))


def test_custom_vjp():
    """Trap 9, made precise: GNB needs reverse mode only, so an opaque kernel with a custom_vjp is fine.

    Hutchinson differentiates the rules of a custom_vjp in forward mode: right if they are plain JAX, else an error.
    """

    def with_rules(matmul):
        f = jax.custom_vjp(matmul)
        f.defvjp(lambda x, w: (matmul(x, w), (x, w)), lambda res, g: (matmul(g, res[1].T), matmul(res[0].T, g)))
        return lambda p, x: f(x, p["w"])

    def opaque(x, w):
        out = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), jnp.float32)
        return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), out, x, w)

    params, x = linear_problem((6, 4))
    key = jax.random.key(0)
    loss = lambda logits_fn: lambda p: jnp.mean(jnp.tanh(logits_fn(p, x)) ** 2)  # noqa: E731
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5)  # another summation order
    same(gnb_diag(with_rules(opaque), params, x, key)["w"], gnb_diag(linear_logits, params, x, key)["w"])
    plain = hutchinson_diag(loss(with_rules(jnp.matmul)), params, key)
    same(plain["w"], hutchinson_diag(loss(linear_logits), params, key)["w"])
    with pytest.raises(ValueError, match="JVP"):
        hutchinson_diag(loss(with_rules(opaque)), params, key)


# Data parallelism


def data_mesh(num_devices):
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


@pytest.mark.multidevice
@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.parametrize("estimator", ["hutchinson", "gnb", "sampled_gnb"])
def test_sharded_batch_gives_the_one_device_estimate(estimator, num_devices):
    """Trap 3 and card test 7: jit + NamedSharding averages before it squares. rtol 1e-5: another summation order."""
    params, x = linear_problem((8, 4))

    @jax.jit
    def estimate(params, x, key):
        if estimator == "hutchinson":
            return hutchinson_diag(lambda p: jnp.mean(jnp.tanh(linear_logits(p, x)) ** 2), params, key)
        if estimator == "gnb":
            return gnb_diag(linear_logits, params, x, key)
        return sampled_gnb_diag(sampled_loss(x), params, key, x.shape[0])

    mesh = data_mesh(num_devices)
    key = jax.random.key(4)
    one = estimate(params, x, key)
    replicated = jax.device_put(params, NamedSharding(mesh, P()))
    many = estimate(replicated, jax.device_put(x, NamedSharding(mesh, P("data"))), key)
    np.testing.assert_allclose(many["w"], one["w"], rtol=1e-5)


@pytest.mark.multidevice
def test_by_hand_under_shard_map():
    """Trap 3: a pmean'd loss gives the global gradient before the square; B is the global count.

    Hutchinson with the same key on all shards is the one-device estimate (rtol 1e-5, summation order). The label draws
    differ from the one-device ones, so GNB is compared with the loss that draws the same labels shard by shard.
    """
    params, x = linear_problem((8, 4))
    key = jax.random.key(4)
    mesh = data_mesh(8)

    def smooth(p, x):
        return jnp.mean(jnp.tanh(linear_logits(p, x)) ** 2)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P())
    def by_hand(params, x, key):
        def global_loss(p, key):
            shard_key = jax.random.fold_in(key, jax.lax.axis_index("data"))
            return jax.lax.pmean(sampled_loss(x)(p, shard_key), "data")

        hutchinson = hutchinson_diag(lambda p: jax.lax.pmean(smooth(p, x), "data"), params, key)
        return hutchinson, sampled_gnb_diag(global_loss, params, key, num_terms=8)

    def shard_by_shard(p, key):
        losses = [sampled_loss(x[i : i + 1])(p, jax.random.fold_in(key, i)) for i in range(8)]
        return sum(losses) / 8

    hutchinson, gnb = by_hand(params, x, key)
    np.testing.assert_allclose(hutchinson["w"], hutchinson_diag(lambda p: smooth(p, x), params, key)["w"], rtol=1e-5)
    np.testing.assert_allclose(gnb["w"], sampled_gnb_diag(shard_by_shard, params, key, 8)["w"], rtol=1e-5)
