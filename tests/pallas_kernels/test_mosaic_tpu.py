"""The TPU kernels: their arithmetic in the TPU interpreter, what they compile to for real TPUs, what they leave out."""

import contextlib
import functools
import importlib
import inspect
import json
import math

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import (
    inputs,
    linear_cross_entropy,
    mosaic_tpu,
    noise,
    sample_linear_categorical,
    tpu_tiles,
)
from tests.aot import TPU, compile_in_a_process
from tests.pallas_kernels.test_linear_cross_entropy import exact

KINDS = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"]


def mesh_of(kind, sizes=(), names=(), axis_type=AxisType.Auto):
    named = {"platform": "tpu"} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    device = AbstractDevice(device_kind=kind, num_cores=1, **named)
    return AbstractMesh(sizes, names, axis_types=(axis_type,) * len(sizes), abstract_device=device)


@contextlib.contextmanager
def tpu(kind="TPU v5 lite"):
    """A pretended chip; what runs on it is interpreted, in memory that holds NaN until it is written."""
    mesh = mesh_of(kind)
    # The pipelines read the last tile of memory whole, beyond the end of the array: that is not refused but NaN.
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pltpu.force_tpu_interpret_mode(params),
        pytest.MonkeyPatch.context() as m,
    ):
        if jax.__version_info__ < (
            0,
            8,
        ):  # this JAX loses the interpreter's callbacks inside a function with its own vmap
            m.setattr(mosaic_tpu, "_unmapped", functools.partial)
        yield


def assert_no_races():
    package = "jax._src.pallas.mosaic.interpret"
    module = package if jax.__version_info__ < (0, 8) else f"{package}.interpret_pallas_call"
    assert not importlib.import_module(module).races.races_found


def problem(tokens, vocabulary, width, seed=0):
    """Embeddings, classifier, labels (a fifth ignored if there are several), bias, cotangents of loss and lse."""
    rng = np.random.default_rng(seed)
    e, c = rng.normal(size=(tokens, width)), rng.normal(size=(vocabulary, width)) / np.sqrt(width)
    labels = rng.integers(0, vocabulary, tokens)
    labels[rng.random(tokens) < 0.2 * (tokens > 1)] = -100
    return e, c, labels, rng.normal(size=vocabulary), *rng.normal(size=(2, tokens))


def gradients(e, c, labels, bias, g, h, layout="vd", tiles=(128, 128), kind="TPU v5 lite", **options):
    """(loss, lse, gradients of sum(g * loss + h * lse)), the classifier's as [V, D]."""

    def f(e, c, bias):
        loss, lse = linear_cross_entropy(
            e, c, labels, bias=bias, reduction="none", return_lse=True, classifier_layout=layout,
            implementation="mosaic_tpu", block_sizes=tiles, **options,
        )  # fmt: skip
        return (g * loss + h * lse).sum(), (loss, lse)

    wanted = (0, 1) if bias is None else (0, 1, 2)
    with tpu(kind):
        step = jax.jit(jax.value_and_grad(f, wanted, has_aux=True))
        (_, (loss, lse)), found = step(e, c if layout == "vd" else c.T, bias)
        found = [np.asarray(x, np.float64) for x in found]
    if layout == "dv":
        found[1] = found[1].T
    return np.asarray(loss), np.asarray(lse), found


