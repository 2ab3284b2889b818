"""NVIDIA Hopper: Pallas Mosaic GPU kernels.

The forward pass keeps a running log-sum-exp of its tokens; the backward pass writes the gradient of one slab of logits
(``slabs``) or works from a list of the entries that matter (``hopper_filter``). The loss of a small classifier and its
gradients come from one pass (``hopper_one_pass``). Every output is written by one thread block and every sum has one
order: results do not depend on the order of execution.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.linear_cross_entropy import hopper_filter, hopper_one_pass, hopper_tiles, slabs
from pallas_kernels.linear_cross_entropy.noise import PERIOD, Draw, threefry, uniform_of
from pallas_kernels.linear_cross_entropy.reference import Spec


def forward(spec: Spec, e, c, b, target):
    """As ``reference.forward``."""
    return _forward(spec, e, c, b, target, saving=False)[0]


def forward_saving(spec: Spec, e, c, b, labels):
    """``forward``, and the largest logit of each token in each tile of the vocabulary, rounded up: bfloat16 [.., N]."""
    vocabulary = c.shape[spec.classifier_layout.index("v")]
    return _forward(spec, e, c, b, labels, saving=vocabulary >= hopper_filter.LEAST_VOCABULARY)


@functools.partial(jax.jit, static_argnums=0, static_argnames="saving")
def _forward(spec, e, c, b, target, saving):
    if e.shape[0] == 0:
        nothing = jnp.zeros(0, jnp.float32)
        return (nothing, nothing, jnp.zeros(0, jnp.int32)), (jnp.zeros((0, 0), jnp.bfloat16),) if saving else ()
    draw = target if isinstance(target, Draw) else None
    lse, logit_sum, maxima, drawn = _scan(spec, e, c, b, draw, saving)
    labels = target if draw is None else drawn
    picked = _label_logits(spec, e, c, b, labels)
    nll = lse - (1 - spec.label_smoothing) * picked
    if spec.label_smoothing:
        if logit_sum is None:
            logit_sum = _logit_sums(spec, e, c, b)
        nll -= spec.label_smoothing / spec.classes * logit_sum
    return (nll, lse, labels), (maxima,) if saving else ()


one_pass = hopper_one_pass.fits


def forward_backward(spec: Spec, e, c, b, weights, labels):
    """As ``chunked.forward_backward``, for the problems that ``one_pass`` names."""
    z_label = _label_logits(spec, e, c, b, labels)
    return hopper_one_pass.forward_backward(
        spec, e, c, weights, labels, z_label, lambda: _scan(spec, e, c, b, None, saving=False)[0]
    )


def _scan(spec, e, c, b, draw, saving):
    """(log-sum-exp [N], sum of the logits [N], largest logits [tiles, bands * 128], labels drawn [N]).

    All but the first are None where they are not needed.
    """
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    bands, columns = pl.cdiv(tokens, hopper_tiles.ROWS), pl.cdiv(vocabulary, hopper_tiles.COLUMNS)
    splits = hopper_tiles.splits(bands, columns)
    summing = bool(spec.label_smoothing) and spec.softcap is not None
    padding = (0, bands * hopper_tiles.ROWS - tokens)
    inputs = {"b_g": None if b is None else hopper.padded(b.astype(jnp.float32), (hopper_tiles.COLUMNS,))}
    if draw is not None:
        inputs |= {"key_g": draw.key, "ids_g": lax.bitcast_convert_type(jnp.pad(draw.token_ids, padding), jnp.int32)}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    per_split = ["lse", *(["sum"] if summing else []), *([] if draw is None else ["best", "label"])]
    per_row = jax.ShapeDtypeStruct((len(per_split), splits, bands * hopper_tiles.ROWS), jnp.float32)
    outputs = {"out_g": per_row}
    if saving:
        outputs["max_g"] = jax.ShapeDtypeStruct((columns, bands * hopper_tiles.ROWS), jnp.bfloat16)

    def body(*refs, out_s, max_s, **pipeline):
        named = dict(zip(("e_g", "c_g", *inputs, *outputs), refs, strict=True))
        band, split = hopper_tiles.grouped(lax.axis_index("block"), bands, splits)
        first, last = split * columns // splits, (split + 1) * columns // splits

        def compute(group, tile_logits):
            rows = pl.ds(band * hopper_tiles.ROWS + group * (hopper_tiles.ROWS // 2), hopper_tiles.ROWS // 2)

            def tile(t, carry):
                start = (first + t) * hopper_tiles.COLUMNS
                z = hopper_tiles.finished(spec, tile_logits(t), named.get("b_g"), start)
                if summing:
                    carry["sum"] += jnp.sum(hopper_tiles.masked(z, start, vocabulary, 0.0), axis=1)
                z = hopper_tiles.masked(z, start, vocabulary, hopper_tiles.LOWEST)
                tile_top = jnp.max(z, axis=1)
                if saving:
                    # Rounded to bfloat16 a maximum could fall below the threshold: round it up.
                    up = tile_top + jnp.abs(tile_top) * 2.0**-8
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    max_s[group] = up.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(max_s.at[group], named["max_g"].at[first + t, rows])
                if draw is not None:
                    best, label = _race(z, start, named["key_g"], hopper.rows(named["ids_g"].at[rows]))
                    carry["label"] = jnp.where(best > carry["best"], label, carry["label"])
                    carry["best"] = jnp.maximum(best, carry["best"])
                top = jnp.maximum(carry["top"], tile_top)
                above = jnp.exp2(z * hopper.LOG2E - hopper.across(top * hopper.LOG2E, z))
                total = carry["total"] * jnp.exp2((carry["top"] - top) * hopper.LOG2E) + jnp.sum(above, axis=1)
                return carry | {"top": top, "total": total}

            carry = {name: hopper.row_vector(0.0) for name in ("total", *per_split[1:])}
            lowest = ["top"] if draw is None else ["top", "best"]
            carry |= {name: hopper.row_vector(hopper_tiles.LOWEST) for name in lowest}
            carry = lax.fori_loop(0, last - first, tile, carry)
            carry["lse"] = carry["top"] + jnp.log(carry["total"])
            for i, name in enumerate(per_split):
                out_s[group, i] = carry[name]
            plgpu.commit_smem()
            for i in range(len(per_split)):
                plgpu.copy_smem_to_gmem(out_s.at[group, i], named["out_g"].at[i, split, rows])
            plgpu.wait_smem_to_gmem(0)

        hopper_tiles.run(spec, named, lambda t: (band, first + t), last - first, compute, **pipeline)

    scratch = hopper_tiles.pipeline(spec) | {
        "out_s": plgpu.SMEM((2, len(per_split), hopper_tiles.ROWS // 2), jnp.float32),
        "max_s": plgpu.SMEM((2, hopper_tiles.ROWS // 2), jnp.bfloat16),
    }
    kernel = hopper_tiles.kernel(body, tuple(outputs.values()), scratch, bands * splits)
    out, *maxima = kernel(*hopper_tiles.operands(spec, e, c), *inputs.values())
    found = dict(zip(per_split, out[:, :, :tokens], strict=True))
    lse = jax.nn.logsumexp(found["lse"], axis=0)
    drawn = None
    if draw is not None:
        winner = jnp.argmax(found["best"], axis=0)[None]
        drawn = jnp.take_along_axis(found["label"], winner, axis=0)[0].astype(jnp.int32)
    return lse, found["sum"].sum(0) if summing else None, maxima[0] if saving else None, drawn


def _race(z, start, key_g, token_ids):
    """Per row of a tile the largest logit plus Gumbel noise and its vocabulary entry, exact in float32 below 2**24."""
    key = key_g[0], key_g[1]
    best, label = hopper.row_vector(-jnp.inf), hopper.row_vector(0.0)
    half = PERIOD // 2
    for first in range(0, half, 32):  # entries v and v + half share a block of noise
        parts = [z[:, column : column + 32] for column in (first, first + half)]
        column = plgpu.broadcasted_iota(jnp.int32, parts[0].shape, 1, layout=plgpu.Layout.WGMMA) + first
        pairs = (column + start // 2).astype(jnp.uint32)
        words = threefry(key, hopper.across(token_ids, parts[0]).astype(jnp.uint32), pairs)
        for part, word, offset in zip(parts, words, (0, half), strict=True):
            score = part - jnp.log(_minus_log1p(uniform_of(word)))
            top = jnp.max(score, axis=1)
            # Of equal scores the last entry: the noise has 2**32 values, so this hardly matters.
            entry = (column + (start + offset)).astype(jnp.float32)
            entry = jnp.max(jnp.where(score == hopper.across(top, score), entry, -1.0), axis=1)
            label = jnp.where(top > best, entry, label)
            best = jnp.maximum(top, best)
    return best, label


def _minus_log1p(u):
    """-log(1 - u), also where 1 - u is rounded: to float32's precision by its series below 2**-6."""
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5)))))
    return jnp.where(u < 2.0**-6, series, -jnp.log(1 - u))


