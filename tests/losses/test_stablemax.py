"""StableMax against its definition in float64, and the gradients at its kinks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.losses import (
    cross_entropy_in_dtype,
    log_stablemax,
    stablemax,
    stablemax_cross_entropy_with_integer_labels,
)

KINKS = [0.0, 1.0, -1.0, 1e30, -1e30, 0.5, -3.0]


def x64():
    """A block with 64-bit types, which JAX before 0.8 has elsewhere."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64

    return enable_x64()


def definition(z):
    """s(z) / sum s(z) over the last axis in float64."""
    z = np.asarray(z, np.float64)
    s = np.where(z >= 0, z + 1, 1 / (1 - np.minimum(z, 0)))
    return s / s.sum(-1, keepdims=True)


def loss_and_grad(z, label, **kwargs):
    return jax.jit(jax.value_and_grad(lambda z: stablemax_cross_entropy_with_integer_labels(z, label, **kwargs)))(z)


def test_the_definition_in_float64():
    """Card test 1: 1e-12."""
    z = np.random.default_rng(0).normal(size=(50, 9)) * 10.0 ** np.arange(-4, 5)
    with x64():
        p = stablemax(jnp.asarray(z))
        assert p.dtype == jnp.float64
        np.testing.assert_allclose(p, definition(z), rtol=1e-12)
        np.testing.assert_allclose(log_stablemax(jnp.asarray(z)), np.log(definition(z)), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=5, max_size=5))
def test_sums_to_one_and_is_monotone(values):
    """Card tests 1 and 2 in float32: 1e-6 of the definition, the order of the logits kept."""
    z = np.array(values, np.float32)
    p = np.asarray(stablemax(jnp.asarray(z)))
    np.testing.assert_allclose(p, definition(z), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    assert np.all(np.diff(p[np.argsort(z, kind="stable")]) >= -1e-7)


@pytest.mark.parametrize("label", range(len(KINKS)))
def test_gradient_at_every_kink(label):
    """Trap 1 and card test 1: finite and (p - y) / (1 + |z|) to 1e-6, where the usual forms give NaN or 0."""
    z = jnp.array(KINKS)
    _, grad = loss_and_grad(z, label)
    wanted = (definition(KINKS) - np.eye(len(KINKS))[label]) / (1 + np.abs(KINKS))
    np.testing.assert_allclose(grad, wanted, rtol=1e-6, atol=1e-7)


def test_a_zero_initialised_head_trains():
    """Card test 1: sign(x) log1p(|x|) would have the gradient zero here."""
    _, grad = loss_and_grad(jnp.zeros(4), 1)
    np.testing.assert_allclose(grad, [0.25, -0.75, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize(("m", "loss"), [(30.0, 0.063), (1e3, 2.0e-3), (1e6, 1.9e-6)])
def test_a_large_margin_still_learns(m, loss):
    """Section 2 of the card, in float32: softmax's loss and gradient are exactly zero at all three."""
    z = jnp.array([m, 0.0, 0.0, -m])
    value, grad = loss_and_grad(z, 0)
    assert float(value) == pytest.approx(loss, rel=0.05)
    assert float(grad[0]) < 0
    softmax = jax.value_and_grad(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, 0))(z)
    assert float(softmax[0]) == 0 and float(softmax[1][0]) == 0


def test_adding_a_constant_changes_it():
    z = jnp.array([1.0, 2.0, 3.0])
    assert float(jnp.abs(stablemax(z) - stablemax(z + 5)).max()) > 0.05


def test_sampling_follows_stablemax_and_not_softmax():
    """Trap 10: 20,000 draws, so 0.02 is six standard errors."""
    z = jnp.array([4.0, 0.0, -2.0])
    draws = jax.random.categorical(jax.random.key(0), log_stablemax(z), shape=(20_000,))
    shares = np.bincount(np.asarray(draws), minlength=3) / draws.size
    np.testing.assert_allclose(shares, stablemax(z), atol=0.02)
    assert abs(shares[0] - float(jax.nn.softmax(z)[0])) > 0.1


def test_bf16_logits_are_reduced_in_float32():
    z = (jnp.arange(4096) / 512).astype(jnp.bfloat16)
    loss, grad = loss_and_grad(z, 7)
    assert loss.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, -np.log(definition(z.astype(jnp.float32))[7]), rtol=1e-6)


def test_where_axis_and_ignore_index():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    labels = jnp.array([0, 3, -100, 1])
    keep = jnp.array([True, True, False, True, True, True])[None]

    @jax.jit
    def run(z):
        loss = lambda z: stablemax_cross_entropy_with_integer_labels(z, labels, where=keep)  # noqa: E731
        by_column = stablemax_cross_entropy_with_integer_labels(z.T, labels, axis=0, where=keep.T)
        return loss(z), by_column, jax.grad(lambda z: loss(z).sum())(z), stablemax(z, where=keep)

    losses, by_column, grad, p = run(z)
    rest = definition(np.delete(np.asarray(z), 2, axis=1))
    np.testing.assert_allclose(losses, [-np.log(rest[0, 0]), -np.log(rest[1, 2]), 0, -np.log(rest[3, 1])], rtol=1e-5)
    np.testing.assert_allclose(by_column, losses, rtol=1e-6)
    assert np.all(np.isfinite(grad)) and np.all(grad[2] == 0) and np.all(grad[:, 2] == 0)
    assert float(p[0, 2]) == 0


def test_labels_that_are_no_class():
    z = jnp.zeros((3, 4))
    losses = stablemax_cross_entropy_with_integer_labels(z, jnp.array([4, -1, 0]))
    np.testing.assert_array_equal(np.isnan(losses), [True, True, False])
    assert np.isnan(stablemax_cross_entropy_with_integer_labels(z, jnp.full(3, -100), ignore_index=None)).all()
    with pytest.raises(TypeError, match="float32"):
        stablemax_cross_entropy_with_integer_labels(z, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(3, 1\).*must be \(3,\)"):
        stablemax_cross_entropy_with_integer_labels(z, jnp.zeros((3, 1), jnp.int32))


def test_vmap_and_jit():
    z = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)
    labels = jnp.arange(4)
    separate = jax.jit(jax.vmap(stablemax_cross_entropy_with_integer_labels))(z, labels)
    np.testing.assert_allclose(stablemax_cross_entropy_with_integer_labels(z, labels), separate, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "margin"), [(jnp.bfloat16, 6.5), (jnp.float16, 8.5), (jnp.float32, 17.5)])
