"""The Triton kernels: what they accept, their arithmetic in Triton's interpreter, what they compile to, on a GPU."""

import contextlib
import importlib.util
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch, jax_triton_call
from pallas_kernels.dispatch import Target
from pallas_kernels.linear_cross_entropy import (
    chunked,
    inputs,
    linear_cross_entropy,
    reference,
    sample_linear_categorical,
    slabs,
    triton,
)
from pallas_kernels.linear_cross_entropy.noise import Draw
from tests.aot import A100, GPU, H200, L4, compile_in_a_process, needs_cuda_plugin
from tests.pallas_kernels.test_linear_cross_entropy import exact, problem

CAPABILITIES = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0)]


def spec_of(dtype="bfloat16", classifier_dtype=None, capability=(8, 0), block_sizes=None, **options):
    operands = (jnp.zeros((1, 1), dtype), jnp.zeros((1, 1), classifier_dtype or dtype), None)
    spec = inputs.spec("triton", operands, "vd", options.get("softcap"), block_sizes, options.get("smoothing", 0.0))
    return spec._replace(target=Target("gpu", capability))


def gpu(device_kind):
    """The mesh that an ahead-of-time compilation for this GPU sets."""
    named = {"platform": "gpu"} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    device = AbstractDevice(device_kind=device_kind, num_cores=None, **named)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",), abstract_device=device))


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cpu", "float16", "needs an NVIDIA GPU"),
        ("Tesla T4", "float16", "compute capability 8.0 to 9.0"),
        ("NVIDIA B200", "bfloat16", "compute capability 8.0 to 9.0"),
    ],
)
def test_a_device_without_it_is_refused_and_the_default_is_another(device, dtype, reason):
    e, c, labels = jnp.ones((4, 8), dtype), jnp.ones((16, 8), dtype), jnp.zeros(4, int)

    def loss(implementation):
        return jax.make_jaxpr(lambda: linear_cross_entropy(e, c, labels, implementation=implementation))()

    with gpu(device) if device != "cpu" else contextlib.nullcontext():
        with pytest.raises(NotImplementedError, match=f"'triton' .*{reason}"):
            loss("triton")
        assert "triton" not in str(loss(None))


def test_float64_is_refused():
    assert re.search("operands, got float64", triton.unavailable(jnp.dtype("float64"), Target("gpu", (8, 0))))


@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is not None, reason="jax-triton is installed")
def test_without_jax_triton_an_a100_gets_the_next_implementation():
    e, c, labels = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16), jnp.zeros(4, int)
    key = jax.random.key(0)
    with gpu("NVIDIA A100-SXM4-40GB"):
        with pytest.raises(NotImplementedError, match=r"jax-triton 0\.3\.1 and triton 3\.6 .* is not installed"):
            linear_cross_entropy(e, c, labels, implementation="triton")
        with pytest.raises(NotImplementedError, match="is not installed"):
            sample_linear_categorical(key, e, c, implementation="triton")
        jax.make_jaxpr(lambda: linear_cross_entropy(e, c, labels))()


@pytest.mark.parametrize(
    ("jax_triton", "compiler", "here", "works"),
    [
        ("0.3.1", "3.6.0", "0.10.2", True),
        ("0.3.1", "3.6.0", "0.11.2", True),
        ("0.3.1", "3.5.1", "0.10.2", False),
        ("0.3.1", "3.6.0", "0.7.2", False),
        ("0.3.0", "3.3.1", "0.7.2", False),
        ("0.3.1", "3.6.0", "0.12.0.1", True),
        ("0.4.1", "3.7.0", "0.12.0.1", False),
    ],
)
def test_versions_that_work_together(jax_triton, compiler, here, works):
    assert jax_triton_call.work_together(jax_triton, compiler, here) == works