CASES = {
    "plain": ((200, 300, 24), "float32", {}),
    "all": ((140, 300, 24), "bfloat16", {"layout": "dv", "bias": True, "softcap": 3.0, "label_smoothing": 0.1}),
    "one": ((1, 1, 1), "bfloat16", {"tiles": None}),
}
SLOW = {
    "smoothing": ((200, 300, 24), "bfloat16", {"label_smoothing": 0.2, "bias": True, "z_loss": 0.1}),
    "float16": ((130, 140, 24), "float16", {"softcap": 5.0}),
    "wide_rows": ((300, 300, 24), "float32", {"tiles": (256, 128), "layout": "dv"}),
    "default_tiles": ((7, 1100, 24), "float32", {"tiles": None, "layout": "dv", "label_smoothing": 0.2}),
    "one_column": ((20, 1, 5), "float32", {"tiles": None}),
    "one_row": ((1, 1000, 130), "float32", {"tiles": None, "softcap": 5.0}),
    "v7": ((140, 300, 24), "float32", {"kind": "TPU7x"}),
}
TOLERANCES = {"float32": (1e-5, 1e-5), "float16": (1e-3, 1e-3), "bfloat16": (1e-2, 1e-2)}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_loss_and_gradients_are_those_of_the_definition(case):
    """Against float64 on the same rounded inputs. Both passes: float32 sums, 1e-5 of the largest value (the official
    tolerance for the loss, stricter for gradients); bfloat16, float16: one rounding of the gradients, the official
    1e-2 and 1e-3. No memory is read before it is written (it would be NaN) and there are no races."""
    shape, dtype, options = (CASES | SLOW)[case]
    options = dict(options)
    e, c, labels, bias, g, h = problem(*shape)
    e, c = jnp.asarray(e, dtype), jnp.asarray(c, dtype)
    bias = jnp.asarray(bias, jnp.float32) if options.pop("bias", False) else None
    loss, lse, found = gradients(e, c, labels, bias, g, h, **options)
    assert_no_races()
    plain = {name: options[name] for name in ("softcap", "label_smoothing", "z_loss") if name in options}
    want, want_lse, want_found, _ = exact(e, c, labels, bias, g=g, h=h, **plain)
    forward, backward = TOLERANCES[dtype]
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=forward * np.abs(want).max())
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-6)  # float32 whatever the inputs
    for got, wanted in zip(found, want_found, strict=False):
        np.testing.assert_allclose(got, wanted, atol=backward * np.abs(wanted).max() + 1e-7)


