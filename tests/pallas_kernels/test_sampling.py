"""Labels drawn without the logits: the distribution, and independence of tiling and placement."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    sample_linear_categorical,
    sampled_linear_cross_entropy,
)
from pallas_kernels.linear_cross_entropy.noise import Draw, exponential

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def head():
    """Embeddings [3, 13, 8], classifier [1100, 8], bias [1100]; 1100 is no multiple of the noise's period 256."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 13, 8), (1100, 8), (1100,))]


def labels_of(head, **options):
    e, c, bias = head
    draw = jax.jit(lambda e, c, b: sample_linear_categorical(KEY, e, c, bias=b, softcap=4.0, **options))
    return np.asarray(draw(e, c, bias))


def test_labels_do_not_depend_on_the_tiling(head):
    want = labels_of(head, implementation="reference")
    assert want.dtype == np.int32 and want.shape == (3, 13) and len(np.unique(want)) > 10
    for tiles in ((39, 1100), (8, 256), (5, 768), (39, 512), (1, 2048)):
        np.testing.assert_array_equal(labels_of(head, block_sizes=tiles), want)
    e, c, bias = head
    transposed = sample_linear_categorical(KEY, e, c.T, bias=bias, softcap=4.0, classifier_layout="dv")
    np.testing.assert_array_equal(transposed, want)


def test_labels_follow_the_token_ids(head):
    e, c, bias = head
    want = labels_of(head)
    ids = jnp.arange(39).reshape(3, 13)
    for pick in (np.s_[::-1], np.s_[1:2, 4:9], np.s_[2, 7]):
        got = sample_linear_categorical(KEY, e[pick], c, bias=bias, softcap=4.0, token_ids=ids[pick])
        np.testing.assert_array_equal(got, want[pick])
    mapped = jax.jit(jax.vmap(lambda e, i: sample_linear_categorical(KEY, e, c, bias=bias, softcap=4.0, token_ids=i)))(
        e, ids
    )
    np.testing.assert_array_equal(mapped, want)


@pytest.mark.multidevice
def test_labels_do_not_depend_on_the_placement(head):
    e, c, _ = head
    rows = jnp.tile(e.reshape(39, 8), (2, 1))[:64]
    ids = jnp.arange(64, dtype=jnp.uint32)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(e, c, ids):
        return jax.grad(lambda c: sampled_linear_cross_entropy(KEY, e, c, token_ids=ids, reduction="sum")[0])(
            c
        ), sample_linear_categorical(KEY, e, c, token_ids=ids)

    gradient, spread = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P(), P("data")))
    )(rows, c, ids)
    (_, labels), want = jax.value_and_grad(
        lambda c: sampled_linear_cross_entropy(KEY, rows, c, reduction="sum"), has_aux=True
    )(c)
    np.testing.assert_array_equal(spread, labels)
    np.testing.assert_allclose(gradient, want, atol=1e-5)  # float32 sums of 64 terms in another order


@pytest.mark.parametrize("classes", [6, 400])
def test_frequencies_are_those_of_the_softmax(classes):
    """Chi-square at significance 1e-3 (fixed seed: passes or fails for good), 40,000 draws of one distribution.

    Also two-sample against jax.random.categorical. Leaving out the bias or the softcap must fail the same test.
    """
    n, s = 40_000, 2.0
    rng = np.random.default_rng(classes)
    e = jnp.ones((n, 1), jnp.float32)
    c = jnp.asarray(rng.normal(size=(classes, 1)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=classes), jnp.float32)
    z = s * jnp.tanh((c[:, 0] + bias) / s)

    def counts(labels):
        return np.bincount(np.asarray(labels), minlength=classes)

    def p_value(observed, logits):
        return scipy.stats.chisquare(observed, n * np.asarray(jax.nn.softmax(logits), np.float64), sum_check=False)[1]

    observed = counts(jax.jit(lambda e, c, b: sample_linear_categorical(KEY, e, c, bias=b, softcap=s))(e, c, bias))
    assert p_value(observed, z) > 1e-3
    for wrong in (c[:, 0] + bias, s * jnp.tanh(c[:, 0] / s)):
        assert p_value(observed, wrong) < 1e-6
    other = counts(jax.random.categorical(jax.random.key(1), z, shape=(n,)))
    seen = observed + other > 0
    assert scipy.stats.chi2_contingency(np.stack([observed, other])[:, seen])[1] > 1e-3


