"""Gradient statistics against closed forms, the tests' laws, and the traps of the AdAdaGrad card."""

import functools
import json
import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxskip.optim import scale_by_adagrad, scale_by_sample_schedule
from jaxskip.training import (
    AdaptiveBatch,
    AdaptiveBatchState,
    BucketPrograms,
    Checkpoints,
    CoordinateTest,
    GradStats,
    InnerProductTest,
    LeafTest,
    NormTest,
    epoch_rows,
    gradient_stats,
    make_mesh,
    rebatch,
    total_variance,
)

RNG = np.random.default_rng(0)
B, D, K = 48, 5, 3
BATCH = {"x": RNG.normal(size=(B, D)).astype(np.float32), "y": RNG.integers(0, K, B)}
PARAMS = {"w": RNG.normal(size=(D, K)).astype(np.float32), "b": RNG.normal(size=K).astype(np.float32)}


def softmax_loss(params, batch):
    logits = batch["x"] @ params["w"] + params["b"][None]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


def closed_form():
    """Per-sample gradients in float64: outer(x, p - y) and p - y."""
    logits = BATCH["x"].astype(np.float64) @ PARAMS["w"] + PARAMS["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    off = p / p.sum(1, keepdims=True) - np.eye(K)[BATCH["y"]]
    return {"w": BATCH["x"][:, :, None] * off[:, None, :], "b": off}


@functools.cache
def stats(**kwargs):
    return jax.jit(lambda p, b: gradient_stats(softmax_loss, p, b, **kwargs))(PARAMS, BATCH)


def fake(var, sq_norm):
    return GradStats(0.0, None, 0, leaf_var=jnp.atleast_1d(var), leaf_sq_norm=jnp.atleast_1d(sq_norm))


# Statistics


@pytest.mark.parametrize("detail", [False, True])
def test_per_sample_statistics_are_the_closed_form(detail):
    """Card test 1: rtol 1e-5, chunks of any size."""
    got = stats(mode="per_sample", chunk=16, detail=detail)
    g = closed_form()
    flat = np.concatenate([g["b"], g["w"].reshape(B, -1)], axis=1)
    np.testing.assert_allclose(got.grad["w"], g["w"].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.var_l1, flat.var(0, ddof=1).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        got.leaf_var, [flat[:, :K].var(0, ddof=1).sum(), flat[:, K:].var(0, ddof=1).sum()], rtol=1e-5
    )
    np.testing.assert_allclose(got.sq_norm, (flat.mean(0) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(got.loss, softmax_loss(PARAMS, BATCH), rtol=1e-5)
    assert int(got.n) == B
    if detail:
        np.testing.assert_allclose(got.var["w"], g["w"].var(0, ddof=1), rtol=1e-4)
        np.testing.assert_allclose(got.var_ip, (flat @ flat.mean(0)).var(ddof=1), rtol=1e-4)
        b, w = flat[:, :K], flat[:, K:]
        by_leaf = [(b @ b.mean(0)).var(ddof=1), (w @ w.mean(0)).var(ddof=1)]
        np.testing.assert_allclose(got.leaf_var_ip, by_leaf, rtol=1e-4)


def test_chunk_statistics_without_and_with_detail_agree():
    """The streamed and the two-pass form of the same estimator, 1e-5."""
    for mode, chunk in (("chunk", 4), ("per_sample", 16)):
        streamed, kept = (stats(mode=mode, chunk=chunk, detail=detail) for detail in (False, True))
        for a, b in zip(streamed[:5], kept[:5], strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_the_chunk_estimator_is_unbiased():
    """Card test 2: the mean over 2000 random splits is within 3 % of the per-sample value."""
    orders = jax.vmap(lambda key: jax.random.permutation(key, B))(jax.random.split(jax.random.key(0), 2000))

    @jax.jit
    def mean_over_splits(params, batch):
        g = jax.vmap(jax.grad(softmax_loss), in_axes=(None, 0))(params, jax.tree.map(lambda x: x[:, None], batch))
        linear = lambda p, rows: jnp.mean(sum(jnp.sum(p[k][None] * rows[k], range(1, rows[k].ndim)) for k in p))  # noqa: E731
        one = lambda order: gradient_stats(linear, params, jax.tree.map(lambda x: x[order], g), chunk=8).var_l1  # noqa: E731
        return jnp.mean(jax.lax.map(one, orders, batch_size=200))

    np.testing.assert_allclose(mean_over_splits(PARAMS, BATCH), stats(mode="per_sample", chunk=16).var_l1, rtol=0.03)


def test_law_of_total_variance():
    """Card test 3: exact (1e-6) with biased group variances; the authors' unbiased ones add mean(var) / c."""
    g = closed_form()["w"].reshape(6, 8, -1)
    pooled = g.reshape(B, -1).var(0)
    np.testing.assert_allclose(
        total_variance(jnp.asarray(g.mean(1)), jnp.asarray(g.var(1))), pooled, rtol=1e-6, atol=1e-6
    )
    official = total_variance(jnp.asarray(g.mean(1)), jnp.asarray(g.var(1, ddof=1)))
    np.testing.assert_allclose(official, pooled + g.var(1, ddof=1).mean(0) / 8, rtol=1e-5, atol=1e-6)


def test_small_noise_on_a_large_gradient_survives_float32():
    """The one-pass form must not subtract sums of squares: noise 1e-3 on a gradient of 1e3."""
    noise = RNG.normal(size=64).astype(np.float32) * 1e-3
    batch = {"x": (np.float32(1e3) + noise)[:, None]}
    loss = lambda p, rows: jnp.mean(p * rows["x"][:, 0])  # noqa: E731
    got = jax.jit(lambda: gradient_stats(loss, jnp.float32(0), batch, mode="per_sample", chunk=8).var_l1)()
    # Rounding 1000.001 to float32 alone moves the noise by 3 %.
    np.testing.assert_allclose(got, batch["x"].astype(np.float64).var(ddof=1), rtol=1e-2)


def test_accumulation_over_a_dynamic_count_is_one_program():
    """Card test 6: 2, 3 and 8 chunks (and 1, whose variance is unknown) equal the one-shot gradient, 1e-6."""

    @jax.jit
    def step(params, rows, count):
        gather = lambda p, r: softmax_loss(p, jax.tree.map(lambda x: x[r], jax.tree.map(jnp.asarray, BATCH)))  # noqa: E731
        return gradient_stats(gather, params, rows, chunk=6, count=count)

    rows = jnp.asarray(epoch_rows(B, 0, B))
    for count in (1, 2, 3, 8):
        used = np.asarray(rows)[: 6 * count]
        got = step(PARAMS, rows.at[6 * count :].set(0), count)
        wanted = jax.tree.map(lambda g: g[used].mean(0), closed_form())  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got.grad, wanted)
        assert int(got.n) == 6 * count
        assert math.isnan(got.var_l1) == (count == 1)
    assert step._cache_size() == 1


@pytest.mark.multidevice
@pytest.mark.parametrize("form", ["jit", "shard_map"])
def test_eight_devices_ask_for_the_same_batch_as_one(form):
    """Card test 7: statistics to 1e-5, the decision exactly; in shard_map chunks are local and psums few."""
    mesh = make_mesh(8, 1, 1)
    test = NormTest(eta=0.2)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))

    def plain(p, b):
        return gradient_stats(softmax_loss, p, b, chunk=2 if form == "shard_map" else 8)

    if form == "jit":
        many, one = jax.jit(plain), jax.jit(plain)(PARAMS, BATCH)
    else:
        local = functools.partial(gradient_stats, softmax_loss, chunk=2, axis_name="data")
        many = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
        # Rows in the order in which one device deals them out to the same chunks: 6 rows a device, 3 chunks of 2.
        order = np.arange(B).reshape(8, 2, 3).transpose(1, 0, 2).reshape(-1)
        one = jax.jit(plain)(PARAMS, jax.tree.map(lambda x: x[order], BATCH))
        lowered = many.lower(params, batch).as_text()
        assert lowered.count("all_reduce") <= 8  # not one a chunk: loss, n, two leaves, variances
    got = many(params, batch)
    for a, b in zip(got[:5], one[:5], strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)
    controller = AdaptiveBatch(test, b0=B, b_max=64 * B, max_growth=math.inf)
    sizes = [controller.update(controller.init(), test.terms(s)).batch_size for s in (got, one)]
    assert sizes[0] == sizes[1] > B


def test_vmap_over_seeds():
    stack = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    got = jax.jit(jax.vmap(lambda p: gradient_stats(softmax_loss, p, BATCH, chunk=4).var_l1))(stack)
    np.testing.assert_allclose(got[0], stats(chunk=4).var_l1, rtol=1e-5)


def test_bf16_gradients_have_float32_statistics():
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    got = jax.jit(lambda p: gradient_stats(softmax_loss, p, BATCH, chunk=4))(params)
    assert got.grad["w"].dtype == jnp.bfloat16 and got.leaf_var.dtype == jnp.float32
    np.testing.assert_allclose(got.var_l1, stats(chunk=4).var_l1, rtol=0.1)  # bf16 gradients: 3 digits each


# Tests


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("b", [16, 64, 256])
def test_pure_noise_asks_for_b_over_eta_squared(eta, b):
    """Card test 4 and trap 1: E T = b / eta^2 up to 5 %, here in the ratio of means over many batches."""
    g = jnp.asarray(np.random.default_rng(b).normal(size=(40, b, 500)).astype(np.float32))
    stat = jax.jit(
        jax.vmap(lambda x: NormTest(eta).terms(fake(jnp.sum(jnp.var(x, 0, ddof=1)), jnp.sum(x.mean(0) ** 2))))
    )
    terms = np.asarray(stat(g)).mean(0)
    np.testing.assert_allclose(terms[0, 0] / terms[0, 1] / b, 1 / eta**2, rtol=0.05)


def test_inner_product_and_augmented_tests():
    """Definitions on per-sample gradients; per_leaf is the authors' sum over tensors (trap 3), which differs."""
    g = closed_form()
    flat = np.concatenate([g["b"], g["w"].reshape(B, -1)], axis=1)
    mean = flat.mean(0)
    sq = mean @ mean
    along = (flat @ mean).var(ddof=1)
    across = (flat - np.outer(flat @ mean, mean) / sq).var(0, ddof=1).sum()
    got = np.asarray(InnerProductTest(theta=0.5, nu=2.0).terms(stats(mode="per_sample", chunk=16, detail=True)))
    np.testing.assert_allclose(got[:, 0] / got[:, 1], [along / (0.25 * sq**2), across / (4 * sq)], rtol=1e-4)
    along, across = 0.0, 0.0
    for part in (flat[:, :K], flat[:, K:]):
        m = part.mean(0)
        along += (part @ m).var(ddof=1)
        across += (part - np.outer(part @ m, m) / (m @ m)).var(0, ddof=1).sum()
    parity = InnerProductTest(theta=0.5, nu=2.0, per_leaf=True).terms(stats(mode="per_sample", chunk=16, detail=True))
    parity = np.asarray(parity)
    np.testing.assert_allclose(parity[:, 0] / parity[:, 1], [along / (0.25 * sq**2), across / (4 * sq)], rtol=1e-4)
    assert not np.allclose(parity[0, 0], got[0, 0], rtol=1e-3)
    assert InnerProductTest().terms(stats(mode="per_sample", chunk=16, detail=True)).shape == (1, 2)


def test_coordinate_test_and_dead_coordinates():
    """Trap 2: the literal maximum is infinite at once; dead coordinates (0 / 0) do not count; the median is usable."""
    stat = GradStats(
        0.0,
        {"w": jnp.array([1.0, 2.0, 0.0, 0.0])},
        4,
        leaf_var=jnp.ones(1),
        leaf_sq_norm=jnp.ones(1),
        var={"w": jnp.array([4.0, 8.0, 1.0, 0.0])},
    )
    ratio = lambda q: float(np.divide(*np.asarray(CoordinateTest(eta=0.5, quantile=q).terms(stat))[0]))  # noqa: E731
    assert (ratio(0.0), ratio(0.5), ratio(1.0)) == (8.0, 16.0, math.inf)
    dead = stat._replace(var={"w": jnp.zeros(4)})
    controller = AdaptiveBatch(CoordinateTest(), b0=4, b_max=64)
    assert controller.update(controller.init(), controller.test.terms(dead)).batch_size == 4
    assert controller.update(controller.init(), CoordinateTest(quantile=1.0).terms(stat)).batch_size == 8


def test_leaf_test_takes_the_noisiest_leaf():
    terms = LeafTest(eta=1.0).terms(fake(jnp.array([30.0, 5.0]), jnp.array([1.0, 1.0])))
    controller = AdaptiveBatch(LeafTest(eta=1.0), b0=4, b_max=64, max_growth=math.inf)
    assert controller.update(controller.init(), terms).batch_size == 32


# The controller


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e3)), min_size=1, max_size=8),
    st.sampled_from([2.0, 3.0, 8.0, math.inf]),
    st.sampled_from(["pow2", "exact"]),
    st.sampled_from([(8, 64), (10, 70), (8, 8), (12, 1000)]),
    st.sampled_from([0.0, 0.9]),
)
def test_sizes_grow_and_stay_in_bounds(terms, growth, buckets, bounds, ema):
    """Card test 5, whatever the terms: monotone, <= b_max, <= max_growth b, one of the sizes; samples add up."""
    b0, b_max = bounds
    controller = AdaptiveBatch(NormTest(), b0, b_max, max_growth=growth, buckets=buckets, micro=2, ema=ema)
    state, used = controller.init(), 0
    for pair in terms:
        before = state
        state = controller.update(state, np.array([pair]))
        used += before.batch_size
        assert before.batch_size <= state.batch_size <= min(b_max, growth * before.batch_size)
        assert state.batch_size in controller.sizes and state.samples == used
    if buckets == "pow2":
        assert len(controller.sizes) <= math.ceil(math.log2(b_max / b0)) + 1


