"""Batches of windows cut from one array of tokens."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from jaxskip.data import tokens as token_arrays

Batch = dict[str, np.ndarray]


class BatchIterator(Iterator[Batch], Protocol):
    """An endless iterator of batches that can be stopped and resumed.

    A batch is ``{"inputs": int32 [B, T], "targets": int32 [B, T]}``, the targets one token ahead, B the rows of this
    process. ``get_state`` gives a small JSON-able dictionary: after ``set_state`` with it, an iterator made with the
    same data and settings gives exactly the batches that would have followed. ``set_state`` raises ValueError for a
    state of other data or settings.
    """

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class TokenWindows(BatchIterator):
    """Uniformly random windows of an array of tokens, as nanoGPT draws them: x = a[i:i+T], y = a[i+1:i+T+1].

    ``tokens``: [N] uint8, uint16 or uint32, in memory or mapped; ``batch_size``: rows of the global batch, of which
    each of ``process_count`` processes takes its consecutive share; ``context_length``: T. Batch number n is a pure
    function of ``seed`` and n (Philox bits, which NumPy keeps stable), so resuming costs nothing, also on another
    number of processes.

    Raises ValueError for tokens shorter than one window (T + 1), a batch size that the processes do not divide, and,
    when a batch is made, for a token id past ``vocab_size``.

    >>> batches = TokenWindows(np.arange(99, dtype=np.uint8), batch_size=2, context_length=4, vocab_size=99, seed=1)
    >>> state, batch = batches.get_state(), next(batches)
    >>> batch["inputs"].shape, bool((batch["targets"] == batch["inputs"] + 1).all()), state["next_batch"]
    ((2, 4), True, 0)
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        batch_size: int,
        context_length: int,
        vocab_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
        _check_windows(tokens, context_length, vocab_size)
        self._rows = local_rows(batch_size, process_index, process_count)
        self._tokens, self._vocab_size = tokens, vocab_size
        self._settings = {
            "seed": seed,
            "batch_size": batch_size,
            "context_length": context_length,
            "num_tokens": tokens.size,
            "fingerprint": token_arrays.fingerprint(tokens),
        }
        self._next_batch = 0

    def __next__(self) -> Batch:
        starts = self._starts(self._next_batch)[self._rows]
        batch = to_batch(_cut(self._tokens, starts, self._settings["context_length"]), self._vocab_size, starts)
        self._next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next_batch, **self._settings}

    def set_state(self, state: dict[str, Any]) -> None:
        check_state(state, self._settings)
        self._next_batch = state["next_batch"]

    def _starts(self, number: int) -> np.ndarray:
        # The batch number sits in the counter's upper half, out of reach of the draws within a batch. The remainder's
        # bias is below (number of tokens) / 2**64.
        bits = np.random.Philox(key=self._settings["seed"], counter=number << 128)
        choices = self._settings["num_tokens"] - self._settings["context_length"]
        return (bits.random_raw(self._settings["batch_size"]) % choices).astype(np.int64)


def evaluation_windows(
    tokens: np.ndarray,
    *,
    batch_size: int,
    context_length: int,
    num_batches: int,
    vocab_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The same ``num_batches`` batches every time: consecutive windows from the start of ``tokens``.

    Window k predicts tokens kT + 1 to (k + 1)T, so no token is predicted twice. Arguments and batches as in
    ``TokenWindows``; a new call starts again.

    Raises ValueError, at the call, also when ``tokens`` are too few for that many windows.

    >>> tokens = np.arange(9, dtype=np.uint8)
    >>> batches = evaluation_windows(tokens, batch_size=1, context_length=4, num_batches=2, vocab_size=9)
    >>> [batch["targets"].tolist() for batch in batches]
    [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]
    """
    _check_windows(tokens, context_length, vocab_size)
    rows = local_rows(batch_size, process_index, process_count)
    if num_batches < 1:
        raise ValueError(f"num_batches must be at least 1, got {num_batches}")
    available = (tokens.size - 1) // context_length
    if num_batches * batch_size > available:
        raise ValueError(
            f"{tokens.size} tokens give {available} windows of {context_length}, not {num_batches} batches of "
            f"{batch_size}: take fewer or smaller batches, or more tokens"
        )
    starts = np.arange(num_batches * batch_size).reshape(num_batches, batch_size)[:, rows] * context_length
    return (to_batch(_cut(tokens, batch, context_length), vocab_size, batch) for batch in starts)


def local_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that belong to this process."""
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..process_count - 1, got {process_index} of {process_count}")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size counts the rows of all processes: it must be a positive multiple of process_count="
            f"{process_count}, got {batch_size}"
        )
    share = batch_size // process_count
    return slice(process_index * share, (process_index + 1) * share)


def to_batch(windows: np.ndarray, vocab_size: int, starts: np.ndarray | None = None) -> Batch:
    """Inputs and targets of windows [B, T + 1]; ``starts`` [B] is where they begin, for the error message."""
    if windows.max() >= vocab_size:
        row, column = np.argwhere(windows >= vocab_size)[0]
        place = f"window {row}, offset {column}" if starts is None else f"position {starts[row] + column}"
        token_arrays.check_below(windows[row, column : column + 1], vocab_size, f"the token array ({place})")
    return {"inputs": windows[:, :-1].astype(np.int32), "targets": windows[:, 1:].astype(np.int32)}


def check_state(state: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if state.get(name) != value:
            raise ValueError(
                f"this state belongs to other data or settings: {name} is {value!r} here and {state.get(name)!r} in "
                "the state. Build the iterator as it was when the state was saved"
            )


def _check_windows(tokens: np.ndarray, context_length: int, vocab_size: int) -> None:
    token_arrays.check_tokens(tokens, vocab_size, "the token array")
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, got {context_length}")
    if tokens.size <= context_length:
        raise ValueError(
            f"{tokens.size} tokens are shorter than one window of context_length + 1 = {context_length + 1}: take a "
            "shorter context or more text"
        )


def _cut(tokens: np.ndarray, starts: np.ndarray, context_length: int) -> np.ndarray:
    return np.stack([tokens[start : start + context_length + 1] for start in starts])
