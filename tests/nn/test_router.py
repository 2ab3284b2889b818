import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.nn import init_routers, keep_probability

ROUTERS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32), "bias": jnp.arange(3.0)}


@pytest.mark.parametrize("pool", ["mean", "max", "last"])
def test_pooled_logits(pool):
    h = np.random.default_rng(1).normal(size=(2, 5, 8)) * 7
    seen = np.array([[1, 1, 1, 0, 0], [0, 1, 0, 1, 0]], bool)
    unit = h / np.sqrt((h**2).mean(-1, keepdims=True))
    logits = unit @ np.asarray(ROUTERS["kernel"][1], np.float64)
    pooled = {
        "mean": [row[s].mean() for row, s in zip(logits, seen, strict=True)],
        "max": [row[s].max() for row, s in zip(logits, seen, strict=True)],
        "last": [logits[0, 2], logits[1, 3]],
    }[pool]
    found = keep_probability(ROUTERS, 1, jnp.asarray(h, jnp.float32), jnp.asarray(seen), pool=pool)
    # float32 sums over 8 features
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.array(pooled) - 1)), rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), left=st.integers(0, 4), pool=st.sampled_from(["mean", "max", "last"]))
def test_padding_plays_no_part_wherever_it_lies(seed, left, pool):
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(1, 4, 8)).astype(np.float32)
    padded = rng.normal(size=(1, 8, 8)).astype(np.float32) * 50
    padded[:, left : left + 4] = h
    seen = np.zeros((1, 8), bool)
    seen[:, left : left + 4] = True
    alone = keep_probability(ROUTERS, 2, jnp.asarray(h), jnp.ones((1, 4), bool), pool=pool)
    found = keep_probability(ROUTERS, 2, jnp.asarray(padded), jnp.asarray(seen), pool=pool)
    # A mean over 4 of 8 numbers adds zeros: in float32 the order of the sum may differ.
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_layers_may_be_traced_and_states_16_bit():
    h = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 8)), jnp.bfloat16)
    traced = jax.jit(lambda layer: keep_probability(ROUTERS, layer, h, jnp.ones((2, 3), bool)))(2)
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, keep_probability(ROUTERS, 2, h, jnp.ones((2, 3), bool)), rtol=1e-5)  # float32


def test_fresh_routers_keep_every_layer():
    routers = init_routers(jax.random.key(0), 3, 8)
    rho = keep_probability(routers, 0, jax.random.normal(jax.random.key(1), (4, 6, 8)), jnp.ones((4, 6), bool))
    assert (rho > 0.85).all() and (rho < 0.9).all()
    assert len(np.unique(routers["kernel"])) == 24


def test_an_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="pool is 'sum'"):
        keep_probability(ROUTERS, 0, jnp.ones((1, 1, 8)), jnp.ones((1, 1), bool), pool="sum")