@pytest.mark.parametrize(
    ("wanted", "options", "size"),
    [
        (8.0, {}, 8),
        (8.1, {}, 16),
        (1e9, {}, 16),
        (100.0, {"max_growth": math.inf}, 128),
        (1e9, {"max_growth": math.inf}, 200),
        (19.0, {"max_growth": 3.0}, 16),
        (33.0, {"max_growth": math.inf, "buckets": "exact", "micro": 4}, 36),
        (33.0, {"max_growth": 3.0, "buckets": "exact", "micro": 4}, 24),
        (math.nan, {}, 8),
    ],
)
def test_rounding(wanted, options, size):
    controller = AdaptiveBatch(NormTest(), b0=8, b_max=200, **options)
    assert controller.update(controller.init(), np.array([[wanted, 1.0]])).batch_size == size


def test_tests_every_few_steps_and_not_at_the_largest_size():
    controller = AdaptiveBatch(NormTest(), b0=8, b_max=16, interval=3)
    state, due = controller.init(), []
    for _ in range(7):
        due.append(controller.due(state))
        state = controller.update(state, np.array([[9.0 if state.steps else 0.0, 1.0]]) if due[-1] else None)
    assert due == [True, False, False, True, False, False, False]
    assert state == AdaptiveBatchState(16, 8 * 4 + 16 * 3, 7)
    with pytest.raises(ValueError, match="step 0 has a test"):
        controller.update(controller.init(), None)