def filtered(e, c, labels, g, h, keep, eps, sizes, softcap=None, smoothing=0.0, embeddings=True, classifier=True):
    """In float64: gradients with the probabilities outside the tiles of ``keep`` spread by the prior, and the bound of
    their error, for each token and each entry."""
    rows, columns = sizes
    e, c = np.asarray(e, np.float64), np.asarray(c, np.float64)
    tokens, vocabulary = len(e), len(c)
    a = e @ c.T
    z = a if softcap is None else softcap * np.tanh(a / softcap)
    lse = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) + z.max(1, keepdims=True)
    p, slope = np.exp(z - lse), 1.0 if softcap is None else 1 - (z / softcap) ** 2
    kept = np.repeat(np.repeat(np.asarray(keep).T, rows, 0)[:tokens], columns, 1)[:, :vocabulary]
    rest = np.maximum(vocabulary - kept.sum(1, keepdims=True), 1)
    valid = (labels >= 0)[:, None]
    average = e[valid[:, 0]].mean(0) @ c.T
    average = average if softcap is None else softcap * np.tanh(average / softcap)
    prior = np.exp(average - average.max())
    cap = min(max(1 / vocabulary, eps / 4), eps / 2)
    prior = np.minimum(prior / prior.sum(), cap)[None]
    mass, left_of_prior = (np.where(kept, 0, x).sum(1, keepdims=True) for x in (p, np.broadcast_to(prior, p.shape)))
    most = np.where(kept, 0, p).max(1, keepdims=True)
    multiple = np.minimum(mass / np.maximum(left_of_prior, 1e-300), (most - mass / rest) / cap)
    rate = np.maximum(mass - multiple * left_of_prior, 0) / rest
    flat = 1.0 if softcap is None else 1 - ((lse + np.log(np.maximum(rate, 1e-300))) / softcap) ** 2
    sloped = prior if softcap is None else prior * (1 - (average / softcap) ** 2)
    g, gh = np.where(valid, g[:, None], 0), np.where(valid, (g + h)[:, None], 0)
    y = (labels[:, None] == np.arange(vocabulary)) * (1 - smoothing) * g + smoothing / vocabulary * g
    whole, spread = p * slope * gh - y * slope, (rate * flat + multiple * sloped) * gh - y * slope
    left = np.where(kept, whole, spread)
    bound = np.where(kept, 0, np.abs(gh))
    de, dc = (left if embeddings else whole) @ c, (left if classifier else whole).T @ e
    sizes = [np.linalg.norm(x, axis=1) for x in (e, c)]
    return (de, dc), (whole @ c, whole.T @ e), (bound @ sizes[1], bound.T @ sizes[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"softcap": 20.0, "filter_embeddings": False},
                {"label_smoothing": 0.1, "filter_classifier": False},
                {"label_smoothing": 0.1, "layout": "dv"},
            )
        ),
    ],
)
def test_the_filter_spreads_what_it_leaves_out_and_keeps_its_bound(options):
    """Peaked tokens; then huge logits, two entries tied, half of the tokens ignored; then a uniform softmax.

    The float64 definition of the spread with the same tiles left out: 1e-5 of the largest gradient, float32 sums. The
    bound eps * |g + h| * (sum of norms left out) holds with the same slack, and what is not filtered is exact.
    """
    eps, (rows, columns) = 0.01, (128, 128)
    e, c, labels, _, g, h = problem(260, 600, 24)
    c[:, 0] = np.arange(600) < 256
    e[:128, 0], e[128:256] = 6, e[128:256] * 1000
    e[128:256, 0], e[256:] = 1e4, 0
    c[200] = c[3]
    labels[:256] %= 256
    labels[128:256:2] = -100
    labels[5], labels[129], labels[256:] = 400, 200, 3
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    layout = options.get("layout", "vd")
    kernel = {name: value for name, value in options.items() if name in ("softcap", "label_smoothing")}
    sides = {name: value for name, value in options.items() if name.startswith("filter")}
    _, _, found = gradients(e, c, labels, None, g, h, filter_eps=eps, **options)
    assert_no_races()

    operands = (e, c if layout == "vd" else c.T, None)
    spec = inputs.spec(
        "mosaic_tpu", operands, layout, kernel.get("softcap"), (rows, columns), filter_eps=eps,
        label_smoothing=kernel.get("label_smoothing", 0.0), **sides,
    )  # fmt: skip
    z = np.asarray(e, np.float64) @ np.asarray(c, np.float64).T
    z = z if "softcap" not in kernel else 20 * np.tanh(z / 20)
    lse = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    tops = np.stack([z[:, k : k + columns].max(1) for k in range(0, 600, columns)])
    gh, g_valid = (np.where(labels >= 0, x, 0) for x in (g + h, g))
    tiles = tpu_tiles.Tiles(260, 600, rows, columns)
    keep, active = tpu_tiles.kept_tiles(
        spec, tiles, *(jnp.asarray(x, jnp.float32) for x in (labels, lse, gh, g_valid, tops))
    )
    assert active.all() and not keep.all(0).any() and keep.any(0).all()  # every token tile leaves out something

    smoothing = kernel.get("label_smoothing", 0.0)
    want, whole, bounds = filtered(
        e, c, labels, g, h, keep, eps, (rows, columns), kernel.get("softcap"), smoothing,
        sides.get("filter_embeddings", True), sides.get("filter_classifier", True),
    )  # fmt: skip
    for got, wanted, precise, bound in zip(found, want, whole, bounds, strict=True):
        slack = 1e-5 * np.abs(precise).max(1).max()
        np.testing.assert_allclose(got, wanted, atol=slack)
        assert (np.linalg.norm(got - precise, axis=1) <= eps * bound + slack * math.sqrt(24)).all()
    # A uniform softmax is spread to what it is, up to the rounding of the mass that is left.
    np.testing.assert_allclose(found[0][256:], whole[0][256:], atol=1e-5 * np.abs(whole[0][256:]).max())


@pytest.mark.slow
def test_the_label_is_never_left_out():
    """A label whose probability is far below eps: its column of the gradient is exact to float32, 1e-5."""
    e, c = jnp.full((16, 8), 3.0), jnp.zeros((256, 8)).at[0].set(1.0)
    labels = np.full(16, 200)
    _, _, (_, dc) = gradients(e, c, labels, None, np.ones(16), np.zeros(16), filter_eps=0.01)
    _, _, (_, want, *_), _ = exact(e, c, labels)
    np.testing.assert_allclose(dc, want, atol=1e-5 * np.abs(want).max())
    assert want[200].min() < -47