def test_the_noise_is_exponential_and_independent():
    """Kolmogorov-Smirnov at significance 1e-3; correlations of 2**17 pairs stay below 4 standard deviations."""
    noise = np.asarray(exponential(Draw(jnp.array([1, 2], jnp.uint32), jnp.arange(512, dtype=jnp.uint32)), 0, 512))
    assert scipy.stats.kstest(noise.ravel()[::7], "expon").pvalue > 1e-3
    assert len(np.unique(noise)) > 0.99 * noise.size
    centred = (noise - noise.mean()) / noise.std()
    for a, b in (
        (centred[:, :128], centred[:, 128:256]),  # the two words of one block
        (centred[:, :256], centred[:, 256:]),
        (centred[:256], centred[256:]),
        (centred[:, :-1], centred[:, 1:]),
    ):
        assert abs((a * b).mean()) < 4 / np.sqrt(a.size)
    part = exponential(Draw(jnp.array([1, 2], jnp.uint32), jnp.array([3, 500], jnp.uint32)), 256, 100)
    np.testing.assert_array_equal(part, noise[[3, 500], 256:356])


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_the_cross_entropy_on_the_drawn_labels(head, reduction, implementation):
    """The same float32 arithmetic on given labels: 1e-5."""
    e, c, bias = head
    weights = jnp.asarray(np.random.default_rng(1).random((3, 13)) < 0.7, jnp.float32)
    tiles = None if implementation == "reference" else (8, 512)

    def drawn(e, c, bias):
        loss, labels = sampled_linear_cross_entropy(
            KEY, e, c, bias=bias, softcap=4.0, token_weights=weights, reduction=reduction,
            implementation=implementation, block_sizes=tiles,
        )  # fmt: skip
        return loss.sum(), (loss, labels)

    (_, (loss, labels)), gradients = jax.jit(jax.value_and_grad(drawn, (0, 1, 2), has_aux=True))(e, c, bias)
    np.testing.assert_array_equal(labels, labels_of(head))

    def given(e, c, bias):
        targets = jnp.where(weights > 0, labels, -100)
        loss = linear_cross_entropy(e, c, targets, bias=bias, softcap=4.0, reduction=reduction)
        return loss.sum(), loss

    (_, want), want_gradients = jax.jit(jax.value_and_grad(given, (0, 1, 2), has_aux=True))(e, c, bias)
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, want_gradients)


def test_keys_of_every_kind(head):
    e, c, _ = head
    typed = sample_linear_categorical(jax.random.key(3), e, c)
    np.testing.assert_array_equal(sample_linear_categorical(jax.random.PRNGKey(3), e, c), typed)
    assert (sample_linear_categorical(jax.random.key(4), e, c) != typed).mean() > 0.5
    rbg = [sample_linear_categorical(jax.random.key(i, impl="rbg"), e, c) for i in (3, 3, 4)]
    np.testing.assert_array_equal(rbg[0], rbg[1])
    assert (rbg[0] != rbg[2]).mean() > 0.5
    keys = jax.random.split(KEY, 2)
    mapped = jax.jit(jax.vmap(lambda key: sample_linear_categorical(key, e, c)))(keys)
    np.testing.assert_array_equal(mapped[1], sample_linear_categorical(keys[1], e, c))


def test_no_tokens_and_one_class():
    assert sample_linear_categorical(KEY, jnp.ones((0, 4)), jnp.ones((9, 4))).shape == (0,)
    loss, labels = sampled_linear_cross_entropy(KEY, jnp.ones((0, 4)), jnp.ones((9, 4)))
    assert loss == 0 and labels.shape == (0,)
    loss, labels = sampled_linear_cross_entropy(KEY, jnp.ones((5, 4)), jnp.ones((1, 4)))
    assert loss == 0 and (labels == 0).all()
    loss, _ = sampled_linear_cross_entropy(KEY, jnp.ones((5, 4)), jnp.ones((9, 4)), token_weights=jnp.zeros(5))
    assert loss == 0


def test_bad_input_raises_early(head):
    e, c, _ = head
    with pytest.raises(ValueError, match=r"multiple of 256 entries, or of the whole vocabulary \(1100\)"):
        sample_linear_categorical(KEY, e, c, block_sizes=(8, 100))
    with pytest.raises(ValueError, match=r"keys of shape \(2,\); use jax.vmap"):
        sample_linear_categorical(jax.random.split(KEY), e, c)
    with pytest.raises(ValueError, match=r"token_ids must be integers of shape \(3, 13\)"):
        sample_linear_categorical(KEY, e, c, token_ids=jnp.arange(39))
    with pytest.raises(ValueError, match="one weight per token"):
        sampled_linear_cross_entropy(KEY, e, c, token_weights=jnp.ones(39))
    with pytest.raises(ValueError, match="'fast' does not exist"):
        sample_linear_categorical(KEY, e, c, implementation="fast")
