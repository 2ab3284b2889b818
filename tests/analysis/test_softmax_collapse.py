import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.analysis import nlm_alignment, softmax_collapse_fraction, zero_loss_fraction
from tests.losses.test_stablemax import x64


def test_collapsed_in_float32_and_not_in_float64():
    """Card test 7."""
    z = jnp.array([[30.0, 0.0, 0.0, 0.0]])
    assert float(softmax_collapse_fraction(z)) == 1
    with x64():
        assert float(softmax_collapse_fraction(z, jnp.float64)) == 0
    with pytest.raises(ValueError, match="jax_enable_x64"):
        softmax_collapse_fraction(z, jnp.float64)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("dtype", "margins"), [(jnp.bfloat16, (5.0, 6.5)), (jnp.float16, (7.0, 8.5)), (jnp.float32, (16.0, 17.5))]
)
def test_collapse_is_decided_in_the_dtype_that_is_asked_for(jit, dtype, margins):
    """Trap 8: left alone, XLA keeps the sum in float32, and 16 bits would seem as safe."""
    f = lambda z: softmax_collapse_fraction(z, dtype)  # noqa: E731
    f = jax.jit(f) if jit else f
    assert [float(f(jnp.array([[m, 0.0]]))) for m in margins] == [0.0, 1.0]
    both = jnp.array([[m, 0.0] for m in margins])
    assert float(f(both)) == 0.5


def test_zero_losses_are_the_collapsed_ones_that_are_right():
    z = jnp.array([[30.0, 0.0], [30.0, 0.0], [1.0, 0.0]])
    assert float(zero_loss_fraction(z, jnp.array([0, 1, 0]))) == pytest.approx(1 / 3)
    assert float(softmax_collapse_fraction(z)) == pytest.approx(2 / 3)


def test_alignment_is_the_cosine_with_minus_the_gradient():
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=(2, 5, 4))
    out = nlm_alignment({"a": w, "b": jnp.ones(3)}, {"a": g, "b": -2 * jnp.ones(3)})
    np.testing.assert_allclose(out["a"], -np.sum(w * g) / np.linalg.norm(w) / np.linalg.norm(g), rtol=1e-5)
    np.testing.assert_allclose(out["b"], 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_alignment_at_any_scale(scale):
    """Gradients of a trained net are far below the square root of the smallest float."""
    w = jnp.array([3.0, 4.0])
    assert float(nlm_alignment(w, -scale * w)) == pytest.approx(1.0 if scale else 0.0)
    assert nlm_alignment(w.astype(jnp.bfloat16), w.astype(jnp.bfloat16)).dtype == jnp.float32


def test_only_the_slope_of_the_loss_counts():
    """A linear two-class model past perfect accuracy: descent lengthens w, and the cosine says so."""
    x = jnp.array([[1.0, 0.2], [-1.0, 0.1]])
    y = jnp.array([1.0, -1.0])
    w = jnp.array([5.0, 0.0])
    grad = jax.grad(lambda w: jnp.mean(jnp.log1p(jnp.exp(-y * (x @ w)))))(w)
    assert float(nlm_alignment(w, grad)) > 0.95