def test_the_rounded_loss_collapses_at_half_an_ulp(dtype, margin):
    """exp(-margin) below half the spacing above 1 vanishes in the sum, under jit too: loss and gradient are zero."""
    f = jax.jit(jax.value_and_grad(lambda z: cross_entropy_in_dtype(z, 0, dtype)))
    below, above = jnp.array([margin - 2, 0.0]), jnp.array([margin, 0.0])
    assert float(f(below)[0]) > 0 and float(f(below)[1][0]) < 0
    assert float(f(above)[0]) == 0 and float(f(above)[1][0]) == 0


def test_the_rounded_loss_is_close_to_the_real_one():
    """Three to four roundings of 2^-8 (bf16) or 2^-11 (f16) on a loss of about 2."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6)), jnp.float32)
    labels = jnp.arange(50) % 6
    tolerances = {jnp.bfloat16: 0.03, jnp.float16: 0.004, jnp.float32: 1e-5}
    real = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(z, labels)
    all_rounded = jax.jit(lambda z: [cross_entropy_in_dtype(z, labels, dtype) for dtype in tolerances])(z)
    for rounded, tolerance in zip(all_rounded, tolerances.values(), strict=True):
        assert rounded.dtype == jnp.float32
        np.testing.assert_allclose(rounded, real, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_the_rounded_loss_in_float64():
    """float32 logits, float64 softmax: 30 is no collapse there; without x64 JAX would quietly take float32."""
    z = jnp.array([30.0, 0.0])
    with pytest.raises(ValueError, match="jax_enable_x64"):
        cross_entropy_in_dtype(z, 0, jnp.float64)
    with pytest.raises(ValueError, match="dtype=int32"):
        cross_entropy_in_dtype(z, 0, jnp.int32)
    with x64():
        loss, grad = jax.value_and_grad(lambda z: cross_entropy_in_dtype(z, 0, jnp.float64))(z.astype(jnp.float32))
    assert loss.dtype == grad.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log1p(np.exp(-30.0)), rtol=1e-2)
    assert float(grad[0]) < 0
