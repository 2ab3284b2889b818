"""The Hopper kernels of attention that skips: interpreted here, compiled ahead of time, and run on a GPU."""

import contextlib
import functools
import json

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, hopper
from pallas_kernels.skip_attention import mosaic_gpu, visits
from pallas_kernels.skip_attention.reference import Places, Spec
from tests.aot import GPU, H200, compile_in_a_process, needs_cuda_plugin
from tests.pallas_kernels import attention_oracle

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="the Mosaic GPU interpreter came with JAX 0.11"
)


@pytest.fixture
def interpreter(monkeypatch):
    """Few multiprocessors, so that each has several tiles; races raise."""

    def add_to(target, source):
        target[...] = target[...] + source[...]
        plgpu.commit_smem()

    def product_onto(total, a, b_ref, meanwhile):
        other, b = meanwhile(), b_ref[...]
        plgpu.commit_smem()
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32), other

    monkeypatch.setattr(hopper, "product_onto", product_onto)
    monkeypatch.setattr(hopper, "start_from", lambda acc, value: None)
    monkeypatch.setattr(hopper, "sum_from", lambda acc, value, pending=0: acc[...] + value)
    monkeypatch.setattr(hopper, "add_to", add_to)
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2)
    jax.clear_caches()

    @contextlib.contextmanager
    def run():
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield

    yield run
    jax.clear_caches()


