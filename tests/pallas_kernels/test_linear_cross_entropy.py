"""The public loss, all implementations, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_cross_entropy import linear_cross_entropy

x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
IMPLEMENTATIONS = ("reference", "chunked")


def problem(shape=(2, 7), vocabulary=130, width=8, ignored=0.2, seed=0):
    """Embeddings, classifier, labels (a share of them -100), bias, weights; float64, logits of order 1."""
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(*shape, width))
    c = rng.normal(size=(vocabulary, width)) / np.sqrt(width)
    labels = rng.integers(0, vocabulary, shape)
    labels[rng.random(shape) < ignored] = -100
    return e, c, labels, rng.normal(size=vocabulary), rng.random(shape) + 0.5


def exact(e, c, labels, bias=None, weights=None, *, shift=0, softcap=None, label_smoothing=0.0, z_loss=0.0, g=1, h=0):
    """In float64: (per-token loss, lse, gradients of sum(g * loss + h * lse) for e, c, bias, weights)."""
    e, c = np.asarray(e, np.float64), np.asarray(c, np.float64)
    labels, tokens = np.asarray(labels), e.shape[:-1]
    weights = np.ones(tokens) if weights is None else np.asarray(weights, np.float64)
    if shift:
        kept = labels[..., shift:]
        pad = [(0, 0)] * (labels.ndim - 1) + [(0, labels.shape[-1] - kept.shape[-1])]
        labels = np.pad(kept, pad, constant_values=-100)
        weights = np.pad(weights[..., shift:], pad)
    valid = labels != -100
    a = e @ c.T + (0 if bias is None else np.asarray(bias, np.float64))
    z = a if softcap is None else softcap * np.tanh(a / softcap)
    top = z.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[..., 0]
    y = (np.arange(c.shape[0]) == labels[..., None]) * (1 - label_smoothing) + label_smoothing / c.shape[0]
    per_token = lse - (y * z).sum(-1) + z_loss * lse**2
    w = np.where(valid, weights * g, 0)[..., None]
    p = np.exp(z - lse[..., None])
    dz = w * (p * (1 + 2 * z_loss * lse[..., None]) - y) + np.where(valid, h, 0)[..., None] * p
    if softcap is not None:
        dz *= 1 - (z / softcap) ** 2
    dw = np.where(valid, per_token * g, 0)
    if shift:
        dw = np.roll(dw, shift, -1)
    rows = dz.reshape(-1, c.shape[0])
    gradients = dz @ c, rows.T @ e.reshape(-1, c.shape[1]), rows.sum(0), dw
    return np.where(valid, weights * per_token, 0), np.where(valid, lse, 0), gradients, np.where(valid, weights, 0)


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0, "shift": 1},
    "all": {
        "bias": True, "softcap": 3.0, "shift": 2, "z_loss": 0.1, "label_smoothing": 0.1, "weights": True,
    },
    "z_loss": {"z_loss": 0.1, "bias": True, "reduction": "sum"},
    "smoothing": {"label_smoothing": 0.2, "shift": 1, "reduction": "sum", "weights": True},
    "none": {"reduction": "none", "softcap": 3.0, "bias": True, "shift": 1, "weights": True, "z_loss": 0.1},
    "shift_all": {"shift": 7},
    "dv": {"layout": "dv", "bias": True, "softcap": 3.0},
    "dv_none": {"layout": "dv", "reduction": "none", "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_definition(case, implementation):
    """Tolerance 1e-12: everything is float64, only the order of sums differs."""
    options = dict(CASES[case])
    reduction, layout = options.pop("reduction", "mean"), options.pop("layout", "vd")
    e, c, labels, bias, weights = problem()
    bias = bias if options.pop("bias", False) else None
    weights = weights if options.pop("weights", False) else None
    g = np.random.default_rng(1).normal(size=labels.shape) if reduction == "none" else 1.0
    tiles = (5, 48) if implementation == "chunked" else None  # both ragged

    def loss(e, c, bias, weights):
        out = linear_cross_entropy(
            e, c if layout == "vd" else c.T, labels, bias=bias, token_weights=weights, reduction=reduction,
            classifier_layout=layout, implementation=implementation, block_sizes=tiles, **options,
        )  # fmt: skip
        return (out * g).sum(), out

    with x64(True):
        arguments = [None if x is None else jnp.asarray(x) for x in (e, c, bias, weights)]
        given = [i for i, x in enumerate(arguments) if x is not None]
        (_, got), gradients = jax.jit(jax.value_and_grad(loss, given, has_aux=True))(*arguments)
        got, gradients = np.asarray(got), dict(zip(given, map(np.asarray, gradients), strict=True))
    want, _, want_gradients, counted = exact(e, c, labels, bias, weights, g=g, **options)
    want_gradients = list(want_gradients)
    if reduction != "none":
        total, count = want.sum(), counted.sum() if reduction == "mean" else 1
        want = total / max(count, 1e-300) if total else 0.0
        if reduction == "mean" and weights is not None:  # d (sum w l / sum w) / dw = (l - loss) / sum w
            shift = options["shift"]
            valid = np.roll(counted != 0, shift, -1)
            want_gradients[3] = want_gradients[3] - np.where(valid, want, 0)
        want_gradients = [x / count if count else x for x in want_gradients]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    for i, gradient in gradients.items():
        np.testing.assert_allclose(gradient, want_gradients[i], rtol=1e-11, atol=1e-13)


SHAPES = [(256, 512, 128), (252, 507, 123), (1, 1, 1), (7, 50257, 64), (128, 1000, 256)]
# Official tolerances of the forward and backward pass, here as excess over the error of the plain computation in the
# same dtype, relative to the largest entry (they are absolute there, where most gradient entries are far smaller).
TOLERANCES = {"float32": (1e-5, 5e-4), "float16": (1e-3, 1e-3), "bfloat16": (1e-2, 1e-2)}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, "float32") for shape in SHAPES]
    + [(SHAPES[1], "float16"), (SHAPES[1], "bfloat16"), (SHAPES[3], "bfloat16")],
)
def test_error_is_at_most_that_of_the_plain_computation(shape, dtype):
    tokens, vocabulary, width = shape
    e, c, labels, *_ = problem((tokens,), vocabulary, width, ignored=0.2 if tokens > 1 else 0.0)
    e, c, options = jnp.asarray(e, dtype), jnp.asarray(c, dtype), {"softcap": 20.0, "shift": 0 if tokens == 1 else 1}

    def fused(e, c):
        return linear_cross_entropy(e, c, labels, implementation="chunked", block_sizes=(64, 4096), **options)

    def plain(e, c):
        shifted = jnp.asarray(labels[options["shift"] :])
        z = 20 * jnp.tanh((e[: len(shifted)] @ c.T) / 20)
        nll = optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), jnp.where(shifted < 0, 0, shifted))
        return jnp.where(shifted >= 0, nll, 0).sum() / (shifted >= 0).sum()

    both = jax.jit(lambda e, c: [jax.value_and_grad(f, (0, 1))(e, c) for f in (fused, plain)])
    (loss, (de, dc)), (plain_loss, (plain_de, plain_dc)) = both(e, c)
    assert loss.dtype == jnp.float32 and de.dtype == dc.dtype == jnp.dtype(dtype)
    per_token, _, (want_de, want_dc, *_), counted = exact(e, c, labels, **options)
    count = counted.sum()
    forward, backward = TOLERANCES[dtype]
    want = per_token.sum() / count
    assert abs(loss - want) <= abs(plain_loss - want) + forward
    for got, other, want in ((de, plain_de, want_de / count), (dc, plain_dc, want_dc / count)):
        size = np.abs(want).max() + 1e-30
        error = np.abs(np.asarray(got, np.float64) - want).max() / size
        assert error <= np.abs(np.asarray(other, np.float64) - want).max() / size + backward


def test_lse_is_returned_and_differentiable():
    """float32 sums of 130 terms: 1e-6 relative for lse (the card allows 1e-5), 1e-5 for gradients."""
    e, c, labels, bias, _ = problem()
    rng = np.random.default_rng(1)
    g, h = rng.normal(size=(2, *labels.shape))

    def f(e, c, bias):
        loss, lse = linear_cross_entropy(
            e, c, labels, bias=bias, reduction="none", shift=1, return_lse=True, block_sizes=(5, 48)
        )
        return (g * loss + h * lse).sum(), lse

    (_, lse), gradients = jax.jit(jax.value_and_grad(f, (0, 1, 2), has_aux=True))(
        *(jnp.asarray(x, jnp.float32) for x in (e, c, bias))
    )
    _, want_lse, want, _ = exact(e, c, labels, bias, shift=1, g=g, h=h)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)
    assert lse.dtype == jnp.float32
    for got, wanted in zip(gradients, want, strict=False):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    # The rows of dL/dlogits sum to the cotangent of lse, so the bias gradient sums to that of the counted tokens.
    np.testing.assert_allclose(gradients[2].sum(), np.where(want_lse != 0, h, 0).sum(), atol=1e-5)


def test_label_smoothing_has_a_closed_form():
    """(alpha / V) sum_v z_v = e . sum_v c_v alpha / V; float32, 1e-5."""
    e, c, labels, *_ = problem(ignored=0.0)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    loss, lse = linear_cross_entropy(e, c, labels, label_smoothing=0.3, reduction="none", return_lse=True)
    want = lse - 0.7 * jnp.einsum("btd,btd->bt", e, c[labels]) - 0.3 / c.shape[0] * (e @ c.sum(0))
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_parity_with_optax():
    """optax on materialised float32 logits; 1e-6 for the loss, gradients to 1e-5 of their largest entry."""
    e, c, labels, *_ = problem(ignored=0.0)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)

    def ours(e, c):
        return linear_cross_entropy(e, c, labels, block_sizes=(4, 32))

    def peer(e, c):
        return optax.softmax_cross_entropy_with_integer_labels(jnp.einsum("btd,vd->btv", e, c), labels).mean()

    got, want = jax.jit(lambda e, c: [jax.value_and_grad(f, (0, 1))(e, c) for f in (ours, peer)])(e, c)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tokens", [(4,), (0,), (3, 0)])
def test_nothing_to_count_gives_zero_and_zero_gradients(tokens, reduction, implementation):
    e, c = jnp.ones((*tokens, 8)), jnp.ones((5, 8))
    labels = jnp.full(tokens, -100)

    @jax.jit
    def f(e, c, w):
        return linear_cross_entropy(
            e, c, labels, token_weights=w, z_loss=0.1, reduction=reduction, implementation=implementation
        ).sum()

    value, gradients = jax.value_and_grad(f, (0, 1, 2))(e, c, jnp.ones(tokens))
    assert value == 0
    assert all((g == 0).all() for g in gradients)
    assert gradients[0].shape == e.shape


def test_z_loss_of_a_confident_token_keeps_its_gradient():
    """p - onehot is about 0 for such a token, and the whole gradient is that of z_loss * lse**2; 1e-5."""
    e, c = jnp.full((4, 1), 30.0), jnp.array([[1.0], [0.0], [-1.0]])
    labels = jnp.zeros(4, int)
    gradient = jax.grad(linear_cross_entropy)(e, c, labels, z_loss=1e-2)
    np.testing.assert_allclose(gradient, np.full((4, 1), 2 * 1e-2 * 30.0 / 4), rtol=1e-5)
    assert jnp.abs(jax.grad(linear_cross_entropy)(e, c, labels)).max() < 1e-10


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**16), layout=st.sampled_from(["vd", "dv"]))
def test_permuting_the_vocabulary_permutes_the_classifier_gradient(seed, layout):
    """float32 sums in another order: 1e-5."""
    e, c, labels, *_ = problem(seed=seed)
    order = np.random.default_rng(seed).permutation(c.shape[0])
    place = np.argsort(order)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    f = _permutation_step(layout)
    loss, (de, dc) = f(e, c, jnp.asarray(labels))
    loss2, (de2, dc2) = f(e, c[order], jnp.asarray(np.where(labels < 0, labels, place[labels])))
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    np.testing.assert_allclose(de2, de, atol=1e-5)
    np.testing.assert_allclose(dc2, dc[order], atol=1e-5)


@functools.cache
def _permutation_step(layout):
    def loss(e, c, labels):
        c = c if layout == "vd" else c.T
        return linear_cross_entropy(e, c, labels, classifier_layout=layout, block_sizes=(5, 48))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))


@pytest.mark.parametrize("bad", [130, -1, 2**31 - 1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_wrong_label_is_never_silent(bad, reduction):
    e, c, labels, *_ = problem(ignored=0.0)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    labels[0, 3] = bad
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 130\).*1 are not, the first is {bad}"):
        linear_cross_entropy(e, c, labels)

    @jax.jit
    def f(e, c, labels):
        loss, lse = linear_cross_entropy(e, c, labels, reduction=reduction, return_lse=True)
        return loss.sum(), (loss, lse)

    (total, (loss, lse)), (de, dc) = jax.value_and_grad(f, (0, 1), has_aux=True)(e, c, jnp.asarray(labels))
    assert jnp.isnan(total) and jnp.isfinite(lse).all()
    assert jnp.isnan(de[0, 3]).all() and jnp.isnan(dc).all()
    if reduction == "none":
        assert jnp.isnan(loss).sum() == 1 and jnp.isnan(loss[0, 3])
    fused = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))(e, c, jnp.asarray(labels))
    assert all(jnp.isnan(x).any() for x in jax.tree.leaves(fused))


def test_labels_that_shift_drops_are_not_looked_at():
    e, c, labels, *_ = problem(ignored=0.0)
    labels[:, 0] = 999
    loss = linear_cross_entropy(jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32), labels, shift=1)
    assert jnp.isfinite(loss)


@pytest.mark.parametrize("dtype", ["uint16", "int8", "uint32"])
def test_any_integer_dtype_of_labels(dtype):
    e, c, labels, *_ = problem(vocabulary=100, ignored=0.0)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    want = linear_cross_entropy(e, c, labels, shift=1)
    assert linear_cross_entropy(e, c, labels.astype(dtype), shift=1) == want


def test_ignore_index_may_be_a_class():
    e, c, labels, *_ = problem(ignored=0.0, vocabulary=5)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    got = linear_cross_entropy(e, c, labels, ignore_index=2)
    assert got == linear_cross_entropy(e, c, np.where(labels == 2, -100, labels))


ONES = jnp.ones((3, 8))
ERRORS = {
    "width": (lambda: linear_cross_entropy(ONES, jnp.ones((5, 7)), jnp.zeros(3, int)), ValueError, "D=8.*D=7"),
    "layout": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), classifier_layout="vocab"), ValueError, "'dv'"
    ),
    "matrix": (lambda: linear_cross_entropy(ONES, jnp.ones(8), jnp.zeros(3, int)), ValueError, "a matrix"),
    "empty": (lambda: linear_cross_entropy(ONES, jnp.ones((0, 8)), jnp.zeros(3, int)), ValueError, "not be empty"),
    "labels": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(4, int)), ValueError, r"\(3,\), got \(4,\)"),
    "label_dtype": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3)), TypeError, "integers, got float32"),
    "dtype": (lambda: linear_cross_entropy(ONES.astype(int), ONES, jnp.zeros(3, int)), TypeError, "embeddings"),
    "bias": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), bias=jnp.ones(8)), ValueError, r"shape \(3,\)"
    ),
    "weights": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), token_weights=jnp.ones(2)), ValueError, "weight"
    ),
    "reduction": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), reduction="avg"), ValueError, "'avg'"),
    "softcap": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), softcap=0.0), ValueError, "positive"),
    "traced": (
        lambda: jax.jit(lambda s: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), softcap=s))(3.0),
        TypeError, "Python number",
    ),
    "smoothing": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), label_smoothing=1.0), ValueError, r"\[0, 1\)"
    ),
    "z_loss": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), z_loss=-1.0), ValueError, "at least 0"),
    "shift": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), shift=-1), ValueError, "shift"),
    "shift_axis": (lambda: linear_cross_entropy(ONES[0], ONES, jnp.array(0), shift=1), ValueError, "token axis"),
    "ignore": (lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), ignore_index=None), TypeError, "int"),
    "tiles": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), block_sizes=(0, 4)), ValueError, "positive ints"
    ),
    "reference_tiles": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), block_sizes=(1, 4), implementation="reference"),
        ValueError, "no tiles",
    ),
    "name": (
        lambda: linear_cross_entropy(ONES, ONES, jnp.zeros(3, int), implementation="fast"), ValueError, "'chunked'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_early(case):
    call, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        call()


@pytest.fixture(scope="module")
def small():
    e, c, labels, bias, weights = problem((3, 2, 5), vocabulary=40)
    return [jnp.asarray(x, jnp.float32) for x in (e, c, bias, weights)] + [jnp.asarray(labels)]


def loss_of(implementation, reduction="mean", tiles=(4, 16)):
    tiles = None if implementation == "reference" else tiles

    def loss(e, c, bias, weights, labels):
        return linear_cross_entropy(
            e, c, labels, bias=bias, token_weights=weights, softcap=3.0, shift=1, z_loss=0.01, label_smoothing=0.1,
            reduction=reduction, implementation=implementation, block_sizes=tiles,
        ).sum()  # fmt: skip

    return loss


@pytest.mark.slow
def test_eager_remat_scan_and_vmap_agree_with_jit(small):
    """The same float32 program compiled differently: 2e-6 of order-1 values."""
    e, c, bias, weights, labels = small
    loss = loss_of("chunked")
    step = jax.value_and_grad(loss, (0, 1, 2, 3))
    one = (e[0], c, bias, weights[0], labels[0])
    want = jax.jit(step)(*one)

    def close(got, want):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), got, want)

    close(step(*one), want)
    close(jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3)))(*one), want)
    batched = jax.jit(jax.vmap(step, (0, None, None, 0, 0)))(*small)
    scanned = jax.jit(
        lambda *a: jax.lax.scan(lambda _, x: (None, step(x[0], c, bias, x[1], x[2])), None, (e, weights, labels))[1]
    )()
    close(scanned, batched)
    close(jax.tree.map(lambda x: x[0], batched), want)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_forward_over_reverse_agrees_with_the_reference(small, reduction):
    """Hessian-vector products of every differentiable argument at once, in float64: 1e-10."""
    rng = np.random.default_rng(2)
    with x64(True):
        floats = [jnp.asarray(np.asarray(x), jnp.float64) for x in small[:4]]
        labels = jnp.asarray(np.asarray(small[4]))
        tangents = [jnp.asarray(rng.normal(size=x.shape)) for x in floats]

        def hvp(implementation, tiles=(4, 16)):
            gradient = jax.grad(loss_of(implementation, reduction, tiles), (0, 1, 2, 3))
            f = jax.jit(lambda p, t: jax.jvp(lambda *p: gradient(*p, labels), tuple(p), tuple(t))[1])
            return f(floats, tangents)

        want = hvp("reference")
        assert all(float(jnp.abs(x).max()) > 1e-3 for x in want)
        for tiles in ((4, 16), (30, 40)):
            for got, wanted in zip(hvp("chunked", tiles), want, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_labels_have_a_float0_cotangent(small):
    e, c, bias, weights, labels = small
    gradient = jax.grad(loss_of("chunked"), 4, allow_int=True)(e, c, bias, weights, labels)
    assert gradient.dtype == jax.dtypes.float0 and gradient.shape == labels.shape


def test_mixed_dtypes_compute_in_the_wider_one():
    """A bfloat16 classifier with float32 embeddings equals the same classifier in float32: 1e-6."""
    e, c, labels, *_ = problem()
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.bfloat16)
    f = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)))
    loss, (de, dc) = f(e, c, jnp.asarray(labels))
    want, (want_de, want_dc) = f(e, c.astype(jnp.float32), jnp.asarray(labels))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(de, want_de, atol=1e-6)
    assert (de.dtype, dc.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(dc.astype(jnp.float32), want_dc, rtol=2**-8, atol=1e-7)  # half a bfloat16 ulp


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_do_not_underflow(reduction):
    """A cotangent of 2**-13 (a mean over 8192 tokens) times probabilities of 1/4096 is below float16's smallest
    number, the gradient that 4096 of them add up to is not. Tolerance 2e-3: float16 rounding of operands and result.
    """
    e, c, labels, *_ = problem((16,), vocabulary=4096, width=8, ignored=0.0)
    e, c = jnp.asarray(e / 4, jnp.float16), jnp.asarray(c + 1, jnp.float16)
    scale = 2.0**-13 * (16 if reduction == "mean" else 1)

    def loss(e):
        return linear_cross_entropy(e, c, labels, reduction=reduction).sum() * scale

    got = np.asarray(jax.jit(jax.grad(loss))(e), np.float64)
    want = exact(e, c, labels)[2][0] * 2.0**-13
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_a_bias_of_minus_infinity_removes_classes():
    """Padding classes masked by the bias change nothing, whole tiles of them included, first or last; 1e-6."""
    e, c, labels, *_ = problem(vocabulary=40)
    e, c = jnp.asarray(e, jnp.float32), jnp.asarray(c, jnp.float32)
    padding = jnp.ones((24, 8))
    padded = jnp.concatenate([padding, c, padding])
    bias = jnp.full(88, -jnp.inf).at[24:64].set(0.0)
    f = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1)), static_argnames="block_sizes")
    want, (want_de, want_dc) = f(e, c, jnp.asarray(labels))
    loss, (de, dc) = f(
        e, padded, jnp.asarray(np.where(labels < 0, labels, labels + 24)), bias=bias, block_sizes=(5, 12)
    )
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(de, want_de, atol=1e-6)
    np.testing.assert_allclose(dc[24:64], want_dc, atol=1e-6)
    assert (dc[:24] == 0).all() and (dc[64:] == 0).all()


@pytest.mark.multidevice
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_tokens_spread_over_devices_by_shard_map(reduction):
    """Eight devices with a replicated classifier equal one device; float32 sums in another order: 1e-6 relative."""
    e, c, labels, bias, _ = problem((16, 3))
    e, c, bias, labels = (
        jnp.asarray(e, jnp.float32),
        jnp.asarray(c, jnp.float32),
        jnp.asarray(bias, jnp.float32),
        labels,
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(e, c, bias, labels):
        loss = linear_cross_entropy(e, c, labels, bias=bias, reduction=reduction, shift=1, block_sizes=(4, 48))
        return jax.lax.psum(loss.sum(), "data")

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P(), P("data")), out_specs=P())
    got = jax.jit(jax.value_and_grad(spread, (0, 1, 2)))(e, c, bias, jnp.asarray(labels))
    want = jax.jit(
        jax.value_and_grad(
            lambda e, c, b: linear_cross_entropy(e, c, labels, bias=b, reduction="sum", shift=1), (0, 1, 2)
        )
    )(e, c, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), got, want)


@pytest.mark.multidevice
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_vocabulary_split_over_devices_equals_one_device(implementation, check_vma):
    """Float32 sums in another order: 1e-6 of the largest entry."""
    e, c, labels, bias, _ = problem((16,), vocabulary=64, width=32)
    e, c, bias = (jnp.asarray(x, jnp.float32) for x in (e, c, bias))
    options = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01, "implementation": implementation}
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = P("data"), P("tensor"), P("tensor"), P("data")

    def split(e, c, bias):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=check_vma)
        def partial_sums(e, c, bias, labels):
            loss = linear_cross_entropy(e, c, labels, bias=bias, reduction="sum", vocab_axis_name="tensor", **options)
            return loss[None]

        return partial_sums(e, c, bias, jnp.asarray(labels)).sum()

    whole = lambda e, c, bias: linear_cross_entropy(e, c, labels, bias=bias, reduction="sum", **options)  # noqa: E731
    want = jax.value_and_grad(whole, (0, 1, 2))(e, c, bias)
    got = jax.jit(jax.value_and_grad(split, (0, 1, 2)))(e, c, bias)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(ours - theirs).max() <= 1e-6 * jnp.abs(theirs).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_eps": -1.0}, "filter_eps must be in"),
        ({"filter_eps": 1.0}, "filter_eps must be in"),
        ({"filter_eps": "some"}, "filter_eps must be a Python number"),
        ({"filter_eps": 0.1, "softcap": 3.0, "label_smoothing": 0.1}, "use filter_eps=0"),
    ],
    ids=str,
)
def test_a_filter_that_makes_no_sense_raises(options, message):
    e, c, labels, _, _ = problem()
    with pytest.raises((ValueError, TypeError), match=message):
        linear_cross_entropy(e.astype("f4"), c.astype("f4"), labels, **options)


def test_an_implementation_may_leave_out_nothing():
    """XLA's does not: with any threshold its gradients are the exact ones."""
    e, c, labels, _, _ = problem()
    e, c = e.astype("f4"), c.astype("f4")
    gradient = lambda **options: jax.grad(lambda e: linear_cross_entropy(e, c, labels, **options))(e)  # noqa: E731
    np.testing.assert_array_equal(
        gradient(filter_eps="auto", implementation="chunked"), gradient(implementation="chunked")
    )
