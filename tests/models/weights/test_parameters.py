"""Where parameters lie in files, and reading them onto meshes without whole copies."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxskip.models import DECODER_PARTITION_RULES, DecoderConfig
from jaxskip.models.weights import load, save_hugging_face
from jaxskip.models.weights.hugging_face import HuggingFaceFolder, open_model
from jaxskip.models.weights.parameters import Part, TensorInfo, parameter_shapes, read_parameters
from jaxskip.training import make_mesh, param_shardings

TINY = {"vocab_size": 96, "context_length": 16, "num_layers": 2, "num_heads": 4, "embed_dim": 32}
LLAMA = DecoderConfig(
    **TINY, num_kv_heads=2, mlp_dim=48, position="rotary", norm="rmsnorm", activation="swiglu", tie_embeddings=False
)
CONFIGS = {"llama": LLAMA, "gpt2": DecoderConfig(**TINY, use_bias=True)}


class Recording:
    """A folder that notes how many numbers each read gave."""

    def __init__(self, folder: HuggingFaceFolder):
        self.folder, self.path, self.tensors, self.counts = folder, folder.path, folder.tensors, []

    def read(self, name, index):
        block = self.folder.read(name, index)
        self.counts.append(block.size)
        return block


class OneTensor:
    path = "memory"

    def __init__(self, array):
        self.array, self.tensors = array, {"w": TensorInfo(array.shape, "F32")}

    def read(self, name, index):
        assert name == "w"
        return self.array[tuple(index)]


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    config, folder = CONFIGS[request.param], tmp_path_factory.mktemp("model")
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), parameter_shapes(config))
    save_hugging_face(folder, config, params)
    return folder, params


@pytest.mark.multidevice
@pytest.mark.parametrize("axes", [(1, 8, 1), (1, 2, 4), (2, 2, 2), (8, 1, 1)], ids=str)
def test_each_shard_is_read_alone_and_once(saved, axes):
    folder, params = saved
    mesh = make_mesh(*axes)
    file, config, parts = open_model(folder, jnp.float32)
    recording = Recording(file)
    loaded = read_parameters(recording, parts, config, mesh, DECODER_PARTITION_RULES)

    shardings = param_shardings(params, mesh, DECODER_PARTITION_RULES)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings
    # A copy on several devices is read once, and a read is never more than one layer of one shard.
    assert sum(recording.counts) == sum(leaf.size for leaf in jax.tree.leaves(params))
    shards = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), params, shardings)
    layers = {name: 2 if name == "layers" else 1 for name in shards}
    largest = max(max(jax.tree.leaves(shards[name])) // layers[name] for name in shards)
    assert max(recording.counts) == largest
    if axes[0] == 1:
        assert largest <= 96 * 32 // 4, "some matrix is not split"


@pytest.mark.multidevice
def test_load_onto_a_mesh(saved):
    folder, params = saved
    mesh = make_mesh(2, 2, 2)
    loaded = load(folder, mesh=mesh, dtype=jnp.bfloat16)[1]
    assert loaded["layers"]["mlp"]["up"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), loaded, params)
    replicated = load(folder, mesh=mesh, rules=((r".*", P()),))[1]
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(replicated))
    with pytest.raises(ValueError, match="no partition rule matches parameter"):
        load(folder, mesh=mesh, rules=())


@given(
    st.integers(1, 3),
    st.sampled_from([2, 4, 6]),
    st.sampled_from(["plain", "transposed", "chunk", "interleaved"]),
    st.data(),
)
@settings(deadline=None, max_examples=25)
def test_a_block_of_a_part_is_that_block_of_the_parameter(heads, width, kind, data):
    parameter = np.random.default_rng(0).normal(size=(5, heads * width))
    if kind == "chunk":
        others = np.zeros_like(parameter)
        part, stored = Part("w", chunk=(1, 3)), np.concatenate([others, parameter, others], axis=1)
    elif kind == "interleaved":
        pairs = parameter.T.reshape(heads, 2, width // 2, 5).swapaxes(1, 2)
        part, stored = Part("w", True, interleaved_heads=heads), pairs.reshape(heads * width, 5)
    else:
        transposed = kind == "transposed"
        part, stored = Part("w", transposed), parameter.T if transposed else parameter
    assert part.file_shape(parameter.shape) == stored.shape
    bounds = tuple(
        tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in parameter.shape
    )
    block = part.read(OneTensor(stored), 0, parameter.shape, bounds)
    np.testing.assert_array_equal(block, parameter[tuple(slice(*bound) for bound in bounds)])