DTYPES = ["float16", "bfloat16", "float32"]


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 2**20),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    capability=st.sampled_from(CAPABILITIES),
    drawing=st.booleans(),
)
def test_the_default_tiles_fit_everywhere(tokens, dtypes, capability, drawing):
    spec = spec_of(*dtypes, capability)
    tile = triton.tiles(spec, tokens, drawing)
    assert triton.shared_memory(spec, tile) <= 99 * 1024
    assert tile.rows * tile.columns <= 32 * tile.warps * (32 if drawing or spec.operand_dtype == jnp.float32 else 128)
    assert tile.rows < 2 * max(tokens, 16)  # few tokens are not a tile of padding


@pytest.mark.parametrize("block_sizes", [(8, 128), (48, 64), (128, 512)])
def test_tiles_that_the_kernels_do_not_have(block_sizes):
    with pytest.raises(ValueError, match=rf"\({block_sizes[0]}, {block_sizes[1]}\).*powers of two.*32768 logits"):
        triton.tiles(spec_of(block_sizes=block_sizes), 1000)


def test_tiles_that_shared_memory_does_not_hold():
    """A stage of [16 + 1024, 32] bfloat16 is 65 KiB, three of them fit the 227 KiB of Hopper only."""
    assert triton.tiles(spec_of(capability=(9, 0), block_sizes=(16, 1024)), 16)[:2] == (16, 1024)
    with pytest.raises(ValueError, match=r"\(16, 1024\) takes \d+ bytes of shared memory, this GPU has 101376"):
        triton.tiles(spec_of(capability=(8, 9), block_sizes=(16, 1024)), 16)


