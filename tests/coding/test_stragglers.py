import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.coding import (
    conforms_arbitrary,
    conforms_bursty,
    conforms_per_round,
    gilbert_elliott,
    gilbert_elliott_delays,
    load_trace,
    random_stragglers,
)

patterns = st.builds(
    lambda n, rounds, seed, rate: np.random.default_rng(seed).random((n, rounds)) < rate,
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 2**31),
    st.sampled_from([0.1, 0.3]),
)


def windows(late, W):
    """Rounds of straggling of each worker in each window, by the definition's words."""
    rounds = late.shape[1]
    for start in range(1 - W, rounds):
        inside = [t for t in range(start, start + W) if 0 <= t < rounds]
        yield [[t for t in inside if worker[t]] for worker in late]


@settings(deadline=None, max_examples=25)
@given(patterns)
def test_models_are_their_definitions(late):
    for B, W, lam in itertools.product((1, 2, 3), (2, 3, 4), (0, 1, 2)):
        wanted = all(
            sum(bool(w) for w in window) <= lam and all(max(w) - min(w) < B for w in window if w)
            for window in windows(late, W)
        )
        assert conforms_bursty(late, B, W, lam) == wanted
        wanted = all(
            sum(bool(w) for w in window) <= lam and all(len(w) <= B for w in window) for window in windows(late, W)
        )
        assert conforms_arbitrary(late, B, W, lam) == wanted
    assert conforms_per_round(late, 1) == all(sum(column) <= 1 for column in late.T)


@pytest.mark.parametrize(
    "conforms",
    [
        lambda s: conforms_bursty(s, 2, 3, 2),
        lambda s: conforms_arbitrary(s, 2, 4, 2),
        lambda s: conforms_per_round(s, 2),
    ],
)
def test_random_patterns_conform_and_use_what_is_allowed(conforms):
    late = random_stragglers(conforms, 6, 12, seed=1)
    assert all(conforms(late[:, :t]) for t in range(1, 13))
    assert late.sum(axis=0).max() == 2
    assert not np.array_equal(late, random_stragglers(conforms, 6, 12, seed=2))


def test_gilbert_elliott_has_its_stationary_share_and_spell_length():
    """2000 rounds of 50 workers: shares and lengths within 5 % (about four standard errors)."""
    slow = gilbert_elliott(50, 2000, enter=0.1, leave=0.4, seed=0)
    assert slow.mean() == pytest.approx(0.1 / 0.5, rel=0.05)
    starts = slow[:, 1:] & ~slow[:, :-1]
    assert slow.sum() / starts.sum() == pytest.approx(1 / 0.4, rel=0.05)
    delays = gilbert_elliott_delays(50, 400, seed=3)
    fast = delays < 1.1
    assert delays.min() >= 1 and delays[~fast].min() >= 3
    assert delays[~fast].mean() - 1.05 == pytest.approx(2 + 8, rel=0.1)


def test_traces_come_back_from_a_file(tmp_path):
    delays = gilbert_elliott_delays(3, 4, seed=0)
    path = tmp_path / "trace.csv"
    np.savetxt(path, delays, delimiter=",")
    np.testing.assert_allclose(load_trace(path), delays, rtol=1e-15)


@pytest.mark.parametrize("text", ["1,2\n3,nan\n", "1,2\n3,0\n", "1,2\n3\n", "a,b\n"])
def test_bad_traces_are_told(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match="trace.csv"):
        load_trace(path)


def test_bad_arguments():
    with pytest.raises(ValueError, match="a pattern is bool"):
        conforms_per_round(np.zeros((2, 2)), 1)
    with pytest.raises(ValueError, match="a window of 0 rounds"):
        conforms_bursty(np.zeros((2, 2), bool), 1, 0, 1)
    with pytest.raises(ValueError, match="enter=2; it is a probability"):
        gilbert_elliott(2, 2, 2, 0.5, 0)