@pytest.mark.slow
def test_a_bias_of_minus_infinity_removes_classes():
    """Whole tiles of them, first and last; float32, 1e-5."""
    e, c, labels, _, g, h = problem(20, 140, 8)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    bias = jnp.full(396, -jnp.inf).at[128:268].set(0.0)
    padded = jnp.ones((396, 8)).at[128:268].set(c)
    loss, lse, (de, dc, db) = gradients(e, padded, np.where(labels < 0, labels, labels + 128), bias, g, h)
    want, want_lse, (want_de, want_dc, want_db, _), _ = exact(e, c, labels, g=g, h=h)
    np.testing.assert_allclose(loss, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    for got, wanted in ((de, want_de), (dc[128:268], want_dc), (db[128:268], want_db)):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert not dc[:128].any() and not dc[268:].any() and not db[:128].any() and not db[268:].any()


@pytest.mark.slow
@pytest.mark.parametrize("filter_eps", [0.0, 0.01])
def test_a_wrong_label_is_never_silent(filter_eps):
    """Traced, it cannot raise: the token's loss and every gradient it touches become NaN, all others do not."""
    e, c, labels, *_ = problem(140, 300, 8)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    labels[3] = 300

    def loss(e, c, labels):
        options = {"implementation": "mosaic_tpu", "block_sizes": (128, 128), "filter_eps": filter_eps}
        return linear_cross_entropy(e, c, labels, reduction="sum", **options)

    with tpu():
        value, (de, dc) = jax.jit(jax.value_and_grad(loss, (0, 1)))(e, c, jnp.asarray(labels))
        value, de, dc = (np.asarray(x) for x in (value, de, dc))
    assert np.isnan(value) and np.isnan(de[3]).all() and np.isnan(dc).all()
    assert np.isfinite(np.delete(de, 3, axis=0)).all()


@pytest.mark.slow
def test_second_derivatives_are_refused():
    e, c, labels, *_ = problem(20, 140, 8)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    gradient = jax.grad(lambda e: linear_cross_entropy(e, c, labels))
    with tpu(), pytest.raises(NotImplementedError, match="'mosaic_tpu' has first derivatives only"):
        jax.jvp(gradient, (e,), (e,))


def test_drawn_labels_are_those_of_the_other_implementations():
    e, c, _, bias, *_ = problem(140, 600, 8)
    e, c, bias = (jnp.asarray(x, jnp.float32) for x in (e, c, bias))

    def draw(implementation, tiles):
        sample = lambda e, c, bias: sample_linear_categorical(  # noqa: E731
            jax.random.key(7), e, c, bias=bias, softcap=4.0, implementation=implementation, block_sizes=tiles
        )
        return np.asarray(jax.jit(sample)(e, c, bias))

    with tpu():
        got = draw("mosaic_tpu", (128, 256))
        assert_no_races()
        with pytest.raises(ValueError, match="here, a multiple of 256 vocabulary entries"):
            draw("mosaic_tpu", (128, 128))
    np.testing.assert_array_equal(got, draw("chunked", None))
    assert len(np.unique(got)) > 50


@pytest.mark.slow
def test_the_kernels_noise_is_the_same_noise():
    rng = np.random.default_rng(0)
    key, x, y = (jnp.asarray(rng.integers(0, 2**32, n, dtype=np.uint32)) for n in (2, 64, 64))
    want = jax.extend.random.threefry_2x32((key[0], key[1]), jnp.stack([x, y]))
    np.testing.assert_array_equal(jnp.stack(noise.threefry((key[0], key[1]), x, y)), want)
    wide = noise.exponential(noise.Draw(key, x), 512, 300)
    np.testing.assert_array_equal(noise.exponential_columns((key[0], key[1]), x[None], 512, 300).T, wide)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="this JAX cannot interpret kernels inside vmap")
