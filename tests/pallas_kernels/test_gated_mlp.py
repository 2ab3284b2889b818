"""``gated_mlp``: the definition, what ``run`` leaves out, and the Hopper kernels interpreted, compiled and on a GPU."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_mlp import gated_mlp
from tests.aot import H200, compile_mosaic_kernels, needs_cuda_plugin

SHAPES = {"llama-1b": (2048, 8192), "smollm2-135m": (576, 1536), "llama-8b": (4096, 14336)}


def problem(batch=3, width=128, hidden=192, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    scales = {"x": 1, "gate_up": width**-0.5, "down": hidden**-0.5}
    shapes = {"x": (batch, width), "gate_up": (2, hidden, width), "down": (width, hidden)}
    made = {name: jnp.asarray(scales[name] * rng.normal(size=shapes[name]), dtype) for name in shapes}
    return {**made, "norm_scale": jnp.asarray(1 + 0.3 * rng.normal(size=width), dtype)}


def exact(x, norm_scale, gate_up, down, epsilon=1e-5):
    """In NumPy's float64."""
    x, norm_scale, gate_up, down = (np.asarray(v, np.float64) for v in (x, norm_scale, gate_up, down))
    n = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + epsilon) * norm_scale
    gate, up = n @ gate_up[0].T, n @ gate_up[1].T
    return x + (gate / (1 + np.exp(-gate)) * up) @ down.T


