"""What the gradient filter puts in the place of what it leaves out."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import spread

EPS = 2.0**-6
CAP = EPS / 4  # more than 1 / 400


def spread_out(p, out, prior):
    """What stands for the probabilities ``p`` where ``out``."""
    mass, most, of_prior = (jnp.sum(p * out), jnp.max(p * out), jnp.sum(prior * out))
    multiple, even = spread.rates(CAP, mass, most, out.sum(), of_prior)
    return np.where(out, multiple * prior + even, p)


def problem(seed, sharpness=2.0, entries=400):
    rng = np.random.default_rng(seed)
    logits = sharpness * rng.normal(size=entries)
    p, q = (np.exp(z) / np.exp(z).sum() for z in (logits + rng.normal(size=entries), logits))
    return p, p < EPS, np.minimum(q, CAP)


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_stays_and_nothing_gets_more_than_the_largest_left_out(seed):
    p, out, prior = problem(seed)
    got = spread_out(p, out, prior)
    assert got.sum() == pytest.approx(1, abs=1e-6) and 0 < out.sum() < 400
    assert got[out].max() <= p[out].max() * (1 + 1e-6) and got.min() >= 0
    assert np.abs(got - p)[out].sum() < 0.7 * np.abs(p[out].mean() - p[out]).sum()  # nearer than evenly
    np.testing.assert_array_equal(got[~out], p[~out].astype(got.dtype))


def test_where_it_can_be_it_is_in_proportion_to_the_prior():
    p, out, prior = problem(0, sharpness=1.0)
    got = spread_out(p, out, prior)
    np.testing.assert_allclose(got[out] / prior[out], (p[out].sum() / prior[out].sum()), rtol=1e-5)


def test_a_uniform_softmax_stays_as_it_is_whatever_the_prior():
    p, out, (*_, prior) = np.full(400, 1 / 400), np.arange(400) > 0, problem(1)
    np.testing.assert_allclose(spread_out(p, out, prior), p, rtol=1e-5)


def test_a_prior_without_weight_where_entries_are_left_out_leaves_the_mean():
    p, out, _ = problem(2)
    np.testing.assert_allclose(spread_out(p, out, np.where(out, 0, CAP))[out], p[out].mean(), rtol=1e-5)


def test_the_prior_may_have_the_even_share_between_a_quarter_and_half_of_eps():
    assert [spread.cap(2**-12, entries) for entries in (256_000, 10_000, 100)] == [2**-14, 1e-4, 2**-13]


@pytest.mark.parametrize(("layout", "softcap"), [("vd", None), ("dv", 3.0)])
def test_the_prior_is_the_softmax_of_the_average_token_that_counts(layout, softcap):
    rng = np.random.default_rng(0)
    e, c, counts = rng.normal(size=(6, 8)), 3 * rng.normal(size=(50, 8)), np.array([1, 1, 0, 1, 0, 0], bool)
    spec = types.SimpleNamespace(classifier_layout=layout, softcap=softcap, filter_eps=0.1)
    operands = jnp.asarray(e, jnp.float32), jnp.asarray(c if layout == "vd" else c.T, jnp.float32), jnp.asarray(counts)
    share, sloped = spread.prior(spec, *operands)
    z = e[counts].mean(0) @ c.T
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    want = np.minimum(np.exp(z) / np.exp(z).sum(), 0.025)
    assert (want == 0.025).any()
    np.testing.assert_allclose(share, want, rtol=1e-5)
    np.testing.assert_allclose(sloped, want * (1 if softcap is None else 1 - (z / softcap) ** 2), rtol=1e-4)


def test_no_token_that_counts_is_no_trouble():
    spec = types.SimpleNamespace(classifier_layout="vd", softcap=None, filter_eps=0.1)
    share, _ = spread.prior(spec, jnp.ones((2, 3)), jnp.ones((20, 3)), jnp.zeros(2, bool))
    np.testing.assert_allclose(share, 0.05)
