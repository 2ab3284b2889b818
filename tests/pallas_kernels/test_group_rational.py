"""The group rational: its definition, XLA's form, and the Hopper kernel interpreted, compiled and on a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.group_rational import chunked, group_rational, reference
from tests.aot import H200, compile_mosaic_kernels, needs_cuda_plugin

XLA = ("reference", "chunked")
# Shape of x, groups of numerator and denominator, degrees.
CASES = {
    "one_row": ((1, 1, 8), (1, 8), (5, 4)),
    "tokens": ((2, 197, 192), (8, 8), (5, 4)),
    "groups_of_24": ((3, 7, 192), (1, 8), (5, 4)),
    "wide": ((64, 768), (8, 1), (5, 4)),
    "groups_of_two": ((9, 10), (5, 5), (3, 2)),
    "one_channel": ((33, 1), (1, 1), (0, 1)),
    "high_degrees": ((21, 12), (3, 1), (7, 6)),
    "a_vector": ((6,), (2, 2), (2, 3)),
    "no_rows": ((0, 16), (2, 2), (5, 4)),
}
# Of dx and y, relative: float32 arithmetic with some twenty roundings; the dtype's own rounding of the result.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 1e-2}


def problem(shape, groups, degree, dtype="float32", seed=0):
    """x (with both zeros and some large values), numerator, denominator (one is 0), cotangent."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.choice([0.3, 1.0, 3.0], size=shape)
    x.flat[:2] = [0.0, -0.0][: x.size]
    a, b = rng.normal(size=(groups[0], degree[0] + 1)), rng.normal(size=(groups[1], degree[1]))
    b.flat[0] = 0.0
    x, g = (jnp.asarray(value, dtype) for value in (x, rng.normal(size=shape)))
    return x, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), g


