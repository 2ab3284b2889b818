import numpy as np
import pytest

from jaxskip.data import tokens


def test_smallest_dtype():
    names = [tokens.token_dtype(vocab_size).name for vocab_size in (1, 256, 257, 65536, 65537)]
    assert names == ["uint8", "uint8", "uint16", "uint16", "uint32"]


def test_sample_of_a_long_array_is_small_and_keeps_both_ends(tmp_path):
    size = 2**26 + 4321
    long = np.memmap(tmp_path / "long.bin", np.uint8, "w+", shape=(size,))
    long[0], long[-1] = 7, 9
    seen = tokens.sample(long)
    assert seen.size == 256 * 4096
    assert (seen[0], seen[-1]) == (7, 9)
    before = tokens.fingerprint(long)
    long[-1] = 10
    assert tokens.fingerprint(long) != before


def test_fingerprint_depends_on_content_order_dtype_and_split():
    a, b = np.arange(5, dtype=np.uint8), np.arange(7, dtype=np.uint8)
    prints = [tokens.fingerprint(*arrays) for arrays in [(a, b), (b, a), (a, b[::-1]), (a.astype(np.uint16), b), (a,)]]
    assert len(set(prints)) == len(prints)
    assert tokens.fingerprint(a.copy(), b.copy()) == prints[0]


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros(0, np.uint8), ValueError, "no tokens"),
        (np.zeros(3, np.int32), TypeError, "int32"),
        ([1, 2], TypeError, "list"),
        (np.zeros((2, 2), np.uint8), ValueError, r"\(2, 2\)"),
        (np.array([1, 99], np.uint8), ValueError, "token id 99"),
    ],
)
def test_refused_arrays(array, error, words):
    with pytest.raises(error, match=words):
        tokens.check_tokens(array, 50, "it")
