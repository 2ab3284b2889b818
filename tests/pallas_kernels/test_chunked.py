"""What the tiles promise: memory, number of matrix products, float32 accumulation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.dispatch import Target
from pallas_kernels.linear_cross_entropy import chunked, inputs, linear_cross_entropy, sampled_linear_cross_entropy


def spec(dtype="float32", block_sizes=None, platform="cpu"):
    operands = (jnp.zeros(1, dtype), jnp.zeros(1, dtype), None)
    return inputs.spec("chunked", operands, "vd", None, block_sizes)._replace(target=Target(platform))


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(0, 2**20),
    vocabulary=st.integers(1, 2**22),
    platform=st.sampled_from(["cpu", "gpu", "tpu"]),
)
def test_default_tiles_keep_to_the_budget(tokens, vocabulary, platform):
    rows, columns = chunked.tile_sizes(spec(platform=platform), tokens, vocabulary)
    budget = 2**20 * (32 if platform == "cpu" else 1024)
    # Even tiles are rounded up, rows to a multiple of 8 and columns of 256: at most 1/8 over. 128 rows are split
    # at worst into twice 64.
    assert 4 * rows * columns <= budget * 9 / 8
    assert columns == vocabulary or (columns % 256 == 0 and rows >= min(tokens, 64))
    assert 1 <= rows <= max(tokens, 1) + 7


def test_the_vocabulary_is_cut_only_when_too_few_rows_fit():
    assert chunked.tile_sizes(spec(platform="gpu"), 8192, 256128) == (1024, 256128)
    assert chunked.tile_sizes(spec(platform="cpu"), 512, 49152) == (128, 49152)
    assert chunked.tile_sizes(spec(platform="cpu"), 8192, 256128)[1] < 256128
    assert chunked.tile_sizes(spec(platform="cpu"), 4, 256128) == (4, 256128)


def products(f, *arguments):
    return len(re.findall(r"= \S+ dot\(", jax.jit(f).lower(*arguments).compile().as_text()))


SHAPES = [jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((512, 32), jnp.float32)]
LABELS = jax.ShapeDtypeStruct((64,), jnp.int32)


@pytest.mark.parametrize("rows", [64, 16])
def test_logits_are_computed_once_with_one_vocabulary_tile(rows):
    """In the optimised program: logits, embedding gradient, classifier gradient; and no more than is asked for."""

    def loss(e, c, labels):
        return linear_cross_entropy(e, c, labels, softcap=20.0, z_loss=0.1, block_sizes=(rows, 512))

    assert products(jax.value_and_grad(loss, (0, 1)), *SHAPES, LABELS) == 3
    assert products(jax.grad(loss), *SHAPES, LABELS) == 2
    assert products(loss, *SHAPES, LABELS) == 1


def test_sampling_shares_the_logits_with_loss_and_gradient():
    def loss(e, c, key):
        return sampled_linear_cross_entropy(key, e, c, block_sizes=(16, 512))[0]

    assert products(jax.value_and_grad(loss, (0, 1)), *SHAPES, jax.random.key(0)) == 3


def test_two_vocabulary_tiles_compute_the_logits_twice():
    def loss(e, c, labels):
        return linear_cross_entropy(e, c, labels, block_sizes=(64, 128))

    assert products(jax.value_and_grad(loss, (0, 1)), *SHAPES, LABELS) == 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temporaries_are_a_twentieth_of_the_materialised_ones(reduction):
    """The compiler's own count; gradients are outputs and, in float32, accumulated in place, so not temporaries."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 64), (49152, 64))]
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)

    def temporaries(implementation, tiles):
        def loss(e, c, labels):
            return linear_cross_entropy(
                e, c, labels, reduction=reduction, implementation=implementation, block_sizes=tiles
            ).sum()

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("chunked", (64, 4096)) < 0.05 * temporaries("reference", None)


@pytest.mark.parametrize(("tokens", "vocabulary", "tiles"), [(16, 32768, (16, 128)), (4096, 64, (16, 64))])
def test_gradients_are_accumulated_in_float32(tokens, vocabulary, tiles):
    """256 vocabulary tiles for the embeddings, 256 row tiles for the classifier, on bfloat16 inputs.

    Against float64 sums of the same bfloat16 products: 1e-5 of the norm. bfloat16 sums are off by more than 1e-3.
    """
    rng = np.random.default_rng(0)
    e = jnp.asarray(rng.normal(size=(tokens, 64)), jnp.bfloat16)
    c = jnp.asarray(rng.normal(size=(vocabulary, 64)) / 8, jnp.bfloat16)
    labels = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32)
    _, _, (de, dc, _) = chunked.forward_backward(
        spec("bfloat16", tiles), e, c, None, jnp.ones(tokens, jnp.float32), labels
    )
    assert de.dtype == dc.dtype == jnp.float32
    probabilities = jax.nn.softmax(jnp.einsum("nd,vd->nv", e, c, preferred_element_type=jnp.float32))
    dz = (probabilities - jax.nn.one_hot(labels, vocabulary)).astype(jnp.bfloat16)
    e, c, dz = (np.asarray(x, np.float64) for x in (e, c, dz))

    def error(got, want):
        return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)

    def in_bfloat16(parts):
        total = jnp.zeros(parts[0].shape, jnp.bfloat16)
        for part in parts:
            total += jnp.asarray(part, jnp.bfloat16)
        return total.astype(jnp.float32)

    assert error(de, dz @ c) < 1e-5 and error(dc, dz.T @ e) < 1e-5
    if vocabulary > tokens:
        parts = [dz[:, i : i + 128] @ c[i : i + 128] for i in range(0, vocabulary, 128)]
        assert error(in_bfloat16(parts), dz @ c) > 1e-3
    else:
        parts = [dz[i : i + 16].T @ e[i : i + 16] for i in range(0, tokens, 16)]
        assert error(in_bfloat16(parts), dz.T @ e) > 1e-3


@functools.cache
def tiling_step(tiles, implementation="chunked"):
    rng = np.random.default_rng(0)
    e, c = jnp.asarray(rng.normal(size=(11, 8)), jnp.float32), jnp.asarray(rng.normal(size=(130, 8)), jnp.float32)
    labels = rng.integers(0, 130, 11)

    def loss(e, c):
        return linear_cross_entropy(e, c, labels, implementation=implementation, block_sizes=tiles)

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(e, c)


@settings(deadline=None, max_examples=12)
@given(rows=st.sampled_from([1, 3, 11, 50]), columns=st.sampled_from([1, 7, 64, 130, 500]))
@pytest.mark.slow
def test_the_tiling_changes_only_rounding(rows, columns):
    """float32 sums in another order: 1e-5."""
    got, want = tiling_step((rows, columns)), tiling_step(None, "reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
