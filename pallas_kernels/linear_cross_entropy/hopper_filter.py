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
_SMALL_SLAB_BYTES, _SMALL_BLOCK = 12 * 2**20, 1024  # for the exact gradients, then: they share the entries' memory


def gradients(spec, e, c, labels, z_label, lse, g, h, scale, maxima, logit_gradients):
    """Gradients of embeddings and classifier from the softmax entries of at least ``spec.filter_eps``.

    ``z_label`` [N] are the labels' logits, which always count. ``logit_gradients`` is what ``slabs.backward`` needs,
    before it is told the rows: for when the entries are too many.
    """
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    entry_row, entry_column, p, counts = _entries(spec, e, c, labels, lse, g + h, maxima)
    capacity = p.shape[1]
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
        p_all = jnp.concatenate([jnp.where(used, p, 1).reshape(-1), jnp.exp(z_label - lse)])
        own = jnp.minimum(row, tokens - 1)
        z = jnp.concatenate([lse[own[:-tokens]] + jnp.log(p_all[:-tokens]), z_label])
        weight = p_all * (g + h)[own]
        weight -= jnp.pad((1 - spec.label_smoothing) * g, (row.shape[0] - tokens, 0))
        if spec.softcap is not None:
            weight *= 1 - (z / spec.softcap) ** 2

        order = jnp.argsort(row, stable=True)
        starts = jnp.searchsorted(row[order], jnp.arange(tokens + 1, dtype=jnp.int32)).astype(jnp.int32)
        prior, background = spread.prior(spec, e, c, g + h != 0)
        own_prior, own_background = (jnp.take(x, column, mode="clip") for x in (prior, background))
        left_out = vocabulary - (starts[1:] - starts[:-1])
        kept, kept_of_prior = (_fractions_between(x[order], starts) for x in (p_all, own_prior))
        rates = spread.rates(spec.filter_eps, jnp.maximum(1 - kept, 0), most, left_out, prior.sum() - kept_of_prior)
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
        starts = jnp.searchsorted(column[order], jnp.arange(vocabulary + 1, dtype=jnp.int32)).astype(jnp.int32)
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