def exact(x, a, b, g):
    """In float64, by the paper's formulas: y, dx, da, db, and the sums of the magnitudes of what da and db add up."""
    x, a, b, g = (np.asarray(value, np.float64) for value in (x, a, b, g))
    channels = x.shape[-1]
    a_of, b_of = (np.repeat(c, channels // len(c), axis=0) for c in (a, b))
    size, sign = np.abs(x), np.where(x < 0, -1.0, 1.0)
    p = sum(a_of[:, i] * x**i for i in range(a.shape[1]))
    q = 1 + sum(np.abs(b_of[:, j]) * size ** (j + 1) for j in range(b.shape[1]))
    dp = sum((i * a_of[:, i] * x ** (i - 1) for i in range(1, a.shape[1])), np.zeros_like(x))
    dq = sign * sum((j + 1) * np.abs(b_of[:, j]) * size**j for j in range(b.shape[1]))
    da = np.stack([x**i * g / q for i in range(a.shape[1])], -1)
    db = np.stack([-p / q**2 * np.where(b_of[:, j] < 0, -1, 1) * size ** (j + 1) * g for j in range(b.shape[1])], -1)

    def by_group(terms, groups):
        return terms.reshape(-1, groups, channels // groups, terms.shape[-1]).sum((0, 2))

    sums = [by_group(f(terms), len(c)) for f in (np.asarray, np.abs) for terms, c in ((da, a), (db, b))]
    return p / q, (dp / q - dq * p / q**2) * g, *sums


@functools.partial(jax.jit, static_argnums=0)
def both_passes(op, x, a, b, g):
    y, backward = jax.vjp(op, x, a, b)
    return y, *backward(g)


def assert_formulas(got, x, a, b, g):
    """Against float64 on the same rounded inputs; sums to 1e-6 of the sum of magnitudes, as float32 adds them."""
    tolerance = TOLERANCE[x.dtype.name]
    y, dx, da, db, da_size, db_size = exact(*(np.asarray(value.astype(jnp.float32)) for value in (x, a, b, g)))
    assert [value.dtype for value in got] == [x.dtype, x.dtype, a.dtype, b.dtype]
    for found, wanted in zip(got[:2], (y, dx), strict=True):
        scale = np.abs(wanted).mean() if wanted.size else 0.0
        np.testing.assert_allclose(found.astype(jnp.float32), wanted, rtol=tolerance, atol=tolerance * scale)
    for found, wanted, size in zip(got[2:], (da, db), (da_size, db_size), strict=True):
        assert (np.abs(np.asarray(found, np.float64) - wanted) <= 1e-6 * size + 1e-12).all()


@pytest.mark.parametrize("implementation", XLA)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formulas(case, implementation):
    arguments = problem(*CASES[case])
    op = functools.partial(group_rational, implementation=implementation)
    assert_formulas(both_passes(op, *arguments), *arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("implementation", XLA)
def test_narrow_inputs_are_computed_in_float32(implementation, dtype):
    """Sums are float32's, and x**5 of 3e3 would not fit float16."""
    x, a, b, g = problem((40, 24), (1, 8), (5, 4), dtype)
    x = x.at[3, 3].set(3e3)
    g = g.at[3, 3].set(0)  # whose terms would be all of the sums
    assert_formulas(
        both_passes(functools.partial(group_rational, implementation=implementation), x, a, b, g), x, a, b, g
    )


def test_float64_is_computed_in_float64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        x, a, b, g = (jnp.asarray(value, jnp.float64) for value in problem((20, 24), (8, 8), (5, 4)))
        for implementation in XLA:
            got = both_passes(functools.partial(group_rational, implementation=implementation), x, a, b, g)
            for found, wanted in zip(got, exact(x, a, b, g), strict=False):
                np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", XLA)
def test_zeros_have_the_derivative_of_the_right(implementation):
    """At x = 0 of either sign |x| grows, and so does |b| at b = 0: denominators of 0 learn."""
    a, b = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, 0.0]])
    for zero in (0.0, -0.0):
        _, dx, da, db = both_passes(
            functools.partial(group_rational, implementation=implementation), jnp.array([zero]), a, b, jnp.ones(1)
        )
        assert dx.item() == 1.5 and (da == jnp.array([[1.0, 0.0]])).all() and not db.any()
    _, _, _, db = both_passes(group_rational, jnp.array([-2.0]), a, b, jnp.ones(1))
    np.testing.assert_allclose(db, [[3 / 4 * 2, 3 / 4 * 4]], rtol=1e-6)


@pytest.mark.parametrize("implementation", XLA)
def test_the_identity_is_exact(implementation):
    x, _, _, g = problem((30, 16), (1, 1), (5, 4))
    a, b = jnp.zeros((1, 6)).at[0, 1].set(1), jnp.zeros((8, 4))
    y, dx, _, db = both_passes(functools.partial(group_rational, implementation=implementation), x, a, b, g)
    assert (y == x).all() and (dx == g).all() and db.any()


def test_a_shared_side_has_the_sum_of_the_gradients():
    x, a, b, g = problem((30, 24), (1, 8), (5, 4))
    y, dx, da, db = both_passes(group_rational, x, a, b, g)
    y8, dx8, da8, db8 = both_passes(group_rational, x, jnp.tile(a, (8, 1)), b, g)
    assert (y == y8).all() and (dx == dx8).all() and (db == db8).all()
    np.testing.assert_allclose(da, da8.sum(0, keepdims=True), rtol=1e-5, atol=1e-4)


def test_coefficients_gradients_are_rounded_less_than_one_by_one():
    """The same float32 terms of one group added one by one are at least ten times further from float64."""
    x, a, b, g = problem((5000, 64), (1, 1), (5, 4))
    x = jnp.clip(x, -3, 3)
    _, _, da, db = both_passes(functools.partial(group_rational, implementation="chunked"), x, a, b, g)
    _, _, want_a, want_b, _, _ = exact(x, a, b, g)
    size, sign = np.abs(np.asarray(x)).ravel(), np.copysign(np.float32(1), np.asarray(b[0]))
    p = np.polyval(np.asarray(a[0])[::-1], np.asarray(x).ravel())
    q = 1 + sum(abs(np.asarray(b[0, j])) * size ** (j + 1) for j in range(4))
    u = np.asarray(g).ravel() / q
    slow_a = np.array([np.add.accumulate(np.asarray(x).ravel() ** i * u)[-1] for i in range(6)])
    slow_b = np.array([np.add.accumulate(-p / q * sign[j] * size ** (j + 1) * u)[-1]
                       for j in range(4)])  # fmt: skip
    assert slow_a.dtype == slow_b.dtype == np.float32
    for ours, slow, want in ((da, slow_a, want_a), (db, slow_b, want_b)):
        assert np.abs(np.asarray(ours) - want).mean() * 10 < np.abs(slow - want).mean()


def test_bands_of_rows_give_the_whole():
    """Sums of 23 rows in another order: 1e-5."""
    arguments = problem((23, 24), (8, 8), (5, 4))
    whole = both_passes(functools.partial(group_rational, implementation="chunked"), *arguments)
    for rows in (1, 5, 23, 100):
        op = functools.partial(group_rational, implementation="chunked", block_sizes=(rows, 24))
        bands = both_passes(op, *arguments)
        assert (bands[0] == whole[0]).all()
        for got, wanted in zip(bands[1:], whole[1:], strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


def test_bands_of_rows_hold_little():
    """Beside the gradients of x (12 MiB) and of the table, what one band of 2^16 elements needs."""
    x, a, b, g = problem((4096, 768), (8, 8), (5, 4))
    op = functools.partial(group_rational, implementation="chunked")
    memory = jax.jit(lambda x, a, b, g: jax.vjp(op, x, a, b)[1](g)).lower(x, a, b, g).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 6 * 2**20


def test_second_derivatives_and_maps():
    """Of the sum of F(x) along v: by a difference quotient in float64; under vmap as in a loop."""
    x, a, b, g = problem((7, 12), (3, 3), (5, 4))
    chunk = functools.partial(group_rational, implementation="chunked")

    def slope(x):
        return jax.grad(lambda x: (chunk(x, a, b) * g).sum())(x)

    v = jnp.ones_like(x)
    found = jax.jvp(slope, (x,), (v,))[1]
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = [np.asarray(value, np.float64) for value in (a, b, g)]
        at = np.where(np.asarray(x) == 0, 0.1, np.asarray(x, np.float64))  # where |x| is smooth
        step = 1e-5 * np.sign(at)
        quotient = (exact(at + step, *wide)[1] - exact(at - step, *wide)[1]) / (2 * step)
    smooth = np.asarray(x) != 0
    np.testing.assert_allclose(found[smooth], quotient[smooth], rtol=1e-3, atol=1e-3)
    many = jnp.stack([x, 2 * x])
    mapped = jax.vmap(lambda x: both_passes(chunk, x, a, b, g)[2])(many)
    np.testing.assert_allclose(mapped[1], both_passes(chunk, 2 * x, a, b, g)[2], rtol=1e-5, atol=1e-4)


@pytest.mark.multidevice
@pytest.mark.parametrize("implementation", XLA)
def test_rows_or_channels_on_many_devices(implementation):
    """Rows: JAX adds the coefficients' gradients up. Channels: each device has the groups of its own."""
    x, a, b, g = problem((16, 32), (4, 4), (5, 4))
    op = functools.partial(group_rational, implementation=implementation)
    want = both_passes(op, x, a, b, g)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.shard_map(op, mesh=mesh, in_specs=(P("data", "tensor"), P("tensor"), P("tensor")),
                          out_specs=P("data", "tensor"))  # fmt: skip
    for got, wanted in zip(both_passes(split, x, a, b, g), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": jnp.ones((2, 9))}, ValueError, "9 channels of x do not split into 2 groups"),
        ({"x": jnp.float32(1)}, ValueError, r"x must be \[..., D\]"),
        ({"x": jnp.ones((2, 8), jnp.int32)}, TypeError, "x must have one of the dtypes"),
        ({"numerator": jnp.ones((4, 6))}, ValueError, "got 4 and 2 rows"),
        ({"numerator": jnp.ones((2, 9))}, ValueError, "0 <= m <= 7"),
        ({"denominator": jnp.ones((2, 0))}, ValueError, "1 <= n <= 6"),
        ({"denominator": jnp.ones(4)}, ValueError, "must be matrices"),
        ({"block_sizes": (0, 8)}, ValueError, "at least 1"),
        ({"implementation": "cuda"}, ValueError, "does not exist"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "needs an NVIDIA Hopper GPU"),
        ({"implementation": "mosaic_tpu"}, NotImplementedError, "needs a TPU v4 or later"),
        ({"implementation": "triton"}, NotImplementedError, "needs an NVIDIA GPU"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, error, message):
    arguments = {"x": jnp.ones((2, 8)), "numerator": jnp.ones((2, 6)), "denominator": jnp.ones((2, 4))} | change
    if jax.default_backend() != "cpu" and error is NotImplementedError:
        pytest.skip("this device may have it")
    with pytest.raises(error, match=message):
        group_rational(**arguments)


# The Hopper kernel: tiles of [rows, 128 or 256] channels of x, read as rows of whole tiles.

HOPPER = {
    "tiles": ((40, 256), (8, 8), (5, 4), "float32", (8, 128)),
    "padded": ((37, 96), (1, 8), (5, 4), "bfloat16", (4, 128)),
    "odd": ((3, 10), (5, 5), (2, 1), "float16", None),
    "one": ((1, 1), (1, 1), (0, 1), "float32", (4, 128)),
    "high": ((5, 128), (1, 2), (7, 6), "bfloat16", None),
}


def hopper_spec(degree, block_sizes):
    return reference.Spec("mosaic_gpu", dispatch.Target("gpu", (9, 0)), degree, block_sizes)


@pytest.mark.skipif(not hasattr(plgpu, "force_gpu_interpret_mode"), reason="the interpreter came with JAX 0.11")
@pytest.mark.parametrize("case", HOPPER)
def test_interpreted_hopper_kernel_equals_chunked(case, monkeypatch):
    """The same float32 arithmetic, sums in another order: 1e-5. Races raise. Two pieces that are written in the GPU's
    instructions are not interpreted: the reciprocal and the unpacking of bfloat16."""
    from pallas_kernels.group_rational import mosaic_gpu

    monkeypatch.setattr(mosaic_gpu, "_reciprocal", lambda layout, q: 1 / q)
    monkeypatch.setattr(mosaic_gpu, "_widened", lambda layout, x: x.astype(jnp.float32))
    shape, groups, degree, dtype, block_sizes = HOPPER[case]
    x, a, b, g = problem(shape, groups, degree, dtype)
    table = reference.channel_table(a, b, shape[-1], jnp.float32)
    spec, plain = hopper_spec(degree, block_sizes), reference.Spec("chunked", dispatch.Target("cpu"), degree, None)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        y = mosaic_gpu.forward(spec, x, table)
        dx, sums = mosaic_gpu.backward(spec, x, table, g)
    want_dx, want_sums = chunked.backward(plain, x, table, g)
    for got, wanted in ((y, chunked.forward(plain, x, table)), (dx, want_dx), (sums, want_sums)):
        assert got.dtype == wanted.dtype
        np.testing.assert_allclose(got.astype(jnp.float32), wanted.astype(jnp.float32), rtol=1e-5, atol=1e-4)


def test_hopper_tiles():
    from pallas_kernels.group_rational import mosaic_gpu

    for block_sizes in ((8, 64), (6, 128), (512, 128), (256, 256)):
        with pytest.raises(ValueError, match="tiles of 128 or 256 channels"):
            mosaic_gpu.tiles(hopper_spec((5, 4), block_sizes), 4, 3)
    for itemsize, arrays in ((2, 2), (2, 3), (4, 2), (4, 3)):
        tile = mosaic_gpu.tiles(hopper_spec((5, 4), None), itemsize, arrays)
        read = arrays - 1
        assert tile.blocks * (tile.stages * arrays * tile.rows * tile.channels * itemsize + 2048) <= 227 * 1024
        # What 4.8 TB/s over 132 multiprocessors need to cover 0.9 microseconds of latency.
        assert tile.blocks * tile.stages * read * tile.rows * tile.channels * itemsize >= 33 * 1024


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.group_rational import group_rational

target, dtype, implementation, *shape = sys.argv[1:]
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("x",))
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
x = array(tuple(map(int, shape)), dtype)
a, b = array((8, 6), jnp.float32), array((8, 4), jnp.float32)
op = lambda *operands: group_rational(*operands, implementation=implementation)
passes = {"forward": (op, (x, a, b)), "backward": (lambda x, a, b, g: jax.vjp(op, x, a, b)[1](g), (x, a, b, x))}
found = {}
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    for name, (f, arguments) in passes.items():
        memory = jax.jit(f).lower(*arguments).compile().memory_analysis()
        found[name] = memory.temp_size_in_bytes / 2**20
print(json.dumps(found))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compiles_for_hopper_without_spills(dtype, record_property, tmp_path):
    """Memory beyond inputs and results: the blocks' sums. Registers: as many as let the intended blocks run at once."""
    from pallas_kernels.group_rational import mosaic_gpu

    found = compile_mosaic_kernels(COMPILE, H200, dtype, "mosaic_gpu", "1024", "197", "768", folder=tmp_path)
    record_property("found", found)
    print(found)
    assert found["forward"] < 0.1 and found["backward"] < 10
    if found["registers"]:  # the compiler's report is not written by every JAX
        assert found["spilled"] == 0
        for registers, arrays in zip(found["registers"], (2, 3), strict=True):
            blocks = mosaic_gpu.tiles(hopper_spec((5, 4), None), jnp.dtype(dtype).itemsize, arrays).blocks
            assert blocks * 128 * registers <= 2**16


@needs_cuda_plugin
@pytest.mark.gpu_aot
def test_awkward_shapes_compile_for_hopper(tmp_path):
    """192 channels, 197 rows: padded to whole tiles, which costs copies of x, g and dx (0.15 MB each)."""
    found = compile_mosaic_kernels(COMPILE, H200, "float32", "mosaic_gpu", "1", "197", "192", folder=tmp_path)
    assert found["spilled"] == 0 and found["backward"] < 16


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_the_kernel_is_within_rounding_of_the_formulas(case, dtype):
    arguments = problem(*CASES[case], dtype)
    op = functools.partial(group_rational, implementation="mosaic_gpu")
    assert_formulas(both_passes(op, *arguments), *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_sums_have_one_order_and_little_rounding(dtype):
    """The same bits twice; of the whole KAT-B activation of 64 pictures, 1e-6 of the sum of magnitudes."""
    arguments = problem((64, 197, 768), (1, 8), (5, 4), dtype)
    op = functools.partial(group_rational, implementation="mosaic_gpu")
    once, again = both_passes(op, *arguments), both_passes(op, *arguments)
    assert all((first == second).all() for first, second in zip(once, again, strict=True))
    assert_formulas(once, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [4, 8, 12, 16, 32])
def test_on_a_gpu_every_tile_gives_the_same(rows):
    arguments = problem((50, 256), (8, 8), (5, 4), "bfloat16")
    for channels in (128, 256):
        op = functools.partial(group_rational, implementation="mosaic_gpu", block_sizes=(rows, channels))
        assert_formulas(both_passes(op, *arguments), *arguments)


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_is_the_default():
    x, a, b, g = problem((16, 64), (8, 8), (5, 4))
    text = both_passes.lower(group_rational, x, a, b, g).as_text()
    assert "mosaic_gpu" in text
