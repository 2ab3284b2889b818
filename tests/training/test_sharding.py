import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from experiments.benchmarks.collectives import collectives
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, decoder_config
from jaxskip.optim import sophia
from jaxskip.training import (
    check_batch_size,
    make_mesh,
    make_optimizer,
    next_token_loss,
    optimizer_state_shardings,
    param_shardings,
)
from jaxskip.training import shard_batch as to_devices

pytestmark = pytest.mark.multidevice
RULES = ((r"layer/w", P("fsdp", "tensor")), (r"layer/b", P("tensor")))
PARAMS = {"layer": {"w": jnp.ones((8, 6)), "b": jnp.ones(6)}}


def test_one_size_may_be_left_to_the_devices():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(make_mesh().axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)])
def test_meshes_that_do_not_cover_the_devices_are_refused(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(*sizes)


def test_rules_decide_by_whole_path_and_drop_axes_that_do_not_divide():
    specs = jax.tree.map(lambda s: s.spec, param_shardings(PARAMS, make_mesh(1, 4, 2), RULES))
    assert specs["layer"]["w"] == P("fsdp", "tensor")
    specs = jax.tree.map(lambda s: s.spec, param_shardings(PARAMS, make_mesh(1, 2, 4), RULES))
    assert specs["layer"]["w"] == P("fsdp", None)  # 6 columns over 4 devices: replicated along that axis
    with pytest.raises(ValueError, match="no partition rule matches parameter 'layer/b'"):
        param_shardings(PARAMS, make_mesh(), RULES[:1])
    with pytest.raises(ValueError, match="has shape"):
        param_shardings(PARAMS, make_mesh(), ((r".*", P("fsdp", "tensor")),))


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(1e-3), make_optimizer("lion", 1e-3), sophia(1e-3), optax.MultiSteps(optax.adam(1e-3), 2)],
    ids=["adamw", "lion", "sophia", "multisteps"],
)
def test_optimizer_state_lies_like_its_parameters(tx):
    mesh = make_mesh(1, 4, 2)
    shardings = param_shardings(PARAMS, mesh, RULES)
    state = optimizer_state_shardings(tx, PARAMS, shardings, mesh)
    leaves = zip(jax.tree.leaves(jax.eval_shape(tx.init, PARAMS)), jax.tree.leaves(state), strict=True)
    specs = {leaf.shape: sharding.spec for leaf, sharding in leaves}
    assert specs[8, 6] == P("fsdp", "tensor") and specs[6,] == P("tensor") and specs[()] == P()


def test_batches_that_do_not_split_are_refused():
    mesh = make_mesh(2, 2, 2)
    check_batch_size(8, mesh, parts=2)
    for size, parts in ((6, 1), (4, 2), (0, 1)):
        with pytest.raises(ValueError, match=f"a batch of {size} does not split"):
            check_batch_size(size, mesh, parts=parts)


def test_batch_rows_go_to_the_batch_axes_in_order():
    rows = np.arange(16).reshape(8, 2)
    placed = to_devices({"x": rows}, make_mesh(2, 2, 2))["x"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding.spec == P(("data", "fsdp")) and placed.addressable_shards[0].data.shape == (2, 2)


def test_the_tensor_axis_splits_matrices_and_not_positions():
    """Partial products are summed, four times a layer; gathering matrices in the loop over layers would be FSDP."""
    model = Decoder(decoder_config("gpt2-tiny", dtype=jnp.float32))
    tokens = jnp.zeros((2, 64), jnp.int32)
    mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    shardings = param_shardings(params, mesh, DECODER_PARTITION_RULES)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(next_token_loss(model), has_aux=True), out_shardings=(shardings, {}))
        program = gradient.lower(params, {"inputs": tokens, "targets": tokens}, jax.random.key(0)).compile()
    found = collectives(program.as_text())
    assert found["all-reduce"]["runs"] >= 4 * model.config.num_layers
    assert found["all-gather"]["runs"] == found["all-gather"]["program"]
