"""What Mosaic GPU kernels for NVIDIA Hopper share: constants, layouts, and names that JAX changed."""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

MULTIPROCESSORS = 132
ROWS = 64  # of a matrix product of one warpgroup
LOG2E = math.log2(math.e)
BEFORE_0_11 = jax.__version_info__ < (0, 11)
# How the copy engine and the tensor cores want tiles in shared memory: of 16-bit numbers, and of float32.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
TRANSFORMS_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def transposed(ref):
    """A tile in shared memory read the other way round."""
    return plgpu.transpose_ref(ref, (1, 0)) if BEFORE_0_11 else ref.T


def padded(x, multiples):
    """x with zeros up to multiples of these sizes."""
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


def load(ref, layout):
    """The numbers at ``ref``, spread over a warpgroup as ``layout`` says."""
    index = ((),) if BEFORE_0_11 else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref, value):
    """Writes a value of any layout to ``ref``."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def rows(ref):
    """Values per row of a product, in the layout of its row reductions."""
    return load(ref, plgpu.Layout.WGMMA.reduce(1))


def row_vector(value):
    """The same value for each row of a product."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def across(x, tile):
    """A value per row for all columns of a tile."""
    return lax.broadcast_in_dim(x, tile.shape, [0])


def down(x, tile):
    """A value per column for all rows of a tile."""
    return lax.broadcast_in_dim(x, tile.shape, [1])


def zeros(columns, dtype=jnp.float32):
    """The start of a sum of products."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), dtype), plgpu.Layout.WGMMA)


def opaque(scalar):
    """The scalar; what follows from it in a loop is computed there, not before it, where it would occupy registers."""
    return scalar if BEFORE_0_11 else lax.optimization_barrier(scalar)


def products(acc, pending=0):
    """The products in ``acc``, while the last ``pending`` that were started may still be on their way."""
    # Pinned after the wait, across which the compiler would move what uses them.
    return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=pending))


# What follows are calls so that a test can replace them: the interpreter has no products of registers, no sums of
# products that start from anything but 0, and no copies that add.


def start_from(acc, value):
    """Lets a sum of products start from ``value``."""
    acc[...] = value


def sum_from(acc, value, pending=0):
    """``products`` of a sum that started from ``value``."""
    del value
    return products(acc, pending)


def product_onto(total, a, b_ref, meanwhile):
    """(total + a b, meanwhile()), with ``a`` in registers and ``b_ref`` in shared memory; both are done at once."""

    def multiply(acc):
        acc[...] = total
        plgpu.wgmma(acc, a, b_ref)
        other = meanwhile()
        if other is not None:  # pinned before the wait, across which the compiler would move it
            other = lax.optimization_barrier(other)
        return acc[...], other

    return pl.run_scoped(multiply, plgpu.ACC(total.shape, total.dtype))


def add_to(target, source):
    """Starts adding a tile in shared memory to one in global memory; the order of several additions is not fixed."""
    plgpu.copy_smem_to_gmem(source, target, reduction_op="add")