def _entries(spec, e, c, labels, lse, gh, maxima):
    """The softmax entries of at least ``spec.filter_eps`` other than the labels', in one list a warpgroup.

    Returns (row, column, p), each [warpgroups, capacity], and how many each warpgroup found. Computes only tiles where
    ``maxima`` shows one.
    """
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    bands, columns = pl.cdiv(tokens, hopper_tiles.ROWS), pl.cdiv(vocabulary, hopper_tiles.COLUMNS)
    tiles, half = bands * columns, hopper_tiles.ROWS // 2
    padding = (0, bands * hopper_tiles.ROWS - tokens)
    least = jnp.pad(jnp.where(gh == 0, jnp.inf, lse + math.log(spec.filter_eps)), padding, constant_values=jnp.inf)
    kept = maxima.astype(jnp.float32) >= least[None, :]
    # One bit a row, 32 to a word.
    words = kept.reshape(columns, -1, 32).astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)[None, None]
    words = lax.bitcast_convert_type(words.sum(-1, dtype=jnp.uint32), jnp.int32)
    band, column = hopper_tiles.grouped(jnp.arange(tiles, dtype=jnp.int32), bands, columns)
    used = kept.reshape(columns, bands, hopper_tiles.ROWS).any(-1)[column, band]
    # Each kept maximum is an entry or the label. Too many: find none, and say that they do not fit.
    fits = kept.sum() - tokens <= tokens * _ENTRIES_PER_TOKEN
    used &= fits
    place = jnp.where(used, jnp.cumsum(used) - 1, tiles)
    chosen = jnp.zeros(tiles, jnp.int32).at[place].set(jnp.arange(tiles, dtype=jnp.int32), mode="drop")
    capacity = pl.cdiv(tokens * _ENTRIES_PER_TOKEN, 2 * hopper.MULTIPROCESSORS)

    def body(e_g, c_g, chosen_g, used_g, words_g, lse_g, labels_g, row_g, column_g, kept_g, counts_g, p_g, **pipeline):
        block = lax.axis_index("block")
        count = (used_g[0] - block + hopper.MULTIPROCESSORS - 1) // hopper.MULTIPROCESSORS

        def tile_at(t):
            return hopper_tiles.grouped(chosen_g[block + t * hopper.MULTIPROCESSORS], bands, columns)

        def compute(group, tile_logits):
            out = block * 2 + group

            def tile(t, found):
                band, column = tile_at(t)
                first_row = band * hopper_tiles.ROWS + group * half
                rows = pl.ds(first_row, half)
                products = tile_logits(t)
                lse, own = hopper.rows(lse_g.at[rows]), hopper.rows(labels_g.at[rows])
                words = [words_g[column, band * 4 + group * 2 + i] for i in range(2)]
                for part in range(hopper_tiles.COLUMNS // _PART):
                    first = column * hopper_tiles.COLUMNS + part * _PART
                    z = hopper_tiles.finished(spec, products[:, part * _PART : (part + 1) * _PART], None, first)
                    here = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA) + first
                    p = jnp.exp2((z - hopper.across(lse, z)) * hopper.LOG2E)
                    p = jnp.where((here == hopper.across(own, z)) | (here >= vocabulary), 0.0, p)
                    hopper.store(p_g.at[out], p)
                    plgpu.commit_smem()
                    for i in range(2):
                        found = lax.fori_loop(0, 32, functools.partial(scan_row, words[i], i, first_row, first), found)
                    plgpu.commit_smem()
                return found

            def scan_row(word, i, first_row, first, bit, found):
                row = i * 32 + bit

                def scan(found):
                    def eight(k, found):
                        values = [p_g[out, row, k * 8 + n] for n in range(8)]
                        any_kept = functools.reduce(jnp.maximum, values) >= spec.filter_eps

                        def keep(found):
                            for n, value in enumerate(values):
                                found = lax.cond(
                                    value >= spec.filter_eps, functools.partial(put, value, n), lambda x: x, found
                                )
                            return found

                        def put(value, n, found):
                            @pl.when(found < capacity)
                            def _():
                                row_g[out, found] = first_row + row
                                column_g[out, found] = first + k * 8 + n
                                kept_g[out, found] = value

                            return found + 1

                        return lax.cond(any_kept, keep, lambda x: x, found)

                    return lax.fori_loop(0, _PART // 8, eight, found)

                return lax.cond((word >> bit) & 1 == 1, scan, lambda x: x, found)

            counts_g[out] = lax.fori_loop(0, count, tile, jnp.int32(0))

        hopper_tiles.run(spec, {"e_g": e_g, "c_g": c_g}, tile_at, count, compute, **pipeline)

    lists = (2 * hopper.MULTIPROCESSORS, capacity)
    outputs = [jax.ShapeDtypeStruct(lists, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    outputs.append(jax.ShapeDtypeStruct(lists[:1], jnp.int32))
    # The part of a tile that is searched, in global memory: single values cannot be read from tiled shared memory.
    outputs.append(jax.ShapeDtypeStruct((lists[0], half, _PART), jnp.float32))
    per_row = jnp.pad(lse, padding), jnp.pad(labels, padding, constant_values=-1)
    kernel = hopper_tiles.kernel(body, tuple(outputs), hopper_tiles.pipeline(spec), hopper.MULTIPROCESSORS)
    row, column, p, counts, _ = kernel(
        *hopper_tiles.operands(spec, e, c), chosen, used.sum(dtype=jnp.int32)[None], words, *per_row
    )
    return row, column, p, jnp.where(fits, counts, capacity + 1)


def _fractions_between(x, starts):
    """The sums of x[starts[i] : starts[i + 1]], numbers from 0 to 1 in steps of 2**-24."""
    # In fixed point differences of a cumulative sum are exact, also where it wraps around.
    fixed = jnp.cumsum(jnp.round(x * 2.0**24).astype(jnp.uint32), dtype=jnp.uint32)
    fixed = jnp.pad(fixed, (1, 0))
    return (fixed[starts[1:]] - fixed[starts[:-1]]).astype(jnp.float32) * 2.0**-24


def row_sums(x, index, weight, starts, factors, bases, dtype):
    """factors[:, i] @ bases + sum of weight[k] * x[index[k]] over k from starts[i] to starts[i + 1], for each i."""
    width, (terms, rows), together = x.shape[1], factors.shape, 4
    x, bases = (hopper.padded(values, (1, 128)) for values in (x, bases))
    rows_a_block = pl.cdiv(rows, 32 * hopper.MULTIPROCESSORS)

    def body(x_g, index_g, weight_g, starts_g, factors_g, bases_g, out_g):
        bases = [bases_g[n] for n in range(terms)]

        def row(r, _):
            i = lax.axis_index("block") * rows_a_block + r

            @pl.when(i < rows)
            def _():
                first, last = starts_g[i], starts_g[i + 1]
                base = sum(factors_g[n, i] * base for n, base in enumerate(bases))

                def add(step, total):
                    for n in range(together):  # several rows on their way at once
                        k = jnp.minimum(first + step * together + n, last - 1)
                        w = jnp.where(first + step * together + n < last, weight_g[k], 0.0)
                        total += w * x_g[index_g[k]].astype(jnp.float32)
                    return total

                total = lax.fori_loop(0, (last - first + together - 1) // together, add, base)
                out_g[i] = total.astype(dtype)

        lax.fori_loop(0, rows_a_block, row, None)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, x.shape[1]), dtype),
        grid=(pl.cdiv(rows, rows_a_block),),
        grid_names=("block",),
        compiler_params=hopper.PARAMS,
    )
    operands = x, index, weight, starts, factors, bases
    return varying_like(operands, kernel(*operands))[:, :width]
