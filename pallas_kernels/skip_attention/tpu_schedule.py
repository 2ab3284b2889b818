"""The lists of a kernel's rows of blocks laid end to end, in scalar memory: what each step of the grid works on."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.skip_attention.reference import Visits

_MOST_STEPS = 96 * 2**10  # two numbers each, in scalar memory, of which there is 1 MiB
_FIRST, _LAST, _PARTIAL, _FULL = 1, 2, 4, 8
_FLAG_BITS, _HEAD_BITS, _BLOCK_BITS = 4, 4, 12  # two blocks, a head and flags make 32 bits
_MOST_BLOCKS = 2**_BLOCK_BITS


class Step(NamedTuple):
    """What a step works on: its blocks, whether it is the first and last of its output, how its pairs are visible."""

    row: Any
    column: Any
    first: Any
    last: Any
    partial: Any
    full: Any
    lengths: list[Any]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What each step works on, ``entries``, and whose output it is, ``owners``: int32 [units of sequences * units of
    heads * most], of which the first ``steps`` of each unit count. They differ where an output has no visit.

    ``lender`` [units of sequences]: a sequence without any visit names the blocks of this one instead of its own.

    ``of_keys``: an output is of a block of keys, so heads of the grid are those of keys, and entries also name which
    of the query heads (blocks of them) that share it is meant.
    """

    entries: jax.Array
    owners: jax.Array
    steps: jax.Array
    lender: jax.Array
    batch: int
    heads: int
    most: int
    of_keys: bool

    def step(self, b, h, t, entries_ref, lengths) -> Step:
        flags = self._entry(b, h, t, entries_ref) & (2**_FLAG_BITS - 1)
        first, last, partial, full = (flags & bit != 0 for bit in (_FIRST, _LAST, _PARTIAL, _FULL))
        row, column = self.row(b, h, t, entries_ref), self.column(b, h, t, entries_ref)
        return Step(row, column, first, last, partial, full, lengths)

    def row(self, b, h, t, entries_ref, *_):
        """The block of queries."""
        return self._field(self._entry(b, h, t, entries_ref), 0 if not self.of_keys else 1)

    def column(self, b, h, t, entries_ref, *_):
        """The block of keys."""
        return self._field(self._entry(b, h, t, entries_ref), 1 if not self.of_keys else 0)

    def head(self, b, h, t, entries_ref, *_):
        entry = self._entry(b, h, t, entries_ref)
        return lax.shift_right_logical(entry, _FLAG_BITS) & (2**_HEAD_BITS - 1)

    def lenders(self, batch: int) -> jax.Array:
        """``lender`` of each of ``batch`` sequences."""
        return self.lender if self.batch == batch else jnp.arange(batch, dtype=jnp.int32)

    def owner(self, b, h, t, owners_ref):
        """The block of queries (``of_keys``: of keys) whose output the step adds to."""
        return self._entry(b, h, t, owners_ref)

    def _entry(self, b, h, t, ref):
        unit = (b if self.batch > 1 else 0) * self.heads + (h if self.heads > 1 else 0)
        return ref[unit * self.most + t]

    def _field(self, entry, other: int):
        bits = _FLAG_BITS + _HEAD_BITS + _BLOCK_BITS * (1 - other)
        return lax.shift_right_logical(entry, bits) & (_MOST_BLOCKS - 1)


def row_schedule(lists: Visits) -> Schedule:
    """The schedule in which an output is a block of queries."""
    index, full, count = lists
    return _schedule(index, full, count, 1, False)


def column_schedule(lists: Visits, kv_heads: int, share: int) -> Schedule:
    """The schedule in which an output is a block of keys, to which ``share`` query heads (or folds of them) add."""
    index, full, count = lists
    batch, heads, blocks = index.shape[:3]
    if share > 2**_HEAD_BITS:
        raise NotImplementedError(
            f"implementation='mosaic_tpu' takes at most {2**_HEAD_BITS} query heads a key/value head that have lists "
            f"of their own, got {share}; use implementation='chunked'"
        )
    units = 1 if heads == 1 else kv_heads

    def merged(x):  # [B, H, blocks, ...] -> [B, units, blocks * share, ...]
        x = x.reshape(batch, units, heads // units, *x.shape[2:])
        x = jnp.broadcast_to(x, (batch, units, share, *x.shape[3:]))
        return x.swapaxes(2, 3).reshape(batch, units, blocks * share, *x.shape[4:])

    index, full, count = map(merged, (index, full, count))
    return _schedule(index, full, count, share, True)


def _schedule(index, full, count, share, of_keys) -> Schedule:
    """Of lists [B, H, outputs * share, most], ``share`` to an output, each of which has one step at least."""
    batch, heads, lists, width = index.shape
    most = lists * width
    if batch * heads * most > _MOST_STEPS or lists > _MOST_BLOCKS * share:
        raise NotImplementedError(
            f"implementation='mosaic_tpu': {batch * heads} schedules of up to {most} pairs of blocks do not fit into "
            f"scalar memory ({_MOST_STEPS} pairs do); use larger blocks, or fewer sequences or heads with masks "
            "of their own at a time, or implementation='chunked'"
        )
    owner, head = (op(jnp.arange(lists, dtype=jnp.int32), share) for op in (lax.div, lax.rem))
    opens, closes = head == 0, head == share - 1
    steps = jnp.maximum(count, 1)
    ends = jnp.cumsum(steps, axis=-1)

    def unit(index, full, count, steps, ends):
        t = jnp.arange(most, dtype=jnp.int32)
        which = jnp.zeros(most + 1, jnp.int32).at[ends].add(1)
        which = jnp.minimum(jnp.cumsum(which)[:-1], lists - 1)
        turn = t - (ends - steps)[which]
        other = index[which, jnp.minimum(turn, width - 1)]
        last = turn == steps[which] - 1
        flags = jnp.where((turn == 0) & opens[which], _FIRST, 0) + jnp.where(last & closes[which], _LAST, 0)
        kind = jnp.where(turn < full[which], _FULL, jnp.where(turn < count[which], _PARTIAL, 0))
        # Without a visit: what the step before has loaded already, or what the first visit will need.
        source = _last_true(kind > 0)
        entry = (owner[which][source] << _BLOCK_BITS) | other[source]
        entry = (entry << (_FLAG_BITS + _HEAD_BITS)) | (head[which][source] << _FLAG_BITS) | flags | kind
        return entry, owner[which]

    entries, owners = jax.vmap(jax.vmap(unit))(index, full, count, steps, ends)
    lender = _last_true((count > 0).any(axis=(1, 2)))
    return Schedule(entries.reshape(-1), owners.reshape(-1), ends[..., -1].max(), lender, batch, heads, most, of_keys)


def _last_true(x: jax.Array) -> jax.Array:
    """For each entry of bool [n] the place of the last one up to it that is True; before the first: of the first."""
    place = lax.cummax(jnp.where(x, jnp.arange(x.shape[0], dtype=jnp.int32), -1))
    return jnp.where(place < 0, jnp.argmax(x).astype(jnp.int32), place)
