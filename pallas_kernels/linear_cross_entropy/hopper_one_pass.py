"""Loss and gradients from one pass over the logits, for NVIDIA Hopper: three matrix products instead of four.

A kernel writes the numerators exp(z - reference) of the softmax of a chunk of tokens in 16 bits, the label's left out.
What is known only after the last of them (the sum, and with it every factor of the gradient) is one number a token and
leaves the products. The reference is the label's logit: no numerator overflows unless one logit exceeds the label's by
44, and then everything is computed once more with the log-sum-exp as reference.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.linear_cross_entropy import hopper_filter, hopper_tiles
from pallas_kernels.linear_cross_entropy.chunked import even, loop_over_tiles
from pallas_kernels.linear_cross_entropy.noise import Draw

# Numerators in memory at a time. Each chunk reads and writes the classifier's gradient in float32, so that has a limit.
CHUNK_BYTES, MOST_CLASSIFIER_BYTES = 400 * 2**20, 256 * 2**20
_LARGEST_SUM = 2.0**64  # of numerators: with it all products stay far from float32's largest number
_PART = 64  # columns of a tile at a time, for want of registers


def fits(spec, e, c, b, target) -> bool:
    """Whether a problem can be solved and gains: bfloat16, a small classifier and no option beside z_loss."""
    vocabulary = c.shape[spec.classifier_layout.index("v")]
    plain = b is None and spec.softcap is None and not spec.label_smoothing and not isinstance(target, Draw)
    tiled = vocabulary % _PART == 0  # what the copy engine writes in tiles
    small = c.size * 4 <= MOST_CLASSIFIER_BYTES
    filtered = spec.filter_eps and vocabulary >= hopper_filter.LEAST_VOCABULARY
    return plain and tiled and small and not filtered and spec.operand_dtype == jnp.bfloat16 and e.shape[0] > 0


def forward_backward(spec, e, c, weights, labels, z_label, log_sum_exp):
    """As ``chunked.forward_backward``; ``z_label`` [N] are the labels' logits, ``log_sum_exp()`` is [N]."""
    axis = spec.classifier_layout.index("v")
    tokens, vocabulary = e.shape[0], c.shape[axis]
    rows = even(tokens, max(CHUNK_BYTES // (2 * vocabulary), hopper_tiles.ROWS), hopper_tiles.ROWS)
    e_operand, c_operand = (x.astype(spec.operand_dtype) for x in (e, c))

    def chunk(carry, start, size, reference):
        fine, loss, own, de, dc = carry
        arrays = (e_operand, weights, labels, z_label, reference)
        e_rows, w, y, z_own, middle = (lax.dynamic_slice_in_dim(x, start, size) for x in arrays)
        q, others = _numerators(spec, e_rows, c_operand, y, middle)
        mine = jnp.where(y >= 0, jnp.exp(z_own - middle), 0)
        total = others + mine
        fine &= ((total > 1 / _LARGEST_SUM) & (total < _LARGEST_SUM)).all()
        lse = middle + jnp.log(total)
        h = 2 * spec.z_loss * lse * w
        factor, of_label = (w + h) / total, jnp.where(y >= 0, h * mine - w * others, 0) / total
        products = jnp.einsum(f"rv,{spec.classifier_layout}->rd", q, c_operand, preferred_element_type=spec.dtype)
        row_of_label = jnp.take(c_operand, jnp.maximum(y, 0), axis)
        row_of_label = row_of_label if axis == 0 else row_of_label.T
        de_rows = factor[:, None] * products + of_label[:, None] * row_of_label.astype(spec.dtype)
        scaled = (factor[:, None] * e_rows.astype(spec.dtype)).astype(spec.operand_dtype)
        dc += jnp.einsum(f"rv,rd->{spec.classifier_layout}", q, scaled, preferred_element_type=spec.dtype)
        found = (lse - z_own + spec.z_loss * lse**2, of_label, de_rows)
        written = (
            lax.dynamic_update_slice_in_dim(x, part, start, 0) for x, part in zip((loss, own, de), found, strict=True)
        )
        return fine, *written, dc

    def nothing(fine):
        row = jnp.zeros_like(e, spec.dtype, shape=(tokens,))
        fine = jnp.full_like(e, fine, bool, shape=())
        return fine, row, row, jnp.zeros_like(e, spec.dtype), jnp.zeros_like(c, spec.dtype)

    def attempt(state):
        tried = state[0]
        reference = lax.cond(tried == 0, lambda: z_label, log_sum_exp)
        step = functools.partial(chunk, reference=reference)
        # Zero as they are in the first attempt: XLA then writes where they lie.
        start = lax.cond(tried == 0, lambda *state: state, lambda *_: nothing(True)[1:], *state[2:])
        return tried + 1, *loop_over_tiles(step, (nothing(True)[0], *start), tokens, rows)

    state = lax.while_loop(lambda state: (state[0] < 2) & ~state[1], attempt, (jnp.int32(0), *nothing(False)))
    _, _, loss, own, de, dc = state
    return loss, labels, (de, dc + _of_labels(spec, e_operand, labels, own, vocabulary), None)


def _numerators(spec, e, c, labels, reference):
    """(exp(z - reference) [N, V] in the operands' dtype, its sum [N]), with 0 for each token's label."""
    tokens, vocabulary = e.shape[0], c.shape[spec.classifier_layout.index("v")]
    bands, columns = pl.cdiv(tokens, hopper_tiles.ROWS), pl.cdiv(vocabulary, hopper_tiles.COLUMNS)
    splits, half = hopper_tiles.splits(bands, columns), hopper_tiles.ROWS // 2
    padding = (0, bands * hopper_tiles.ROWS - tokens)
    per_row = jnp.pad(reference * hopper.LOG2E, padding), jnp.pad(labels, padding, constant_values=-1)

    def body(e_g, c_g, reference_g, labels_g, q_g, sums_g, q_s, **pipeline):
        band, split = hopper_tiles.grouped(lax.axis_index("block"), bands, splits)
        first, last = split * columns // splits, (split + 1) * columns // splits

        def compute(group, tile_logits):
            rows = pl.ds(band * hopper_tiles.ROWS + group * half, half)
            reference, own = hopper.rows(reference_g.at[rows]), hopper.rows(labels_g.at[rows])

            def tile(t, total):
                products = tile_logits(t)
                for part in range(hopper_tiles.COLUMNS // _PART):
                    start = (first + t) * hopper_tiles.COLUMNS + part * _PART
                    z = products[:, part * _PART : (part + 1) * _PART]
                    q = jnp.exp2(z * hopper.LOG2E - hopper.across(reference, z))
                    here = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA) + start
                    q = jnp.where((here == hopper.across(own, z)) | (here >= vocabulary), 0.0, q)
                    total += jnp.sum(q, axis=1)
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    q_s[group, part % 2] = q.astype(q_s.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(q_s.at[group, part % 2], q_g.at[rows, pl.ds(start, _PART)])
                return total

            total = lax.fori_loop(0, last - first, tile, hopper.row_vector(0.0))
            hopper.store(sums_g.at[split, rows], total)
            plgpu.wait_smem_to_gmem(0)

        named = {"e_g": e_g, "c_g": c_g}
        hopper_tiles.run(spec, named, lambda t: (band, first + t), last - first, compute, **pipeline)

    scratch = hopper_tiles.pipeline(spec) | {
        "q_s": plgpu.SMEM((2, 2, half, _PART), spec.operand_dtype, transforms=hopper.TRANSFORMS),
    }
    outputs = (
        # Copies are whole 8 rows; what a tile has beyond is not written.
        jax.ShapeDtypeStruct((tokens + -tokens % 8, vocabulary), spec.operand_dtype),
        jax.ShapeDtypeStruct((splits, bands * hopper_tiles.ROWS), jnp.float32),
    )
    kernel = hopper_tiles.kernel(body, outputs, scratch, bands * splits)
    q, sums = kernel(*hopper_tiles.operands(spec, e, c), *per_row)
    return q[:tokens], sums.sum(0)[:tokens]


def _of_labels(spec, e, labels, weight, vocabulary):
    """What the labels' own logits give the classifier: for each entry the sum of weight * e over its tokens."""
    entry = jnp.where(labels >= 0, labels, vocabulary)
    order = jnp.argsort(entry, stable=True)
    starts = hopper_filter.starts_of(entry[order], vocabulary)
    none = jnp.zeros((1, vocabulary), jnp.float32), jnp.zeros((1, e.shape[1]), jnp.float32)
    sums = hopper_filter.row_sums(e, order.astype(jnp.int32), weight[order], starts, *none, jnp.float32)
    return sums if spec.classifier_layout == "vd" else sums.T
