"""Tokenizers: bytes, and byte-level BPE (trained here, or GPT-2's own files)."""

import copy
import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from jaxskip.data.tokens import token_dtype

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """Text to token ids and back.

    ``encode`` returns a 1-D array of the smallest unsigned dtype that holds ``vocab_size`` ids. ``end_of_text`` is the
    id that ends a document, or None where the vocabulary has none.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def end_of_text(self) -> int | None: ...

    def encode(self, text: str) -> np.ndarray: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as tokens: 256 of them, no file, no package, no end-of-text token.

    ``decode`` writes U+FFFD for bytes that are not UTF-8 (a sampled or cut sequence); it raises ValueError for ids
    outside 0..255.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né")
    array([110, 195, 169], dtype=uint8)
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """

    vocab_size = 256
    end_of_text = None

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(_checked_ids(ids, self.vocab_size)).decode(errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding (GPT-2's kind) through the ``tokenizers`` package.

    Wraps a ``tokenizers.Tokenizer``; build one with ``train``, ``load``, ``from_gpt2`` or ``from_merges``. Text that
    spells a special token, such as ``<|endoftext|>``, is encoded as ordinary text (tiktoken's ``encode_ordinary``):
    only code appends the token itself, or asks for it with ``encode_special``. ``vocab_size`` is the largest id plus
    one. ``decode`` raises ValueError for an id past it.

    What a pretrained model's files say of it: ``bos_token`` begins a text (None: nothing does), ``stop_tokens`` end
    what a model generates. The first of them ends a document where the vocabulary has no ``<|endoftext|>``.

    Raises ImportError without the package, ValueError for a vocabulary that cannot give every text back unchanged
    (unless ``lossless`` is False).

    >>> tokenizer = BPETokenizer.train(["the cat", "the hat"], vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("the hat")), len(tokenizer.encode("the hat")) < 7
    ('the hat', True)
    """

    def __init__(
        self, tokenizer, *, lossless: bool = True, bos_token: int | None = None, stop_tokens: Sequence[int] = ()
    ):
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError("the vocabulary is empty")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.bos_token = bos_token
        self.stop_tokens = tuple(stop_tokens)
        self.end_of_text: int | None = vocabulary.get(END_OF_TEXT, next(iter(self.stop_tokens), None))
        self._dtype = token_dtype(self.vocab_size)
        if lossless:
            self._check_lossless()

    def _check_lossless(self) -> None:
        tokenizer = self._tokenizer
        encodings = tokenizer.encode_batch_fast(_ALL_UTF8_BYTES, add_special_tokens=False)
        decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
        if lost := [character for character, back in zip(_ALL_UTF8_BYTES, decoded, strict=True) if character != back]:
            raise ValueError(
                f"not a lossless byte-level BPE: {lost[0]!r} does not survive encode and decode. The vocabulary must "
                "hold all 256 byte symbols, and nothing may normalise the text or add a leading space (load and "
                "from_merges take lossless=False for a pretrained model's tokenizer)"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns merges from ``texts``: 256 bytes and ``<|endoftext|>`` first, then merges up to ``vocab_size`` ids
        (fewer when the texts run out of pairs: read ``.vocab_size``). The same texts give the same tokenizer."""
        if vocab_size < 257:
            raise ValueError(f"vocab_size must be at least 257 (256 bytes and {END_OF_TEXT}), got {vocab_size}")
        tokenizers = _tokenizers()
        tokenizer = _byte_level(tokenizers, tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike, **options) -> "BPETokenizer":
        """Reads one ``tokenizer.json``, as ``save`` and Hugging Face write it.

        ``options`` are ``lossless``, ``bos_token`` and ``stop_tokens``. ``lossless=False`` takes a pretrained model's
        tokenizer as it is: Qwen2's composes characters, SmolLM2's drops a few control characters.
        """
        tokenizers = _tokenizers()
        return cls(_read(tokenizers.Tokenizer.from_file, pathlib.Path(path)), **options)

    @classmethod
    def from_gpt2(cls, folder: str | os.PathLike, **ids) -> "BPETokenizer":
        """Reads GPT-2's ``vocab.json`` and ``merges.txt`` from ``folder``.

        ``ids`` are ``bos_token`` and ``stop_tokens``.
        """
        tokenizers = _tokenizers()
        files = (pathlib.Path(folder, name) for name in ("vocab.json", "merges.txt"))
        tokenizer = _byte_level(tokenizers, _read(tokenizers.models.BPE.from_file, *files))
        if tokenizer.token_to_id(END_OF_TEXT) is not None:
            tokenizer.add_special_tokens([END_OF_TEXT])
        return cls(tokenizer, **ids)

    @classmethod
    def from_merges(
        cls,
        tokens: Sequence[str],
        merges: Sequence[tuple[str, str]],
        *,
        special_tokens: Sequence[str] = (),
        split_digits: bool = False,
        **options,
    ) -> "BPETokenizer":
        """Builds GPT-2's kind of BPE from all tokens in the order of their ids and merges by rank, as GGUF files hold
        them.

        ``special_tokens`` are the tokens that no text spells; ``split_digits`` cuts every digit out before merging, as
        SmolLM does; ``options`` are ``lossless``, ``bos_token`` and ``stop_tokens``.
        """
        tokenizers = _tokenizers()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        try:
            model = tokenizers.models.BPE(vocabulary, list(merges))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"these tokens and merges are no BPE: {error}") from error
        tokenizer = _byte_level(tokenizers, model)
        if split_digits:
            digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
        if unknown := [token for token in special_tokens if token not in vocabulary]:
            raise ValueError(f"special token {unknown[0]!r} is not one of the tokens")
        tokenizer.add_special_tokens(list(special_tokens))
        return cls(tokenizer, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one ``tokenizer.json`` for ``load``."""
        self._tokenizer.save(str(path))

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> np.ndarray:
        """As ``encode``, but what spells a special token becomes that token: for chat prompts, whose text is trusted.

        >>> tokenizer = BPETokenizer.train(["the cat"], vocab_size=260)
        >>> int(tokenizer.encode_special("a<|endoftext|>")[-1]) == tokenizer.end_of_text
        True
        """
        return np.array(self._special.encode(text, add_special_tokens=False).ids, self._dtype)

    @functools.cached_property
    def _special(self):
        # A copy, since the setting is the tokenizer's and not the call's, and others may be encoding.
        tokenizer = copy.deepcopy(self._tokenizer)
        tokenizer.encode_special_tokens = False
        return tokenizer

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_checked_ids(ids, self.vocab_size), skip_special_tokens=False)


def encode_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Token ids of each text, the end-of-text token appended where the tokenizer has one.

    Texts go to the tokenizer 256 at a time: it works on them in parallel, and memory stays bounded.
    """
    texts = iter(texts)
    while chunk := list(itertools.islice(texts, 256)):
        for ids in tokenizer.encode_batch(chunk):
            yield ids if tokenizer.end_of_text is None else np.append(ids, ids.dtype.type(tokenizer.end_of_text))


# Between them the UTF-8 forms of these characters hold every byte that UTF-8 can hold, and a few composed characters
# that Unicode normalisation would change.
_ALL_UTF8_BYTES = [chr(point) for point in (*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, 0xFFFD)]
_ALL_UTF8_BYTES += [chr(point) for point in range(0x10000, 0x110000, 0x20000)]


def _checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    checked = [int(token) for token in ids]
    for token in checked:
        if not 0 <= token < vocab_size:
            raise ValueError(f"token id {token} is outside the tokenizer's vocabulary 0..{vocab_size - 1}")
    return checked


def _byte_level(tokenizers, model):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


def _read(reader, *paths: pathlib.Path):
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer file {path}")
    try:
        return reader(*map(str, paths))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"cannot read {' and '.join(map(str, paths))} as a tokenizer: {error}") from error


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('BPE needs the tokenizers package: pip install "jaxskip[data]"') from error
    return tokenizers