def assert_is_the_block(found, operands, epsilon=1e-5):
    """Sums of hundreds of float32 numbers: 2e-6 of the largest value. Of 16 bits: what is added to x and the result are
    rounded, by half of the dtype's step at most; roundings before the last product average out in its sum: two steps.
    """
    wanted = exact(**operands, epsilon=epsilon)
    step = 2e-6 if found.dtype == jnp.float32 else 2 * float(jnp.finfo(found.dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=step * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_output_is_that_of_the_definition(implementation, dtype):
    operands = problem(dtype=dtype)
    for run, epsilon in ((None, 1e-5), (jnp.bool_(True), 0.5)):
        assert_is_the_block(
            gated_mlp(**operands, run=run, epsilon=epsilon, implementation=implementation), operands, epsilon
        )


def test_run_is_data_and_where_it_is_false_x_comes_back():
    f = jax.jit(functools.partial(gated_mlp, implementation="xla"))
    operands = problem(dtype="bfloat16")
    assert_is_the_block(f(**operands, run=jnp.bool_(True)), operands)
    unread = operands | {name: jnp.full_like(operands[name], jnp.nan) for name in ("gate_up", "down")}
    np.testing.assert_array_equal(f(**unread, run=jnp.bool_(False)), operands["x"])
    assert f._cache_size() == 1
    hlo = f.lower(**operands, run=jnp.bool_(False)).compile().as_text()
    assert "conditional(" in hlo


@pytest.fixture
def kernels():
    """The module of the kernels, to be interpreted; shared memory that nothing has written is NaN."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX has no interpreter of Mosaic GPU kernels")
    from pallas_kernels.gated_mlp import mosaic_gpu

    jax.clear_caches()
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield mosaic_gpu
    jax.clear_caches()


# Batches below 8, of no multiple of 8, and of one; widths of several steps, that wrap around the ring; rows and steps
# as wide as for large matrices.
@pytest.mark.parametrize(
    ("batch", "width", "hidden", "dtype", "rows"),
    [
        (1, 128, 64, "bfloat16", 8),
        (5, 64, 128, "float16", 8),
        (16, 128, 128, "bfloat16", 8),
        (9, 320, 64, "bfloat16", 8),
        (2, 512, 128, "bfloat16", 64),
    ],
)
def test_interpreted_kernels_equal_the_definition(kernels, monkeypatch, batch, width, hidden, dtype, rows):
    monkeypatch.setattr(kernels, "_MOST_STAGES", 2)
    monkeypatch.setattr(kernels, "_ENOUGH", 1 if rows == 64 else kernels._ENOUGH)
    assert kernels.gate_up_split(batch, width, hidden).rows == rows
    operands = problem(batch, width, hidden, dtype)
    assert_is_the_block(kernels.block(**operands, run=None, epsilon=1e-5), operands)
    assert_is_the_block(kernels.block(**operands, run=jnp.bool_(True), epsilon=0.5), operands, 0.5)


def test_interpreted_kernels_return_at_once_where_run_is_false(kernels):
    """What they would have written stays as it was, NaN."""
    operands = problem(2, 64, 64, "bfloat16")
    out = kernels.block(**operands, run=jnp.bool_(False), epsilon=1e-5)
    np.testing.assert_array_equal(out, operands["x"])
    for run in (False, True):
        flag = [jnp.array([run])]
        x, norm_scale, gate_up, down = (operands[name] for name in ("x", "norm_scale", "gate_up", "down"))
        hidden = kernels._hidden(kernels.gate_up_split(2, 64, 64), 1e-5, x, norm_scale, gate_up, flag)
        parts = kernels._products(kernels.down_split(2, 64, 64), x, down, flag)
        assert (jnp.isnan(hidden) != run).all() and (jnp.isnan(parts) != run).all()


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_splits_cover_the_matrices_and_fill_the_device(name, batch):
    from pallas_kernels.gated_mlp import mosaic_gpu

    width, hidden = SHAPES[name]
    for split, rows, columns, tiles in (
        (mosaic_gpu.gate_up_split(batch, width, hidden), hidden, width, 2),
        (mosaic_gpu.down_split(batch, width, hidden), width, hidden, 1),
    ):
        assert rows % split.rows == 0 and columns % (split.depth * split.parts) == 0
        blocks = rows // split.rows * split.parts
        assert blocks >= 96 and split.stages <= columns // (split.depth * split.parts)
        # What 4.8 TB/s need to cover 0.9 microseconds of latency, or most of the matrix, is on its way.
        under_way = min(blocks, 2 * 132) * split.stages * tiles * split.rows * split.depth * 2
        assert under_way >= min(132 * 33 * 1024, 0.9 * 2 * tiles * rows * columns)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.zeros((3, 64))}, ValueError, r"x must be \[B, D\].*\(3, 64\)"),
        ({"x": jnp.zeros(128)}, ValueError, r"x must be \[B, D\]"),
        ({"norm_scale": jnp.zeros((1, 128))}, ValueError, "norm_scale"),
        ({"gate_up": jnp.zeros((192, 128))}, ValueError, r"gate_up \[2, F, D\]"),
        ({"down": jnp.zeros((192, 128))}, ValueError, r"down \[D, F\]"),
        ({"down": jnp.zeros((128, 192), jnp.bfloat16)}, TypeError, "floats alike"),
        ({"run": jnp.int32(1)}, ValueError, r"run must be a scalar bool, not int32 \(\)"),
        ({"run": jnp.ones(3, bool)}, ValueError, "run must be a scalar bool"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "needs an NVIDIA Hopper GPU"),
        ({"implementation": "triton"}, ValueError, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        gated_mlp(**{**problem(), **change})


# Prints the temporary memory and the number of XLA's kernels.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.gated_mlp import gated_mlp

target, shapes = sys.argv[1], json.loads(sys.argv[2])
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("x",))
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
op = lambda *operands, run=None: gated_mlp(*operands, run=run, implementation="mosaic_gpu")
found = {"temporary": [], "fusions": []}
for batch, width, hidden in shapes:
    operands = array(batch, width), array(width), array(2, hidden, width), array(width, hidden)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(op).lower(*operands, run=array(dtype=bool)).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    found["fusions"].append(entry.count(" fusion("))
    found["temporary"].append(compiled.memory_analysis().temp_size_in_bytes)
print(json.dumps(found))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
def test_compiles_for_hopper_without_spills(record_property, tmp_path):
    """Around the two kernels there is one of XLA, which adds. Memory: hidden values, and at most 8 parts of the sum.

    Registers: three thread blocks of 128 threads to a multiprocessor, which has 65,536.
    """
    shapes = [(batch, *shape) for shape in SHAPES.values() for batch in (1, 32)]
    found = compile_mosaic_kernels(COMPILE, H200, json.dumps(shapes), folder=tmp_path)
    record_property("found", found)
    assert found["fusions"] == [1] * len(shapes)
    for (batch, width, hidden), temporary in zip(shapes, found["temporary"], strict=True):
        assert temporary <= batch * (2 * hidden + 8 * 4 * width)
    assert found["spilled"] == 0 and len(found["registers"]) >= 2 * len(shapes) and max(found["registers"]) <= 168


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 5, 9, 32, 64])
@pytest.mark.parametrize("name", ["llama-1b", "smollm2-135m"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu_the_default_gives_the_definition(name, batch, dtype):
    """And twice the same, bit for bit; x where it does not run."""
    operands = problem(batch, *SHAPES[name], dtype)
    f = jax.jit(gated_mlp)
    found = f(**operands, run=jnp.bool_(True))
    assert_is_the_block(found, operands)
    np.testing.assert_array_equal(found, f(**operands))
    unread = operands | {name: jnp.full_like(operands[name], jnp.nan) for name in ("gate_up", "down")}
    np.testing.assert_array_equal(f(**unread, run=jnp.bool_(False)), operands["x"])
