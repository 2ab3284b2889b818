"""Pallas kernels for TPU: one pair of blocks a step, and no step for what is skipped.

The lists of all rows of blocks are laid end to end into a schedule, which lies in scalar memory before the kernel
starts: step t works on the blocks that entry t names, and the number of steps is a number of the program, not a bound.
A row that visits nothing has one step, which loads nothing new (it names the blocks of the step before) and writes its
zeros. Scores are [keys, queries]: what belongs to a query lies along the lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.skip_attention.reference import Places, Spec, Visits
from pallas_kernels.skip_attention.tpu_schedule import column_schedule, row_schedule

_LOWEST = -1e30  # the score of what is not visible: finite, so that differences are
_LANES = 128
_VMEM_BYTES = 14 * 2**20  # less than every TPU gives to a kernel that does not ask


def forward(
    spec: Spec, q: jax.Array, k: jax.Array, v: jax.Array, rows: Visits, places: Places
) -> tuple[jax.Array, jax.Array]:
    """As ``reference.forward``."""
    call = _Call.of(spec, q, k, rows)
    schedule = row_schedule(rows)
    width = q.shape[3]

    def body(refs, step):
        k_ref, vt_ref, q_ref, *segments, out_ref, lse_ref, top_ref, total_ref, sum_ref = refs

        @pl.when(step.first)
        def _():
            top_ref[...] = jnp.full_like(top_ref, _LOWEST)
            total_ref[...] = jnp.zeros_like(total_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def visit(h, seen):
            scores = _scores(spec, k_ref[...], q_ref[h])[0]
            scores = _where(seen, scores, _LOWEST)
            old = top_ref[h]
            top = jnp.maximum(old, jnp.max(scores, axis=0, keepdims=True))
            p = _where(seen, jnp.exp(scores - top), 0)
            shrink = jnp.exp(old - top)
            top_ref[h] = top
            total_ref[h] = total_ref[h] * shrink + jnp.sum(p, axis=0, keepdims=True)
            sum_ref[h] = sum_ref[h] * shrink + _product(vt_ref[...], p.astype(vt_ref.dtype), 1, 0)

        call.visits(step, segments, visit)

        @pl.when(step.last)
        def _():
            some = total_ref[...] > 0
            total = jnp.where(some, total_ref[...], 1)
            out_ref[...] = (sum_ref[...] / total).astype(out_ref.dtype)
            lse_ref[...] = jnp.where(some, top_ref[...] + jnp.log(total), -jnp.inf)

    queries = call.block_q
    out, lse = call.run(
        body,
        "skip_attention_forward",
        schedule,
        call.heads,
        inputs=[
            call.keys(k, schedule),
            call.keys(v, schedule, transposed=True),
            call.queries(q, schedule),
            *call.segments(places, schedule),
        ],
        outputs=[
            call.query_output(width, q.dtype),
            call.query_output(1, jnp.float32),
        ],
        scratch=[(call.fold, 1, queries), (call.fold, 1, queries), (call.fold, width, queries)],
        places=places,
    )
    out = jnp.moveaxis(out.reshape(*q.shape[:1], q.shape[2], width, -1), 3, 1)[:, : q.shape[1]]
    return out, lse.reshape(q.shape[0], q.shape[2], -1)[..., : q.shape[1]]


def backward(
    spec: Spec,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: Visits,
    columns: Visits,
    places: Places,
    lse: jax.Array,
    delta: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``chunked.backward``: two kernels, each of which owns its output and computes the scores again."""
    call = _Call.of(spec, q, k, rows)
    # A query that sees nothing has probabilities exp(score - inf) = 0.
    statistics = jnp.where(lse == -jnp.inf, -_LOWEST, lse), delta
    dq = _query_gradient(call, q, k, v, rows, places, statistics, g)
    dk, dv = _key_gradients(call, q, k, v, columns, places, statistics, g)
    return dq, dk, dv


