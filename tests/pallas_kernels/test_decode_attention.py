"""``decode_attention`` and ``append_kv``: the definition, who is skipped, the cache written in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skip_attention import append_kv, decode_attention
from tests.aot import needs_mosaic_gpu


def problem(batch=3, slots=300, groups=2, heads=4, width=64, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, heads, width)] + [(batch, slots, groups, width)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def exact(query, keys, values, lengths, recent=(0, 0), active=None):
    """In NumPy's float64, sequence by sequence."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.zeros_like(query)
    slot, group = np.arange(keys.shape[1]), query.shape[1] // keys.shape[2]
    for b in range(len(query)):
        seen = (slot < lengths[b]) | ((slot >= recent[0]) & (slot < sum(recent)))
        if not seen.any() or (active is not None and not active[b]):
            continue
        for h in range(query.shape[1]):
            scores = keys[b, seen, h // group] @ query[b, h] / np.sqrt(query.shape[2])
            p = np.exp(scores - scores.max())
            out[b, h] = p @ values[b, seen, h // group] / p.sum()
    return out


OPTIONS = [
    {"lengths": np.array([300, 17, 0])},
    {"lengths": np.array([20, 0, 131]), "recent": (140, 9)},
    {"lengths": np.array([20, 5, 131]), "recent": (140, 3), "active": np.array([True, False, True])},
    {"lengths": np.array([20, 5, 131]), "recent": (140, 0), "active": np.array([False, False, False])},
]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_output_is_that_of_the_definition(options, implementation):
    operands = problem()
    found = decode_attention(*operands, **jax.tree.map(jnp.asarray, options), implementation=implementation)
    np.testing.assert_allclose(found, exact(*operands, **options), atol=2e-6)  # float32


@pytest.mark.parametrize("options", OPTIONS)
def test_the_hopper_kernel_in_the_interpreter(options):
    """bfloat16: probabilities and output are rounded, 2e-2. NaN in inactive sequences is not read."""
    plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
    if not hasattr(plgpu, "force_gpu_interpret_mode"):
        pytest.skip("this JAX has no interpreter of Mosaic GPU kernels")
    from pallas_kernels.skip_attention import decode_mosaic_gpu

    query, keys, values = problem(dtype="bfloat16")
    wanted = exact(query, keys, values, **options)
    active = options.get("active", np.ones(3, bool))
    keys, values = (jnp.where(active[:, None, None, None], x, jnp.nan) for x in (keys, values))
    start, count = (jnp.full(3, x, jnp.int32) for x in options.get("recent", (0, 0)))
    lengths, count = (jnp.where(active, x, 0) for x in (options["lengths"], count))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = decode_mosaic_gpu.attend(query, keys, values, lengths, start, count, 64**-0.5)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=2e-2)
    assert (np.asarray(found)[~active] == 0).all()


@needs_mosaic_gpu
def test_the_hopper_kernel_takes_any_number_of_slots():
    """Of 300 slots the copy engine can make no tiles of 8, which only lowering finds."""
    from pallas_kernels.skip_attention import decode_mosaic_gpu

    ints = [jnp.zeros(3, jnp.int32)] * 3
    attend = jax.jit(functools.partial(decode_mosaic_gpu.attend, scale=64**-0.5))
    lowered = attend.trace(*problem(slots=300, dtype="bfloat16"), *ints).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_who_is_active_is_data():
    operands = problem()
    f = jax.jit(functools.partial(decode_attention, lengths=jnp.full(3, 300)))
    for active in ([True, True, False], [False, True, False]):
        found = f(*operands, active=jnp.array(active))
        np.testing.assert_allclose(found, exact(*operands, [300] * 3, active=active), atol=2e-6)
    assert f._cache_size() == 1


def test_sequences_that_skip_a_layer_leave_compact_caches():
    """Ten steps, each sequence taking part in some: the same as dense caches in which the others' slots are masked."""
    rng = np.random.default_rng(1)
    batch, steps, groups, width = 3, 10, 2, 8
    active = rng.random((steps, batch)) < 0.5
    new = [jnp.asarray(rng.normal(size=(steps, batch, groups, width)), jnp.float32) for _ in range(2)]
    query = jnp.asarray(rng.normal(size=(steps, batch, 4, width)), jnp.float32)
    keys = values = jnp.zeros((batch, steps, groups, width))
    lengths = jnp.zeros(batch, jnp.int32)
    for t in range(steps):
        on = jnp.asarray(active[t])
        keys, values, lengths = append_kv(keys, values, new[0][t], new[1][t], lengths=lengths, active=on)
        out = decode_attention(query[t], keys, values, lengths=lengths, active=on)
        for b in range(batch):
            there = np.flatnonzero(active[: t + 1, b])
            if not active[t, b]:
                assert (np.asarray(out[b]) == 0).all()
                continue
            dense = [np.asarray(x[there, b])[None] for x in new]
            np.testing.assert_allclose(out[b], exact(query[t, b][None], *dense, [len(there)])[0], atol=2e-6)
    assert lengths.tolist() == active.sum(axis=0).tolist()


def test_a_full_cache_stays_as_it_is():
    cache, new = jnp.zeros((2, 3, 1, 4)), jnp.ones((2, 1, 4))
    keys, values, lengths = append_kv(cache, cache, new, new, lengths=jnp.array([3, 2]))
    assert lengths.tolist() == [3, 3] and not keys[0].any() and (keys[1, 2] == 1).all() and (values == keys).all()


def test_a_donated_cache_is_written_in_place():
    cache, new = jax.ShapeDtypeStruct((4, 64, 2, 32), jnp.float32), jax.ShapeDtypeStruct((4, 2, 32), jnp.float32)
    lengths, active = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((4,), bool)

    def step(keys, values, k, v, lengths, active):
        return append_kv(keys, values, k, v, lengths=lengths, active=active)

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(cache, cache, new, new, lengths, active).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * 64 * 2 * 32 * 4
    assert memory.temp_size_in_bytes < 4 * 64 * 2 * 32 * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": jnp.zeros((3, 300, 3, 64))}, ValueError, "keys and values"),
        ({"query": jnp.zeros((3, 4, 64), jnp.bfloat16)}, TypeError, "floats alike"),
        ({"lengths": jnp.zeros(2, jnp.int32)}, ValueError, "lengths must be integers"),
        ({"active": jnp.zeros(3, jnp.int32)}, ValueError, "active must be bool"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "needs an NVIDIA Hopper GPU"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    query, keys, values = problem()
    operands = {"query": query, "keys": keys, "values": values, "lengths": jnp.zeros(3, jnp.int32)}
    with pytest.raises(error, match=message):
        decode_attention(**{**operands, **change})
    with pytest.raises(ValueError, match=r"what is new \[B, G, K\]"):
        append_kv(keys, values, keys[:, 0], values[:, 0, :1], lengths=operands["lengths"])


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("heads", "width"), [(4, 64), (16, 128)])
def test_on_a_gpu_the_default_gives_the_definition(options, heads, width):
    """As in the interpreter: bfloat16, 2e-2."""
    operands = problem(heads=heads, width=width, dtype="bfloat16")
    found = jax.jit(decode_attention)(*operands, **jax.tree.map(jnp.asarray, options))
    np.testing.assert_allclose(np.asarray(found, np.float64), exact(*operands, **options), atol=2e-2)