def backward(spec: Spec, e, c, b, labels, lse, g, h, scale, maxima=None):
    """As ``chunked.backward``. With ``maxima`` the gradients that the filter names are sums of few rows."""
    if e.shape[0] == 0:
        return jnp.zeros_like(e), jnp.zeros_like(c), None if b is None else jnp.zeros_like(b)

    def exact(**options):
        logit_gradients = functools.partial(_logit_gradients, spec, e, c, b, labels, lse)
        return slabs.backward(spec, e, c, b, g, h, scale, logit_gradients, **options)

    if maxima is None:
        return exact()
    z_label = _label_logits(spec, e, c, b, labels)
    de, dc = hopper_filter.gradients(spec, e, c, labels, z_label, lse, g, h, scale, maxima, _logit_gradients)
    if not spec.filter_embeddings:
        de = exact(classifier=False)[0]
    if not spec.filter_classifier:
        dc = exact(embeddings=False)[1]
    return de, dc, None


@functools.partial(jax.jit, static_argnums=(0, 9))
def _logit_gradients(spec, e, c, b, labels, lse, g, h, start, size):
    """The gradient [N, size] of the logits from ``start``, in the operands' dtype."""
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    bands, columns = pl.cdiv(tokens, hopper_tiles.ROWS), pl.cdiv(size, hopper_tiles.COLUMNS)
    tiles = bands * columns
    start = jnp.asarray(start, jnp.int32)
    # Per token: log-sum-exp, g + h, what the label takes off, what smoothing takes off every entry.
    rows_in = jnp.stack([lse, g + h, (1 - spec.label_smoothing) * g, spec.label_smoothing / spec.classes * g])
    padding = ((0, 0), (0, bands * hopper_tiles.ROWS - tokens))
    rows_in = jnp.pad(rows_in.astype(jnp.float32), padding)
    labels = jnp.pad(labels - start, padding[1])

    bias = () if b is None else (hopper.padded(b.astype(jnp.float32), (hopper_tiles.COLUMNS,)),)

    def body(*refs, out_s, **pipeline):
        names = ("e_g", "c_g", *(() if b is None else ("b_g",)), "start_g", "rows_g", "labels_g", "out_g")
        named = dict(zip(names, refs, strict=True))
        first = named["start_g"][0] // hopper_tiles.COLUMNS
        count, own = hopper_tiles.own_tiles(tiles)

        def tile_at(t):
            band, column = hopper_tiles.grouped(own(t), bands, columns)
            return band, first + column

        def compute(group, tile_logits):
            def tile(t, _):
                band, column = tile_at(t)
                rows = pl.ds(band * hopper_tiles.ROWS + group * (hopper_tiles.ROWS // 2), hopper_tiles.ROWS // 2)
                products = tile_logits(t)
                lse, gh, label_share, share = (hopper.rows(named["rows_g"].at[i, rows]) for i in range(4))
                own = hopper.rows(named["labels_g"].at[rows])
                for part in range(hopper_tiles.COLUMNS // 64):  # little by little, for want of registers
                    first_out = (column - first) * hopper_tiles.COLUMNS + part * 64
                    z = products[:, part * 64 : (part + 1) * 64]
                    z = hopper_tiles.finished(spec, z, named.get("b_g"), column * hopper_tiles.COLUMNS + part * 64)
                    dz = jnp.exp2((z - hopper.across(lse, z)) * hopper.LOG2E) * hopper.across(gh, z)
                    here = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA) + first_out
                    dz -= jnp.where(here == hopper.across(own, z), hopper.across(label_share, z), 0.0)
                    if spec.label_smoothing:
                        dz -= hopper.across(share, z)
                    if spec.softcap is not None:
                        dz *= 1 - z * z * spec.softcap**-2
                    dz = hopper_tiles.masked(dz, column * hopper_tiles.COLUMNS + part * 64, vocabulary, 0.0)
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    out_s[group, part % 2] = dz.astype(out_s.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_s.at[group, part % 2], named["out_g"].at[rows, pl.ds(first_out, 64)])

            lax.fori_loop(0, count, tile, None)
            plgpu.wait_smem_to_gmem(0)

        hopper_tiles.run(spec, named, tile_at, count, compute, **pipeline)

    scratch = hopper_tiles.pipeline(spec) | {
        "out_s": plgpu.SMEM((2, 2, hopper_tiles.ROWS // 2, 64), spec.operand_dtype, transforms=hopper.TRANSFORMS),
    }
    output = jax.ShapeDtypeStruct((bands * hopper_tiles.ROWS, columns * hopper_tiles.COLUMNS), spec.operand_dtype)
    out = hopper_tiles.kernel(body, output, scratch, min(tiles, hopper.MULTIPROCESSORS))(
        *hopper_tiles.operands(spec, e, c), *bias, start[None], rows_in, labels
    )
    return out[:tokens, :size]


def _label_logits(spec, e, c, b, labels):
    """The logit of each token's label, 0 for a label of -1."""
    axis = spec.classifier_layout.index("v")
    own = jnp.maximum(labels, 0)
    z = jnp.einsum(
        f"nd,{'nd' if axis == 0 else 'dn'}->n", e, jnp.take(c, own, axis), preferred_element_type=jnp.float32
    )
    if b is not None:
        z += b.astype(jnp.float32)[own]
    if spec.softcap is not None:
        z = spec.softcap * jnp.tanh(z / spec.softcap)
    return jnp.where(labels < 0, 0, z)


def _logit_sums(spec, e, c, b):
    """The sum of each token's logits, which without a softcap is linear."""
    axis = spec.classifier_layout.index("v")
    z = e.astype(jnp.float32) @ c.sum(axis, dtype=jnp.float32)
    return z if b is None else z + b.sum(dtype=jnp.float32)
