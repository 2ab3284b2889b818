import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.coding import UndecodableError, cyclic, drop, frc, rounding


def survivors(n, stragglers):
    mask = np.ones(n, bool)
    mask[list(stragglers)] = False
    return mask


@pytest.mark.parametrize("s", range(5))
def test_cyclic_decodes_every_set_of_s_stragglers(s):
    code = cyclic(8, s, dtype=np.float64)
    assert np.count_nonzero(code.encode, axis=1).tolist() == [s + 1] * 8
    for stragglers in itertools.combinations(range(8), s):
        mask = survivors(8, stragglers)
        a = code.decode(mask)
        assert not a[~mask].any()
        np.testing.assert_allclose(a @ code.encode, np.ones(8), atol=1e-8)  # the card's bound, float64


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([(4, 1), (6, 1), (6, 2), (6, 5), (12, 3), (5, 0)]), st.integers(0, 2**31))
def test_frc_decodes_exactly_iff_a_worker_of_each_group_is_left(sizes, seed):
    n, s = sizes
    code = frc(n, s)
    mask = np.random.default_rng(seed).random(n) < 0.6
    if mask.reshape(-1, s + 1).any(axis=1).all():
        a = code.decode(mask)
        assert set(a.tolist()) <= {0.0, 1.0} and not a[~mask].any()
        assert (a @ code.encode == 1).all()
    else:
        assert mask.sum() < n - s
        with pytest.raises(UndecodableError, match="a whole group is missing"):
            code.decode(mask)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_cyclic_beyond_its_promise_raises_and_never_returns_a_wrong_gradient(seed):
    rng = np.random.default_rng(seed)
    code = cyclic(7, 2, seed=seed % 10, dtype=np.float64)
    mask = survivors(7, rng.choice(7, 3, replace=False))
    with pytest.raises(UndecodableError, match="do not span"):
        code.decode(mask)


def test_cyclic_in_float32_keeps_the_digits_that_its_measure_promises():
    """Messages rounded to float32: the error stays below 10 times |a| eps (n terms add up), and below 1e-3."""
    code = cyclic(16, 3)
    gradients = np.random.default_rng(0).normal(size=(16, 50))
    messages = (code.encode @ gradients).astype(np.float32)
    total = gradients.sum(axis=0)
    for first in range(16):
        a = code.decode(survivors(16, [(first + i) % 16 for i in range(3)]))
        error = np.linalg.norm(a @ messages - total) / np.linalg.norm(total)
        assert error < min(1e-3, 10 * rounding(a, np.float32))


@pytest.mark.parametrize(("n", "s", "dtype"), [(64, 15, np.float32), (96, 15, np.float32), (8, 3, jnp.bfloat16)])
def test_cyclic_is_refused_where_it_loses_precision(n, s, dtype):
    """|a| passes 1e4, the limit of float32, beyond some 50 workers; bfloat16 has two digits to lose."""
    with pytest.raises(ValueError, match="rounding errors would grow.*fractional repetition"):
        cyclic(n, s, dtype=dtype)
    assert frc(n, 3, dtype=dtype).dtype == dtype


def test_dropping_scales_up_and_is_bounded():
    code = drop(5, 2)
    np.testing.assert_allclose(code.decode(survivors(5, [0, 3])), [0, 5 / 3, 5 / 3, 0, 5 / 3])
    with pytest.raises(UndecodableError, match="more were dropped"):
        code.decode(survivors(5, [0, 1, 3]))


@pytest.mark.parametrize("make", [frc, cyclic, drop])
def test_bad_arguments(make):
    for s in (-1, 4):
        with pytest.raises(ValueError, match="0 <= s < n"):
            make(4, s)
    for mask in (np.ones(3, bool), np.ones(4), np.ones((4, 1), bool)):
        with pytest.raises(ValueError, match=r"a mask of 4 workers is bool \[4\]"):
            make(4, 1).decode(mask)


def test_frc_says_which_sizes_fit():
    with pytest.raises(ValueError, match=r"takes s = \[0, 1, 2, 5\], not 3"):
        frc(6, 3)
