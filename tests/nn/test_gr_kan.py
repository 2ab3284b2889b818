import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxskip.nn import GRKAN, GroupRational, fit_rational, gr_kan, rational_decay_mask, variance_gain

GELU = gr_kan._FUNCTIONS["gelu"]
GRID = np.linspace(-3, 3, 6001)


def error(a, b, fn):
    with jax.ensure_compile_time_eval():
        return np.abs(gr_kan.rational(GRID, a, b) - np.asarray(fn(jnp.asarray(GRID, jnp.float32)))).max()


@pytest.mark.parametrize("name", ["swish", "gelu"])
def test_the_tables_are_what_the_fit_finds(name):
    """The optimum is flat in the small coefficients: 1e-3 of the values that count, 1e-5 for the rest."""
    found = fit_rational(gr_kan._FUNCTIONS[name])
    for ours, stored in zip(found, gr_kan.initial_coefficients(name), strict=True):
        np.testing.assert_allclose(ours, stored, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "fn", "bound"),
    [("identity", lambda x: x, 1e-6), ("swish", jax.nn.silu, 2e-6), ("gelu", GELU, 5e-3), (jnp.tanh, jnp.tanh, 1e-3)],
)
def test_initial_coefficients_give_their_function(name, fn, bound):
    """The bound of gelu is the card's; float32 is 2e-7."""
    assert error(*gr_kan.initial_coefficients(name), fn) < bound


def test_the_repositorys_gelu_is_a_trap():
    assert error(*gr_kan.initial_coefficients("gelu_repo"), GELU) > 1


def test_the_fit_is_as_near_as_the_authors_own():
    """The authors' own coefficients for swish, in the right form: ours are no worse in least squares."""
    theirs = (3.054879741e-7, 0.50000078537, 0.24999783423, 0.05326628273, 0.00580303457, 0.00027519610)
    below = (-4.11155e-6, 0.10652899335, -1.26900e-6, 0.00055023313)
    silu = GRID / (1 + np.exp(-GRID))

    def squares(a, b):
        return ((gr_kan.rational(GRID, a, b) - silu) ** 2).mean()

    assert squares(*gr_kan.initial_coefficients("swish")) <= 1.05 * squares(theirs, below)


@pytest.mark.parametrize(("name", "gain"), [("identity", 1.0), ("gelu", 2.3568), ("swish", 2.807)])
def test_gains_keep_the_variance(name, gain):
    """1 % of the paper's numbers (swish: of the card's, with E[F^2]; the paper's 2.8178 is within it too)."""
    assert abs(variance_gain(name) / gain - 1) < 0.01
    x = np.random.default_rng(0).normal(size=10**6)
    squares = (gr_kan.rational(x, *gr_kan.initial_coefficients(name)) ** 2).mean()
    assert abs(squares * variance_gain(name) - 1) < 0.01


def test_variance_preserving_weights_keep_activations_in_size():
    """x ~ N(0, 1) through both maps of a wide layer: variance 1 within the noise of 512 channels."""
    layer = GRKAN(512, 512, act_init=("gelu", "swish"))
    x = jax.random.normal(jax.random.key(0), (512, 512))
    params = layer.init(jax.random.key(1), x)
    assert 0.85 < layer.apply(params, x).var() < 1.15
    small = GRKAN(512, 512, kernel_init="trunc_normal_002").init(jax.random.key(1), x)["params"]["fc1"]["kernel"]
    assert abs(small.std() - 0.02) < 1e-3 and jnp.abs(small).max() < 0.2


def test_the_identity_is_exact_and_its_denominator_learns():
    layer = GroupRational()
    x = jax.random.normal(jax.random.key(0), (32, 16))
    params = layer.init(jax.random.key(1), x)
    assert (layer.apply(params, x) == x).all()
    grads = jax.grad(lambda p: (layer.apply(p, x) ** 2).sum())(params)["params"]
    assert grads["denominator"].all() and sum(leaf.size for leaf in jax.tree.leaves(params)) == 38


def test_groups_and_dtypes():
    layer = GroupRational(4, share_numerator=False, initial="gelu", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = jnp.linspace(-2, 2, 24).reshape(2, 12)
    params = layer.init(jax.random.key(0), x)
    assert jax.tree.map(lambda p: (p.shape, p.dtype.name), params["params"]) == {
        "numerator": ((4, 6), "bfloat16"), "denominator": ((4, 4), "bfloat16")
    }  # fmt: skip
    y = layer.apply(params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), GELU(x), atol=0.03)


def test_other_degrees_are_fitted():
    layer = GroupRational(2, initial="swish", degree=(3, 2))
    x = jnp.linspace(-2, 2, 24).reshape(2, 12)
    np.testing.assert_allclose(layer.apply(layer.init(jax.random.key(0), x), x), jax.nn.silu(x), atol=0.02)


def test_layers_stack_under_scan_and_are_checkpointed():
    """As a stack of layers is run: one scan, coefficients on a leading axis; the same numbers as layer by layer."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.remat(GRKAN)(16, 32, num_groups=4)(x), None

    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    x = jax.random.normal(jax.random.key(0), (5, 16))
    params = stack.init(jax.random.key(1), x, None)
    (y, _), one = stack.apply(params, x, None), x
    for i in range(3):
        one, _ = Step().apply(jax.tree.map(lambda p, i=i: p[i], params), one, None)
    np.testing.assert_allclose(y, one, rtol=1e-5, atol=1e-6)


def test_dropout_needs_its_stream_and_changes_the_result():
    layer = GRKAN(8, 16, dropout_rate=0.5)
    x = jnp.ones((4, 8))
    params = layer.init(jax.random.key(0), x)
    dropped = layer.apply(params, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    assert (dropped != layer.apply(params, x)).any()


def test_decay_leaves_coefficients_alone():
    params = GRKAN(8, 16).init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    tx = optax.add_decayed_weights(0.1, mask=rational_decay_mask)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = jax.tree.map(lambda u: bool(u.any()), updates)
    assert moved == {name: {"bias": False, "kernel": True} for name in ("fc1", "fc2")} | {
        name: {"numerator": False, "denominator": False} for name in ("act1", "act2")
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupRational(initial="relu6"), "activation is 'relu6'; it must be one of"),
        (lambda: GroupRational(initial="gelu_repo", degree=(3, 2)), r"has degree \(5, 4\)"),
        (lambda: GroupRational(7), "do not split into 7 groups"),
        (lambda: GRKAN(16, 16, kernel_init="zeros"), "kernel_init is 'zeros'"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(jax.random.key(0), jnp.ones((1, 16)))


def test_a_fit_of_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        fit_rational(jnp.log)
    with pytest.raises(ValueError, match="low < high"):
        fit_rational(jnp.tanh, interval=(1.0, 1.0))
