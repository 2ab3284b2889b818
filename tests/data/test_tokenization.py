import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.data import BPETokenizer, ByteTokenizer, load_corpus
from jaxskip.data.tokenization import END_OF_TEXT, encode_documents

TEXTS = ["the cat sat on the mat\n", "def cat(the):\n    return the\n", "naïve café, 漢字\n"] * 3
# Unicode text without lone surrogates, which UTF-8 cannot hold.
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def bpe():
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(TEXTS, vocab_size=290)


@given(unicode_text)
@settings(deadline=None, max_examples=25)
def test_byte_round_trip(text):
    ids = ByteTokenizer().encode(text)
    assert ids.dtype == np.uint8
    assert bytes(ids) == text.encode()
    assert ByteTokenizer().decode(ids) == text


def test_byte_decode_of_cut_text_and_of_ids_out_of_range():
    assert ByteTokenizer().decode([0xC3]) == "\ufffd"
    for bad in (256, -1):
        with pytest.raises(ValueError, match=str(bad)):
            ByteTokenizer().decode([bad])


@given(unicode_text)
@settings(deadline=None, max_examples=25)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert ids.dtype == np.uint16
    assert bpe.decode(ids) == text


def test_bpe_merges_and_is_deterministic(bpe):
    again = BPETokenizer.train(TEXTS, vocab_size=290)
    assert bpe.vocab_size == 290
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) // 2
    for one, other, text in zip(bpe.encode_batch(TEXTS), again.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, bpe.encode(text))


def test_bpe_save_and_load(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    loaded = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.end_of_text) == (bpe.vocab_size, bpe.end_of_text)
    text = TEXTS[0] + END_OF_TEXT + "🙂"
    np.testing.assert_array_equal(loaded.encode(text), bpe.encode(text))
    assert loaded.decode(loaded.encode(text)) == text


def test_end_of_text_comes_from_documents_and_never_from_text(bpe):
    assert bpe.end_of_text not in bpe.encode(f"a {END_OF_TEXT} b")
    documents = list(encode_documents(["the", "", "cat"], bpe))
    assert [ids.dtype for ids in documents] == [np.uint16] * 3
    assert [int(ids[-1]) for ids in documents] == [bpe.end_of_text] * 3
    assert bpe.decode(np.concatenate(documents)) == f"the{END_OF_TEXT}{END_OF_TEXT}cat{END_OF_TEXT}"
    assert [ids.tolist() for ids in encode_documents(["a", ""], ByteTokenizer())] == [[97], []]


def test_encode_documents_keeps_order_over_several_chunks():
    texts = [str(i) for i in range(600)]
    assert [bytes(ids).decode() for ids in encode_documents(iter(texts), ByteTokenizer())] == texts


def test_corpus_of_bpe_tokens(bpe, tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"the cat {i}")
    corpus = load_corpus(tmp_path, tokenizer=bpe)
    assert (corpus.vocab_size, corpus.train.dtype, corpus.tokenizer) == (290, np.uint16, bpe)
    assert bpe.decode(corpus.validation) == f"the cat 9{END_OF_TEXT}"
    assert np.count_nonzero(corpus.train == bpe.end_of_text) == 9


def test_special_tokens_are_encoded_when_asked_for(bpe):
    text = f"the cat{END_OF_TEXT}the"
    special = bpe.encode_special(text)
    assert special.dtype == bpe.encode(text).dtype
    np.testing.assert_array_equal(special, [*bpe.encode("the cat"), bpe.end_of_text, *bpe.encode("the")])
    assert bpe.end_of_text not in bpe.encode(text)
    assert bpe.decode(special) == bpe.decode(bpe.encode(text)) == text


def test_bpe_from_merges():
    tokenizers = pytest.importorskip("tokenizers")
    tokens = ["<s>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "12", "the", "th"]
    merges = [("t", "h"), ("th", "e"), ("1", "2")]
    plain = BPETokenizer.from_merges(tokens, merges)
    assert (plain.bos_token, plain.stop_tokens, plain.end_of_text) == (None, (), None)
    assert plain.encode("the12").tolist() == [tokens.index("the"), tokens.index("12")]
    tokenizer = BPETokenizer.from_merges(
        tokens, merges, special_tokens=["<s>"], split_digits=True, bos_token=0, stop_tokens=[0, 5]
    )
    assert (tokenizer.bos_token, tokenizer.stop_tokens, tokenizer.end_of_text) == (0, (0, 5), 0)
    assert tokenizer.encode("the12").tolist() == [tokens.index(token) for token in ("the", "1", "2")]
    assert tokenizer.encode_special("<s>the").tolist() == [0, tokens.index("the")]
    assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]
    with pytest.raises(ValueError, match="special token '</s>'"):
        BPETokenizer.from_merges(tokens, merges, special_tokens=["</s>"])
    with pytest.raises(ValueError, match="no BPE"):
        BPETokenizer.from_merges(tokens, [("q", "q")])
    with pytest.raises(ValueError, match="not a lossless byte-level BPE"):
        BPETokenizer.from_merges(tokens[2:], merges)
    assert BPETokenizer.from_merges(tokens[2:], merges, lossless=False).vocab_size == len(tokens) - 2


def write_gpt2_files(folder, alphabet):
    symbols = [*alphabet, "th", "the", "Ġthe"]
    vocabulary = {symbol: i for i, symbol in enumerate([*symbols, END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
    return vocabulary


def test_gpt2_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = write_gpt2_files(tmp_path, sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = BPETokenizer.from_gpt2(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (260, vocabulary[END_OF_TEXT])
    assert tokenizer.encode("the the").tolist() == [vocabulary["the"], vocabulary["Ġthe"]]
    assert tokenizer.decode(tokenizer.encode(TEXTS[2])) == TEXTS[2]


def test_bpe_errors(bpe, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="257"):
        BPETokenizer.train(TEXTS, vocab_size=256)
    with pytest.raises(ValueError, match="token id 290"):
        bpe.decode([290])
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        BPETokenizer.load(tmp_path / "tokenizer.json")
    write_gpt2_files(tmp_path, "abcd")
    with pytest.raises(ValueError, match=r"cannot read .*vocab\.json and .*merges\.txt"):
        BPETokenizer.from_gpt2(tmp_path)
    write_gpt2_files(tmp_path, "theĠ")
    with pytest.raises(ValueError, match="not a lossless byte-level BPE"):
        BPETokenizer.from_gpt2(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        BPETokenizer.from_gpt2(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "jaxskip\[data\]"'):
        BPETokenizer.train(TEXTS, vocab_size=300)