def test_parts_of_the_vocabulary_are_combined():
    """Against float64 sums over the whole vocabulary: 1e-6. The last part is masked by a bias of -inf."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(5, 4, 7)) * 3  # parts, entries of a part, tokens
    z[4] = -np.inf
    labels = rng.integers(0, 16, 7)
    labels[2] = -1
    entry = np.arange(20).reshape(5, 4, 1)
    top = np.maximum(z.max(1), np.finfo(np.float32).min)
    picked = np.where(entry == labels, z, 0).sum(1)
    lse = np.log(np.exp(z).sum((0, 1)))

    def combined(target, other, drawn, smoothing=0.0):
        statistics = jnp.asarray(np.stack([top, np.exp(z - top[:, None]).sum(1), picked, other]), jnp.float32)
        spec = spec_of(smoothing=smoothing)._replace(classes=16)
        return triton.combined(spec, statistics, jnp.asarray(drawn, jnp.int32), target)

    sums = np.where(np.isfinite(z), z, 0).sum(1)
    nll, got_lse, same = combined(jnp.asarray(labels), sums, np.zeros(1), 0.1)
    np.testing.assert_allclose(got_lse, lse, rtol=1e-6)
    np.testing.assert_allclose(nll, lse - 0.9 * picked.sum(0) - 0.1 / 16 * sums.sum(0), rtol=1e-6)
    np.testing.assert_array_equal(same, labels)
    score = rng.normal(size=(5, 7))
    score[4] = -np.inf
    winners = score.argmax(0)
    drawn = rng.integers(0, 16, (5, 7))
    nll, _, got = combined(Draw(jnp.zeros(2, jnp.uint32), jnp.arange(7, dtype=jnp.uint32)), score, drawn)
    np.testing.assert_array_equal(got, drawn[winners, np.arange(7)])
    np.testing.assert_allclose(nll, lse - picked[winners, np.arange(7)], rtol=1e-6)


@pytest.mark.parametrize("layout", ["vd", "dv"])
@pytest.mark.parametrize(
    ("e_dtype", "c_dtype"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"),
     ("float16", "float32"), ("bfloat16", "float16")],
)  # fmt: skip
def test_slabs_give_the_gradients_of_chunked(e_dtype, c_dtype, layout):
    """Slabs of 4096 entries out of 5000, for a mean over so many tokens that float16 would lose every entry.

    Of the largest entry: 2e-6 in float32; else the rounding of the classifier's gradient to its dtype, and of the
    bias gradient's terms to the operands'.
    """
    rng = np.random.default_rng(0)
    tokens, vocabulary, width, scale = 11, 5000, 8, jnp.float32(2.0**-20)
    e, c = jnp.asarray(rng.normal(size=(tokens, width)), e_dtype), rng.normal(size=(vocabulary, width))
    c = jnp.asarray(c if layout == "vd" else c.T, c_dtype)
    b = jnp.asarray(rng.normal(size=vocabulary), jnp.float32)
    spec = inputs.spec("chunked", (e, c, b), layout, 3.0, (11, 5000), 0.1)
    labels = jnp.asarray(rng.integers(-1, vocabulary, tokens), jnp.int32)
    g, h = (jnp.asarray(rng.normal(size=tokens), jnp.float32) for _ in range(2))

    def logit_gradients(z, lse, g, h, start, size):
        hit = labels[:, None] == jnp.arange(vocabulary)[None]
        dz = jnp.exp(z - lse[:, None]) * (g + h)[:, None] - (jnp.where(hit, 0.9, 0) + 0.1 / vocabulary) * g[:, None]
        dz = (dz * (1 - (z / 3) ** 2)).astype(spec.operand_dtype)
        return jax.lax.dynamic_slice_in_dim(dz, start, size, 1)

    @jax.jit
    def both(e, c):
        z = reference.logits(spec, e, c, b)
        lse = jax.nn.logsumexp(z, axis=-1)

        def one(g, h, start, size):
            return logit_gradients(z, lse, g, h, start, size)

        got = slabs.backward(spec, e, c, b, g, h, scale, one, slab_bytes=1)
        return got, chunked.backward(spec, e, c, b, labels, lse, g, h, scale)

    got, want = both(e, c)
    eps = {dtype: max(2e-6, float(jnp.finfo(dtype).eps)) for dtype in (c_dtype, spec.operand_dtype.name)}
    tolerances = [2e-6, eps[c_dtype], eps[spec.operand_dtype.name]]
    for x, wanted, tolerance in zip(got, want, tolerances, strict=True):
        wanted = np.asarray(wanted, np.float64)
        tolerance = max(tolerance, 2.0**-24 / np.abs(wanted).max() if x.dtype == jnp.float16 else 0)  # subnormal
        np.testing.assert_allclose(np.asarray(x, np.float64), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


# Runs the public operation with the kernels in Triton's interpreter, on arrays of the CPU.
INTERPRETED = """
import json, sys, types
import jax, jax.numpy as jnp, numpy as np, torch
from pallas_kernels import dispatch, jax_triton_call
from pallas_kernels.linear_cross_entropy import linear_cross_entropy, sampled_linear_cross_entropy, triton
from tests.pallas_kernels.test_linear_cross_entropy import exact, problem
from tests.pallas_kernels.test_triton import CASES

jax.config.update("jax_numpy_rank_promotion", "raise")

def triton_call(*arrays, kernel, out_shape, grid, num_warps, num_stages, compute_capability, **constants):
    def run(*arrays):
        outputs = [torch.from_numpy(np.full(x.shape, 77, x.dtype)) for x in out_shape]
        kernel[grid](*(torch.from_numpy(np.array(x)) for x in arrays), *outputs, **constants)
        return [x.numpy() for x in outputs]
    return jax.pure_callback(run, out_shape, *arrays)

