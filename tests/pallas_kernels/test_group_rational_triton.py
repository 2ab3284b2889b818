"""The Triton kernel of the group rational: in Triton's interpreter, what it compiles to, and on a GPU."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Target
from pallas_kernels.group_rational import group_rational, triton
from pallas_kernels.group_rational.reference import Spec
from tests.aot import A100, GPU, L4, T4, compile_in_a_process, needs_cuda_plugin
from tests.pallas_kernels.test_group_rational import CASES, assert_formulas, both_passes, problem
from tests.pallas_kernels.test_triton import gpu

# Runs the public operation with the kernel in Triton's interpreter, on NumPy arrays that look like PyTorch's to it.
INTERPRETED = """
import functools, json, sys, types
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels import dispatch, jax_triton_call
from pallas_kernels.group_rational import group_rational
from tests.pallas_kernels.test_group_rational import CASES, assert_formulas, both_passes, problem

class Memory:
    def __init__(self, array):
        self.array, self.dtype = array, array.dtype
    data_ptr = lambda self: self.array.ctypes.data
    untyped_storage = cpu = lambda self: self
    new_empty = lambda self, *_, **__: Memory(self.array)
    set_ = copy_ = lambda self, *_: None
    storage_offset = size = stride = lambda self: 0

def triton_call(*arrays, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
    def run(*arrays):
        outputs = [np.full(x.shape, 77, x.dtype) for x in out_shape]
        kernel[grid](*(Memory(np.array(x)) for x in arrays), *map(Memory, outputs), **constants)
        return outputs
    return jax.pure_callback(run, out_shape, *arrays)

sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
jax_triton_call.missing = lambda: None
dispatch.target = lambda: dispatch.Target("gpu", (7, 5))
op = functools.partial(group_rational, implementation="triton")
done = []
for name, case in CASES.items():
    for dtype in ("float32", "float16", "bfloat16"):
        arguments = problem(*case, dtype)
        assert_formulas(both_passes(op, *arguments), *arguments)
        done.append(name)
arguments = problem((70, 24), (1, 8), (5, 4))
assert_formulas(both_passes(functools.partial(op, block_sizes=(16, 8)), *arguments), *arguments)
x, a, b, g = arguments
mapped = jax.vmap(lambda x: both_passes(op, x, a, b, g))(jnp.stack([x, x + 1]))
assert_formulas([value[1] for value in mapped], x + 1, a, b, g)
print(json.dumps(done))
"""


@pytest.mark.slow
def test_interpreted_kernel_gives_the_formulas():
    pytest.importorskip("triton")
    done = compile_in_a_process(INTERPRETED, environment={"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"})
    assert len(done) == 3 * len(CASES)


def test_what_it_needs():
    for capability in (None, (7, 0), (10, 0)):
        assert "compute capability 7.5 to 9.0" in str(
            triton.unavailable(jnp.dtype("float32"), Target("gpu", capability))
        )
    assert "not float64" in str(triton.unavailable(jnp.dtype("float64"), Target("gpu", (8, 0))))


def test_tiles():
    def of(block_sizes, channels=768):
        return triton.tiles(Spec("triton", Target("gpu", (8, 0)), (5, 4), block_sizes), channels)

    assert of(None) == (4, 128) and of(None, 24) == (16, 32) and of(None, 1) == (512, 1)
    assert of((8, 64)) == (8, 64)
    for block_sizes in ((6, 64), (4, 24), (4, 16), (64, 64)):
        with pytest.raises(ValueError, match=re.escape(str(block_sizes)) + ".*powers of two, of 128 to 2048 elements"):
            of(block_sizes)


# Compiles both passes for KAT-B's activation and for a small one, and lists what Triton made of the kernel.
COMPILED = """
import json, os, re, subprocess, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
import jax_triton.triton_lib as lib, triton as compiler
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.dispatch import Target
from pallas_kernels.group_rational import reference, triton

target, major, minor, dtype = sys.argv[1:]
kernels = []
compile_kernel = lib.compile_ttir_inplace

def listed(*arguments):
    result = compile_kernel(*arguments)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.binary)
        file.flush()
        ptxas = os.path.join(os.path.dirname(compiler.__file__), "backends", "nvidia", "bin", "ptxas")
        command = [ptxas, "-v", f"--gpu-name=sm_{major}{minor}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels.append({"spilled": int(re.search(r"(\\d+) bytes spill stores", said)[1]),
        "registers": int(re.search(r"Used (\\d+) registers", said)[1]), "atomics": "atom." in result.binary})
    return result

lib.compile_ttir_inplace = listed
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("data",))
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
temporary = []
for shape, degree in (((256, 197, 768), (5, 4)), ((33, 10), (7, 6))):
    spec = reference.Spec("triton", Target("gpu", (int(major), int(minor))), degree, None)
    x, table = array(shape, dtype), array((sum(degree) + 1, shape[-1]), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        for lowered in (triton.forward.lower(spec, x, table), triton.backward.lower(spec, x, table, x)):
            temporary.append(lowered.compile().memory_analysis().temp_size_in_bytes)
print(json.dumps({"temporary": temporary, "kernels": kernels}))
"""


@pytest.mark.gpu_aot
@needs_cuda_plugin
@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="needs jax-triton")
@pytest.mark.parametrize(
    ("target", "capability", "dtype"),
    [(T4, "75", "float16"), (T4, "75", "bfloat16"), (A100, "80", "bfloat16"), (A100, "80", "float32"),
     (L4, "89", "float16")],
    ids=["T4-f16", "T4-bf16", "A100-bf16", "A100-f32", "L4-f16"],
)  # fmt: skip
def test_compiles_without_spills_or_atomics(target, capability, dtype, record_property):
    """Memory: what the programs found, 10 numbers a channel from at most 2048 / 6 of them, and 10 KB of XLA's."""
    found = compile_in_a_process(COMPILED, target, *capability, dtype, environment=GPU)
    record_property("found", found)
    print(found)
    assert len(found["kernels"]) == 4
    assert not any(kernel["spilled"] or kernel["atomics"] for kernel in found["kernels"])
    forward, backward, *_ = found["temporary"]
    assert forward < 10_000 and backward <= 4 * 10 * 768 * (2048 // 6) + 10_000


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_the_kernel_gives_the_formulas(case, dtype):
    if reason := triton.unavailable(jnp.dtype(dtype), dispatch.target()):
        pytest.skip(reason)
    arguments = problem(*CASES[case], dtype)
    op = functools.partial(group_rational, implementation="triton")
    got, again = both_passes(op, *arguments), both_passes(op, *arguments)
    assert_formulas(got, *arguments)
    assert all((first == second).all() for first, second in zip(got, again, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is installed")
@pytest.mark.parametrize("device", ["NVIDIA A100-SXM4-40GB", "Tesla T4"])
def test_without_jax_triton_the_next_implementation_is_taken(device):
    x, a, b, _ = problem((4, 8), (1, 8), (5, 4))
    with gpu(device):
        with pytest.raises(NotImplementedError, match=r"jax-triton 0\.3\.1 and triton 3\.6 .* is not installed"):
            group_rational(x, a, b, implementation="triton")
        assert "triton" not in str(jax.make_jaxpr(lambda: group_rational(x, a, b))())