def test_averages_over_tests():
    """ema: the ratio of averages, not the average of ratios; one wild test does not decide."""
    controller = AdaptiveBatch(NormTest(), b0=8, b_max=512, max_growth=math.inf, ema=0.9)
    state = controller.update(controller.init(), np.array([[4.0, 1.0]]))
    state = controller.update(state, np.array([[100.0, 1.0]]))
    assert state.averages == (pytest.approx((0.1 * (0.9 * 4 + 100), 0.19)),)
    assert state.batch_size == 64  # 103.6 / 1.9 = 54.5, where the last test alone wants 100


def test_checkpoint_of_the_controller(tmp_path):
    """Size, samples (the position in the data too) and averages come back from JSON; so do the next decisions."""
    controller = AdaptiveBatch(NormTest(), b0=8, b_max=512, ema=0.5)
    state = controller.update(controller.init(), np.array([[40.0, 1.0]]))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(1)}, {"batch": state._asdict()})
        _, _, extra = checkpoints.restore({"w": jnp.ones(1)})
    restored = AdaptiveBatchState(**extra["batch"])
    more = np.array([[40.0, 1.0]])
    assert controller.update(restored, more) == controller.update(state, more)


def test_epoch_rows():
    """Each epoch is a permutation, cut anywhere; other seeds and epochs differ; trap 9: no batch beyond the data."""
    two = epoch_rows(10, 0, 10), epoch_rows(10, 10, 10)
    assert all(sorted(rows) == list(range(10)) for rows in two) and list(two[0]) != list(two[1])
    np.testing.assert_array_equal(epoch_rows(10, 7, 8), np.concatenate(two)[7:15])
    assert list(epoch_rows(10, 0, 10, seed=1)) != list(two[0])
    with pytest.raises(ValueError, match="a batch of 11 from 10 rows"):
        epoch_rows(10, 0, 11)