def test_vmap_is_a_loop():
    """Two batches, one of the classifier too; float32, 1e-5."""
    e, c, labels, *_ = problem(40, 300, 8)
    e, labels = jnp.asarray(e.reshape(2, 20, 8), jnp.float32), jnp.asarray(labels.reshape(2, 20))
    c = jnp.stack([jnp.asarray(c, jnp.float32)] * 2) * jnp.array([1.0, 2.0])[:, None, None]

    def step(implementation):
        def loss(e, c, labels):
            return linear_cross_entropy(e, c, labels, implementation=implementation, block_sizes=(128, 128))

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(e, c, labels)

    with tpu():
        got = step("mosaic_tpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, step("chunked"))


def test_no_tokens():
    with tpu():
        value, (de, dc) = jax.value_and_grad(linear_cross_entropy, (0, 1))(
            jnp.ones((0, 4)), jnp.ones((9, 4)), jnp.zeros(0, int), filter_eps=0.1
        )
        labels = sample_linear_categorical(jax.random.key(0), jnp.ones((0, 4)), jnp.ones((9, 4)))
    assert value == 0 and de.shape == (0, 4) and (dc == 0).all() and labels.shape == (0,)


@settings(deadline=None, max_examples=10)
@given(st.sampled_from([(1, 1), (5, 9)]), st.floats(0, 1), st.integers(0, 2**16))
def test_a_list_is_a_permutation_with_what_is_kept_first(shape, share, seed):
    keep = np.random.default_rng(seed).random(shape) < share
    order, kept = tpu_tiles.lists(jnp.asarray(keep))
    np.testing.assert_array_equal(order[:, 0], np.argsort(~keep, axis=1, stable=True))
    np.testing.assert_array_equal(kept, keep.sum(1))


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 2**17), st.integers(1, 2**19), st.integers(1, 8192), st.sampled_from(KINDS),
    st.sampled_from(["bfloat16", "float32"]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_tiles_fit_and_cover(tokens, vocabulary, width, kind, dtype, drawing, filtering):
    e, c = (jax.ShapeDtypeStruct((n, width), jnp.dtype(dtype)) for n in (max(tokens, 16), vocabulary))
    spec = inputs.spec("mosaic_tpu", (e, c, None), "vd", None, None)
    with tpu(kind):
        memory, _ = tpu_tiles.core()
        try:
            backward = tpu_tiles.backward_tiles(spec, e, c, filtering)
            forward, part = tpu_tiles.forward_tiles(spec, e, c, drawing, filtering and not drawing)
        except NotImplementedError as error:
            assert kind == "TPU v4" and "use implementation='chunked'" in str(error)
            return
    for tiles in (forward, backward):
        assert tiles.rows % 128 == 0 and tiles.rows <= e.shape[0] + 127
        multiple = 256 if drawing and tiles is forward else 128
        assert tiles.columns % multiple == 0 and tiles.columns < vocabulary + multiple
        operands = 2 * width * e.dtype.itemsize * (tiles.rows + tiles.columns)
        assert operands + 4 * width * min(tiles.rows, tiles.columns) < memory
    assert forward.columns % part == 0 and forward.columns // part in (1, 2, 4, 8)
    if filtering and not drawing:
        assert part == backward.columns


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("TPU v5 lite", 0.8), ("TPU v6 lite", 0.5)])
def test_share_of_tiles_left_out_for_zipf_data(kind, least):
    """8 for the label, 6 for each of four rivals by Zipf's law, 1.04 * N(0, 1) elsewhere: the logits that hidden states
    8 * label row + 6 * rival rows + N(0, 1) have with a classifier N(0, 1 / 2304). 512 tokens of 256,000 entries."""
    tokens, vocabulary = 512, 256_000
    rng = np.random.default_rng(0)
    weights = 1 / np.arange(1, vocabulary + 1)
    entries = rng.choice(vocabulary, (5, tokens), p=weights / weights.sum())
    e, c = jax.ShapeDtypeStruct((tokens, 2304), jnp.bfloat16), jax.ShapeDtypeStruct((vocabulary, 2304), jnp.bfloat16)
    with tpu(kind):
        spec = inputs.spec("mosaic_tpu", (e, c, None), "vd", None, None, filter_eps=2**-12)
        tiles = tpu_tiles.backward_tiles(spec, e, c, True)
    tops, total = [], 0.0
    for start in range(0, vocabulary, tiles.columns):
        z = 1.04 * rng.standard_normal((tiles.columns, tokens), np.float32)
        for height, row in zip((8, 6, 6, 6, 6), entries, strict=True):
            here = np.flatnonzero((row >= start) & (row < start + tiles.columns))
            z[row[here] - start, here] += height
        tops.append(z.max(0))
        total += np.exp(z).sum(0, dtype=np.float64)
    lse, ones, labels = jnp.asarray(np.log(total), jnp.float32), jnp.ones(tokens), jnp.asarray(entries[0])
    keep, _ = tpu_tiles.kept_tiles(spec, tiles, labels, lse, ones, ones, jnp.asarray(np.stack(tops)))
    left_out = 1 - float(keep.mean())
    print(f"{kind}: {left_out:.3f} of the tiles of {tiles.rows} x {tiles.columns} are left out")
    assert left_out > least


