import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.models import KAT, kat, kat_base, kat_small, kat_tiny

TINY = {"num_classes": 3, "image_size": 8, "patch_size": 4, "embed_dim": 16, "num_layers": 2, "num_heads": 2}
PICTURES = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))


def parameters(model, side=224):
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, side, side, 3))), jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("make", "size"), [(kat_tiny, 5_718_328), (kat_small, 22_051_576), (kat_base, 86_568_568)], ids=["T", "S", "B"]
)
def test_published_sizes(make, size):
    """KAT-T's count is the authors'; S and B are 22.1M and 86.6M, each 912 coefficients above its ViT."""
    assert parameters(make()) == size
    assert parameters(make(mlp="gelu")) == size - 912


@pytest.mark.parametrize("mlp", ["gr_kan", "gelu"])
def test_it_is_finite_and_every_parameter_has_a_gradient(mlp):
    """But for key biases, which shift all scores of a query alike."""
    model = KAT(**TINY, mlp=mlp, num_groups=4)
    params = jax.jit(model.init)(jax.random.key(1), PICTURES)

    def loss(params):
        return (model.apply(params, PICTURES) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(params)["params"]
    for name, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(leaf).all() and leaf.any(), name


def test_half_precision_is_near():
    model = KAT(**TINY, num_groups=4)
    params = jax.jit(model.init)(jax.random.key(1), PICTURES)
    full, half = model.apply(params, PICTURES), KAT(**TINY, num_groups=4, dtype=jnp.bfloat16).apply(params, PICTURES)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.05)


def test_attention_starts_near_the_identity():
    """Query times key of both heads together: 0.7 I and noise of deviation 0.7 / sqrt(D) in each head's share; value
    times output: 0.4 U - 0.4 I exactly, up to float32."""
    width = 64
    layer = kat.Attention(1, True, jnp.float32, jnp.float32)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 2, width)))["params"]
    query, key, value = jnp.split(params["qkv"]["kernel"], 3, axis=1)
    for product, identity, noise in ((query @ key.T, 0.7, 0.7), (value @ params["out"]["kernel"], -0.4, 0.4)):
        assert abs(jnp.diag(product).mean() - identity) < 3 * noise / width
        rest = product - identity * jnp.eye(width)
        assert abs(rest.std() * width**0.5 / noise - 1) < 0.1
    again = layer.apply({"params": params}, jnp.ones((1, 2, width)))
    assert again.shape == (1, 2, width)


def test_drop_path_leaves_out_whole_branches_of_a_picture():
    """With a rate of almost 1 the last block adds nothing for most pictures: as a network without it."""
    model = KAT(**TINY, num_groups=4, drop_path_rate=0.999)
    params = jax.jit(model.init)(jax.random.key(1), PICTURES)
    dropped = model.apply(params, PICTURES, deterministic=False, rngs={"dropout": jax.random.key(0)})
    shorter = KAT(**TINY | {"num_layers": 1}, num_groups=4).apply(params, PICTURES)
    np.testing.assert_allclose(dropped, shorter, rtol=1e-5, atol=1e-6)
    assert jnp.abs(model.apply(params, PICTURES) - shorter).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 3}, "image_size 8 must be a multiple of patch_size 3"),
        ({"num_heads": 3}, "embed_dim 16 of num_heads 3"),
        ({"image_size": 16}, r"pictures must be \[B, 16, 16, C\], got \(4, 8, 8, 1\)"),
        ({"mlp": "swiglu"}, "mlp is 'swiglu'"),
        ({"attention_init": "zeros"}, "attention_init is 'zeros'"),
        ({"num_groups": 5}, "do not split into 5 groups"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KAT(**TINY | change).init(jax.random.key(0), PICTURES)