def test_rebatch_is_the_official_one():
    """Micro-batches grow to their maximum, then the accumulation does; sizes are rounded up, never past the maximum."""
    assert rebatch(64, 128, workers=4) == (16, 1, 64)
    assert rebatch(65, 128, workers=4) == (17, 1, 68)
    assert rebatch(4000, 128, workers=4) == (128, 8, 4096)
    assert rebatch(4000, 128, workers=4, accumulate=2, max_batch_size=4050) == (128, 8, 4050)
    with pytest.raises(ValueError, match="at least 1"):
        rebatch(0, 8)


def test_programs_are_counted_and_bounded():
    """One program a size that occurs and the next one; sizes outside the list are refused; results are the step's."""
    controller = AdaptiveBatch(NormTest(eta=1.0), b0=4, b_max=24)
    traced = []

    @jax.jit
    def step(x):
        traced.append(x.shape)
        return x.sum()

    programs = BucketPrograms(step, lambda size: (jax.ShapeDtypeStruct((size,), jnp.float32),), controller.sizes)
    assert programs(4)(jnp.ones(4)) == 4 and programs.compilations == 2
    for size in (4, 8, 8, 16, 24, 24):
        assert programs(size)(jnp.ones(size)) == size
    assert programs.compilations == len(traced) == len(controller.sizes) == 4
    with pytest.raises(ValueError, match="no program for a batch of 12"):
        programs(12)