def _query_gradient(call, q, k, v, rows, places, statistics, g):
    schedule, width = row_schedule(rows), q.shape[3]

    def body(refs, step):
        k_ref, kt_ref, v_ref, q_ref, g_ref, lse_ref, delta_ref, *segments, dq_ref, sum_ref = refs

        @pl.when(step.first)
        def _():
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def visit(h, seen):
            operands = k_ref[...], v_ref[...], q_ref[h], g_ref[h], lse_ref[h], delta_ref[h]
            ds = _gradient(call.spec, *operands, seen)[1]
            sum_ref[h] += _product(kt_ref[...], ds.astype(kt_ref.dtype), 1, 0)

        call.visits(step, segments, visit)

        @pl.when(step.last)
        def _():
            dq_ref[...] = sum_ref[...].astype(dq_ref.dtype)

    (dq,) = call.run(
        body,
        "skip_attention_dq",
        schedule,
        call.heads,
        inputs=[
            call.keys(k, schedule),
            call.keys(k, schedule, transposed=True),
            call.keys(v, schedule),
            call.queries(q, schedule),
            call.queries(g, schedule),
            *(call.statistic(x, schedule) for x in statistics),
            *call.segments(places, schedule),
        ],
        outputs=[call.query_output(width, q.dtype)],
        scratch=[(call.fold, width, call.block_q)],
        places=places,
    )
    return jnp.moveaxis(dq.reshape(q.shape[0], q.shape[2], width, -1), 3, 1)[:, : q.shape[1]]