sys.modules["jax_triton"] = types.SimpleNamespace(triton_call=triton_call)
jax_triton_call.missing = lambda: None
dispatch.target = lambda: dispatch.Target("gpu", (8, 0))
errors = {}
for name, options in CASES.items():
    dtypes, layout = options.pop("dtypes", ("float32", "float32")), options.pop("layout", "vd")
    e, c, labels, bias, _ = problem((2, 19), 150, 24)
    e, c = jnp.asarray(e, dtypes[0]), jnp.asarray(c, dtypes[1])
    bias = jnp.asarray(bias, jnp.float32) if options.pop("bias", False) else None
    rng = np.random.default_rng(1)
    g, h = rng.normal(size=(2, *labels.shape)).astype(np.float32)

    def f(e, c, bias):
        loss, lse = linear_cross_entropy(
            e, c if layout == "vd" else c.T, labels, bias=bias, classifier_layout=layout, reduction="none",
            return_lse=True, implementation="triton", block_sizes=(16, 32), **options)
        return (g * loss + h * lse).sum(), (loss, lse)

    given = (0, 1) if bias is None else (0, 1, 2)
    (_, outputs), gradients = jax.jit(jax.value_and_grad(f, given, has_aux=True))(e, c, bias)
    loss, lse, want, _ = exact(e, c, labels, bias, g=g, h=h, **options)
    errors[name] = [
        float(np.abs(np.asarray(x, np.float64) - w).max() / np.abs(w).max())
        for x, w in zip((*outputs, *gradients), (loss, lse, *want))]

e, c, _, bias, _ = problem((3, 7), 150, 24)
e, c, bias = (jnp.asarray(x, jnp.float32) for x in (e, c, bias))
def draw(implementation, layout):
    return sampled_linear_cross_entropy(jax.random.key(3), e, c if layout == "vd" else c.T, bias=bias, softcap=4.0,
        reduction="none", classifier_layout=layout, implementation=implementation)
loss, labels = draw("reference", "vd")
for layout in ("vd", "dv"):
    got, drawn = draw("triton", layout)
    errors["draw_" + layout] = [float((drawn != labels).sum()), float(jnp.abs(got - loss).max())]
mapped = jax.vmap(lambda e, l: linear_cross_entropy(e, c, l, implementation="triton"))(e, labels)
for i in range(3):
    errors[f"vmap_{i}"] = [float(jnp.abs(mapped[i] - linear_cross_entropy(e[i], c, labels[i])))]
print(json.dumps(errors))
"""
CASES = {
    "plain": {},
    "everything": {
        "bias": True, "softcap": 3.0, "shift": 2, "z_loss": 0.1, "label_smoothing": 0.1, "layout": "dv",
    },
    "float16": {"dtypes": ("float16", "float16"), "softcap": 3.0},
    "mixed": {"dtypes": ("float16", "float32"), "bias": True, "label_smoothing": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    return compile_in_a_process(INTERPRETED, environment={"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_definition(interpreted, case):
    """38 tokens, 150 entries in tiles of (16, 32), width 24 in steps of 16 or 32: everything is ragged.

    Of the largest entry, against float64: 1e-5 for float32 sums (the card's tolerance of the forward pass is 1e-5, of
    gradients 5e-4), 1e-3 for float16, whose products and gradients are rounded to it.
    """
    loss, lse, *gradients = interpreted[case]
    assert loss < 1e-5 and lse < 1e-5
    assert max(gradients) < (1e-3 if "float16" in str(CASES[case].get("dtypes")) else 1e-5)


@pytest.mark.slow
def test_interpreted_kernels_draw_the_labels_of_the_reference(interpreted):
    """The same noise: the same labels. The loss to 1e-5 (float32 sums); also one token sequence after another."""
    for layout in ("vd", "dv"):
        wrong, loss = interpreted[f"draw_{layout}"]
        assert wrong == 0 and loss < 1e-5
    assert all(interpreted[f"vmap_{i}"][0] < 1e-5 for i in range(3))


# Compiles the loss and its gradient at the shape of Gemma 2 2B and sampling, and lists what Triton made of the kernels.
COMPILED = """
import json, os, re, subprocess, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
import jax_triton.triton_lib as lib, triton as compiler
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.linear_cross_entropy import linear_cross_entropy, sampled_linear_cross_entropy

target, dtype, layout, options = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
kernels = []
compile_kernel = lib.compile_ttir_inplace