def test_a_whole_run_composes_with_optax():
    """The batch grows while AdaGrad trains; the rate follows samples; one compilation for all sizes."""
    controller = AdaptiveBatch(NormTest(eta=0.7), b0=8, b_max=B, micro=4, dataset_size=B)
    tx = optax.chain(scale_by_adagrad(), scale_by_sample_schedule(optax.linear_schedule(0.3, 0.0, 2000)))
    data = jax.tree.map(jnp.asarray, BATCH)

    @jax.jit
    def step(params, opt_state, rows, size):
        gather = lambda p, r: softmax_loss(p, jax.tree.map(lambda x: x[r], data))  # noqa: E731
        stat = gradient_stats(gather, params, rows, chunk=4, count=size // 4)
        updates, opt_state = tx.update(stat.grad, opt_state, params, batch_size=size)
        return optax.apply_updates(params, updates), opt_state, controller.test.terms(stat), stat.loss

    params = jax.tree.map(jnp.asarray, PARAMS)
    opt_state, state, losses, sizes = tx.init(params), controller.init(), [], []
    while state.samples < 2000:
        rows = np.zeros(B, np.int32)
        rows[: state.batch_size] = epoch_rows(B, state.samples, state.batch_size)
        params, opt_state, terms, loss = step(params, opt_state, rows, state.batch_size)
        losses.append(float(loss))
        sizes.append(state.batch_size)
        state = controller.update(state, terms)
    assert sizes == sorted(sizes) and sizes[0] == 8 and sizes[-1] == B
    assert int(opt_state[1].samples) == state.samples == sum(sizes)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gradient_stats(softmax_loss, PARAMS, BATCH, mode="fast"), "mode='fast'"),
        (lambda: gradient_stats(softmax_loss, PARAMS, BATCH, chunk=7), "chunks of 7 do not divide a batch of 48"),
        (lambda: gradient_stats(softmax_loss, PARAMS, BATCH, chunk=48), "two chunks"),
        (lambda: gradient_stats(softmax_loss, PARAMS, BATCH, chunk=8, count=2, detail=True), "count"),
        (lambda: gradient_stats(softmax_loss, PARAMS, {"x": np.ones(4), "y": np.ones(5)}), "same number of rows"),
        (lambda: NormTest(eta=0.0), "eta=0.0"),
        (lambda: InnerProductTest(nu=-1.0), "nu=-1.0"),
        (lambda: CoordinateTest(quantile=2.0), "quantile=2.0"),
        (lambda: InnerProductTest().terms(fake(1.0, 1.0)), "detail=True"),
        (lambda: CoordinateTest().terms(fake(1.0, 1.0)), "detail=True"),
        (lambda: AdaptiveBatch(NormTest(), 8, 4), "b_max=4"),
        (lambda: AdaptiveBatch(NormTest(), 8, 64, micro=8), "one chunk has no variance"),
        (lambda: AdaptiveBatch(NormTest(), 9, 64, micro=4), "multiples of micro=4"),
        (lambda: AdaptiveBatch(NormTest(), 8, 64, max_growth=1.5), "max_growth=1.5"),
        (lambda: AdaptiveBatch(NormTest(), 8, 64, buckets="pow3"), "buckets='pow3'"),
        (lambda: AdaptiveBatch(NormTest(), 8, 64, interval=0), "interval=0"),
        (lambda: AdaptiveBatch(NormTest(), 8, 64, dataset_size=50), "exceeds the 50 samples"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.multidevice
def test_terms_that_differ_between_devices_are_refused():
    mesh = make_mesh(8, 1, 1)
    controller = AdaptiveBatch(NormTest(), 8, 64)
    local = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match="statistics of the global batch"):
        controller.update(controller.init(), local)


