"""``attention``: every form against the definition in float64, what is left out, the lists, the errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.skip_attention import SkipSpec, attention, inputs, visits, work_done
from pallas_kernels.skip_attention.reference import Places, Spec
from tests.pallas_kernels import attention_oracle as oracle

RNG = np.random.default_rng


def problem(batch=2, queries=37, keys=53, heads=4, kv_heads=2, width=8, dtype="float32", seed=0):
    """q, k, v and the cotangents of output and log-sum-exp."""
    rng = RNG(seed)
    shapes = [(batch, queries, heads, width)] + [(batch, keys, kv_heads, width)] * 2
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return q, k, v, rng.normal(size=shapes[0]), rng.normal(size=(batch, heads, queries))


def mask_of(*shape, seed=1, density=0.6):
    return RNG(seed).random(shape) < density


def run(q, k, v, g, g_lse, **options):
    """Output, log-sum-exp and gradients, as float64 arrays; -inf in the log-sum-exp takes part in nothing."""

    def f(q, k, v):
        out, lse = attention(q, k, v, return_lse=True, **options)
        wide = jnp.promote_types(out.dtype, jnp.float32)
        total = (out.astype(wide) * g).sum() + jnp.where(lse == -jnp.inf, 0, lse * g_lse).sum()
        return total, (out, lse)

    (_, (out, lse)), found = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float64) for x in (out, lse, *found)]


# Name -> (shape of the problem, options of attention, the same for the oracle). Lengths are no multiples of blocks.
CASES = {
    "all_visible": ({}, {}, {}),
    "causal": ({"queries": 53}, {"is_causal": True}, {"causal": True}),
    "causal_last_queries": ({}, {"is_causal": True}, {"causal": True}),
    "more_queries_than_keys": ({"queries": 40, "keys": 24}, {"is_causal": True}, {"causal": True}),
    "window": ({}, {"local_window_size": (9, 3)}, {"window": (9, 3)}),
    "window_of_one_side": (
        {},
        {"local_window_size": (20, None), "is_causal": True},
        {"window": (20, None), "causal": True},
    ),
    "block_mask": (
        {},
        {"skip": SkipSpec.from_block_mask(mask_of(3, 4), 16, 16)},
        {"block_mask": mask_of(3, 4), "blocks": (16, 16)},
    ),
    "block_mask_of_heads_causal": (
        {"heads": 6, "kv_heads": 2, "queries": 53},
        {"skip": SkipSpec.from_block_mask(mask_of(6, 4, 2), 16, 32), "is_causal": True},
        {"block_mask": mask_of(6, 4, 2), "blocks": (16, 32), "causal": True},
    ),
    "block_mask_of_sequences": (
        {},
        {"skip": SkipSpec.from_block_mask(mask_of(2, 1, 3, 4), 16, 16)},
        {"block_mask": mask_of(2, 1, 3, 4), "blocks": (16, 16)},
    ),
    "lengths": (
        {},
        {"query_seq_lengths": np.array([20, 37]), "key_value_seq_lengths": jnp.array([30, 0]), "is_causal": True},
        {"q_len": [20, 37], "kv_len": [30, 0], "causal": True},
    ),
    "segments": (
        {"queries": 53},
        {
            "q_segment_ids": np.arange(53)[None] // np.array([[20], [17]]),
            "kv_segment_ids": np.arange(53)[None] // np.array([[20], [17]]),
            "is_causal": True,
        },
        {
            "q_segments": np.arange(53)[None] // np.array([[20], [17]]),
            "kv_segments": np.arange(53)[None] // np.array([[20], [17]]),
            "causal": True,
        },
    ),
    "everything": (
        {"batch": 3, "heads": 4, "kv_heads": 1, "queries": 53},
        {
            "skip": SkipSpec.from_block_mask(jnp.asarray(mask_of(3, 4, 4, 4, density=0.8)), 16, 16),
            "is_causal": True,
            "local_window_size": (30, 0),
            "query_seq_lengths": jnp.array([53, 40, 53]),
            "key_value_seq_lengths": jnp.array([53, 50, 53]),
            "q_segment_ids": jnp.asarray(np.broadcast_to(np.arange(53) // 25, (3, 53))),
            "kv_segment_ids": jnp.asarray(np.broadcast_to(np.arange(53) // 25, (3, 53))),
            "active": jnp.array([True, True, False]),
            "logits_soft_cap": 2.0,
            "scale": 0.7,
        },
        {
            "block_mask": mask_of(3, 4, 4, 4, density=0.8),
            "blocks": (16, 16),
            "causal": True,
            "window": (30, 0),
            "q_len": [53, 40, 53],
            "kv_len": [53, 50, 53],
            "q_segments": np.broadcast_to(np.arange(53) // 25, (3, 53)),
            "kv_segments": np.broadcast_to(np.arange(53) // 25, (3, 53)),
            "active": [True, True, False],
            "softcap": 2.0,
            "scale": 0.7,
        },
    ),
    "one_token_seven_heads_a_group": (
        {"batch": 1, "queries": 1, "keys": 1, "heads": 7, "kv_heads": 1, "width": 80},
        {"is_causal": True},
        {"causal": True},
    ),
}


def expected(operands, oracle_options):
    q, k, v, g, g_lse = operands
    options = dict(oracle_options)
    plain = {name: options.pop(name) for name in ("softcap", "scale") if name in options}
    seen = oracle.pairs(q.shape, k.shape[1], **options)
    return seen, oracle.attention(q, k, v, seen, g=g, g_lse=g_lse, **plain)


def assert_agree(found, wanted, output, gradients):
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        tolerance = gradients if name[0] == "d" else 2e-5 if name == "lse" else output
        scale = np.abs(want[np.isfinite(want)]).max(initial=1)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize(
    ("implementation", "case"),
    [("chunked", case) for case in CASES]
    + [("reference", case) for case in ("causal_last_queries", "block_mask_of_heads_causal", "lengths", "everything")],
)
def test_output_and_gradients_are_those_of_the_definition(implementation, case):
    """float32 against float64: 2e-5 for outputs, 1e-4 of the largest for gradients (sums of about 50 terms)."""
    shape, options, oracle_options = CASES[case]
    operands = problem(**shape)
    blocks = {"block_sizes": (16, 16)}
    found = run(*operands, implementation=implementation, **options, **blocks)
    seen, wanted = expected(operands, oracle_options)
    assert_agree(found, wanted, 2e-5, 1e-4)
    blind = ~seen.any(axis=-1)
    out, lse, dq, dk, dv = found
    assert (out.swapaxes(1, 2)[blind] == 0).all() and (dq.swapaxes(1, 2)[blind] == 0).all()
    assert (lse[blind] == -np.inf).all()
    group = operands[0].shape[2] // operands[1].shape[2]
    unseen = ~seen.any(axis=2).reshape(seen.shape[0], -1, group, seen.shape[3]).any(axis=2)
    assert (dk.swapaxes(1, 2)[unseen] == 0).all() and (dv.swapaxes(1, 2)[unseen] == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(dtype):
    """Probabilities and results are rounded to 16 bits: 2e-2 of the largest (bfloat16 has 2**-8)."""
    operands = problem(dtype=dtype)
    found = run(*operands, implementation="chunked", is_causal=True, block_sizes=(16, 16))
    _, wanted = expected(operands, {"causal": True})
    assert_agree(found, wanted, 2e-2, 2e-2)


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        operands = problem(dtype="float64")
        for implementation in ("chunked", "reference"):
            found = run(*operands, implementation=implementation, is_causal=True, block_sizes=(16, 16))
            for got, want in zip(found, expected(operands, {"causal": True})[1], strict=True):
                np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_padding_and_inactive_sequences_may_hold_nan(implementation):
    q, k, v, g, g_lse = problem(batch=3)
    q_len, kv_len = np.array([20, 37, 37]), np.array([30, 53, 53])
    options = {"query_seq_lengths": q_len, "key_value_seq_lengths": kv_len, "active": np.array([True, True, False])}
    clean = run(q, k, v, g, g_lse, implementation=implementation, is_causal=True, block_sizes=(16, 16), **options)
    real = np.where(options["active"], 1, 0)
    q, k, v = (
        x.at[jnp.arange(x.shape[1])[None] >= (length * real)[:, None]].set(jnp.nan)
        for x, length in ((q, q_len), (k, kv_len), (v, kv_len))
    )
    dirty = run(q, k, v, g, g_lse, implementation=implementation, is_causal=True, block_sizes=(16, 16), **options)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_skipped_blocks_are_never_used():
    """NaN in keys and values that no query block visits changes nothing: they are not read, forward or backward."""
    mask = mask_of(4, 4)
    mask[:, 2] = False
    options = {"skip": SkipSpec.from_block_mask(mask, 16, 16), "implementation": "chunked"}
    q, k, v, g, g_lse = problem(queries=64, keys=64)
    clean = run(q, k, v, g, g_lse, **options)
    dirty = run(q, k.at[:, 32:48].set(jnp.nan), v.at[:, 32:48].set(jnp.nan), g, g_lse, **options)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_work_is_done_for_what_is_skipped():
    """The loops of the compiled program have no other trip counts than those of the lists: NaN is met exactly in the
    visited blocks, one at a time. Each (query block, key block) in turn is the only one that is poisoned."""
    mask = mask_of(3, 3, seed=5)
    q, k, v, *_ = problem(batch=1, queries=48, keys=48, heads=1, kv_heads=1)
    f = jax.jit(functools.partial(attention, skip=SkipSpec.from_block_mask(mask, 16, 16), implementation="chunked"))
    for j in range(3):
        out = np.asarray(f(q, k, v.at[:, 16 * j : 16 * j + 16].set(jnp.nan)))[0, :, 0, 0]
        assert (np.isnan(out).reshape(3, 16).all(axis=1) == mask[:, j]).all()
        assert (np.isnan(out).reshape(3, 16).any(axis=1) == mask[:, j]).all()


def test_agrees_with_jax():
    q, k, v, *_ = problem(queries=53)
    for window in (None, (9, 0)):
        ours = attention(q, k, v, is_causal=True, local_window_size=window)
        theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window)
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_traced_choices_compile_once():
    q, k, v, *_ = problem()
    traces = 0

    @jax.jit
    def f(skip, lengths, active):
        nonlocal traces
        traces += 1
        return attention(q, k, v, skip=skip, key_value_seq_lengths=lengths, active=active, implementation="chunked")

    for seed in range(3):
        mask, lengths = mask_of(3, 4, seed=seed), np.array([50 - seed, 20])
        active = np.array([True, seed != 1])
        found = f(SkipSpec.from_block_mask(jnp.asarray(mask), 16, 16), jnp.asarray(lengths), jnp.asarray(active))
        seen = oracle.pairs(q.shape, 53, block_mask=mask, blocks=(16, 16), kv_len=lengths, active=active)
        np.testing.assert_allclose(found, oracle.attention(q, k, v, seen)[0], atol=2e-5)
    assert traces == 1


def test_vmap_is_a_batch():
    q, k, v, *_ = problem(batch=6)
    masks = jnp.asarray(mask_of(3, 1, 1, 3, 4))
    split = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    for implementation in ("chunked", "reference"):
        f = functools.partial(attention, implementation=implementation, block_sizes=(16, 16))
        together = jax.vmap(lambda q, k, v, m, f=f: f(q, k, v, skip=SkipSpec.from_block_mask(m, 16, 16)))(*split, masks)
        for n in range(3):
            alone = f(*(x[n] for x in split), skip=SkipSpec.from_block_mask(masks[n], 16, 16))
            np.testing.assert_allclose(together[n], alone, atol=1e-6)


def test_heads_and_batch_over_devices():
    """The same gradients with sequences split over one mesh axis and heads over another, the block mask shared."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    operands = problem()
    q, k, v, g, _ = operands
    skip = SkipSpec.from_block_mask(mask_of(3, 4), 16, 16)
    lengths = jnp.array([50, 30])
    spec = P("data", None, "tensor")

    def local(q, k, v, lengths):
        return attention(q, k, v, skip=skip, is_causal=True, key_value_seq_lengths=lengths, block_sizes=(16, 16))

    def loss(q, k, v):
        f = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec, P("data")), out_specs=spec)
        return (f(q, k, v, lengths) * g).sum()

    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    found = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed)
    wanted = jax.grad(lambda *x: (local(*x, lengths) * g).sum(), (0, 1, 2))(q, k, v)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    q_len=st.integers(0, 40),
    kv_len=st.integers(0, 40),
    causal=st.booleans(),
    window=st.tuples(st.none() | st.integers(0, 20), st.none() | st.integers(0, 20)),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    segments=st.booleans(),
)
def test_lists_are_exactly_the_blocks_with_something_visible(
    queries, keys, q_len, kv_len, causal, window, blocks, segments
):
    """Every block with a visible pair is listed, others are not (with segments: may be); "full" means every pair."""
    q_len, kv_len = min(q_len, queries), min(kv_len, keys)
    ids = (np.arange(queries)[None] // 7, np.arange(keys)[None] // 7) if segments else (None, None)
    seen = oracle.pairs(
        (1, queries, 1, 1), keys, causal=causal, window=window, q_len=[q_len], kv_len=[kv_len],
        q_segments=ids[0], kv_segments=ids[1],
    )[0, 0]  # fmt: skip
    spec = Spec("chunked", dispatch.Target("cpu"), 1.0, None, causal, window, *blocks, segments, False)
    lengths = (np.array([x], np.int32) for x in (q_len, kv_len, kv_len - q_len))
    places = Places(*lengths, *ids)
    rows, columns = visits.lists(spec, places, queries, keys)
    tall, wide = -(-queries // blocks[0]), -(-keys // blocks[1])
    padded = np.zeros((tall * blocks[0], wide * blocks[1]), bool)
    padded[:queries, :keys] = seen
    tiles = padded.reshape(tall, blocks[0], wide, blocks[1])
    any_pair, every_pair = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    for lists, some, every in ((rows, any_pair, every_pair), (columns, any_pair.T, every_pair.T)):
        for n in range(len(some)):
            index, full, count = (np.asarray(x)[0, 0, n] for x in lists)
            named = index[:count].tolist()
            assert set(np.flatnonzero(some[n])) <= set(named) and len(set(named)) == len(named)
            if segments:
                assert full == 0
                continue
            assert named[:full] == np.flatnonzero(every[n]).tolist()
            assert named[full:] == np.flatnonzero(some[n] & ~every[n]).tolist()
            assert (index[count:] == (named[-1] if named else index[0])).all() and (index >= 0).all()


@pytest.mark.parametrize(("blocks", "window"), [((16, 8), (None, None)), ((4, 3), (30, 0))])
def test_lists_made_on_the_device_are_the_same(blocks, window):
    """Few blocks are put in order by comparison, many by a sort. The widths differ: there it is a bound."""
    queries = keys = 200
    spec = Spec("chunked", dispatch.Target("cpu"), 1.0, None, True, window, *blocks, False, True)
    places = Places(*(np.array(x, np.int32) for x in ([200, 90], [200, 150], [0, 60])))
    mask = mask_of(2, 3, -(-queries // blocks[0]), -(-keys // blocks[1]))
    known = visits.lists(spec, places, queries, keys, mask)
    made = jax.jit(lambda *x: visits.lists(spec, x[0], queries, keys, x[1]))(places, mask)
    for here, there in zip(known, made, strict=True):
        width = here.index.shape[-1]
        assert there.index.shape[-1] >= width
        np.testing.assert_array_equal(here.index, there.index[..., :width])
        np.testing.assert_array_equal(here.full, there.full)
        np.testing.assert_array_equal(here.count, there.count)


def test_documents_skip_what_lies_between_them():
    """Four documents of 128 tokens, blocks of 32: of 16 x 16 blocks only the 4 triangles of 10 are visited."""
    ids = np.arange(512)[None] // 128
    shape = (1, 512, 1, 8)
    done = work_done(shape, shape, q_segment_ids=ids, kv_segment_ids=ids, is_causal=True, block_sizes=(32, 32))
    assert done["blocks_visited"] == 4 * 10 and done["blocks_total"] == 256


def test_work_is_counted_from_the_lists():
    shape, kv_shape = (2, 1024, 4, 64), (2, 1024, 2, 64)
    skip = SkipSpec.sliding(8, 128, window=2, sink=1)
    done = work_done(shape, kv_shape, skip=skip, is_causal=True)
    blocks = 2 * 4 * (1 + 2 + 6 * 3)
    assert done == {
        "blocks_visited": blocks,
        "blocks_total": 2 * 4 * 64,
        "flops": 4 * 64 * 128 * 128 * blocks,
        "kv_bytes": 2 * 64 * 128 * 2 * blocks,
    }
    half = work_done(shape, kv_shape, skip=skip, is_causal=True, active=np.array([True, False]))
    assert half["blocks_visited"] == blocks // 2


def test_builders():
    strided = SkipSpec.strided(6, 16, stride=3, local=2).mask
    assert strided[5].tolist() == [True, False, False, True, True, True]
    assert SkipSpec.sliding(6, 16, window=2).mask[4].tolist() == [True, False, False, True, True, False]
    scores = jnp.where(jnp.tril(jnp.ones((4, 4), bool)), jnp.arange(4.0), -jnp.inf)
    top = SkipSpec.topk(scores, 2, 16, 16)
    assert top.mask.tolist()[0] == [True, False, False, False] and top.mask.tolist()[3] == [False, False, True, True]
    mask = mask_of(2, 3, 4)
    index = np.argsort(~mask, axis=-1, kind="stable")
    lists = SkipSpec.from_lists(index[..., :3], np.minimum(mask.sum(-1), 3), 4, 16, 16)
    assert lists.most == 3
    assert (lists.mask == (mask & (mask.cumsum(-1) <= 3))).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": jnp.zeros((2, 52, 2, 8))}, ValueError, r"k and v \[B, S, Hkv, d\] alike"),
        ({"q": jnp.zeros((2, 37, 3, 8))}, ValueError, "Hq must be a multiple of Hkv"),
        ({"q": jnp.zeros((2, 37, 4, 8), jnp.bfloat16)}, TypeError, "the same dtype"),
        ({"skip": SkipSpec.from_block_mask(np.ones((3, 3), bool), 16, 16)}, ValueError, r"skip.mask \(3, 3\)"),
        ({"query_seq_lengths": np.array([38, 1])}, ValueError, r"query_seq_lengths must lie in \[0, 37\]"),
        ({"key_value_seq_lengths": np.array([3.0, 1])}, ValueError, "key_value_seq_lengths must be integers"),
        ({"q_segment_ids": np.zeros((2, 37), int)}, ValueError, "must be given together"),
        ({"active": np.array([1, 0])}, ValueError, "active must be bool"),
        ({"local_window_size": (-1, 2)}, ValueError, "local_window_size"),
        ({"logits_soft_cap": -1.0}, ValueError, "logits_soft_cap must be positive"),
        ({"scale": jnp.float32(1)}, TypeError, "scale must be a Python number"),
        ({"block_sizes": (0, 2)}, ValueError, "block_sizes must be two positive ints"),
        (
            {"skip": SkipSpec.from_block_mask(np.ones((3, 4), bool), 16, 16), "block_sizes": (32, 16)},
            ValueError,
            r"must divide the blocks of skip, \(16, 16\)",
        ),
        ({"implementation": "splash"}, ValueError, "does not exist"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "needs an NVIDIA Hopper GPU"),
        ({"implementation": "mosaic_tpu"}, NotImplementedError, "needs a TPU v4 or later"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    q, k, v, *_ = problem()
    with pytest.raises(error, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})
    assert inputs  # the checks live there


@pytest.mark.parametrize("shape", [{"queries": 0}, {"keys": 0}, {"batch": 0}])
def test_nothing_gives_nothing(shape):
    q, k, v, g, g_lse = problem(**shape)
    for got in run(q, k, v, g, g_lse):
        assert (got == np.where(np.isneginf(got), got, 0)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
def test_on_a_gpu_the_default_gives_the_definition(width):
    """bfloat16, everything at once, the choices traced; 2e-2 of the largest as in ``test_sixteen_bits``."""
    mask, lengths, active = mask_of(3, 4, 4, 4, density=0.8), np.array([500, 400, 500]), np.array([True, True, False])
    operands = problem(batch=3, queries=500, keys=500, heads=4, kv_heads=2, width=width, dtype="bfloat16")
    found = run(
        *operands,
        skip=SkipSpec.from_block_mask(jnp.asarray(mask), 128, 128),
        is_causal=True,
        local_window_size=(300, 0),
        key_value_seq_lengths=jnp.asarray(lengths),
        query_seq_lengths=jnp.asarray(lengths),
        active=jnp.asarray(active),
        logits_soft_cap=5.0,
    )
    same = {"block_mask": mask, "blocks": (128, 128), "causal": True, "window": (300, 0), "softcap": 5.0}
    _, wanted = expected(operands, same | {"q_len": lengths, "kv_len": lengths, "active": active})
    for name, got, want in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        finite = np.isfinite(want)
        error = np.abs(got[finite] - want[finite]).max() / np.abs(want[finite]).max()
        assert error < (1e-4 if name == "lse" else 2e-2), (name, error)
    assert (np.isneginf(found[1]) == np.isneginf(wanted[1])).all()
    assert (found[0][2] == 0).all() and all((x[2] == 0).all() for x in found[2:])


def test_chunked_has_second_derivatives():
    """Forward over reverse mode, as the reference: float32 sums in another order, 1e-4 of the largest."""
    q = jax.random.normal(jax.random.key(0), (1, 10, 2, 8))

    def along(implementation):
        def total(q):
            return (attention(q, q, q, is_causal=True, implementation=implementation, block_sizes=(4, 4)) ** 2).sum()

        return jax.jvp(jax.grad(total), (q,), (jnp.cos(q),))[1]

    want = along("reference")
    np.testing.assert_allclose(along("chunked"), want, atol=1e-4 * jnp.abs(want).max())
