import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.skipping import Sampling, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.05, 0.3, 0.15]]))


def shares(sampling):
    draw = jax.jit(lambda key: sample(LOGITS, key, sampling)[0])
    return np.bincount(jax.vmap(draw)(jax.random.split(jax.random.key(0), 20_000)), minlength=4) / 20_000


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(0.0), [1, 0, 0, 0]),
        (Sampling(1.0), [0.5, 0.05, 0.3, 0.15]),
        (Sampling(0.5), np.array([0.25, 0.0025, 0.09, 0.0225]) / 0.365),
        (Sampling(1.0, top_k=2), [0.625, 0, 0.375, 0]),
        (Sampling(1.0, top_k=9), [0.5, 0.05, 0.3, 0.15]),
        (Sampling(1.0, top_p=0.45), [1, 0, 0, 0]),
        (Sampling(1.0, top_p=0.7), [0.625, 0, 0.375, 0]),
        (Sampling(1.0, top_p=0.9), np.array([0.5, 0, 0.3, 0.15]) / 0.95),
        (Sampling(1.0, top_k=3, top_p=0.6), [0.625, 0, 0.375, 0]),
    ],
    ids=str,
)
def test_frequencies(sampling, expected):
    """20,000 draws: four standard deviations of a share are at most 0.0142."""
    np.testing.assert_allclose(shares(sampling), expected, atol=0.0142)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
        Sampling(**bad)
