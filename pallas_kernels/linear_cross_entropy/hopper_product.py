"""A matrix product for NVIDIA Hopper that holds nothing beside its result: XLA's calls take 32 MiB of workspace."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import hopper
from pallas_kernels.linear_cross_entropy import hopper_tiles


def einsum(spec, subscripts, a, b, dtype):
    """``jnp.einsum`` of two matrices of ``spec.operand_dtype`` that share one subscript, summed in float32."""
    left, right, out = subscripts.replace("->", ",").split(",")
    if out[0] not in left:
        (left, a), (right, b) = (right, b), (left, a)
    rows_last = left[1] == out[0]
    rows, columns = a.shape[int(rows_last)], b.shape[right.index(out[1])]
    # The layout of the second operand as the pipeline names it: "vd" where its columns come first.
    spec = spec._replace(classifier_layout="vd" if right[0] == out[1] else "dv")
    width = 128 // jnp.dtype(dtype).itemsize  # of a part of a tile that leaves at a time
    if columns % width:  # what the copy engine writes in tiles
        return jnp.einsum(f"{left},{right}->{out}", a, b, preferred_element_type=dtype)
    bands, blocks = pl.cdiv(rows, hopper_tiles.ROWS), pl.cdiv(columns, hopper_tiles.COLUMNS)
    tiles, half = bands * blocks, hopper_tiles.ROWS // 2

    def body(a_g, b_g, out_g, out_s, **pipeline):
        count, own = hopper_tiles.own_tiles(tiles)

        def tile_at(t):
            return hopper_tiles.grouped(own(t), bands, blocks)

        def compute(group, tile_products):
            def tile(t, _):
                band, column = tile_at(t)
                products = tile_products(t)
                for part in range(hopper_tiles.COLUMNS // width):
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    out_s[group, part % 2] = products[:, part * width : (part + 1) * width].astype(dtype)
                    plgpu.commit_smem()
                    here = (
                        pl.ds(band * hopper_tiles.ROWS + group * half, half),
                        pl.ds(column * hopper_tiles.COLUMNS + part * width, width),
                    )
                    plgpu.copy_smem_to_gmem(out_s.at[group, part % 2], out_g.at[here])

            lax.fori_loop(0, count, tile, None)
            plgpu.wait_smem_to_gmem(0)

        named = {"e_g": a_g, "c_g": b_g}
        hopper_tiles.run(spec, named, tile_at, count, compute, **pipeline, rows_last=rows_last)

    transforms = hopper.TRANSFORMS if jnp.dtype(dtype).itemsize == 2 else hopper.TRANSFORMS_F32
    scratch = hopper_tiles.pipeline(spec, rows_last) | {
        "out_s": plgpu.SMEM((2, 2, half, width), dtype, transforms=transforms)
    }
    output = jax.ShapeDtypeStruct((rows + -rows % 8, columns), dtype)  # copies are whole 8 rows
    kernel = hopper_tiles.kernel(body, output, scratch, min(tiles, hopper.MULTIPROCESSORS))
    return kernel(*hopper_tiles.operands(spec, a, b, rows_last))[:rows]
