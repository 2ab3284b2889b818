import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.losses import LinearCrossEntropy, linear_cross_entropy, sampled_linear_cross_entropy
from jaxskip.training import make_mesh

keys = jax.random.split(jax.random.key(0), 3)
E = jax.random.normal(keys[0], (8, 6, 16))
C = jax.random.normal(keys[1], (40, 16))
LABELS = jnp.where(jax.random.uniform(keys[2], (8, 6)) < 0.2, -100, jax.random.randint(keys[2], (8, 6), 0, 40))


def materialised(e, c, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(e @ c.T, jnp.maximum(labels, 0))
    return jnp.sum(jnp.where(labels >= 0, losses, 0)) / jnp.sum(labels >= 0)


@pytest.mark.multidevice
@pytest.mark.parametrize("axes", [(1, 1, 1), (8, 1, 1), (2, 2, 2)], ids=str)
def test_value_and_gradients_are_the_materialised_ones_on_every_mesh(axes):
    """Float32 sums in another order: 1e-5 relative."""
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    expected, (de, dc) = jax.value_and_grad(materialised, (0, 1))(E, C, LABELS)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        e, labels = jax.device_put((E, LABELS), rows)
        c = jax.device_put(C, NamedSharding(mesh, P("tensor", "fsdp")))
        value, grads = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))(e, c, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads[0], de, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[1], dc, rtol=1e-4, atol=1e-7)


@pytest.mark.multidevice
@pytest.mark.parametrize("layout", ["vd", "dv"])
def test_a_classifier_split_along_the_vocabulary_stays_split(layout):
    """Value and gradients as before, and no device ever holds the whole classifier. Tolerances as above."""
    mesh = make_mesh(2, 1, 4)
    expected, (de, dc) = jax.value_and_grad(materialised, (0, 1))(E, C, LABELS)
    spec = P("tensor", None) if layout == "vd" else P(None, "tensor")
    with jax.set_mesh(mesh):
        e, labels = jax.device_put((E, LABELS), NamedSharding(mesh, P("data")))
        c = jax.device_put(C if layout == "vd" else C.T, NamedSharding(mesh, spec))
        loss = functools.partial(linear_cross_entropy, vocab_axis_name="tensor", classifier_layout=layout)
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(e, c, labels).compile()
        value, grads = compiled(e, c, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads[0], de, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(grads[1] if layout == "vd" else grads[1].T, dc, rtol=1e-4, atol=1e-7)
    assert "all-gather" not in compiled.as_text()
    assert grads[1].sharding.is_equivalent_to(c.sharding, 2)


def test_a_vocabulary_axis_that_is_not_there():
    with pytest.raises(ValueError, match="vocab_axis_name='tensor' is no axis"):
        linear_cross_entropy(E, C, LABELS, vocab_axis_name="tensor")


def test_the_layer_owns_its_classifier_or_takes_a_tied_one():
    layer = LinearCrossEntropy(vocabulary=40, options={"z_loss": 1e-3})
    params = layer.init(jax.random.key(0), E, LABELS)
    own = layer.apply(params, E, LABELS)
    tied = LinearCrossEntropy(options={"z_loss": 1e-3}).apply({}, E, LABELS, params["params"]["classifier"])
    assert own == tied == linear_cross_entropy(E, params["params"]["classifier"], LABELS, z_loss=1e-3)
    with pytest.raises(ValueError, match="vocabulary=40 or a classifier"):
        layer.apply(params, E, LABELS, C)
    with pytest.raises(ValueError, match="not given"):
        LinearCrossEntropy().apply({}, E, LABELS)


@pytest.mark.multidevice
def test_the_gradient_of_the_classifier_is_reduced_once_outside_the_loop_over_tiles():
    mesh = make_mesh(8, 1, 1)
    with jax.set_mesh(mesh):
        e, labels = jax.device_put((E, LABELS), NamedSharding(mesh, P(("data", "fsdp"))))
        c = jax.device_put(C, NamedSharding(mesh, P()))
        loss = lambda e, c, labels: linear_cross_entropy(e, c, labels, block_sizes=(2, 40))  # noqa: E731
        text = jax.jit(jax.grad(loss, 1)).lower(e, c, labels).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    everywhere = [line for line in text.splitlines() if " all-reduce(" in line and "[40,16]" in line]
    assert "while(" in entry and len(everywhere) == 1 and everywhere[0] in entry


@pytest.mark.multidevice
def test_labels_are_drawn_alike_on_every_mesh():
    mask = jnp.arange(48).reshape(8, 6) % 5 > 0
    key = jax.random.key(7)
    gradient = jax.value_and_grad(lambda c, e, mask: sampled_linear_cross_entropy(key, e, c, mask))
    expected, expected_grad = jax.jit(gradient)(C, E, mask)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        e, mask = jax.device_put((E, mask), NamedSharding(mesh, P(("data", "fsdp"))))
        value, grad = jax.jit(gradient)(jax.device_put(C, NamedSharding(mesh, P())), e, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-7)


def test_sum_is_mean_times_targets_and_none_is_refused():
    total = linear_cross_entropy(E, C, LABELS, reduction="sum")
    np.testing.assert_allclose(total / (LABELS >= 0).sum(), linear_cross_entropy(E, C, LABELS), rtol=1e-6)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        linear_cross_entropy(E, C, LABELS, reduction="none")


@pytest.mark.multidevice
def test_tokens_that_do_not_split_are_refused():
    with jax.set_mesh(make_mesh(8, 1, 1)), pytest.raises(ValueError, match="axis 0 of embeddings"):
        linear_cross_entropy(E[:6], C, LABELS[:6])
    with jax.set_mesh(make_mesh(2, 1, 4)), pytest.raises(ValueError, match="axis 1 of embeddings"):
        linear_cross_entropy(E, C, LABELS)
