import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.data import BatchIterator, TokenWindows, evaluation_windows

TOKENS = np.random.Generator(np.random.PCG64(0)).integers(0, 300, 1000).astype(np.uint16)
SETTINGS = {"batch_size": 4, "context_length": 6, "vocab_size": 300}


def windows(tokens=TOKENS, **changes) -> BatchIterator:
    return TokenWindows(tokens, **{**SETTINGS, "seed": 3, **changes})


def assert_same(one, other):
    for name in ("inputs", "targets"):
        np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_windows_of_the_tokens():
    for batch in [batch for _, batch in zip(range(5), windows(), strict=False)]:
        assert set(batch) == {"inputs", "targets"}
        for array in batch.values():
            assert (array.shape, array.dtype) == ((4, 6), np.int32)
        for x, y in zip(batch["inputs"], batch["targets"], strict=True):
            starts = [i for i in range(994) if (TOKENS[i : i + 6] == x).all() and (TOKENS[i + 1 : i + 7] == y).all()]
            assert len(starts) == 1


def test_first_batch_is_fixed():
    # Pins the draw itself: a run resumed under another NumPy must see the same windows.
    batch = next(TokenWindows(np.arange(200, dtype=np.uint8), batch_size=5, context_length=1, vocab_size=200, seed=7))
    assert batch["inputs"][:, 0].tolist() == [164, 195, 70, 177, 139]


def test_all_starts_are_drawn_about_equally_often():
    tokens = np.arange(10, dtype=np.uint8)
    batches = TokenWindows(tokens, batch_size=1000, context_length=6, vocab_size=10)
    counts = sum(np.bincount(next(batches)["inputs"][:, 0], minlength=10) for _ in range(4))
    # Four places for 7 tokens; 1000 expected of each, standard deviation 27: 150 is over five of them.
    assert counts[4:].sum() == 0
    np.testing.assert_allclose(counts[:4], 1000, atol=150)


@given(st.integers(0, 12), st.integers(0, 5), st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=25)
def test_resume_gives_exactly_the_following_batches(stop, ahead, seed):
    first = windows(seed=seed)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = windows(seed=seed)
    for _ in range(ahead):
        next(second)
    second.set_state(state)
    assert second.get_state() == state
    for _ in range(3):
        assert_same(next(first), next(second))


@pytest.mark.parametrize("count", [2, 4])
def test_rows_of_the_processes_make_the_global_batch(count):
    whole = windows()
    parts = [windows(process_index=i, process_count=count) for i in range(count)]
    for _ in range(3):
        rows = [next(part) for part in parts]
        assert rows[0]["inputs"].shape == (4 // count, 6)
        assert_same(next(whole), {name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
    # and a state moves between numbers of processes
    parts[1].set_state(whole.get_state())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"context_length": 5}, "context_length"),
        ({"tokens": TOKENS[1:]}, "num_tokens"),
        ({"tokens": TOKENS[::-1]}, "fingerprint"),
    ],
)
def test_state_of_other_data_or_settings_is_refused(change, name):
    with pytest.raises(ValueError, match=f"other data or settings: {name} is"):
        windows(**change).set_state(windows().get_state())


def test_token_past_the_vocabulary_is_found_when_the_batch_is_made(tmp_path):
    tokens = np.memmap(tmp_path / "long.bin", np.uint16, "w+", shape=(40_000_000,))
    tokens[4096:4110] = 999  # between the first two blocks that are looked at on loading
    batches = evaluation_windows(tokens, batch_size=8, context_length=500, num_batches=2, vocab_size=300)
    next(batches)
    with pytest.raises(ValueError, match=r"position 4096\) holds token id 999"):
        next(batches)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": TOKENS[:6]}, "6 tokens are shorter than one window of context_length . 1 = 7"),
        ({"context_length": 0}, "context_length must"),
        ({"batch_size": 0}, "batch_size counts"),
        ({"process_count": 3}, "multiple of process_count=3, got 4"),
        ({"process_index": 2, "process_count": 2}, "process_index must"),
        ({"vocab_size": 200}, "token id 299"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_refused_settings(change, words):
    with pytest.raises(ValueError, match=words):
        windows(**change)
    if "seed" not in change:
        with pytest.raises(ValueError, match=words):
            evaluation_windows(**{"tokens": TOKENS, **SETTINGS, "num_batches": 1, **change})


def test_shortest_possible_tokens():
    batch = next(windows(tokens=TOKENS[:7]))
    np.testing.assert_array_equal(batch["targets"], np.tile(TOKENS[1:7], (4, 1)))


def test_evaluation_windows_are_the_same_each_time_and_predict_each_token_once():
    one, two = (list(evaluation_windows(TOKENS, num_batches=41, **SETTINGS)) for _ in range(2))
    assert len(one) == 41
    for a, b in zip(one, two, strict=True):
        assert_same(a, b)
        assert a["inputs"].dtype == np.int32
    targets = np.concatenate([batch["targets"].ravel() for batch in one])
    np.testing.assert_array_equal(targets, TOKENS[1 : 41 * 24 + 1])


def test_evaluation_windows_by_process():
    whole = evaluation_windows(TOKENS, num_batches=2, **SETTINGS)
    parts = [evaluation_windows(TOKENS, num_batches=2, process_index=i, process_count=2, **SETTINGS) for i in range(2)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert_same(batch, {name: np.concatenate([left[name], right[name]]) for name in batch})


def test_evaluation_windows_that_do_not_fit():
    with pytest.raises(ValueError, match="1000 tokens give 166 windows of 6, not 42 batches of 4"):
        evaluation_windows(TOKENS, num_batches=42, **SETTINGS)
    with pytest.raises(ValueError, match="num_batches"):
        evaluation_windows(TOKENS, num_batches=0, **SETTINGS)
