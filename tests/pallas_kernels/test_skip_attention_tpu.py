"""The TPU kernels of ``attention``: their arithmetic in the TPU interpreter, what they load, what they compile to."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.skip_attention import SkipSpec, attention, mosaic_tpu, tpu_schedule, visits
from pallas_kernels.skip_attention.reference import Spec, Visits
from tests.aot import TPU, compile_in_a_process
from tests.pallas_kernels import attention_oracle as oracle
from tests.pallas_kernels.test_mosaic_tpu import assert_no_races, tpu
from tests.pallas_kernels.test_skip_attention import assert_agree, mask_of, problem, run

SPEC = Spec("mosaic_tpu", dispatch.Target("tpu"), 1.0, None, False, (None, None), 128, 128, False, True)
# (shape of the problem, options of attention, the same for the oracle): blocks of 128, the last ones not full.
CASES = {
    "causal_groups_of_two": (
        {"batch": 1, "queries": 200, "keys": 300, "heads": 2, "kv_heads": 1, "width": 16},
        {"is_causal": True, "block_sizes": (128, 128)},
        {"causal": True},
    ),
    "masks_of_heads": (
        {"batch": 2, "queries": 256, "keys": 300, "heads": 2, "kv_heads": 1, "width": 8},
        {
            "skip": SkipSpec.from_block_mask(jnp.asarray(mask_of(2, 2, 2, 3, seed=2)), 128, 128),
            "active": jnp.array([False, True]),
            "logits_soft_cap": 2.0,
        },
        {
            "block_mask": mask_of(2, 2, 2, 3, seed=2),
            "blocks": (128, 128),
            "active": [False, True],
            "softcap": 2.0,
        },
    ),
    "one_token": (
        {"batch": 1, "queries": 1, "keys": 5, "heads": 2, "kv_heads": 2, "width": 8},
        {},
        {},
    ),
}
SLOW = {
    "segments_window_lengths": (
        {"batch": 2, "queries": 300, "keys": 300, "heads": 2, "kv_heads": 1, "width": 64, "dtype": "bfloat16"},
        {
            "q_segment_ids": np.broadcast_to(np.arange(300) // 140, (2, 300)),
            "kv_segment_ids": np.broadcast_to(np.arange(300) // 140, (2, 300)),
            "local_window_size": (100, 20),
            "query_seq_lengths": jnp.array([300, 250]),
            "key_value_seq_lengths": jnp.array([300, 250]),
            "block_sizes": (128, 128),
        },
        {
            "q_segments": np.broadcast_to(np.arange(300) // 140, (2, 300)),
            "kv_segments": np.broadcast_to(np.arange(300) // 140, (2, 300)),
            "window": (100, 20),
            "q_len": [300, 250],
            "kv_len": [300, 250],
        },
    ),
    "seven_heads_a_group_default_blocks": (
        {"batch": 1, "queries": 520, "keys": 700, "heads": 7, "kv_heads": 1, "width": 80},
        {"is_causal": True},
        {"causal": True},
    ),
}


def expected(operands, options):
    q, k, v, g, g_lse = operands
    options = dict(options)
    plain = {name: options.pop(name) for name in ("softcap", "scale") if name in options}
    seen = oracle.pairs(q.shape, k.shape[1], **options)
    return oracle.attention(q, k, v, seen, g=g, g_lse=g_lse, **plain)


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_output_and_gradients_are_those_of_the_definition(case):
    """As in ``test_skip_attention``; memory holds NaN until it is written, and there are no races."""
    shape, options, oracle_options = (CASES | SLOW)[case]
    operands = problem(**shape)
    with tpu():
        found = run(*operands, implementation="mosaic_tpu", **options)
    assert_no_races()
    tolerances = (2e-2, 2e-2) if shape.get("dtype") == "bfloat16" else (2e-5, 1e-4)
    assert_agree(found, expected(operands, oracle_options), *tolerances)


def test_skipped_blocks_are_never_used():
    """NaN in all keys and values that nothing visits: the same results to the last bit, forward and backward."""
    mask = np.array([[[1, 0, 0], [1, 0, 1]], [[0, 0, 1], [0, 0, 0]]], bool)
    q, k, v, g, g_lse = problem(batch=2, queries=256, keys=384, heads=2, kv_heads=2, width=8)
    skip = SkipSpec.from_block_mask(mask, 128, 128)
    # Head 0 visits blocks 0 and 2, head 1 block 2; sequence 0 is not active.
    unseen = np.ones((2, 3, 2), bool)
    unseen[1, [0, 2], 0] = unseen[1, 2, 1] = False
    poison = jnp.asarray(np.where(unseen, np.nan, 0).repeat(128, axis=1)[..., None], jnp.float32)
    with tpu():
        f = functools.partial(run, skip=skip, active=jnp.array([False, True]), implementation="mosaic_tpu")
        for clean, dirty in zip(f(q, k, v, g, g_lse), f(q, k + poison, v + poison, g, g_lse), strict=True):
            np.testing.assert_array_equal(clean, dirty)
            assert not np.isnan(dirty).any()


def loads(lists, *, batch, heads, kv_heads, fold, of_keys, blocks):
    """What the index maps of keys and queries name, step by step: arrays [steps, axes], and which steps compute."""
    kernel = mosaic_tpu._Call(SPEC, batch, tuple(128 * n for n in blocks), heads, kv_heads, fold)
    share = kernel.heads // kv_heads
    schedule = tpu_schedule.column_schedule(lists, kv_heads, share) if of_keys else tpu_schedule.row_schedule(lists)
    entries, outputs = np.asarray(schedule.entries), np.asarray(schedule.owners)
    lengths = np.concatenate([np.zeros(3 * batch, np.int32), np.asarray(schedule.lenders(batch))])
    named = {"keys": "bkc", "queries": "bqr"}
    found, computes, owners = {name: [] for name in named}, [], []
    grid_heads = kv_heads if of_keys else kernel.heads
    for b, h, t in np.ndindex(batch, grid_heads, int(schedule.steps)):
        for name, axes in named.items():
            at = kernel._block(schedule, (None,) * 3, axes).index_map(b, h, t, entries, outputs, lengths)
            found[name].append([int(x) for x in at])
        step = schedule.step(b, h, t, entries, None)
        computes.append(bool(step.full) or bool(step.partial))
        if step.last:
            owners.append((b, h, int(schedule.owner(b, h, t, outputs))))
    assert sorted(owners) == list(np.ndindex(batch, grid_heads, blocks[1] if of_keys else blocks[0]))
    return {name: np.array(x) for name, x in found.items()}, np.array(computes)


@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_only_blocks_that_are_visited_are_loaded(of_keys, per_head):
    """A load is a change of what an index map names. Every key and query block that a computing step needs is named by
    it, no other key block is ever named, inactive sequences are not named at all, and a step without work loads no
    keys unless they are those of the first work to come."""
    rng = np.random.default_rng(3)
    heads, kv_heads, blocks = 4, 2, (5, 6)
    mask = rng.random((3, heads if per_head else 1, *blocks)) < 0.4
    mask[0] = mask[2, 0, 1:3] = False  # an inactive sequence, rows without a visit
    kinds = mask * rng.integers(visits.PARTIAL, visits.FULL + 1, mask.shape)
    lists = visits.listed(jnp.asarray(kinds.swapaxes(2, 3) if of_keys else kinds), blocks[0] if of_keys else blocks[1])
    fold = 1 if per_head else 2
    named, computes = loads(lists, batch=3, heads=heads, kv_heads=kv_heads, fold=fold, of_keys=of_keys, blocks=blocks)
    keys, queries = named["keys"], named["queries"]
    pairs = {(b, h, i, j) for b, h, i, j in zip(*np.nonzero(mask), strict=True)}
    if not per_head:
        pairs = {(b, h, i, j) for b, _, i, j in pairs for h in range(kv_heads)}
    work = [(b, h, i, j) for (b, _, j), (_, h, i) in zip(keys[computes], queries[computes], strict=True)]
    assert len(work) == len(set(work)) and set(work) == pairs  # every visit once, and nothing else
    assert (keys[:, 0] != 0).all() and (queries[:, 0] != 0).all()
    share = heads // fold // kv_heads
    assert {tuple(x) for x in keys} == {(b, h // share, j) for b, h, i, j in pairs}
    assert {tuple(x) for x in queries} == {(b, h, i) for b, h, i, j in pairs}
    changes = (keys[1:] != keys[:-1]).any(axis=1)
    assert changes.sum() < computes.sum()
    for t in np.flatnonzero(changes & ~computes[1:]):
        later = np.flatnonzero(computes[t + 1 :])
        assert (keys[t + 1] == keys[t + 1 + later[0]]).all()


def test_steps_are_as_many_as_visits():
    """The number of steps is a number the program computes; rows without a visit take one."""
    count = jnp.array([[[2, 0, 3]]], jnp.int32)
    lists = Visits(jnp.array([[[[0, 1, 1], [0, 0, 0], [0, 1, 2]]]], jnp.int32), count, count)
    assert int(tpu_schedule.row_schedule(lists).steps) == 2 + 1 + 3
    with tpu():
        q, k, v, *_ = problem(batch=1, queries=256, keys=256)
        f = functools.partial(attention, implementation="mosaic_tpu", block_sizes=(128, 128))
        program = str(jax.make_jaxpr(lambda mask: f(q, k, v, skip=SkipSpec.from_block_mask(mask, 128, 128)))(
            jnp.ones((2, 2), bool)
        ))  # fmt: skip
    assert re.search(r"grid=\(1, 2, (None|DynamicGridDim)\)", program), re.findall(r"grid=\([^)]*\)", program)


def test_too_long_lists_and_odd_blocks_are_refused():
    q = jax.ShapeDtypeStruct((8, 16384, 8, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((8, 8, 128, 128), bool)
    f = functools.partial(attention, implementation="mosaic_tpu")
    with tpu(), pytest.raises(NotImplementedError, match="do not fit into scalar memory"):
        jax.eval_shape(lambda q, mask: f(q, q, q, skip=SkipSpec.from_block_mask(mask, 128, 128)), q, mask)
    with tpu(), pytest.raises(ValueError, match="a multiple of 128 queries"):
        jax.eval_shape(lambda q: f(q, q, q, block_sizes=(96, 128)), q)
    with tpu(), pytest.raises(NotImplementedError, match="reads bfloat16 or float32, not float16"):
        jax.eval_shape(lambda q: f(q, q, q), jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.float16))


# Compiles forward and gradients on the first chip of a topology. Arguments: topology, cases: shape of q, keys,
# key/value heads, dtype, options, granularity of a mask (0: none), and whether it is traced.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from pallas_kernels.skip_attention import SkipSpec, attention

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
array = lambda shape, dtype: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)
found = []
for shape, keys, kv_heads, dtype, options, grain, segmented, backward in json.loads(sys.argv[2]):
    batch, queries, heads, width = shape
    kv = array((batch, keys, kv_heads, width), dtype)
    mask = array((heads, -(-queries // grain), -(-keys // grain)), "bool") if grain else None
    ids = [array((batch, n), "int32") for n in (queries, keys)] if segmented else [None, None]

    def f(q, k, v, mask, ids):
        skip = None if mask is None else SkipSpec.from_block_mask(mask, grain, grain)
        return attention(q, k, v, skip=skip, q_segment_ids=ids[0], kv_segment_ids=ids[1],
                         implementation="mosaic_tpu", **options)

    def gradients(q, k, v, mask, ids):
        out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, mask, ids), q, k, v)
        return vjp(out)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(gradients if backward else f).lower(array(shape, dtype), kv, kv, mask, ids).compile()
    found.append([compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()])
print(json.dumps(found))
"""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiled_for_real_tpus_nothing_grows_with_queries_times_keys(topology):
    """Temporaries beside the results: copies of the operands with heads first and the statistics of each query, far
    below the [Hq, T, S] scores (4 GB); the mask stays a mask of blocks."""
    pytest.importorskip("libtpu")
    shape, kv_heads = (1, 8192, 16, 128), 4
    cases = [
        (shape, 8192, kv_heads, "bfloat16", {"is_causal": True}, 0, False, False),
        (shape, 8192, kv_heads, "bfloat16", {"is_causal": True}, 0, False, True),
        (shape, 8192, kv_heads, "bfloat16", {"is_causal": True}, 512, False, True),
    ]
    found = compile_in_a_process(COMPILE, topology, json.dumps(cases), environment=TPU)
    size = 2 * 8192 * 16 * 128  # of q
    print(topology, [f"{temporary / 2**20:.1f} MB" for temporary, _ in found])
    for (temporary, text), operands in zip(found, (1.5, 4.5, 4.5), strict=True):
        assert temporary <= operands * size
        names = set(re.findall(r"skip_attention_(\w+)", text))
        assert {"forward"} <= names
        assert not re.search(r"\[(?:\d+,)*8192,8192\]", text)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_option_compiles(topology):
    pytest.importorskip("libtpu")
    cases = [
        ((2, 300, 4, 80), 500, 2, "float32", {"is_causal": True, "local_window_size": [100, None]}, 0, True, True),
        ((1, 1, 7, 64), 1, 1, "bfloat16", {"logits_soft_cap": 20.0}, 0, False, True),
        ((2, 700, 8, 32), 700, 8, "bfloat16", {"is_causal": True}, 128, True, True),
        ((1, 1024, 32, 128), 1024, 1, "bfloat16", {"is_causal": True}, 0, False, True),
        ((1, 1024, 4, 256), 1024, 2, "float32", {}, 256, False, True),
    ]
    assert len(compile_in_a_process(COMPILE, topology, json.dumps(cases), environment=TPU)) == len(cases)