def test_the_choice_and_its_reasons():
    e, c, labels = jnp.ones((4, 8)), jnp.ones((16, 8)), jnp.zeros(4, int)

    def loss(implementation, c=c):
        text = jax.make_jaxpr(lambda: linear_cross_entropy(e, c, labels, implementation=implementation))()
        return "pallas_call" in str(text)

    with tpu():
        assert loss(None) and not loss("chunked")
    assert not loss(None)
    with pytest.raises(NotImplementedError, match="'mosaic_tpu' needs a TPU v4 or later"):
        loss("mosaic_tpu")
    with tpu("TPU v3"):
        assert not loss(None)
    with jax.sharding.use_abstract_mesh(mesh_of("TPU v5 lite", (4, 1), ("data", "one"))):
        assert not loss(None)
        with pytest.raises(NotImplementedError, match=r"partitioned by XLA over the mesh axes \['data'\].*shard_map"):
            loss("mosaic_tpu")
    with jax.sharding.use_abstract_mesh(mesh_of("TPU v5 lite", (4,), ("data",), AxisType.Manual)):
        assert loss(None)
    with tpu(), pytest.raises(ValueError, match=r"tiles of implementation='mosaic_tpu' have a multiple of 128"):
        linear_cross_entropy(jnp.ones((400, 8)), c, jnp.zeros(400, int), block_sizes=(100, 16))


def test_float64_is_for_others():
    with (jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64)(True), tpu():
        e, c = jnp.ones((4, 8), jnp.float64), jnp.ones((16, 8))
        with pytest.raises(NotImplementedError, match="not float64"):
            linear_cross_entropy(e, c, jnp.zeros(4, int), implementation="mosaic_tpu")
        with pytest.raises(TypeError, match="takes bfloat16, float16 or float32, got float64"):
            mosaic_tpu.kernel_dtype(e.dtype)


def test_a_compiler_that_takes_no_kernels_is_asked_once_and_quoted():
    """The CPU's compiler is one; also from inside a program that is being traced."""
    reason = dispatch.mosaic_tpu_refusal(jax.devices()[0])
    assert "Only interpret mode is supported on CPU" in reason and "install libtpu>=0.0.23" in reason
    dispatch.mosaic_tpu_refusal.cache_clear()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def program(x):
        assert dispatch.mosaic_tpu_refusal(jax.devices()[0]) == reason
        return x

    jax.jit(jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec)).lower(jnp.ones(8))


