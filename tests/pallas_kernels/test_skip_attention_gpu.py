"""The Hopper kernels of attention that skips: interpreted here, compiled ahead of time, and run on a GPU."""

import contextlib
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
    """Few multiprocessors, so that a thread block has several tiles; races raise."""

    def product_onto(total, a, b_ref, meanwhile):
        other, b = meanwhile(), b_ref[...]
        plgpu.commit_smem()
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32), other

    monkeypatch.setattr(hopper, "product_onto", product_onto)
    monkeypatch.setattr(hopper, "start_from", lambda acc, value: None)
    monkeypatch.setattr(hopper, "sum_from", lambda acc, value, pending=0: acc[...] + value)
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
):  # fmt: skip
    """(spec, (q, k, v), cotangents of the output and the log-sum-exp, lists, places, which pairs are seen)."""
    rng = np.random.default_rng(seed)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(batch, n, h, width)), dtype)
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads))
    )
    scale = width**-0.5 if scale is None else scale
    spec = Spec(
        "mosaic_gpu", dispatch.Target("gpu", (9, 0)), scale, softcap, causal, window, *blocks, segmented,
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
    "causal": {"queries": 256, "keys": 256, "causal": True},
    "ragged": {"queries": 150, "keys": 100, "width": 128, "blocks": (64, 128)},
    "grouped": {"batch": 2, "heads": 4, "kv_heads": 2},
    "lengths": {"batch": 2, "causal": True, "q_len": [100, 0], "kv_len": [70, 20]},
    "segments": {"queries": 200, "keys": 200, "causal": True, "segmented": True},
    "blocks": {"queries": 256, "keys": 256, "heads": 2, "kv_heads": 2, "causal": True, "density": 0.5},
    "window": {"queries": 256, "keys": 256, "window": (60, 0), "softcap": 5.0},
    "float16": {"queries": 100, "keys": 200, "blocks": (192, 128), "dtype": jnp.float16, "scale": -0.1},
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_definition(case, interpreter):
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


COMPILE = """
import json, re, sys
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
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    compiled = jax.jit(lambda *x: run(spec, *x)).lower(*arguments).compile()
m = compiled.memory_analysis()
print(json.dumps({"temporary": m.temp_size_in_bytes}))
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
    """Beyond the results: the log-sum-exp and delta in whole blocks, and the lists."""
    found = compile_in_a_process(COMPILE, H200, json.dumps(options | {"blocks": [128, 128]}), environment=GPU)
    assert found["temporary"] <= 2**18


ON_A_GPU = CASES | {
    "wide": {"batch": 2, "queries": 1000, "keys": 1200, "heads": 4, "kv_heads": 2, "width": 128, "causal": True},
    "long": {"queries": 4096, "keys": 4096, "heads": 2, "kv_heads": 2, "width": 128, "causal": True},
    "sparse": {"queries": 2048, "keys": 2048, "heads": 4, "kv_heads": 4, "width": 128, "density": 0.3},
    "documents": {"batch": 2, "queries": 1500, "keys": 1500, "width": 64, "causal": True, "segmented": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_A_GPU)
def test_on_a_gpu_the_kernels_equal_the_definition(case):
    """And twice the same, bit for bit: every sum has one order."""
    options = {"blocks": (128, 128)} | ON_A_GPU[case]
    spec, operands, cotangents, lists, places, seen = problem(**options)
    got = run(spec, operands, cotangents, lists, places)
    check(got, spec, operands, cotangents, seen)
    again = run(spec, operands, cotangents, lists, places)
    for ours, same in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(same))
