import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from jaxskip.data import ByteTokenizer, Corpus, load_corpus, load_texts


def test_default_corpus_twice():
    one, two = load_corpus(), load_corpus("pysrc")
    assert (one.vocab_size, one.name, one.train.dtype) == (256, "pysrc", np.uint8)
    assert one.train.size + one.validation.size == 8_000_000
    # Files are held out by number, not by size; any fair tenth lies well within these bounds.
    assert 0.05 < one.validation.size / 8_000_000 < 0.2
    np.testing.assert_array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.validation, two.validation)
    assert one.fingerprint == two.fingerprint
    assert len(one.fingerprint) == 16


def test_tokens_are_the_text():
    train, validation = load_texts("pysrc", max_bytes=300_000)
    corpus = load_corpus("pysrc", max_bytes=300_000)
    assert ByteTokenizer().decode(corpus.train) == "".join(train)
    assert ByteTokenizer().decode(corpus.validation) == "".join(validation)


def test_fingerprint_changes_with_the_data(tmp_path):
    file = tmp_path / "a.txt"
    prints = set()
    for text, fraction in (("abcdefghij", 0.1), ("abcdefghiJ", 0.1), ("abcdefghij", 0.2), ("abcdefghij", 0.1)):
        file.write_text(text)
        prints.add(load_corpus(file, validation_fraction=fraction).fingerprint)
    assert len(prints) == 3


def test_corpus_is_frozen_and_checked():
    corpus = Corpus(np.zeros(2, np.uint8), np.zeros(2, np.uint8), vocab_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        corpus.name = "other"
    with pytest.raises(ValueError, match=r"validation part of tokens.*token id 4"):
        Corpus(np.zeros(2, np.uint8), np.full(2, 4, np.uint8), vocab_size=4)


@pytest.mark.parametrize(("text", "part"), [("", "training"), ("short", "validation")])
def test_empty_parts(tmp_path, text, part):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"the {part} part of .*a\.txt holds no tokens"):
        load_corpus(tmp_path / "a.txt")


def test_a_folder_named_pysrc_does_not_shadow_the_corpus(tmp_path, monkeypatch):
    (tmp_path / "pysrc").mkdir()
    (tmp_path / "pysrc" / "train.bin").write_bytes(b"ab")
    monkeypatch.chdir(tmp_path)
    assert load_corpus("pysrc", max_bytes=50_000).vocab_size == 256


def test_import_needs_numpy_alone():
    code = (
        "import sys, jaxskip.data\n"
        "jaxskip.data.load_corpus(max_bytes=50_000)\n"
        "print({'tensorflow', 'tensorflow_datasets', 'grain', 'tokenizers', 'jax'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "set()"