def listed(*arguments):
    result = compile_kernel(*arguments)
    capability = arguments[3]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(result.binary)
        file.flush()
        ptxas = os.path.join(os.path.dirname(compiler.__file__), "backends", "nvidia", "bin", "ptxas")
        architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
        command = [ptxas, "-v", "--gpu-name=" + architecture, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels.append({"name": result.name, "shared": result.shared_mem_bytes, "capability": capability,
        "spilled": int(re.search(r"(\\d+) bytes spill stores", said)[1]),
        "tensor_cores": bool(re.search(r"mma", result.binary)), "tf32": "tf32" in result.binary})
    return result

lib.compile_ttir_inplace = listed
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("data",))
tokens, vocabulary, width = 8192, 256128, 2304
S = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
e, c = S((tokens, width), dtype), S((vocabulary, width) if layout == "vd" else (width, vocabulary), dtype)
labels, key, bias = S((tokens,), jnp.int32), S((2,), jnp.uint32), S((vocabulary,), dtype)
options |= {"implementation": "triton", "classifier_layout": layout}

def loss(e, c, labels, bias):
    return linear_cross_entropy(e, c, labels, bias=bias if options.get("softcap") else None, **options)

def spread(e, c, labels, bias):
    local = jax.shard_map(lambda *a: jax.lax.pmean(loss(*a), "data"), mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P()), out_specs=P())
    return local(e, c, labels, bias)

