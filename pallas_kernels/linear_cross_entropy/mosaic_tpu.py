"""Pallas kernels for TPU: one tile of the logits at a time, in VMEM.

A tile is [vocabulary entries, tokens]: what belongs to a token lies along the lanes, so that maxima and sums over the
vocabulary are sums over sublanes and every vector over the tokens is compact in memory.

The backward pass is two kernels, each of which owns its output and computes the logits again: one takes a tile of
tokens through a list of vocabulary tiles, the other a tile of the vocabulary through a list of token tiles. Nothing is
added up in HBM and every sum has one order. The lists are what the gradient filter shortens.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy import noise, spread
from pallas_kernels.linear_cross_entropy.noise import Draw
from pallas_kernels.linear_cross_entropy.reference import Spec
from pallas_kernels.linear_cross_entropy.tpu_tiles import (
    LANES,
    backward_tiles,
    core,
    forward_tiles,
    kept_tiles,
    kernel_dtype,
    lists,
    most_left_out,
    operand_dtype,
    part_of,
    vocabulary_size,
)
from pallas_kernels.manual_axes import output_like

_FEW = 16  # what a register holds along its first axis


def forward(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, target: jax.Array | Draw
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As ``reference.forward``."""
    return _unmapped(_forward, spec, False)(e, c, b, target)[0]


