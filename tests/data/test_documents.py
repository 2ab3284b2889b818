import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.data import ByteTokenizer, GrainBatches

pytest.importorskip("grain")


class Lines(ByteTokenizer):
    """Bytes, and 256 to end a document."""

    vocab_size, end_of_text = 257, 256

    def encode(self, text):
        return super().encode(text).astype(np.uint16)


# Some are empty. Grain's shuffle is slow for a handful of documents, so there are more.
DOCUMENTS = [str(i) * (i % 4) for i in range(600)]


def batches(documents=DOCUMENTS, tokenizer=None, **changes):
    return GrainBatches(documents, tokenizer or Lines(), **{"batch_size": 2, "context_length": 4, "seed": 1, **changes})


def stream(iterator, count):
    """The tokens of ``count`` windows end to end: the inputs, and the last target of each."""
    rows = []
    while len(rows) < count:
        batch = next(iterator)
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
        rows += [[*x, y[-1]] for x, y in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True)]
    return [token for row in rows for token in row]


def as_documents(tokens):
    return bytes(token if token < 256 else 10 for token in tokens).decode().split("\n")


def test_shape_and_dtype():
    for array in next(batches()).values():
        assert (array.shape, array.dtype) == ((2, 4), np.int32)


def test_every_document_once_an_epoch_in_a_new_order():
    epoch = sum(len(text) + 1 for text in DOCUMENTS)
    tokens = stream(batches(), -(-2 * epoch // 5) + 1)
    one, two = as_documents(tokens[:epoch])[:-1], as_documents(tokens[epoch : 2 * epoch])[:-1]
    assert sorted(one) == sorted(two) == sorted(DOCUMENTS)
    assert one != two
    assert one != DOCUMENTS
    assert stream(batches(seed=2), 8) != tokens[:40]


@given(st.integers(0, 30), st.integers(0, 3), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=15)
def test_resume_gives_exactly_the_following_batches(stop, ahead, process_index):
    process = {"process_index": process_index, "process_count": 2}
    first = batches(**process)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = batches(**process)
    for _ in range(ahead):
        next(second)
    second.set_state(state)
    assert second.get_state() == state
    assert stream(first, 6) == stream(second, 6)


def test_processes_read_different_documents():
    # Texts of equal length, so that an epoch ends for both processes at the same count.
    documents = [f"{i:03}" for i in range(100)]
    tokens = [stream(batches(documents, process_index=i, process_count=2), 40) for i in range(2)]
    seen = [as_documents(part)[:-1] for part in tokens]
    assert [len(part) for part in seen] == [50, 50]
    assert sorted(seen[0] + seen[1]) == documents


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"context_length": 5}, "context_length"),
        ({"process_count": 2}, "process_count"),
        ({"documents": DOCUMENTS[1:]}, "num_documents"),
        ({"documents": DOCUMENTS[::-1]}, "fingerprint"),
        ({"tokenizer": ByteTokenizer()}, "fingerprint"),
    ],
)
def test_state_of_other_data_or_settings_is_refused(change, name):
    with pytest.raises(ValueError, match=f"other data or settings: {name} is"):
        batches(**change).set_state(batches().get_state())


class Wrong(Lines):
    vocab_size = 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": []}, "0 documents"),
        ({"documents": ["a"], "process_count": 2}, "1 documents are too few for 2"),
        ({"context_length": 0}, "context_length must"),
        ({"seed": 2**32}, "seed must"),
        ({"process_count": 4}, "multiple of process_count=4, got 2"),
    ],
)
def test_refused_settings(change, words):
    with pytest.raises(ValueError, match=words):
        batches(**change)


def test_errors_when_batches_are_made(monkeypatch):
    with pytest.raises(ValueError, match="all 3 documents are empty"):
        next(batches(["", "", ""], ByteTokenizer()))
    with pytest.raises(ValueError, match=r"window \d, offset \d\) holds token id 256"):
        next(batches(tokenizer=Wrong()))
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r'pip install "jaxskip\[data\]"'):
        batches()