# Sequences over "data" and heads over "tensor", on four chips, forward and backward.
SPREAD = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.skip_attention import SkipSpec, attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
array = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
split = P("data", None, "tensor")

def local(q, k, v, mask, lengths):
    out = attention(q, k, v, skip=SkipSpec.from_block_mask(mask, 512, 512), is_causal=True,
                    key_value_seq_lengths=lengths, implementation="mosaic_tpu")
    return jax.lax.psum(jnp.square(out.astype(jnp.float32)).sum(), ("data", "tensor"))

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    spread = jax.shard_map(local, mesh=mesh.abstract_mesh, out_specs=P(),
                           in_specs=(split, split, split, P("tensor"), P("data")))
    compiled = jax.jit(jax.grad(spread, (0, 1, 2))).lower(
        array((4, 2048, 8, 128), jnp.bfloat16, split), array((4, 2048, 4, 128), jnp.bfloat16, split),
        array((4, 2048, 4, 128), jnp.bfloat16, split), array((8, 4, 4), bool, P("tensor")),
        array((4,), jnp.int32, P("data"))).compile()
print(json.dumps({"text": compiled.as_text()}))
"""


@pytest.mark.tpu_aot
def test_spread_over_chips_each_works_on_its_own_heads_and_sequences():
    """The kernels are there, and the only communication is that of the scalar loss, if any."""
    pytest.importorskip("libtpu")
    text = compile_in_a_process(SPREAD, environment=TPU)["text"]
    assert all(f"skip_attention_{name}" in text for name in ("forward", "dq", "dkv"))
    assert not re.search(r"all-gather|all-to-all|collective-permute", text)
    assert not re.search(r"all-reduce\(\S*\[\d+,", text)


@pytest.mark.slow
def test_vmap_is_a_loop_over_the_kernel():
    q, k, v, *_ = problem(batch=2, queries=130, keys=130, heads=1, kv_heads=1)
    masks = jnp.asarray(mask_of(2, 2, 2, seed=4))
    with tpu():
        f = functools.partial(attention, implementation="mosaic_tpu")
        together = jax.vmap(
            lambda q, k, v, m: f(q[None], k[None], v[None], skip=SkipSpec.from_block_mask(m, 128, 128))
        )(q, k, v, masks)
    for n in range(2):
        seen = oracle.pairs((1, *q.shape[1:]), 130, block_mask=np.asarray(masks[n]), blocks=(128, 128))
        want = oracle.attention(q[n : n + 1], k[n : n + 1], v[n : n + 1], seen)[0]
        np.testing.assert_allclose(together[n], want, atol=2e-5)