def _key_gradients(call, q, k, v, columns, places, statistics, g):
    schedule, width = column_schedule(columns, k.shape[2], call.heads // k.shape[2]), k.shape[3]

    def body(refs, step):
        k_ref, v_ref, q_ref, g_ref, lse_ref, delta_ref, *segments, dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = refs

        @pl.when(step.first)
        def _():
            dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
            dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

        def visit(h, seen):
            operands = k_ref[...], v_ref[...], q_ref[h], g_ref[h], lse_ref[h], delta_ref[h]
            p, ds = _gradient(call.spec, *operands, seen)
            dv_sum_ref[...] += _product(p.astype(g_ref.dtype), g_ref[h], 1, 0)
            dk_sum_ref[...] += _product(ds.astype(q_ref.dtype), q_ref[h], 1, 0)

        call.visits(step, segments, visit)

        @pl.when(step.last)
        def _():
            dk_ref[...] = dk_sum_ref[...].astype(dk_ref.dtype)
            dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    shape, block = (k.shape[0], k.shape[2], call.padded_kv, width), (None, None, call.block_kv, width)
    found = call.run(
        body,
        "skip_attention_dkv",
        schedule,
        k.shape[2],
        inputs=[
            call.keys(k, schedule),
            call.keys(v, schedule),
            call.queries(q, schedule),
            call.queries(g, schedule),
            *(call.statistic(x, schedule) for x in statistics),
            *call.segments(places, schedule),
        ],
        outputs=[(shape, k.dtype, block, "bho_"), (shape, v.dtype, block, "bho_")],
        scratch=[(call.block_kv, width)] * 2,
        places=places,
    )
    return tuple(jnp.moveaxis(x, 1, 2)[:, : k.shape[1]] for x in found)


class _Call:
    """What the three kernels share: how arrays are laid out in HBM, which block a step sees, which pairs count.

    ``fold`` query heads that share a key/value head and lists are worked on in one step, on the same keys and values.
    """

    def __init__(self, spec: Spec, batch: int, lengths: tuple[int, int], heads: int, kv_heads: int, fold: int):
        self.spec, self.batch, self.fold = spec, batch, fold
        self.heads, self.kv_heads = heads // fold, kv_heads
        self.block_q, self.block_kv = spec.block_q, spec.block_kv
        for name, block, length in (("queries", self.block_q, lengths[0]), ("keys", self.block_kv, lengths[1])):
            if block % _LANES and block < length:
                raise ValueError(
                    f"implementation='mosaic_tpu' works in blocks of a multiple of {_LANES} {name}, or of all {length} "
                    f"of them, not of {block}: choose block_sizes, and blocks of skip, accordingly"
                )
        self.padded_q = pl.cdiv(lengths[0], self.block_q) * self.block_q
        self.padded_kv = pl.cdiv(lengths[1], self.block_kv) * self.block_kv

    @classmethod
    def of(cls, spec: Spec, q: jax.Array, k: jax.Array, rows: Visits) -> "_Call":
        (batch, queries, heads, width), (_, keys, kv_heads, _) = q.shape, k.shape
        fold = 1
        if rows.index.shape[1] == 1:
            # Queries, their gradient and its sum, twice each, next to keys, values and a few tiles of scores.
            row = spec.block_q * max(width, _LANES) * (4 * q.dtype.itemsize + 4)
            room = _VMEM_BYTES - 5 * 4 * spec.block_q * spec.block_kv
            group = heads // kv_heads
            fold = max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * row <= room // 2))
        return cls(spec, batch, (queries, keys), heads, kv_heads, fold)

    def heads_first(self, rest: tuple[int, ...]) -> tuple[int, ...]:
        return (self.batch, self.heads, self.fold, *rest)

    def keys(self, x, schedule, transposed=False):
        """[B, S, Hkv, d] as [B, Hkv, S, d] or, ``transposed``, [B, Hkv, d, S], and the block of a step."""
        x = jnp.moveaxis(self._padded(x, self.padded_kv), 2, 1)
        if transposed:
            return x.swapaxes(2, 3), self._block(schedule, (None, None, x.shape[3], self.block_kv), "bk_c")
        return x, self._block(schedule, (None, None, self.block_kv, x.shape[3]), "bkc_")

    def queries(self, x, schedule):
        """[B, T, Hq, d] as [B, heads, fold, T, d], and the block of a step."""
        x = jnp.moveaxis(self._padded(x, self.padded_q), 2, 1)
        x = x.reshape(*self.heads_first(x.shape[2:]))
        return x, self._block(schedule, (None, None, self.fold, self.block_q, x.shape[4]), "bq_r_")

    def query_output(self, width, dtype):
        """Shape, dtype, block and its axes of an output [B, heads, fold, width, T]."""
        shape = self.heads_first((width, self.padded_q))
        return shape, dtype, (None, None, self.fold, width, self.block_q), "bh__o"

    def statistic(self, x, schedule):
        """[B, Hq, T] as [B, heads, fold, 1, T], and the block of a step."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padded_q - x.shape[2])))
        x = x.reshape(self.heads_first((1, -1)))
        return x, self._block(schedule, (None, None, self.fold, 1, self.block_q), "bq__r")

    def segments(self, places, schedule):
        """Segments of queries along the lanes and of keys along the sublanes, with their blocks, if there are any."""
        if not self.spec.segmented:
            return []
        q_ids = jnp.pad(places.q_segments, ((0, 0), (0, self.padded_q - places.q_segments.shape[1])))
        kv_ids = jnp.pad(places.kv_segments, ((0, 0), (0, self.padded_kv - places.kv_segments.shape[1])))
        kv_ids = jnp.broadcast_to(kv_ids[:, :, None], (*kv_ids.shape, _LANES))
        q_block = self._block(schedule, (None, 1, self.block_q), "b_r")
        return [(q_ids[:, None], q_block), (kv_ids, self._block(schedule, (None, self.block_kv, _LANES), "bc_"))]

    def visits(self, step, segments, visit):
        """Run ``visit`` for each head of the step with the mask of its pair of blocks, True where all is visible."""

        def heads(seen):
            def head(h, carry):
                visit(h, seen)
                return carry

            lax.fori_loop(0, self.fold, head, 0)

        pl.when(step.full)(lambda: heads(True))
        pl.when(step.partial)(lambda: heads(self._seen(step, segments)))

    def run(self, body, name, schedule, heads, *, inputs, outputs, scratch, places):
        """The kernel over (sequence, head, step of the schedule); ``body`` gets its blocks and what the step is."""
        arrays, blocks = zip(*inputs, strict=True)
        numbers = [*places[:3], schedule.lenders(self.batch)]
        lengths = jnp.stack([jnp.asarray(x, jnp.int32) for x in numbers]).reshape(-1)

        def kernel(entries_ref, owners_ref, lengths_ref, *refs):
            del owners_ref
            b, h, t = (pl.program_id(axis) for axis in range(3))
            body(refs, schedule.step(b, h, t, entries_ref, [lengths_ref[n * self.batch + b] for n in range(3)]))

        like = functools.partial(jnp.zeros_like, arrays[0])
        return pl.pallas_call(
            kernel,
            out_shape=[jax.eval_shape(functools.partial(like, dtype, shape=shape)) for shape, dtype, *_ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=(self.batch, heads, schedule.steps),
                in_specs=list(blocks),
                out_specs=[self._output_block(schedule, *block) for _, _, *block in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name=name,
        )(schedule.entries, schedule.owners, lengths, *arrays)

    def _block(self, schedule, shape, axes):
        """The block of a step of an input whose axes are b sequence, k key head, q query heads, r block of queries, c
        block of keys, _ whole.

        Where a sequence visits nothing, it is one that another has loaded.
        """
        per = self.heads // self.kv_heads

        def index(b, h, t, entries_ref, owners_ref, lengths_ref):
            del owners_ref
            lender = lengths_ref[3 * self.batch + b]
            borrowed = lender != b
            last_head = (self.kv_heads if schedule.of_keys else self.heads) - 1
            h, t = jnp.where(borrowed, last_head, h), jnp.where(borrowed, schedule.most - 1, t)
            at = lender, h, t, entries_ref
            places = {
                "b": lambda: lender,
                "k": lambda: h if schedule.of_keys else lax.div(h, per),
                "q": lambda: h * per + schedule.head(*at) if schedule.of_keys else h,
                "r": lambda: schedule.row(*at),
                "c": lambda: schedule.column(*at),
                "_": lambda: 0,
            }
            return tuple(places[axis]() for axis in axes)

        return pl.BlockSpec(shape, index)

    def _output_block(self, schedule, shape, axes):
        """The block of a step of an output whose axes are b sequence, h head of the grid, o owner, _ whole."""

        def index(b, h, t, entries_ref, owners_ref, lengths_ref):
            del entries_ref, lengths_ref
            places = {"b": lambda: b, "h": lambda: h, "o": lambda: schedule.owner(b, h, t, owners_ref), "_": lambda: 0}
            return tuple(places[axis]() for axis in axes)

        return pl.BlockSpec(shape, index)

    def _padded(self, x, length):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)))

    def _seen(self, step, segments):
        """Which key each query of the step's blocks sees, [keys, queries]."""
        shape = self.block_kv, self.block_q
        key = step.column * self.block_kv + lax.broadcasted_iota(jnp.int32, shape, 0)
        query = step.row * self.block_q + lax.broadcasted_iota(jnp.int32, shape, 1)
        q_len, kv_len, offset = step.lengths
        seen = (query < q_len) & (key < kv_len)
        lowest, highest = self.spec.reach
        if lowest is not None:
            seen &= key - query >= lowest + offset
        if highest is not None:
            seen &= key - query <= highest + offset
        if segments:
            q_ids, kv_ids = segments
            seen &= q_ids[...] == kv_ids[:, :1]
        return seen


def _scores(spec, k_tile, q_tile):
    """Scores [keys, queries] and the derivative of the cap at them."""
    scores = spec.scale * _product(k_tile, q_tile, 1, 1)
    if spec.softcap is None:
        return scores, 1.0
    bent = jnp.tanh(scores / spec.softcap)
    return spec.softcap * bent, 1 - bent * bent


def _gradient(spec, k_tile, v_tile, q_tile, g_tile, lse, delta, seen):
    """(probabilities, gradient of the scores before the scale), [keys, queries]."""
    scores, slope = _scores(spec, k_tile, q_tile)
    p = _where(seen, jnp.exp(scores - lse), 0)
    dp = _product(v_tile, g_tile, 1, 1)
    return p, p * (dp - delta) * slope * spec.scale


def _where(seen, x, other):
    return x if seen is True else jnp.where(seen, x, other)


def _product(a, b, a_axis, b_axis):
    """The product over one axis of each, in float32; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
