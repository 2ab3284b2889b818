"""nanoGPT's token files: ``train.bin`` and ``val.bin``, flat little-endian uint16, and ``meta.pkl``."""

import os
import pathlib
import pickle
from collections.abc import Iterable

import numpy as np

from jaxskip.data.tokenization import Tokenizer, encode_documents

# What nanoGPT takes where there is no meta.pkl: GPT-2's 50257 ids rounded up to a multiple of 64.
GPT2_PADDED_VOCAB_SIZE = 50304
_DTYPE = np.dtype("<u2")


def write_token_files(
    directory: str | os.PathLike,
    train_texts: Iterable[str],
    validation_texts: Iterable[str],
    tokenizer: Tokenizer,
) -> None:
    """Writes ``train.bin``, ``val.bin`` and ``meta.pkl`` (the vocabulary size) as nanoGPT reads them.

    Each text is a document: its tokens, then the end-of-text token where the tokenizer has one. Texts are taken as
    they come, 256 in memory at a time; the files get their names when all is written.

    Raises ValueError for a vocabulary past 65536 or no tokens, FileExistsError rather than overwrite.

    >>> import tempfile
    >>> from jaxskip.data import ByteTokenizer, load_corpus
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     write_token_files(directory, ["abc", "de"], ["f"], ByteTokenizer())
    ...     np.array(load_corpus(directory).train)
    array([ 97,  98,  99, 100, 101], dtype=uint16)
    """
    if tokenizer.vocab_size > 2**16:
        raise ValueError(f"token files hold uint16: vocab_size is at most 65536, got {tokenizer.vocab_size}")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("train.bin", "val.bin", "meta.pkl"):
        if (directory / name).exists():
            raise FileExistsError(f"{directory / name} is there already: delete it first, or give another directory")
    partials = []
    for name, texts in (("train.bin", train_texts), ("val.bin", validation_texts)):
        partial = directory / f"{name}.partial"
        with partial.open("wb") as file:
            for ids in encode_documents(texts, tokenizer):
                file.write(ids.astype(_DTYPE).tobytes())
        if not partial.stat().st_size:
            raise ValueError(f"no tokens for {directory / name}: the texts are empty")
        partials.append(partial)
    (directory / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokenizer.vocab_size}))
    for partial in partials:
        partial.rename(partial.with_suffix(""))


def is_token_directory(path: pathlib.Path) -> bool:
    return (path / "train.bin").exists() or (path / "val.bin").exists()


def open_token_files(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray, int | None]:
    """(train, validation, vocabulary size of ``meta.pkl`` or None), the arrays mapped and not read."""
    train, validation = (_open_bin(directory / name) for name in ("train.bin", "val.bin"))
    return train, validation, _meta_vocab_size(directory / "meta.pkl")


def _open_bin(path: pathlib.Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a token directory needs train.bin and val.bin")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path} has {size} bytes: uint16 tokens need an even number above zero; is it cut short?")
    return np.memmap(path, dtype=_DTYPE, mode="r")


def _meta_vocab_size(path: pathlib.Path) -> int | None:
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"{path} is refused: {error}. Delete it, or write a dictionary of plain values") from error
    vocab_size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if type(vocab_size) is not int or vocab_size < 1:
        raise ValueError(f"{path} must hold a dictionary with a positive integer vocab_size, got {vocab_size!r}")
    return vocab_size


class _PlainUnpickler(pickle.Unpickler):
    """Dictionaries, lists, strings and numbers need no class or function, so every other pickle is refused unrun."""

    def find_class(self, module_name, global_name):
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, and running code from data is not safe")