WORKER = """
import json, sys
import jax
process, count, port = (int(x) for x in sys.argv[1:4])
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, process)
import jax.numpy as jnp, numpy as np
from jaxskip import training

mesh = training.make_mesh(4, 1, 1)
data = np.random.default_rng(0).normal(1.0, 3.0, size=(1000, 6)).astype(np.float32)
controller = training.AdaptiveBatch(training.NormTest(eta=0.5), b0=8, b_max=256, micro=4)

@jax.jit
def step(w, batch):
    stats = training.gradient_stats(lambda w, rows: jnp.mean((w[None] - rows["x"]) ** 2), w, batch, chunk=4)
    return w - 0.2 * stats.grad, controller.test.terms(stats)

state, w, sizes = controller.init(), jnp.zeros(6), []
with jax.set_mesh(mesh):
    w = jax.jit(lambda: jnp.zeros(6), out_shardings=training.replicated(mesh))()
    for _ in range(12):
        rows = training.epoch_rows(1000, state.samples, state.batch_size)
        share = len(rows) // count
        local = rows[process * share : (process + 1) * share]
        w, terms = step(w, training.shard_batch({"x": data[local]}, mesh))
        state = controller.update(state, terms)
        sizes.append(state.batch_size)
    if count > 1:
        try:
            controller.update(controller.init(), np.ones((1, 2)))
            sizes.append("accepted local terms")
        except ValueError:
            pass
print(json.dumps([sizes, step._cache_size()]))
"""


@pytest.mark.slow
@pytest.mark.multidevice
def test_two_processes_take_the_sizes_of_one():
    """Both hosts agree at every step, with one program a size; a process's own statistics are refused."""
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]

    def launch(process, count):
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), str(count), str(port)],
            cwd=pathlib.Path(__file__).parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(4 // count)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return json.loads(out.splitlines()[-1])

    one = finish(launch(0, 1))
    two = [finish(process) for process in [launch(0, 2), launch(1, 2)]]
    assert one[0] == sorted(one[0]) and one[0][-1] > 8
    assert two == [one, one] and one[1] <= 6