# Compiles through the public loss. Arguments: topology name, list of cases (JSON): N, V, D, dtype, options, whether to
# differentiate. Prints for each (bytes of temporaries, of code), then whether the topology's compiler takes kernels.
COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from pallas_kernels import dispatch
from pallas_kernels.linear_cross_entropy import linear_cross_entropy, sampled_linear_cross_entropy

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
found = []
for tokens, vocabulary, width, dtype, options, differentiate in json.loads(sys.argv[2]):
    def array(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    options = dict(options)
    bias = array((vocabulary,), jnp.float32) if options.pop("bias", False) else None
    drawing = options.pop("drawing", False)
    shape = (vocabulary, width) if options.get("classifier_layout", "vd") == "vd" else (width, vocabulary)
    c = array(shape, jnp.dtype(options.pop("classifier_dtype", dtype)))

    def loss(e, c, labels, bias):
        if drawing:
            return sampled_linear_cross_entropy(jax.random.key(0), e, c, bias=bias, implementation="mosaic_tpu",
                                                **options)[0]
        return linear_cross_entropy(e, c, labels, bias=bias, implementation="mosaic_tpu", **options)

    f = jax.value_and_grad(loss, (0, 1) if bias is None else (0, 1, 3)) if differentiate else loss
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(f).lower(
            array((tokens, width), jnp.dtype(dtype)), c, array((tokens,), jnp.int32), bias).compile()
    memory = compiled.memory_analysis()
    found.append((memory.temp_size_in_bytes, memory.generated_code_size_in_bytes))
print(json.dumps({"found": found, "refusal": dispatch.mosaic_tpu_refusal(devices[0])}))
"""
GEMMA, LLAMA, GPT2 = (8192, 256000, 2304), (8192, 128256, 4096), (32768, 50304, 768)
SIDE = {"v5e:2x2": 128, "v5p:2x2x1": 128, "v6e:2x2": 256, "tpu7x:2x2x1": 256}  # of the filter's tiles


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("topology", "shape"),
    [(topology, GEMMA) for topology in SIDE] + [(t, s) for t in ("v5e:2x2", "v6e:2x2") for s in (LLAMA, GPT2)],
)
def test_compiled_for_real_tpus_memory_is_that_of_the_vectors(topology, shape):
    """Temporaries beyond the gradients: vectors over the tokens; with the filter the largest logits [tiles, N] and some
    arrays [tiles, D]. Never a copy of the classifier, nor a gradient in float32."""
    pytest.importorskip("libtpu")
    tokens, vocabulary, width = shape
    cases = [
        (*shape, "bfloat16", options, differentiate)
        for options, differentiate in (({}, False), ({}, True), ({"filter_eps": "auto"}, True))
    ]
    result = compile_in_a_process(COMPILE, topology, json.dumps(cases), environment=TPU)
    forward, exactly, filtering = (bytes_ for bytes_, _ in result["found"])
    tiles = vocabulary // SIDE[topology] + 1
    print(f"{shape} on {topology}, MB beside the gradients: " + ", ".join(f"{bytes_ / 1e6:.2f}" for bytes_, _ in
          result["found"]))  # fmt: skip
    vectors = 64 * 4 * tokens + 2**20
    assert forward <= vectors and exactly <= vectors + 4 * 4 * width
    assert filtering <= vectors + 4 * (tiles + 8) * tokens + 3 * 4 * tiles * width
    assert result["refusal"] is None


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_option_compiles(topology):
    pytest.importorskip("libtpu")
    cases = [
        (252, 507, 123, "float32", {"softcap": 20.0, "label_smoothing": 0.1, "bias": True}, True),
        (252, 507, 123, "bfloat16", {"classifier_layout": "dv", "bias": True, "z_loss": 0.1}, True),
        (1, 1, 1, "bfloat16", {}, True),
        (7, 5257, 64, "float16", {"classifier_layout": "dv"}, True),
        (300, 1000, 256, "float32", {"classifier_dtype": "bfloat16", "drawing": True}, True),
        (300, 1000, 256, "bfloat16", {"classifier_layout": "dv", "drawing": True, "bias": True}, True),
        (700, 1000, 256, "bfloat16", {"filter_eps": 2**-12, "classifier_layout": "dv", "label_smoothing": 0.1}, True),
        (700, 1000, 256, "float32", {"filter_eps": 2**-12, "softcap": 30.0, "filter_classifier": False}, True),
        (700, 1000, 256, "bfloat16", {"filter_eps": 2**-12, "filter_embeddings": False}, True),
    ]
    result = compile_in_a_process(COMPILE, topology, json.dumps(cases), environment=TPU)
    assert len(result["found"]) == len(cases)


# A batch over "data" and the classifier's rows over "vocab", on four chips.
SPREAD = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("data", "vocab"), axis_types=(AxisType.Auto,) * 2)

def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

def local(e, c, labels):
    loss = linear_cross_entropy(e, c, labels, filter_eps="auto", reduction="sum", vocab_axis_name="vocab",
                                label_smoothing=0.1, implementation="mosaic_tpu")
    return jax.lax.psum(loss, "data")

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    spread = jax.shard_map(local, mesh=mesh.abstract_mesh, in_specs=(P("data"), P("vocab"), P("data")), out_specs=P())
    compiled = jax.jit(jax.value_and_grad(spread, (0, 1))).lower(
        array((8192, 768), jnp.bfloat16, "data"), array((50304, 768), jnp.bfloat16, "vocab"),
        array((8192,), jnp.int32, "data")).compile()
print(json.dumps({"temporaries": compiled.memory_analysis().temp_size_in_bytes}))
"""


@pytest.mark.tpu_aot
def test_spread_over_chips_nothing_is_gathered():
    """A chip has 4096 tokens and 25,152 entries: the largest logits [197, 4096], gradients in float32 to be added over
    the other axis [4096, 768], and at most one more of the shard's gradient. The whole classifier would be 77 MB."""
    pytest.importorskip("libtpu")
    result = compile_in_a_process(SPREAD, environment=TPU)
    assert result["temporaries"] < 4 * (200 * 4096 + 2 * 4096 * 768) + 2 * 25_152 * 768
