"""The Triton kernels of ``attention``: what they accept, their arithmetic in Triton's interpreter, on a GPU."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Target
from pallas_kernels.skip_attention import triton
from tests.aot import A100, GPU, L4, compile_in_a_process, needs_cuda_plugin
from tests.pallas_kernels.test_skip_attention import problem, run

# Name -> (shape of the problem, options of attention, the same for the oracle); masks are [H, blocks, blocks] of 16.
CASES = {
    "causal_groups": (
        {"queries": 37, "keys": 53, "heads": 4, "kv_heads": 2, "width": 24},
        {"is_causal": True},
        {"causal": True},
    ),
    "masks_of_heads": (
        {"queries": 40, "keys": 53, "heads": 4, "kv_heads": 2, "width": 16},
        {"mask": 7, "is_causal": True, "logits_soft_cap": 2.0, "active": [True, False]},
        {"causal": True, "softcap": 2.0, "active": [True, False]},
    ),
    "segments_window_lengths": (
        {"queries": 53, "keys": 53, "heads": 2, "kv_heads": 2, "width": 32},
        {"segments": 20, "local_window_size": [17, 5], "key_value_seq_lengths": [50, 53]},
        {"window": [17, 5], "kv_len": [50, 53]},
    ),
}


def test_what_the_kernels_do_not_read_is_refused():
    a100 = Target("gpu", (8, 0))
    assert "not float32 of 64" in (triton.unavailable(jnp.dtype("float32"), 64, a100) or "")
    assert "not bfloat16 of 256" in (triton.unavailable(jnp.dtype("bfloat16"), 256, a100) or "")
    assert "compute capability 8.0" in (triton.unavailable(jnp.dtype("bfloat16"), 64, Target("gpu", (7, 5))) or "")


# Runs the public operation with the kernels in Triton's interpreter, on NumPy arrays that look like PyTorch's.
INTERPRETED = """
import json, sys, types
import jax, numpy as np
import triton.language as tl
from pallas_kernels import dispatch, jax_triton_call
from tests.pallas_kernels.test_skip_attention_triton import CASES, errors

jax.config.update("jax_numpy_rank_promotion", "raise")

class Tensor:
    def __init__(self, array=None):
        self.array = array

    dtype = property(lambda self: getattr(tl, {"int32": "int32", "float32": "float32", "float16": "float16",
                                               "bfloat16": "bfloat16"}[self.array.dtype.name]))
    data_ptr = lambda self: self.array.ctypes.data
    untyped_storage = cpu = lambda self: self
    new_empty = lambda self, *_, **__: Tensor()
    storage_offset = size = stride = lambda self: 0

    def set_(self, storage, *_):
        self.array = storage.array

    def copy_(self, other):
        assert other.array is self.array

def triton_call(*arrays, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
    def run(*arrays):
        outputs = [np.full(x.shape, 77, x.dtype) for x in out_shape]
        kernel[grid](*(Tensor(np.array(x)) for x in arrays), *map(Tensor, outputs), **constants)
        return outputs
    return jax.pure_callback(run, out_shape, *arrays)

sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
jax_triton_call.missing = lambda: None
dispatch.target = lambda: dispatch.Target("gpu", (8, 0))
print(json.dumps({name: errors(name) for name in CASES}))
"""


def errors(name):
    """Of the largest value, against the definition; and whether rows without a key are exactly 0 with lse -inf."""
    from pallas_kernels.skip_attention import SkipSpec
    from tests.pallas_kernels import attention_oracle as oracle
    from tests.pallas_kernels.test_skip_attention import mask_of

    shape, options, wanted = CASES[name]
    options, wanted = dict(options), dict(wanted)
    operands = problem(**shape, dtype="float16")
    q, k, v, g, g_lse = operands
    if "mask" in options:
        mask = mask_of(q.shape[2], 3, 4, seed=options.pop("mask"))
        options["skip"] = SkipSpec.from_block_mask(jnp.asarray(mask), 16, 16)
        wanted |= {"block_mask": mask, "blocks": (16, 16)}
    if "segments" in options:
        ids = np.broadcast_to(np.arange(k.shape[1]) // options.pop("segments"), k.shape[:2])
        options |= {"q_segment_ids": ids, "kv_segment_ids": ids}
        wanted |= {"q_segments": ids, "kv_segments": ids}
    for key in ("active", "key_value_seq_lengths"):
        if key in options:
            options[key] = np.asarray(options[key])
    found = run(*operands, implementation="triton", block_sizes=(16, 16), **options)
    softcap = wanted.pop("softcap", None)
    seen = oracle.pairs(q.shape, k.shape[1], **wanted)
    want = oracle.attention(q, k, v, seen, g=g, g_lse=g_lse, softcap=softcap)
    blind = ~seen.any(axis=-1)
    exact = (found[0].swapaxes(1, 2)[blind] == 0).all() and (found[2].swapaxes(1, 2)[blind] == 0).all()
    exact &= np.isneginf(found[1][blind]).all()
    differences = [
        float(np.abs(np.where(np.isfinite(b), a - b, 0)).max() / np.abs(b[np.isfinite(b)]).max())
        for a, b in zip(found, want, strict=True)
    ]
    return differences, bool(exact)


@functools.cache
def interpreted():
    return compile_in_a_process(INTERPRETED, environment={"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_definition(case):
    """float16 against float64: probabilities and results are rounded to 2**-11, 4e-3 of the largest; the log-sum-exp
    is a sum in float32 of exact products, 1e-5."""
    pytest.importorskip("triton")
    differences, exact = interpreted()[case]
    assert exact
    assert differences[1] < 1e-5 and max(differences) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    """As in the interpreter."""
    pytest.importorskip("jax_triton")
    differences, exact = errors(case)
    assert exact
    assert differences[1] < 1e-4 and max(differences) < 4e-3


COMPILED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels import jax_triton_call
from pallas_kernels.skip_attention import SkipSpec, attention

jax_triton_call.missing = lambda: None  # any pair that compiles will do
device = topologies.get_topology_desc(platform="cuda", target_config=sys.argv[1], topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("x",))
array = lambda shape, dtype: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, P()))
found = []
for shape, kv_heads, options, grain in json.loads(sys.argv[2]):
    kv = array((*shape[:2], kv_heads, shape[3]), jnp.bfloat16)
    mask = array((shape[2], -(-shape[1] // grain), -(-shape[1] // grain)), bool)

    def f(q, k, v, mask):
        skip = SkipSpec.from_block_mask(mask, grain, grain)
        out, vjp = jax.vjp(lambda *x: attention(*x, skip=skip, is_causal=True, implementation="triton", **options),
                           q, k, v)
        return vjp(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(f).lower(array(shape, jnp.bfloat16), kv, kv, mask).compile()
    found.append(compiled.memory_analysis().temp_size_in_bytes)
print(json.dumps(found))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
@pytest.mark.parametrize("target", [A100, L4], ids=["A100", "L4"])
def test_compiles_for_ampere_and_ada(target):
    """Beyond the results: the output, log-sum-exp and delta, and the lists."""
    pytest.importorskip("jax_triton")
    cases = [((1, 2048, 8, 128), 2, {}, 128), ((2, 500, 4, 80), 4, {"logits_soft_cap": 20.0}, 64)]
    found = compile_in_a_process(COMPILED, target, json.dumps(cases), environment=GPU)
    assert found[0] <= 3 * 2 * 2048 * 8 * 128 and found[1] <= 3 * 2 * 2 * 500 * 4 * 80 + 2**18