def temporaries(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    result = {"forward": temporaries(loss, e, c, labels, bias),
        "gradient": temporaries(jax.grad(loss, (0, 1)), e, c, labels, bias),
        "spread": temporaries(jax.grad(spread, (0, 1)), e, c, labels, bias)}
    if not options.get("softcap"):
        result["sampling"] = temporaries(lambda key, e, c: sampled_linear_cross_entropy(
            key, e, c, classifier_layout=layout, implementation="triton")[0], key, e, c)
print(json.dumps(result | {"kernels": kernels}))
"""


@pytest.mark.gpu_aot
@needs_cuda_plugin
@pytest.mark.skipif(importlib.util.find_spec("jax_triton") is None, reason="needs jax-triton")
@pytest.mark.parametrize(
    ("gpu_name", "dtype", "layout", "options"),
    [
        ("A100", "bfloat16", "vd", {}),
        ("A100", "bfloat16", "dv", {"softcap": 30.0, "label_smoothing": 0.1}),
        ("A100", "float32", "vd", {}),
        ("L4", "float16", "vd", {"softcap": 30.0}),
        ("L4", "bfloat16", "dv", {}),
        ("H200", "bfloat16", "vd", {}),
        ("H200", "float32", "dv", {"softcap": 30.0}),
    ],
    ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain",
)
def test_kernels_compile_within_the_memory_of_the_gpu(gpu_name, dtype, layout, options):
    """Gemma 2 2B's head at 8192 tokens: the logits in float32 would take 8.4 GB.

    Temporaries: forward the statistics of the parts (1024 tiles of rows, 4 numbers each: 4 MB, and as much again for
    a copy), backward below 5 % of the logits (one slab of 96 MiB, the embeddings' float32 gradient of 75 MB, copies).
    Spills: at most 64 bytes, in the epilogue of a tile of 128 sums per thread.
    """
    target, capability = {"A100": (A100, (8, 0)), "L4": (L4, (8, 9)), "H200": (H200, (9, 0))}[gpu_name]
    result = compile_in_a_process(COMPILED, target, dtype, layout, json.dumps(options), environment=GPU)
    assert result["forward"] < 10e6 and result.get("sampling", 0) < 10e6
    assert result["gradient"] < 0.05 * 8192 * 256128 * 4
    assert result["spread"] < result["gradient"] + 1e6
    assert {kernel["name"] for kernel in result["kernels"]} == {"_forward_kernel", "_gradient_kernel"}
    for kernel in result["kernels"]:
        spec = spec_of(dtype, capability=capability)
        assert kernel["shared"] <= triton.shared_memory(spec, triton.tiles(spec, 8192))
        assert kernel["spilled"] <= 64
        assert kernel["tensor_cores"] == (dtype != "float32") and not kernel["tf32"]


ON_GPU = {
    "plain": {},
    "everything": {"bias": True, "softcap": 3.0, "shift": 2, "z_loss": 0.1, "label_smoothing": 0.1, "layout": "dv"},
    "dv": {"layout": "dv", "label_smoothing": 0.1},
    "aligned": {"shape": ((512,), 2048, 256), "softcap": 20.0},
    "slabs": {"shape": ((3000,), 15001, 64), "bias": True},
    "one": {"shape": ((1,), 1, 1)},
    "tiles": {"tiles": (16, 32), "bias": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", ["float32", "float16", "bfloat16", "bfloat16 float32"])
@pytest.mark.parametrize("case", ON_GPU)
def test_kernels_on_the_gpu_equal_the_definition(case, dtypes):
    """Of the largest entry, against float64 on the rounded inputs: float32 1e-5, gradients 1e-4 (sums of up to 15001
    terms); 16 bit 1e-5 for the loss, whose products are exact, and one rounding for gradients (float16 1e-3, bfloat16
    1e-2: the card's). The same result twice, bit for bit.
    """
    if reason := triton.unavailable(jnp.dtype("float32"), dispatch.target()):
        pytest.skip(reason)
    options = dict(ON_GPU[case])
    shape, layout = options.pop("shape", ((2, 77), 1000, 40)), options.pop("layout", "vd")
    tiles, biased = options.pop("tiles", None), options.pop("bias", False)
    e_dtype, c_dtype = (dtypes.split() * 2)[:2]
    e, c, labels, bias, _ = problem(*shape, ignored=0.2 if shape[0] != (1,) else 0.0)
    e, c = jnp.asarray(e, e_dtype), jnp.asarray(c, c_dtype)
    bias = jnp.asarray(bias, jnp.float32) if biased else None
    g, h = np.random.default_rng(1).normal(size=(2, *labels.shape)).astype(np.float32)

    def f(e, c, bias):
        loss, lse = linear_cross_entropy(
            e, c if layout == "vd" else c.T, labels, bias=bias, classifier_layout=layout, reduction="none",
            return_lse=True, implementation="triton", block_sizes=tiles, **options,
        )  # fmt: skip
        return (g * loss + h * lse).sum(), (loss, lse)

    with jax.default_matmul_precision("highest"):
        step = jax.jit(jax.value_and_grad(f, (0, 1, 2) if biased else (0, 1), has_aux=True))
        (_, outputs), gradients = step(e, c, bias)
        again = step(e, c, bias)
    jax.tree.map(np.testing.assert_array_equal, ((_, outputs), gradients), again)
    loss, lse, want, _ = exact(e, c, labels, bias, g=g, h=h, **options)
    rounding = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-2}
    tolerance = max(rounding[e_dtype], rounding[c_dtype])
    wanted = [(loss, 1e-5), (lse, 1e-5), *((x, tolerance) for x in want)]
    for got, (expected, limit) in zip((*outputs, *gradients), wanted, strict=False):
        expected = np.asarray(expected, np.float64)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=0, atol=limit * max(np.abs(expected).max(), 1e-2)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_labels_drawn_on_the_gpu_are_those_of_chunked(dtype):
    """The same noise and logits that differ by float32 rounding: at most 1 label in 1000 may be another."""
    if reason := triton.unavailable(jnp.dtype("float32"), dispatch.target()):
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    e, c = jnp.asarray(rng.normal(size=(4096, 64)), dtype), jnp.asarray(rng.normal(size=(5003, 64)) / 8, dtype)

    def draw(implementation):
        with jax.default_matmul_precision("highest"):
            return sample_linear_categorical(jax.random.key(5), e, c, softcap=8.0, implementation=implementation)

    got, want = draw("triton"), draw("chunked")
    assert (got != want).mean() <= 1e-3
    assert len(np.unique(got)) > 1000
