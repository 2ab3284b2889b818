"""The gradient filter of the Hopper kernels: gradients as sums over the few softmax entries that are worth it.

The forward pass leaves the largest logit of each token in each tile of the vocabulary. From these it is known which
tiles hold an entry of at least eps before any is computed again; those tiles yield a list of entries, and each row of
a gradient is the sum of the rows of the other operand that its entries name.
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.linear_cross_entropy import hopper_product, hopper_tiles, slabs, spread
from pallas_kernels.linear_cross_entropy.chunked import loop_over_tiles
from pallas_kernels.manual_axes import varying_like

# Below this, computing every entry costs no more than finding those that the filter keeps.
LEAST_VOCABULARY = 65536
# Softmax entries that the filter keeps, per token on average; with more, the gradients are computed exactly instead.
_ENTRIES_PER_TOKEN = 64
_PART = 64  # columns of a tile that are searched for entries at a time
_MOST_COLUMNS, _TOGETHER = 1024, 8  # of a row that a thread block sums, and rows on their way: measured on an H200
_SMALL_SLAB_BYTES, _SMALL_BLOCK = 12 * 2**20, 1024  # for the exact gradients, then: they share the entries' memory


def gradients(spec, e, c, labels, z_label, lse, g, h, scale, maxima, logit_gradients):
    """Gradients of embeddings and classifier from the softmax entries of at least ``spec.filter_eps``.

    ``z_label`` [N] are the labels' logits, which always count. ``logit_gradients`` is what ``slabs.backward`` needs,
    before it is told the rows: for when the entries are too many.
    """
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    least = jnp.where(g + h == 0, jnp.inf, lse + math.log(spec.filter_eps))
    entry_row, entry_column, entry_z, counts = _entries(spec, e, c, labels, least, maxima)
    capacity = entry_z.shape[1]
    # The most that each token leaves out: of tiles that hold an entry to keep only eps is known. Inside the conditional
    # the maxima would outlive their use.
    most = jnp.minimum(jnp.exp(maxima.max(0)[:tokens].astype(jnp.float32) - lse), spec.filter_eps)

    def sparse():
        used = jnp.arange(capacity)[None, :] < counts[:, None]
        labelled = labels >= 0
        tokens_in_order = jnp.arange(tokens, dtype=jnp.int32)
        row = jnp.concatenate(
            [jnp.where(used, entry_row, tokens).reshape(-1), jnp.where(labelled, tokens_in_order, tokens)]
        )
        column = jnp.concatenate(
            [jnp.where(used, entry_column, vocabulary).reshape(-1), jnp.where(labelled, labels, vocabulary)]
        )
        z = jnp.concatenate([jnp.where(used, entry_z, 0).reshape(-1), z_label])
        own = jnp.minimum(row, tokens - 1)
        p_all = jnp.where(row < tokens, jnp.exp(z - lse[own]), 0)
        weight = p_all * (g + h)[own]
        weight -= jnp.pad((1 - spec.label_smoothing) * g, (row.shape[0] - tokens, 0))
        if spec.softcap is not None:
            weight *= 1 - (z / spec.softcap) ** 2

        order = jnp.argsort(row, stable=True)
        starts = starts_of(row[order], tokens)
        prior, background = spread.prior(spec, e, c, g + h != 0)
        own_prior, own_background = (jnp.take(x, column, mode="clip") for x in (prior, background))
        left_out = vocabulary - (starts[1:] - starts[:-1])
        kept, kept_of_prior = (_fractions_between(x[order], starts) for x in (p_all, own_prior))
        cap = spread.cap(spec.filter_eps, vocabulary)
        rates = spread.rates(cap, jnp.maximum(1 - kept, 0), most, left_out, prior.sum() - kept_of_prior)
        multiple, even = (rate * (g + h) for rate in rates)
        weight = (weight - even[own] - multiple[own] * own_background) * scale
        multiple, even = multiple * scale, (even - spec.label_smoothing / spec.classes * g) * scale

        axis = spec.classifier_layout.index("v")
        by_entry = c if axis == 0 else c.T
        wide = by_entry.astype(jnp.float32)
        bases = jnp.stack([wide.sum(0), (background[:, None] * wide).sum(0)])
        de = row_sums(by_entry, column[order], weight[order], starts, jnp.stack([even, multiple]), bases, e.dtype)
        if not spec.filter_classifier:
            return de, jnp.zeros((), c.dtype)
        order = jnp.argsort(column, stable=True)
        starts = starts_of(column[order], vocabulary)
        # No product of XLA's anywhere here: each would have 32 MiB of workspace.
        bases = jnp.stack([(rate[:, None] * e.astype(jnp.float32)).sum(0) for rate in (even, multiple)])
        factors = jnp.stack([jnp.ones(vocabulary, jnp.float32), background])
        dc = row_sums(e, own[order], weight[order], starts, factors, bases, c.dtype)
        return de, dc if axis == 0 else dc.T

    def exact():
        def block(de, start, size):
            rows = [lax.dynamic_slice_in_dim(x, start, size) for x in (e, labels, lse, g, h)]
            part = some(*rows, classifier=False)[0]
            return lax.dynamic_update_slice_in_dim(de, jnp.asarray(part, e.dtype), start, 0)

        def some(e, labels, lse, g, h, **options):
            part = functools.partial(logit_gradients, spec, e, c, None, labels, lse)
            product = functools.partial(hopper_product.einsum, spec)
            small = {"slab_bytes": _SMALL_SLAB_BYTES, "product": product}
            return slabs.backward(spec, e, c, None, g, h, scale, part, **small, **options)

        de = loop_over_tiles(block, jnp.zeros_like(e), tokens, _SMALL_BLOCK)
        dc = some(e, labels, lse, g, h, embeddings=False)[1] if spec.filter_classifier else jnp.zeros((), c.dtype)
        return de, dc

    return lax.cond((counts <= capacity).all(), sparse, exact)


def _entries(spec, e, c, labels, least, maxima):
    """The logits of at least ``least`` [N] other than the labels', in one list a warpgroup.

    Returns (row, column, logit), each [warpgroups, capacity], and how many each warpgroup found. Computes only tiles
    where ``maxima`` shows one, and of these only the tokens that have one, and their neighbours.
    """
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    padding = (0, -tokens % hopper_tiles.ROWS)
    least = jnp.pad(least, padding, constant_values=jnp.inf)
    eights, columns, count, fits = _tiles(tokens, least, maxima)
    capacity = pl.cdiv(tokens * _ENTRIES_PER_TOKEN, 2 * hopper.MULTIPROCESSORS)
    half = hopper_tiles.ROWS // 2

    def body(
        e_g, c_g, eights_g, columns_g, count_g, least_g, labels_g, row_g, column_g, logit_g, found_g, z_g, top_g,
        **pipeline,
    ):  # fmt: skip
        count, own = hopper_tiles.own_tiles(count_g[0])

        def tile_at(t):
            return 0, columns_g[own(t)]

        def eight_at(t, i):
            return eights_g[own(t), i]

        def compute(group, tile_logits):
            out = lax.axis_index("block") * 2 + group

            def tile(t, found):
                _, column = tile_at(t)
                products = tile_logits(t)
                for part in range(hopper_tiles.COLUMNS // _PART):
                    first = column * hopper_tiles.COLUMNS + part * _PART
                    z = hopper_tiles.finished(spec, products[:, part * _PART : (part + 1) * _PART], None, first)
                    z = hopper_tiles.masked(z, first, vocabulary, hopper_tiles.LOWEST)
                    hopper.store(z_g.at[out], z)
                    hopper.store(top_g.at[out], jnp.max(z, axis=1))
                    plgpu.commit_smem()
                    found = lax.fori_loop(0, half // 8, functools.partial(scan_eight, t, first), found)
                    plgpu.commit_smem()
                return found

            def scan_eight(t, first, i, found):
                eight = eight_at(t, group * (half // 8) + i)

                def scan_row(n, found):
                    row, token = i * 8 + n, (eight >> 8) * 8 + n
                    wanted = top_g[out, row] >= least_g[token]
                    return lax.cond(wanted, functools.partial(scan, row, token, first), lambda x: x, found)

                return _for_bits(eight & 255, scan_row, found)

            def scan(row, token, first, found):
                least, label = least_g[token], labels_g[token]

                def put(start, n, found):
                    column, is_other = first + start + n, first + start + n != label

                    @pl.when(is_other & (found < capacity))
                    def _():
                        row_g[out, found] = token
                        column_g[out, found] = column
                        logit_g[out, found] = z_g[out, row, start + n]

                    return found + is_other.astype(jnp.int32)

                for start in range(0, _PART, 32):
                    large = [(z_g[out, row, start + n] >= least).astype(jnp.int32) << n for n in range(32)]
                    bits = functools.reduce(jnp.bitwise_or, large)
                    found = _for_bits(bits, functools.partial(put, start), found)
                return found

            found_g[out] = lax.fori_loop(0, count, tile, jnp.int32(0))

        named = {"e_g": e_g, "c_g": c_g}
        hopper_tiles.run(spec, named, tile_at, count, compute, **pipeline, eights=lambda t, i: eight_at(t, i) >> 8)

    lists = (2 * hopper.MULTIPROCESSORS, capacity)
    outputs = [jax.ShapeDtypeStruct(lists, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    outputs.append(jax.ShapeDtypeStruct(lists[:1], jnp.int32))
    # The part of a tile that is searched and its rows' largest logits, in global memory: single values cannot be read
    # from tiled shared memory.
    outputs += [jax.ShapeDtypeStruct((lists[0], half, *x), jnp.float32) for x in ((_PART,), ())]
    scratch = hopper_tiles.pipeline(spec, eights=True)
    kernel = hopper_tiles.kernel(body, tuple(outputs), scratch, hopper.MULTIPROCESSORS)
    row, column, logit, found, *_ = kernel(
        *hopper_tiles.operands(spec, e, c), eights, columns, count[None], least, jnp.pad(labels, padding)
    )
    return row, column, logit, jnp.where(fits, found, capacity + 1)


def _tiles(tokens, least, maxima):
    """Tiles of the tokens that have a logit to keep in a block of columns, gathered 8 neighbours at a time.

    Returns (eights, columns, count, fits): int32 [tiles, 16], the number of each 8 tokens, times 256, and a bit for
    each of them that has one; int32 [tiles], the tiles' blocks of columns; how many tiles there are; and whether the
    logits fit into the lists (else there is no tile).
    """
    columns, together = maxima.shape[0], hopper_tiles.ROWS // 8
    kept = (maxima.astype(jnp.float32) >= least[None]).reshape(columns, -1, 8)
    bits = (kept << jnp.arange(8, dtype=jnp.int32)[None, None]).sum(-1, dtype=jnp.int32)
    # Each kept maximum is a logit to keep or the label's.
    most = tokens * (_ENTRIES_PER_TOKEN + 1)
    fits = lax.population_count(bits).sum() <= most
    used = (bits > 0) & fits
    tiles_of = (used.sum(1, dtype=jnp.int32) + together - 1) // together
    most_tiles = min(pl.cdiv(most, together) + columns, columns * pl.cdiv(bits.shape[1], together))
    first = (jnp.cumsum(tiles_of) - tiles_of) * together
    place = jnp.where(used, first[:, None] + jnp.cumsum(used, axis=1) - 1, most_tiles * together)
    numbered = bits | (jnp.arange(bits.shape[1], dtype=jnp.int32) << 8)[None]
    eights = jnp.zeros(most_tiles * together, jnp.int32).at[place].set(numbered, mode="drop")
    column_of = jnp.repeat(jnp.arange(columns, dtype=jnp.int32), tiles_of, total_repeat_length=most_tiles)
    return eights.reshape(most_tiles, together), column_of, tiles_of.sum(), fits


def _for_bits(bits, body, carry):
    """``carry = body(n, carry)`` for each bit n of an int32 that is set."""

    def step(state):
        bits, carry = state
        n = 31 - lax.clz(bits)
        return bits ^ (1 << n), body(n, carry)

    return lax.while_loop(lambda state: state[0] != 0, step, (bits, carry))[1]


def starts_of(ordered, count):
    """Where each of the numbers below ``count`` starts in an ordered list, and where the last ends: [count + 1]."""
    # In one kernel; XLA's loop would start three for each step of the search.
    starts = jnp.searchsorted(ordered, jnp.arange(count + 1, dtype=jnp.int32), method="scan_unrolled")
    return starts.astype(jnp.int32)


def _fractions_between(x, starts):
    """The sums of x[starts[i] : starts[i + 1]], numbers from 0 to 1 in steps of 2**-24."""
    # In fixed point differences of a cumulative sum are exact, also where it wraps around.
    fixed = jnp.cumsum(jnp.round(x * 2.0**24).astype(jnp.uint32), dtype=jnp.uint32)
    fixed = jnp.pad(fixed, (1, 0))
    return (fixed[starts[1:]] - fixed[starts[:-1]]).astype(jnp.float32) * 2.0**-24


def row_sums(x, index, weight, starts, factors, bases, dtype):
    """factors[:, i] @ bases + sum of weight[k] * x[index[k]] over k from starts[i] to starts[i + 1], for each i."""
    width, (terms, rows), together = x.shape[1], factors.shape, _TOGETHER
    x, bases = (hopper.padded(values, (1, 128)) for values in (x, bases))
    # Frequent entries come first and have long sums: neighbours go to different thread blocks, and each takes part of
    # the columns, so that several rows can be on their way.
    columns = max(size for size in range(128, _MOST_COLUMNS + 1, 128) if x.shape[1] % size == 0)
    parts = x.shape[1] // columns
    blocks = min(rows, pl.cdiv(32 * hopper.MULTIPROCESSORS, parts))

    def body(x_g, index_g, weight_g, starts_g, factors_g, bases_g, out_g):
        here = pl.ds(lax.axis_index("part") * columns, columns)
        bases = [bases_g[n, here] for n in range(terms)]

        def row(r, _):
            i = lax.axis_index("block") + r * blocks

            @pl.when(i < rows)
            def _():
                first, last = starts_g[i], starts_g[i + 1]
                base = sum(factors_g[n, i] * base for n, base in enumerate(bases))

                def add(step, total):
                    for n in range(together):
                        k = jnp.minimum(first + step * together + n, last - 1)
                        w = jnp.where(first + step * together + n < last, weight_g[k], 0.0)
                        total += w * x_g[index_g[k], here].astype(jnp.float32)
                    return total

                total = lax.fori_loop(0, (last - first + together - 1) // together, add, base)
                out_g[i, here] = total.astype(dtype)

        lax.fori_loop(0, pl.cdiv(rows, blocks), row, None)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, x.shape[1]), dtype),
        grid=(blocks, parts),
        grid_names=("block", "part"),
        compiler_params=hopper.PARAMS,
    )
    operands = x, index, weight, starts, factors, bases
    return varying_like(operands, kernel(*operands))[:, :width]