def forward_saving(
    spec: Spec, e: jax.Array, c: jax.Array, b: jax.Array | None, target: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
    """``forward``, and the largest logit of each token in each vocabulary tile of the backward pass, [tiles, N]."""
    return _unmapped(_forward, spec, True)(e, c, b, target)


def _unmapped(f, *static):
    """``f`` with its static arguments; under ``jax.vmap`` a loop, for a kernel's operands in HBM cannot be mapped."""
    return jax.custom_batching.sequential_vmap(functools.partial(f, *static))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(spec, saving, e, c, b, target):
    drawing, count, vocabulary = isinstance(target, Draw), e.shape[0], vocabulary_size(spec, c)
    if count == 0:
        nothing = jnp.zeros_like(e, jnp.float32, shape=(0,))
        return (nothing, nothing, nothing.astype(jnp.int32)), ()
    target_row = lax.bitcast_convert_type(target.token_ids, jnp.int32) if drawing else target
    logit_sum = _logit_sum(spec, e, c, b) if spec.label_smoothing and not _dense(spec) else None
    e, c, (target_row,) = _operands(spec, e, c, target_row)
    tiles, part = forward_tiles(spec, e, c, drawing, saving)
    tiles = tiles._replace(vocabulary=vocabulary)
    bias = _by_entry(tiles, b)

    def row(dtype):
        return output_like(e, (1, tiles.tokens), dtype), pl.BlockSpec((1, tiles.rows), lambda i, j, _: (0, i))

    outputs = {"lse": row(jnp.float32), "picked": row(jnp.float32)}
    if _dense(spec):
        outputs["sum"] = row(jnp.float32)
    if drawing:
        outputs["label"] = row(jnp.int32)
    if saving:
        shape = (pl.cdiv(pl.cdiv(tiles.vocabulary, part), 8) * 8, tiles.row_tiles * tiles.rows)
        parts = tiles.columns // part
        block = pl.BlockSpec((8, tiles.rows), lambda i, j, _: (j * parts // 8, i))
        outputs["top"] = output_like(e, shape, jnp.float32), block
    key = target.key if drawing else jnp.zeros_like(e, jnp.uint32, shape=(2,))
    results = pl.pallas_call(
        functools.partial(_forward_kernel, spec, tiles, part, drawing),
        out_shape={name: shape for name, (shape, _) in outputs.items()},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.row_tiles, tiles.column_tiles),
            in_specs=[
                pl.BlockSpec((tiles.rows, e.shape[1]), lambda i, j, _: (i, 0)),
                _classifier_block(spec, tiles, c, lambda i, j, _: j),
                _by_entry_blocks(tiles, bias, lambda i, j, _: j),
                pl.BlockSpec((1, tiles.rows), lambda i, j, _: (0, i)),
            ],
            out_specs={name: block for name, (_, block) in outputs.items()},
            scratch_shapes=[pltpu.VMEM((1, tiles.rows), jnp.float32)] * 2,
        ),
        compiler_params=_compiler_params("parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * tiles.tokens * c.size,
            transcendentals=tiles.tokens * tiles.vocabulary,
            bytes_accessed=_bytes(e) + tiles.row_tiles * _bytes(c),
        ),
        name="linear_cross_entropy_forward",
    )(key, e, c, bias, target_row)
    lse, picked = results["lse"][0, :count], results["picked"][0, :count]
    nll = lse - (1 - spec.label_smoothing) * picked
    if spec.label_smoothing:
        logit_sum = results["sum"][0, :count] if logit_sum is None else logit_sum
        nll -= spec.label_smoothing / spec.classes * logit_sum
    labels = results["label"][0, :count] if drawing else target
    return (nll, lse, labels), (results["top"],) if saving else ()


def _forward_kernel(spec, tiles, part, drawing, key_ref, e_ref, c_ref, bias_ref, target_ref, out, total_ref, best_ref):
    j = pl.program_id(1)
    start = j * tiles.columns

    @pl.when(j == 0)
    def _():
        # The least finite number, not -inf: a tile whose logits are all -inf must not give NaN.
        out["lse"][...] = jnp.full_like(out["lse"], jnp.finfo(jnp.float32).min)
        best_ref[...] = jnp.full_like(best_ref, -jnp.inf)
        for ref in (total_ref, *(out[name] for name in ("picked", "sum", "label") if name in out)):
            ref[...] = jnp.zeros_like(ref)

    def some_tokens(rows):
        z = _tile_logits(spec, c_ref[...], e_ref[rows, :], bias_ref)
        entry = start + lax.broadcasted_iota(jnp.int32, z.shape, 0)
        exists = entry < tiles.vocabulary
        if "sum" in out:
            out["sum"][:, rows] += _over_entries(jnp.sum, jnp.where(exists, z, 0))
        if tiles.vocabulary % tiles.columns:
            z = jnp.where(exists, z, -jnp.inf)
        tops = [_over_entries(jnp.max, z[k : k + part]) for k in range(0, tiles.columns, part)]
        if "top" in out:
            block = out["top"][:, rows]  # written whole: not every TPU stores one row at a place known only at run time
            place = lax.broadcasted_iota(jnp.int32, block.shape, 0) - j * len(tops) % 8
            for k, top in enumerate(tops):
                block = jnp.where(place == k, top, block)
            out["top"][:, rows] = block
        old_top = out["lse"][:, rows]
        top = functools.reduce(jnp.maximum, tops, old_top)
        above = jnp.exp(z - top)
        total_ref[:, rows] = total_ref[:, rows] * jnp.exp(old_top - top) + _over_entries(jnp.sum, above)
        out["lse"][:, rows] = top
        if not drawing:
            out["picked"][:, rows] += _over_entries(jnp.sum, jnp.where(entry == target_ref[:, rows], z, 0))
            return
        # argmax(z + Gumbel noise) as an exponential race, as in chunked.
        token_ids = lax.bitcast_convert_type(target_ref[:, rows], jnp.uint32)
        score = above / noise.exponential_columns((key_ref[0], key_ref[1]), token_ids, start, tiles.columns)
        tile_score = _over_entries(jnp.max, score)
        tile_label = _over_entries(jnp.min, jnp.where(score == tile_score, entry, tiles.vocabulary))
        tile_best = jnp.log(tile_score) + top
        better = tile_best > best_ref[:, rows]
        picked = _over_entries(jnp.sum, jnp.where(entry == tile_label, z, 0))
        out["picked"][:, rows] = jnp.where(better, picked, out["picked"][:, rows])
        out["label"][:, rows] = jnp.where(better, tile_label, out["label"][:, rows])
        best_ref[:, rows] = jnp.where(better, tile_best, best_ref[:, rows])

    _by_parts(tiles, some_tokens)

    @pl.when(j == tiles.column_tiles - 1)
    def _():
        out["lse"][...] += jnp.log(total_ref[...])


def backward(
    spec: Spec,
    e: jax.Array,
    c: jax.Array,
    b: jax.Array | None,
    labels: jax.Array,
    lse: jax.Array,
    g: jax.Array,
    h: jax.Array,
    scale: jax.Array,
    tops: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """As ``chunked.backward``; ``tops``, what ``forward_saving`` saved, lets it leave out tiles."""
    return _unmapped(_backward, spec)(e, c, b, labels, lse, g, h, scale, tops)


@functools.partial(jax.jit, static_argnums=0)
def _backward(spec, e, c, b, labels, lse, g, h, scale, tops):
    count, width, vocabulary = *e.shape, vocabulary_size(spec, c)
    if count == 0:
        return jnp.zeros_like(e), jnp.zeros_like(c), None if b is None else jnp.zeros_like(b)
    priors = spread.prior(spec, e, c, g + h != 0) if spec.filter_eps else ()
    e, c, (labels, lse, gh, g) = _operands(spec, e, c, labels, lse, g + h, g)
    tiles = backward_tiles(spec, e, c, tops is not None)._replace(vocabulary=vocabulary)
    keep, active = kept_tiles(spec, tiles, labels[0], lse[0], gh[0], g[0], tops)
    # What smoothing takes off every entry, unless the kernels do.
    share = 0.0 if _dense(spec) else spec.label_smoothing / spec.classes
    vectors = [*(lax.bitcast_convert_type(x, jnp.int32) for x in (lse, gh, g)), labels]
    if spec.filter_eps:
        vectors.append(lax.bitcast_convert_type(most_left_out(tiles, keep, lse[0], tops), jnp.int32)[None])
    operands = e, c, _by_entry(tiles, b), jnp.concatenate(vectors), scale.reshape(1)
    priors = [_by_entry(tiles, x)[0] for x in priors]
    de, pull = _embedding_gradient(spec, tiles, keep, active, share, priors, *operands)
    base = jnp.zeros_like(e, jnp.float32, shape=(1, e.shape[1]))
    if share:
        base -= share * _product(g, e.astype(jnp.float32))
    bases = base[:, None]
    if pull is not None:
        left_out = (~keep).astype(jnp.float32)
        bases = jnp.stack([base + _product(left_out, pull[:, 0]), _product(left_out, pull[:, 1])], 1)
    dc, db = _classifier_gradient(spec, tiles, keep, active, bases, priors, *operands)
    if db is not None and share:
        db -= share * g.sum() * scale
    dc = dc[:vocabulary, :width] if spec.classifier_layout == "vd" else dc[:width, :vocabulary]
    return de[:count, :width], dc, db


def _embedding_gradient(spec, tiles, keep, active, share, priors, e, c, bias, vectors, scale):
    """(dE, and what each token tile adds to every row of the classifier's gradient that it leaves out, and adds by the
    prior, or None)."""
    width, filtering = e.shape[1], bool(spec.filter_eps)
    order, kept = lists(keep.T)
    last = tiles.vocabulary - (tiles.column_tiles - 1) * tiles.columns
    left_out = (~keep[:-1]).sum(0) * tiles.columns + ~keep[-1] * last
    steps = kept if spec.filter_embeddings else jnp.where(active, tiles.column_tiles, 0)
    # Sums of the classifier: over all entries, over those left out, and over these by the prior.
    edges = jnp.zeros_like(e, jnp.float32, shape=(1, 3, width))
    if share:
        edges = edges.at[0, 0].set(_class_sum(spec, c))
    rest = (~keep).T.astype(jnp.float32)
    if filtering and spec.filter_embeddings:
        sums = [_product(rest, sums) for sums in _tile_sums(spec, tiles, c, priors[1])]
        edges = jnp.stack([jnp.broadcast_to(edges[0, :1], sums[0].shape), *sums], 1)
    if filtering:
        by_tile = priors[0].reshape(-1, tiles.columns).sum(1, keepdims=True)
        scale = jnp.concatenate([scale, _product(rest, by_tile)[:, 0]])  # and what is left out of the prior
    outputs = {"de": (output_like(e, e.shape, kernel_dtype(spec.dtypes[0])), pl.BlockSpec((tiles.rows, width), _outer))}
    if filtering and spec.filter_classifier:
        shape = output_like(e, (tiles.row_tiles, 2, width), jnp.float32)
        outputs["pull"] = shape, pl.BlockSpec((None, 2, width), lambda i, *_: (i, 0, 0))
    per_tile = edges.shape[0] > 1
    results = pl.pallas_call(
        functools.partial(_embedding_kernel, spec, tiles, share),
        out_shape={name: shape for name, (shape, _) in outputs.items()},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles.row_tiles,),
            in_specs=[
                _list_block(order),
                pl.BlockSpec((tiles.rows, width), _outer),
                pl.BlockSpec((vectors.shape[0], tiles.rows), lambda i, *_: (0, i)),
                pl.BlockSpec((None, 3, width), lambda i, *_: (i if per_tile else 0, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                [pl.BlockSpec(memory_space=pl.ANY)] * len(bias),
            ],
            out_specs={name: block for name, (_, block) in outputs.items()},
            scratch_shapes=[
                pltpu.VMEM((tiles.rows, width), jnp.float32),
                pltpu.VMEM((1, tiles.rows), jnp.float32),
            ],
        ),
        compiler_params=_compiler_params("parallel"),
        cost_estimate=_backward_cost(tiles, _bytes(e), tiles.row_tiles * _bytes(c), c.size),
        name="linear_cross_entropy_embedding_gradient",
    )(jnp.stack([kept, steps, left_out]).astype(jnp.int32), scale, order, e, vectors, edges, c, bias)
    return results["de"], results.get("pull")


def _embedding_kernel(
    spec, tiles, share, counts_ref, scale_ref, list_ref, e_ref, vectors_ref, edges_ref, c_hbm, bias_hbm, out, acc, mass
):
    i = pl.program_id(0)
    kept, steps, left_out = (counts_ref[k, i] for k in range(3))
    acc[...] = jnp.zeros_like(acc)
    mass[...] = jnp.zeros_like(mass)
    v_axis = spec.classifier_layout.index("v")
    _zero_tail(e_ref, 0, tiles.tokens, tiles.rows, i)
    _zero_tail(vectors_ref, 1, tiles.tokens, tiles.rows, i)

    def place(t):
        return list_ref[0, t]

    def step(c_ref, *bias_ref):
        t = pl.program_id(0)
        j = place(t)
        _zero_tail(c_ref, v_axis, tiles.vocabulary, tiles.columns, j)

        def some_tokens(rows):
            p, dz = _tile_gradient(spec, tiles, c_ref, e_ref, bias_ref, vectors_ref, rows, j)
            acc[rows, :] += _dot(dz.astype(operand_dtype(spec)), c_ref[...].astype(operand_dtype(spec)), 0, v_axis)

            @pl.when(t < kept)
            def _():
                mass[:, rows] += _over_entries(jnp.sum, p)

        _by_parts(tiles, some_tokens)

    @pl.when(steps > 0)
    def _():
        pltpu.emit_pipeline(
            step,
            grid=(steps,),
            in_specs=[_classifier_block(spec, tiles, c_hbm, place), *_by_entry_blocks(tiles, bias_hbm, place)],
        )(c_hbm, *bias_hbm)

    if "pull" in out:
        out["pull"][...] = jnp.zeros_like(out["pull"])

    def finish(rows):
        lse, gh, g, _ = _unpacked(vectors_ref, rows)
        de = acc[rows, :] - _column(share * g) * edges_ref[:1, :]
        if spec.filter_eps:
            most = lax.bitcast_convert_type(vectors_ref[4:, rows], jnp.float32)
            rest = jnp.maximum(1 - mass[:, rows], 0)
            cap = spread.cap(spec.filter_eps, tiles.vocabulary)
            multiple, rate = spread.rates(cap, rest, most, left_out, scale_ref[1 + i])
            if spec.softcap is not None:
                # The logit whose probability is the rate stands for all that are left out.
                z = lse + jnp.log(jnp.maximum(rate, jnp.finfo(jnp.float32).tiny))
                rate *= jnp.maximum(1 - (z / spec.softcap) ** 2, 0)
            for k, added in enumerate((rate, multiple)):
                added = _column(added * gh)
                de += added * edges_ref[1 + k : 2 + k, :]
                if "pull" in out:
                    pulled = _over_entries(jnp.sum, added * e_ref[rows, :].astype(jnp.float32))
                    out["pull"][k : k + 1, :] += pulled
        out["de"][rows, :] = (de * scale_ref[0]).astype(out["de"].dtype)

    _by_parts(tiles, finish)


def _classifier_gradient(spec, tiles, keep, active, bases, priors, e, c, bias, vectors, scale):
    """(dC, db or None); to each row of a tile ``bases`` [column tiles or 1, 1 or 2, D] are added, the second by the
    prior."""
    width, v_axis = e.shape[1], spec.classifier_layout.index("v")
    if not spec.filter_classifier:
        keep = jnp.broadcast_to(active[None], keep.shape)
    order, steps = lists(keep)
    outputs = {"dc": (output_like(e, c.shape, kernel_dtype(spec.dtypes[1])), _classifier_block(spec, tiles, c, _first))}
    if bias:
        outputs["db"] = (
            output_like(e, (1, tiles.vocabulary), jnp.float32),
            pl.BlockSpec((1, tiles.columns), lambda j, *_: (0, j)),
        )
    per_tile, by_prior = bases.shape[0] > 1, priors[1:] if bases.shape[1] > 1 else []
    results = pl.pallas_call(
        functools.partial(_classifier_kernel, spec, tiles, v_axis),
        out_shape={name: shape for name, (shape, _) in outputs.items()},
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles.column_tiles,),
            in_specs=[
                _list_block(order),
                _classifier_block(spec, tiles, c, _first),
                _by_entry_blocks(tiles, bias, _first),
                pl.BlockSpec((None, bases.shape[1], width), lambda j, *_: (j if per_tile else 0, 0, 0)),
                _by_entry_blocks(tiles, by_prior, _first),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs={name: block for name, (_, block) in outputs.items()},
            scratch_shapes=[
                pltpu.VMEM((tiles.columns, width), jnp.float32),
                [pltpu.VMEM((tiles.columns, 1), jnp.float32)] * len(bias),
            ],
        ),
        compiler_params=_compiler_params("parallel"),
        cost_estimate=_backward_cost(tiles, _bytes(c), tiles.column_tiles * _bytes(e), c.size),
        name="linear_cross_entropy_classifier_gradient",
    )(steps, scale, order, c, bias, bases, by_prior, e, vectors)
    return results["dc"], results["db"][0] if bias else None


def _classifier_kernel(
    spec,
    tiles,
    v_axis,
    steps_ref,
    scale_ref,
    list_ref,
    c_ref,
    bias_ref,
    bases_ref,
    prior_ref,
    e_hbm,
    vectors_hbm,
    out,
    acc,
    bias_acc,
):
    j = pl.program_id(0)
    acc[...] = jnp.broadcast_to(bases_ref[:1, :], acc.shape)
    for ref in prior_ref:
        acc[...] += _column(ref[...]) * bases_ref[1:, :]
    for ref in bias_acc:
        ref[...] = jnp.zeros_like(ref)

    def place(t):
        return list_ref[0, t]

    def step(e_ref, vectors_ref):
        i = place(pl.program_id(0))
        _zero_tail(e_ref, 0, tiles.tokens, tiles.rows, i)
        _zero_tail(vectors_ref, 1, tiles.tokens, tiles.rows, i)

        def some_tokens(rows):
            _, dz = _tile_gradient(spec, tiles, c_ref, e_ref, bias_ref, vectors_ref, rows, j)
            for ref in bias_acc:
                ref[...] += jnp.sum(dz, axis=1, keepdims=True)
            acc[...] += _dot(dz.astype(operand_dtype(spec)), e_ref[rows, :].astype(operand_dtype(spec)), 1, 0)

        _by_parts(tiles, some_tokens)

    @pl.when(steps_ref[j] > 0)
    def _():
        pltpu.emit_pipeline(
            step,
            grid=(steps_ref[j],),
            in_specs=[
                pl.BlockSpec((tiles.rows, e_hbm.shape[1]), lambda t: (place(t), 0)),
                pl.BlockSpec((vectors_hbm.shape[0], tiles.rows), lambda t: (0, place(t))),
            ],
        )(e_hbm, vectors_hbm)

    dc = acc[...] * scale_ref[0]
    out["dc"][...] = (dc if v_axis == 0 else dc.T).astype(out["dc"].dtype)
    for ref in bias_acc:
        out["db"][...] = _row(ref[...]) * scale_ref[0]


def _tile_gradient(spec, tiles, c_ref, e_ref, bias_ref, vectors_ref, rows, j):
    """(probabilities, gradient of the logits) [columns, rows] of some rows of the vocabulary's j-th tile."""
    lse, gh, g, labels = _unpacked(vectors_ref, rows)
    z = _tile_logits(spec, c_ref[...], e_ref[rows, :], bias_ref)
    entry = j * tiles.columns + lax.broadcasted_iota(jnp.int32, z.shape, 0)
    p = jnp.exp(z - lse)
    if tiles.vocabulary % tiles.columns:
        p = jnp.where(entry < tiles.vocabulary, p, 0)
    dz = p * gh - jnp.where(entry == labels, (1 - spec.label_smoothing) * g, 0)
    if _dense(spec):
        dz -= spec.label_smoothing / spec.classes * g
    if spec.softcap is not None:
        dz *= 1 - (z / spec.softcap) ** 2
    return p, dz


def _tile_logits(spec, c, e, bias_ref):
    dtype = operand_dtype(spec)
    z = _dot(c.astype(dtype), e.astype(dtype), spec.classifier_layout.index("d"), 1)
    for ref in bias_ref:
        z += _column(ref[...])
    return z if spec.softcap is None else spec.softcap * jnp.tanh(z / spec.softcap)


def _dot(a, b, a_axis, b_axis):
    """The product over one axis of each, in float32; float32 operands at full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _over_entries(reduce, x):
    return reduce(x, axis=0, keepdims=True)


def _by_parts(tiles, some_tokens):
    """Calls ``some_tokens(rows)`` for all rows of a tile, few at a time: a shorter program and fewer logits in VMEM."""
    size = part_of(tiles.rows)
    if size == tiles.rows:
        return some_tokens(pl.ds(0, size))
    return lax.fori_loop(
        0, tiles.rows // size, lambda k, _: some_tokens(pl.ds(pl.multiple_of(k * size, size), size)), None
    )


def _unpacked(vectors_ref, rows):
    """Per token, [1, rows]: log-sum-exp, g + h, g, label."""
    lse, gh, g = (lax.bitcast_convert_type(vectors_ref[k : k + 1, rows], jnp.float32) for k in range(3))
    return lse, gh, g, vectors_ref[3:4, rows]


def _zero_tail(ref, axis, total, tile, index):
    """What a block holds beyond the end of the array is undefined, and 0 times it may be NaN: make it 0."""
    if total % tile:

        @pl.when(index == total // tile)
        def _():
            place = lax.broadcasted_iota(jnp.int32, ref.shape, axis)
            ref[...] = jnp.where(place < total % tile, ref[...], jnp.zeros_like(ref))


def _compiler_params(*semantics):
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=core()[0] * 7 // 8)


def _operands(spec, e, c, *vectors):
    """What the kernels read: no float16, which the TPU lacks, a register of tokens and of vocabulary entries at least,
    and vectors as [1, N]."""
    v_axis = spec.classifier_layout.index("v")
    missing = max(_FEW - e.shape[0], 0)
    # The pipelines inside the kernels of older JAX move whole registers only.
    width = -e.shape[1] % LANES if jax.__version_info__ < (0, 10) else 0
    c_padding = [(0, width), (0, width)]
    c_padding[v_axis] = (0, max(_FEW - c.shape[v_axis], 0))
    e, c = (x.astype(kernel_dtype(x.dtype)) for x in (e, c))
    e, c = _padded(e, [(0, missing), (0, width)]), _padded(c, c_padding)
    return e, c, [jnp.pad(x, (0, missing))[None] for x in vectors]


def _padded(x, padding):
    return jnp.pad(x, padding) if any(end for _, end in padding) else x


def _dense(spec):
    """Whether label smoothing has to be part of the tiles: without a softcap it is linear and has a closed form."""
    return bool(spec.label_smoothing) and spec.softcap is not None


def _logit_sum(spec, e, c, b):
    """The sum of each token's logits, [N]."""
    z = _product(e.astype(jnp.float32), _class_sum(spec, c)[:, None])[:, 0]
    return z if b is None else z + b.sum(dtype=jnp.float32)


def _class_sum(spec, c):
    """The sum of the classifier over the vocabulary, [D]."""
    return c.sum(spec.classifier_layout.index("v"), dtype=jnp.float32)


def _tile_sums(spec, tiles, c, weights):
    """The sums of the classifier over each vocabulary tile, plain and weighted, each [column tiles, D]."""
    v_axis = spec.classifier_layout.index("v")
    width = c.shape[1 - v_axis]

    def kernel(c_ref, weights_ref, out_ref):
        _zero_tail(c_ref, v_axis, tiles.vocabulary, tiles.columns, pl.program_id(0))
        weights = weights_ref[...] if v_axis == 1 else _column(weights_ref[...])
        for k, weight in enumerate((1, weights)):
            sums = jnp.sum(c_ref[...].astype(jnp.float32) * weight, axis=v_axis, keepdims=True)
            out_ref[k : k + 1, :] = sums if v_axis == 0 else _row(sums)

    sums = pl.pallas_call(
        kernel,
        out_shape=output_like(c, (tiles.column_tiles, 2, width), jnp.float32),
        grid=(tiles.column_tiles,),
        in_specs=[_classifier_block(spec, tiles, c, _first), *_by_entry_blocks(tiles, [weights], _first)],
        out_specs=pl.BlockSpec((None, 2, width), lambda j: (j, 0, 0)),
        compiler_params=_compiler_params("parallel"),
        name="linear_cross_entropy_tile_sums",
    )(c, weights)
    return sums[:, 0], sums[:, 1]


def _row(column):
    """[n, 1] as [1, n]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]


def _column(row):
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _product(a, b):
    """Of float32 matrices in XLA, at full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _list_block(order):
    return pl.BlockSpec((None, 1, order.shape[2]), lambda i, *_: (i, 0, 0), memory_space=pltpu.SMEM)


def _outer(i, *_):
    return i, 0


def _first(i, *_):
    return i


def _classifier_block(spec, tiles, c, index):
    if spec.classifier_layout == "vd":
        return pl.BlockSpec((tiles.columns, c.shape[1]), lambda *grid: (index(*grid), 0))
    return pl.BlockSpec((c.shape[0], tiles.columns), lambda *grid: (0, index(*grid)))


def _by_entry(tiles, x):
    """What a kernel is told of the entries, as the bias, [1, whole tiles] in a list, which is empty for None."""
    if x is None:
        return []
    return [jnp.pad(x.astype(jnp.float32), (0, tiles.column_tiles * tiles.columns - tiles.vocabulary))[None]]


def _by_entry_blocks(tiles, operands, index):
    return [pl.BlockSpec((1, tiles.columns), lambda *grid: (0, index(*grid)))] * len(operands)


def _bytes(x):
    return x.size * x.dtype.itemsize


def _backward_cost(tiles, own_bytes, streamed_bytes, size):
    return pl.CostEstimate(
        flops=4 * tiles.tokens * size,
        transcendentals=tiles.tokens * tiles.vocabulary,
        bytes_accessed=2 * own_bytes + streamed_bytes,
    )
