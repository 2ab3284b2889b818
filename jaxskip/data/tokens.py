"""Arrays of token ids: their dtype, a bounded look at their contents, and a fingerprint."""

import hashlib

import numpy as np

_WHOLE_BYTES = 2**26
_BLOCKS, _BLOCK_TOKENS = 256, 4096


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint8, uint16 and uint32 that holds ``vocab_size`` ids."""
    return np.min_scalar_type(vocab_size - 1)


def check_tokens(tokens: np.ndarray, vocab_size: int, what: str) -> None:
    """Refuses what is not a non-empty 1-D array of unsigned ids below ``vocab_size``; a long one is only sampled."""
    if not isinstance(tokens, np.ndarray) or tokens.dtype not in (np.uint8, np.uint16, np.uint32):
        seen = tokens.dtype if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise TypeError(f"{what} must be a numpy array of uint8, uint16 or uint32, not {seen}")
    if tokens.ndim != 1:
        raise ValueError(f"{what} must have one axis, its shape is {tokens.shape}")
    if not tokens.size:
        raise ValueError(f"{what} holds no tokens: give more text, or another validation_fraction")
    check_below(sample(tokens), vocab_size, what)


def check_below(tokens: np.ndarray, vocab_size: int, what: str) -> None:
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"{what} holds token id {largest}, the vocabulary ends at {vocab_size - 1}: the file is damaged, or it was "
            f"written with another tokenizer than the one that gave vocab_size={vocab_size}"
        )


def sample(tokens: np.ndarray) -> np.ndarray:
    """All of ``tokens`` up to 64 MiB; of longer arrays, 256 evenly spaced blocks of 4096 tokens, first and last among
    them, so that a memory-mapped file of billions of tokens is never read whole."""
    if tokens.nbytes <= _WHOLE_BYTES:
        return tokens
    starts = np.linspace(0, tokens.size - _BLOCK_TOKENS, _BLOCKS).astype(np.int64)
    return np.concatenate([tokens[start : start + _BLOCK_TOKENS] for start in starts])


def fingerprint(*arrays: np.ndarray) -> str:
    """First 16 hex digits of a sha256 over length, dtype and ``sample`` of each array."""
    digest = hashlib.sha256()
    for tokens in arrays:
        digest.update(f"{tokens.size} {tokens.dtype.name};".encode())
        digest.update(np.ascontiguousarray(sample(tokens)).data)
    return digest.hexdigest()[:16]
