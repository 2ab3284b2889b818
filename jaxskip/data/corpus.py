"""A corpus: training and validation tokens with their vocabulary, from one of several sources."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable

import numpy as np

from jaxskip.data import tfds_text, token_files, tokens
from jaxskip.data.texts import load_texts
from jaxskip.data.tokenization import ByteTokenizer, Tokenizer, encode_documents


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and tokens to validate with.

    ``train``, ``validation``: 1-D arrays (or memory maps) of uint8, uint16 or uint32 below ``vocab_size``;
    ``tokenizer``: what made them, or None where they came as tokens; ``name``: the source, for reports.

    Raises TypeError or ValueError for other arrays, empty ones, and ids past the vocabulary (arrays beyond 64 MiB are
    checked on a sample here, and every batch when it is made).

    >>> corpus = Corpus(np.arange(9, dtype=np.uint8), np.arange(3, dtype=np.uint8), vocab_size=16, name="toy")
    >>> corpus.fingerprint
    '00ac71a5607f4078'
    """

    train: np.ndarray = dataclasses.field(repr=False)
    validation: np.ndarray = dataclasses.field(repr=False)
    vocab_size: int
    tokenizer: Tokenizer | None = None
    name: str = "tokens"

    def __post_init__(self):
        tokens.check_tokens(self.train, self.vocab_size, f"the training part of {self.name}")
        tokens.check_tokens(self.validation, self.vocab_size, f"the validation part of {self.name}")

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a sha256 over the tokens of both parts: equal for equal data, to compare runs with.

        Of an array beyond 64 MiB it covers the length and 256 evenly spaced blocks of 4096 tokens.
        """
        return tokens.fingerprint(self.train, self.validation)


def load_corpus(
    source="pysrc",
    *,
    tokenizer: Tokenizer | None = None,
    validation_fraction: float = 0.1,
    max_bytes: int | None = None,
    data_dir=None,
    download: bool = True,
) -> Corpus:
    """Loads a text source of ``load_texts`` as tokens, or a directory of nanoGPT's token files.

    Text is tokenised with ``tokenizer`` (bytes by default) into the smallest unsigned dtype; documents follow each
    other, each with the end-of-text token where the tokenizer has one. ``load_texts`` describes the sources and the
    other arguments.

    A directory with ``train.bin`` and ``val.bin`` (flat little-endian uint16) is mapped into memory, not read. Its
    ``vocab_size`` is that of ``meta.pkl`` (only plain values are unpickled), else the tokenizer's if one is given for
    decoding, else 50304 as in nanoGPT: GPT-2's 50257 padded. A ``max_bytes`` is refused there.

    Raises what ``load_texts`` and ``Corpus`` raise; ValueError for a token file of odd or zero size, a ``meta.pkl``
    that is more than plain values, a tokenizer beyond the files' vocabulary.

    >>> corpus = load_corpus("pysrc", max_bytes=100_000)
    >>> corpus.vocab_size, corpus.train.dtype, corpus.train.size + corpus.validation.size <= 100_000
    (256, dtype('uint8'), True)
    """
    from_tfds = tfds_text.is_tfds(source)
    name = tfds_text.tfds_name(source) if from_tfds else str(source)
    if not from_tfds and source != "pysrc" and token_files.is_token_directory(pathlib.Path(source)):
        if max_bytes is not None:
            raise ValueError(f"max_bytes is for text, and {source} holds token files: slice the arrays instead")
        return _token_corpus(pathlib.Path(source), name, tokenizer)
    train, validation = load_texts(
        source, validation_fraction=validation_fraction, max_bytes=max_bytes, data_dir=data_dir, download=download
    )
    tokenizer = tokenizer or ByteTokenizer()
    return Corpus(
        train=_encoded(train, tokenizer),
        validation=_encoded(validation, tokenizer),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
        name=name,
    )


def _token_corpus(directory: pathlib.Path, name: str, tokenizer: Tokenizer | None) -> Corpus:
    train, validation, vocab_size = token_files.open_token_files(directory)
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size if tokenizer else token_files.GPT2_PADDED_VOCAB_SIZE
    elif tokenizer and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, {directory / 'meta.pkl'} says {vocab_size}")
    return Corpus(train, validation, vocab_size, tokenizer, name)


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    empty = np.zeros(0, tokens.token_dtype(tokenizer.vocab_size))
    return np.concatenate([empty, *encode_documents(texts, tokenizer)])