def problem(
    batch=1, queries=128, keys=128, heads=1, kv_heads=1, width=64, blocks=(128, 64), dtype=jnp.bfloat16, seed=0,
    causal=False, window=(None, None), softcap=None, scale=None, q_len=None, kv_len=None, density=None, segmented=False,
    seen=True,
):  # fmt: skip
    """(spec, (q, k, v), cotangents of the output and the log-sum-exp, lists, places, which pairs are seen or None)."""
    rng = np.random.default_rng(seed)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(batch, n, h, width)), dtype)
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    )
    scale = width**-0.5 if scale is None else scale
    spec = Spec(
        "mosaic_gpu", dispatch.Target("gpu", (9, 0)), scale, softcap, causal, tuple(window), *blocks, segmented,
        density is not None,
    )  # fmt: skip
    q_len, kv_len = (
        np.full(batch, most, np.int32) if length is None else np.asarray(length, np.int32)
        for most, length in ((queries, q_len), (keys, kv_len))
    )
    segments = [
        np.sort(rng.integers(0, 3, (batch, n))).astype(np.int32) if segmented else None for n in (queries, keys)
    ]
    places = Places(q_len, kv_len, kv_len - q_len, *segments)
    mask = None
    if density is not None:
        mask = rng.random((batch, heads, -(-queries // blocks[0]), -(-keys // blocks[1]))) < density
        mask[0, 0, -1] = False  # a row of blocks that sees nothing
        mask[0, :, :, -1] = False  # keys that nothing sees
    lists = visits.lists(spec, places, queries, keys, mask)
    if seen:
        seen = attention_oracle.pairs(
            q.shape, keys, block_mask=mask, blocks=blocks, causal=causal, window=window, q_len=q_len, kv_len=kv_len,
            q_segments=segments[0], kv_segments=segments[1],
        )  # fmt: skip
    real = np.arange(queries)[None] < q_len[:, None], np.arange(keys)[None] < kv_len[:, None]
    q, k, v, g = (jnp.where(real[side][:, :, None, None], x, 0) for x, side in ((q, 0), (k, 1), (v, 1), (g, 0)))
    g_lse = jnp.asarray(rng.normal(size=(batch, heads, queries)), jnp.float32)
    return spec, (q, k, v), (g, g_lse), lists, places, seen


def run(spec, operands, cotangents, lists, places):
    """(output, log-sum-exp, dq, dk, dv), as the public op puts them together."""
    out, lse = mosaic_gpu.forward(spec, *operands, lists[0], places)
    g, g_lse = cotangents
    delta = jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=jnp.float32)
    delta -= jnp.where(lse == -jnp.inf, 0, g_lse)
    return out, lse, *mosaic_gpu.backward(spec, *operands, *lists, places, lse, delta, g)


def check(got, spec, operands, cotangents, seen):
    """Of 16 bits: within 2e-2 of the largest value, for probabilities and their gradients are rounded to 16 bits before
    they are multiplied, and so are the results. Of the log-sum-exp: 1e-4, sums in float32. Of nothing: exactly 0.
    """
    want = attention_oracle.attention(
        *operands, seen, scale=spec.scale, softcap=spec.softcap, g=cotangents[0], g_lse=cotangents[1]
    )
    for name, ours, truth in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        ours = np.asarray(ours.astype(jnp.float32))
        if name == "lse":
            np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(truth))
            ours, truth = (np.where(np.isneginf(truth), 0, x) for x in (ours, truth))
            np.testing.assert_allclose(ours, truth, atol=1e-4, rtol=1e-5)
        else:
            np.testing.assert_allclose(ours, truth, atol=2e-2 * np.abs(truth).max(), err_msg=name)
    empty = ~np.asarray(seen).any(-1).transpose(0, 2, 1)
    unseen = ~np.asarray(seen).reshape(seen.shape[0], operands[1].shape[2], -1, seen.shape[-1]).any(2).transpose(
        0, 2, 1
    )
    for name, ours, nothing in zip(
        ("out", "dq", "dk", "dv"), (got[0], *got[2:]), (empty, empty, unseen, unseen), strict=True
    ):
        assert not np.asarray(ours.astype(jnp.float32))[nothing].any(), name


CASES = {
    "one_pass": {"queries": 200, "keys": 300, "heads": 2, "width": 128, "blocks": (128, 128), "causal": True},
    "causal": {"queries": 256, "keys": 256, "causal": True},
    "ragged": {"queries": 150, "keys": 100, "width": 128, "blocks": (64, 128)},
    "grouped": {"batch": 2, "heads": 4, "kv_heads": 2},
    "lengths": {"batch": 2, "causal": True, "q_len": [100, 0], "kv_len": [70, 20]},
    "segments": {"queries": 200, "keys": 200, "causal": True, "segmented": True},
    "blocks": {"queries": 256, "keys": 256, "heads": 2, "kv_heads": 2, "causal": True, "density": 0.5},
    "window": {"queries": 256, "keys": 256, "window": (60, 0), "softcap": 5.0},
    "float16": {"queries": 100, "keys": 200, "blocks": (128, 128), "dtype": jnp.float16, "scale": -0.1},
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_definition(case, interpreter, monkeypatch):
    if CASES[case].get("width") == 128:  # one pass: where dq is summed, two would race, as copies that add do not
        monkeypatch.setattr(hopper, "MULTIPROCESSORS", 1)
    spec, operands, cotangents, lists, places, seen = problem(**CASES[case])
    with interpreter():
        got = run(spec, operands, cotangents, lists, places)
    check(got, spec, operands, cotangents, seen)


@interpreted
@pytest.mark.slow
def test_what_no_list_names_is_never_read(interpreter):
    """NaN in the keys and values of blocks that no query visits, and in the queries of blocks that visit nothing."""
    options = {"queries": 256, "keys": 256, "heads": 2, "kv_heads": 2, "density": 0.5, "blocks": (64, 64)}
    spec, (q, k, v), (g, g_lse), lists, places, seen = problem(**options)
    blind = ~seen.any(-1).transpose(0, 2, 1)[..., None]
    unseen = ~seen.any(-2).transpose(0, 2, 1)[..., None]
    assert blind.any() and unseen.any()
    poisoned = jnp.where(blind, jnp.nan, q), jnp.where(unseen, jnp.nan, k), jnp.where(unseen, jnp.nan, v)
    with interpreter():
        clean = run(spec, (q, k, v), (g, g_lse), lists, places)
        out, lse = mosaic_gpu.forward(spec, *poisoned, lists[0], places)
        delta = jnp.einsum("bthd,bthd->bht", out, g, preferred_element_type=jnp.float32)
        delta -= jnp.where(lse == -jnp.inf, 0, g_lse)
        g = jnp.where(blind, jnp.nan, g)
        got = out, lse, *mosaic_gpu.backward(spec, *poisoned, *lists, places, lse, delta, g)
    for ours, same in zip(got, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(same))


def test_other_blocks_and_widths_are_refused():
    for options, message in (({"blocks": (32, 128)}, "blocks of 32 queries"), ({"width": 32}, "widths 64 and 128")):
        spec, operands, _, lists, places, _ = problem(**options)
        with pytest.raises(NotImplementedError, match=message):
            mosaic_gpu.forward(spec, *operands, lists[0], places)


# Prints the temporary memory, and the bytes that each kernel spills, as the assembler says on the standard output.
COMPILE = """
import json, os, re, sys, tempfile
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.pallas_kernels.test_skip_attention_gpu import problem, run

target, options = sys.argv[1], json.loads(sys.argv[2])
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("x",))
spec, operands, cotangents, lists, places, _ = problem(**options)
shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))
arguments = jax.tree.map(shape, (operands, cotangents, lists, places))
with tempfile.TemporaryFile("w+") as said, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    out = os.dup(1)
    os.dup2(said.fileno(), 1)
    compiled = jax.jit(lambda *x: run(spec, *x)).lower(*arguments).compile()
    os.dup2(out, 1)
    said.seek(0)
    text = said.read()
print(json.dumps({
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "spilled": [int(x) for x in re.findall(r"stack frame, (\\d+) bytes spill stores", text)],
    "serialized": text.count("C7514") + text.count("C7510")}))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    "options",
    [
        {"batch": 2, "queries": 1024, "keys": 1024, "heads": 4, "kv_heads": 2, "width": 128, "causal": True},
        {"queries": 500, "keys": 700, "width": 64, "window": [100, 0], "softcap": 30.0, "segmented": True},
    ],
    ids=["causal", "everything"],
)
def test_compiles_for_hopper(options):
    """Memory beyond the results: the sum of dq in float32 (4 MiB of the first), per query two numbers, and the lists.
    Registers: what does not change in a tile may be spilled, products not serialized."""
    environment = GPU | {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    found = compile_in_a_process(COMPILE, H200, json.dumps(options | {"blocks": [128, 128]}), environment=environment)
    assert found["temporary"] <= 2**23
    assert len(found["spilled"]) in (2, 3) and max(found["spilled"]) <= 256
    assert not found["serialized"]


# The most telling first: few, for each is compiled.
ON_A_GPU = {
    "one_pass": {"batch": 2, "queries": 300, "keys": 400, "heads": 4, "kv_heads": 2, "width": 128, "causal": True},
    "two_passes": {"queries": 600, "keys": 600, "heads": 4, "kv_heads": 2, "width": 128, "causal": True},
    "everything": {
        "batch": 2, "queries": 300, "keys": 400, "width": 64, "causal": True, "window": (150, 0), "softcap": 10.0,
        "segmented": True, "q_len": [300, 170], "kv_len": [333, 400],
    },
    "blocks": {"queries": 1024, "keys": 1024, "heads": 3, "kv_heads": 3, "width": 128, "density": 0.4},
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_on_a_gpu_the_kernels_equal_the_definition(case, monkeypatch):
    """And twice the same, bit for bit: every sum has one order, but that of dq in one pass (within 1e-3 of the largest,
    for it is rounded to bfloat16, as much as 2**-8 of a value, after a sum in float32)."""
    monkeypatch.setattr(mosaic_gpu, "ONE_PASS", mosaic_gpu.ONE_PASS and case != "two_passes")
    spec, operands, cotangents, lists, places, seen = problem(blocks=(128, 128), **ON_A_GPU[case])
    both = jax.jit(lambda *operands: run(spec, *operands, lists, places))
    got, again = both(operands, cotangents), both(operands, cotangents)
    check(got, spec, operands, cotangents, seen)
    for name, ours, same in zip(("out", "lse", "dq", "dk", "dv"), got, again, strict=True):
        ours, same = (np.asarray(x.astype(jnp.float32)) for x in (ours, same))
        if name == "dq" and case in ("one_pass", "blocks"):
            np.testing.assert_allclose(ours, same, atol=1e-3 * np.abs(ours).max(), rtol=2**-7)
        else:
            np.testing.assert_array_equal(ours, same, err_msg=name)


@pytest.mark.gpu
def test_on_a_gpu_many_tiles_equal_xla():
    """Several tiles a multiprocessor, long lists: 2e-2 of the largest value, from bfloat16's rounding, as ``check``."""
    spec, (q, k, v), (g, _), lists, places, _ = problem(
        batch=2, queries=1920, keys=1920, heads=16, kv_heads=8, width=128, blocks=(128, 128), causal=True, seen=False
    )

    def ours(q, k, v, g):
        out, _, *gradients = run(spec, (q, k, v), (g, jnp.zeros((2, 16, 1920), jnp.float32)), lists, places)
        return out, *gradients

    def xla(q, k, v, g):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
        out, transpose = jax.vjp(attend, q, k, v)
        return out, *transpose(g.astype(jnp.float32))

    for name, a, b in zip(("out", "dq", "dk", "dv"), jax.jit(ours)(q, k, v, g), jax.jit(xla)(q, k, v, g), strict=True):
        assert jnp.abs(a.astype(jnp.float32) - b).max() <= 2e-2 * jnp.abs(b).max(), name
