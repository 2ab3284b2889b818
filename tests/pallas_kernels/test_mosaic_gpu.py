"""The Hopper kernels of the linear cross-entropy: interpreted here, compiled ahead of time, and run on a GPU."""

import contextlib
import json
import math

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_cross_entropy import (
    chunked,
    inputs,
    linear_cross_entropy,
    reference,
    sample_linear_categorical,
    spread,
)
from pallas_kernels.linear_cross_entropy.noise import Draw, key_words
from tests.aot import GPU, H200, compile_in_a_process, needs_cuda_plugin, needs_mosaic_gpu

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="the Mosaic GPU interpreter came with JAX 0.11"
)


@contextlib.contextmanager
def interpreter():
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def problem(tokens, vocabulary, width, layout="vd", bias=False, peak=2.0, dtype=jnp.bfloat16, **options):
    """(spec, operands, labels, cotangents): logits of deviation ``peak``, the first label is of no class."""
    rng = np.random.default_rng(0)
    e = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    c = jnp.asarray(rng.normal(size=(vocabulary, width)) * peak / np.sqrt(width), dtype)
    labels = jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32).at[:1].set(-1)
    b = jnp.asarray(rng.normal(size=vocabulary), jnp.float32) if bias else None
    c = c if layout == "vd" else c.T
    softcap = options.pop("softcap", None)
    spec = inputs.spec("mosaic_gpu", (e, c, b), layout, softcap, None, **options)
    g, h = jnp.asarray(rng.random(tokens), jnp.float32), jnp.asarray(0.1 * rng.normal(size=tokens), jnp.float32)
    return spec, (e, c, b), labels, (g, h)


def check_gradients(got, spec, operands, labels, cotangents, excess=0.0):
    """Within the rounding of the logits' gradient to the operands' dtype, as XLA's own form of the same products.

    The bias gradient is a sum of those rounded values here, and of unrounded ones there: half a unit in the last place.
    """
    want_spec = spec._replace(implementation="chunked")
    lse = reference.forward(spec, *operands, labels)[1]
    wide = [None if x is None else x.astype(jnp.float32) for x in operands]
    exact_spec = want_spec._replace(dtypes=tuple(None if x is None else x.dtype for x in wide))
    plain = chunked.backward(want_spec, *operands, labels, lse, *cotangents, jnp.float32(1))
    exact = chunked.backward(exact_spec, *wide, labels, lse, *cotangents, jnp.float32(1))
    allowances = (excess, excess, excess + jnp.finfo(spec.operand_dtype).eps / 2)
    for ours, same, truth, x, allowance in zip(got, plain, exact, operands, allowances, strict=True):
        if x is None:
            continue
        truth = truth.astype(jnp.float32)
        error = jnp.abs(ours.astype(x.dtype).astype(jnp.float32) - truth).max()
        plain_error = jnp.abs(same.astype(x.dtype).astype(jnp.float32) - truth).max()
        assert error <= 1.5 * plain_error + (allowance + 1e-6) * jnp.abs(truth).max()


CASES = {
    "tiles": (128, 512, 128, {}),
    "ragged_all": (130, 520, 72, {"bias": True, "softcap": 3.0, "label_smoothing": 0.1}),
    "dv": (64, 264, 64, {"layout": "dv", "label_smoothing": 0.1}),
    "one": (1, 1, 1, {}),
    "float16": (7, 300, 24, {"dtype": jnp.float16, "softcap": 3.0}),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_equal_the_reference(case):
    """Sums in float32 in another order: 1e-5 for the forward pass, of logits of order 5; races raise."""
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    tokens, vocabulary, width, options = CASES[case]
    spec, operands, labels, cotangents = problem(tokens, vocabulary, width, **options)
    want = reference.forward(spec, *operands, labels)
    with interpreter():
        nll, lse, _ = mosaic_gpu.forward(spec, *operands, labels)
        got = mosaic_gpu.backward(spec, *operands, labels, lse, *cotangents, jnp.float32(1))
    np.testing.assert_allclose(nll, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)
    check_gradients(got, spec, operands, labels, cotangents)


@interpreted
def test_interpreted_kernel_draws_the_labels_of_the_reference():
    """The same noise, so the same labels but for ties within rounding, of which this seed has none."""
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    spec, operands, _, _ = problem(20, 300, 24)
    draw = Draw(key_words(jax.random.key(3)), jnp.arange(7, 27, dtype=jnp.uint32))
    want = reference.forward(spec, *operands, draw)
    with interpreter():
        nll, lse, labels = mosaic_gpu.forward(spec, *operands, draw)
    np.testing.assert_array_equal(labels, want[2])
    np.testing.assert_allclose(nll, want[0], atol=1e-5)
    np.testing.assert_allclose(lse, want[1], atol=1e-5)


@interpreted
def test_no_tokens():
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    spec, operands, labels, cotangents = problem(0, 300, 24, filter_eps="auto")
    (nll, lse, _), saved = mosaic_gpu.forward_saving(spec, *operands, labels)
    assert nll.shape == lse.shape == (0,)
    de, dc, _ = mosaic_gpu.backward(spec, *operands, labels, lse, *cotangents, jnp.float32(1), *saved)
    assert de.shape == (0, 24) and not dc.any()


ONE_PASS = {
    "ragged": (130, 576, 72, {}),
    "chunks": (260, 320, 64, {"layout": "dv", "z_loss": 0.01}),
    "second_reference": (8, 320, 24, {"peak": 300.0}),  # some logits exceed the label's by more than 44
}


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_PASS)
def test_interpreted_one_pass_equals_the_reference(case, monkeypatch):
    """Numerators and scaled embeddings are rounded, not the gradient of the logits: half a unit of bfloat16 more."""
    from pallas_kernels.linear_cross_entropy import hopper_one_pass, mosaic_gpu

    monkeypatch.setattr(hopper_one_pass, "CHUNK_BYTES", 0)  # the smallest chunks
    tokens, vocabulary, width, options = ONE_PASS[case]
    spec, operands, labels, (w, _) = problem(tokens, vocabulary, width, **options)
    w = w.at[0].set(0)  # as the op does for a label of -1
    assert mosaic_gpu.one_pass(spec, *operands, labels)
    with interpreter():
        loss, same, gradients = mosaic_gpu.forward_backward(spec, *operands, w, labels)
    nll, lse, _ = reference.forward(spec, *operands, labels)
    np.testing.assert_allclose(loss, nll + spec.z_loss * lse**2, rtol=1e-5, atol=1e-5)
    assert (same == labels).all()
    check_gradients(gradients, spec, operands, labels, (w, 2 * spec.z_loss * lse * w), excess=2.0**-9)


@interpreted
@pytest.mark.parametrize("subscripts", ["rv,vd->rd", "rv,dv->rd", "rv,rd->vd", "rv,rd->dv"])
def test_interpreted_product_equals_einsum(subscripts):
    """Of bfloat16 numbers, rounded once: half a unit in the last place of the largest, 2**-8."""
    from pallas_kernels.linear_cross_entropy import hopper_product

    rng, sizes = np.random.default_rng(0), {"r": 200, "v": 192, "d": 320}
    operands = [
        jnp.asarray(rng.normal(size=[sizes[letter] for letter in letters]), jnp.bfloat16)
        for letters in subscripts.split("->")[0].split(",")
    ]
    want = jnp.einsum(subscripts, *(x.astype(jnp.float32) for x in operands))
    with interpreter():
        got = hopper_product.einsum(problem(8, 8, 8)[0], subscripts, *operands, jnp.bfloat16)
        wide = hopper_product.einsum(problem(8, 8, 8)[0], subscripts, *operands, jnp.float32)
    np.testing.assert_allclose(wide, want, atol=1e-6 * jnp.abs(want).max())
    assert got.dtype == jnp.bfloat16 and jnp.abs(got - want).max() <= 2**-8 * jnp.abs(want).max()


@pytest.mark.parametrize("subscripts", ["rv,vd->rd", "rv,rd->dv"])
def test_products_that_the_copy_engine_cannot_tile_are_xlas(subscripts):
    from pallas_kernels.linear_cross_entropy import hopper_product

    sizes = {"r": 5, "v": 7, "d": 9}
    operands = [
        jnp.arange(math.prod(sizes[letter] for letter in letters), dtype=jnp.bfloat16).reshape(
            [sizes[letter] for letter in letters]
        )
        for letters in subscripts.split("->")[0].split(",")
    ]
    got = hopper_product.einsum(problem(8, 8, 8)[0], subscripts, *operands, jnp.float32)
    np.testing.assert_array_equal(got, jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32))


def test_one_pass_is_for_small_plain_problems():
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    def one_pass(*sizes, target=None, **options):
        spec, operands, labels, _ = problem(*sizes, **options)
        return mosaic_gpu.one_pass(spec, *operands, labels if target is None else target)

    assert one_pass(8, 320, 24) and one_pass(8, 320, 24, z_loss=0.1, filter_eps=0.1)  # too small to filter
    assert not one_pass(0, 320, 24) and not one_pass(8, 300, 24)
    for options in ({"bias": True}, {"softcap": 3.0}, {"label_smoothing": 0.1}, {"dtype": jnp.float16}):
        assert not one_pass(8, 320, 24, **options), options
    assert not one_pass(8, 70_400, 8, filter_eps=0.1) and not one_pass(1, 400_000, 256)
    assert not one_pass(8, 320, 24, target=Draw(key_words(jax.random.key(3)), jnp.zeros(8, jnp.uint32)))


FILTERED = {
    "peaked": (20, 300, 24, {"peak": 4.0}),
    "z_loss_only": (8, 300, 24, {"peak": 4.0, "h_only": True}),
    "smoothing": (8, 260, 24, {"label_smoothing": 0.1}),
    "softcap": (8, 260, 24, {"softcap": 5.0, "peak": 8.0}),
    "embeddings": (8, 260, 24, {"filter_classifier": False}),
    "classifier": (8, 260, 24, {"filter_embeddings": False}),
    "uniform": (8, 260, 24, {"peak": 0.0}),
    "one_hot": (8, 260, 24, {"peak": 300.0}),
    "too_many": (2, 600, 24, {"peak": 0.01}),
}


def test_the_filter_gathers_the_tokens_that_need_a_tile():
    from pallas_kernels.linear_cross_entropy import hopper_filter

    rng, tokens = np.random.default_rng(0), 700  # 6 bands of rows, the last of them not whole
    maxima, least = rng.normal(size=(5, 768)), rng.normal(2.5, 1, size=tokens)
    maxima[3] = -9.0  # no token has anything there
    least = np.pad(least, (0, 68), constant_values=np.inf)
    eights, columns, count, fits = hopper_filter._tiles(tokens, jnp.asarray(least), jnp.asarray(maxima, jnp.float32))
    found = [
        (int(column), (eight >> 8) * 8 + bit)
        for column, tile in zip(columns[:count], np.asarray(eights), strict=False)
        for eight in tile.tolist()
        for bit in range(8)
        if eight >> bit & 1
    ]
    wanted = np.argwhere(maxima >= least)
    assert fits and 0 < len(wanted) < 5 * tokens / 10
    assert sorted(found) == list(map(tuple, wanted.tolist()))
    assert count == sum(-(-len({t // 8 for c, t in found if c == column}) // 16) for column in range(5))


ANY_SIZES = {
    "filtered": (300, 70000, 256, "vd", {"filter_eps": "auto"}),
    "filtered_dv": (301, 70007, 100, "dv", {"filter_eps": "auto"}),
    "one_pass": (130, 576, 72, "vd", {}),
    "one_pass_chunks": (4097, 50304, 64, "dv", {}),
    "exact": (301, 1007, 100, "dv", {}),
}


@needs_mosaic_gpu
@pytest.mark.parametrize("case", ANY_SIZES)
def test_any_sizes(case):
    """Lowered only, which needs no GPU and finds what the copy engine cannot tile, of the filter in both branches."""
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    tokens, vocabulary, width, layout, options = ANY_SIZES[case]
    e, labels = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    c = jax.ShapeDtypeStruct((vocabulary, width) if layout == "vd" else (width, vocabulary), jnp.bfloat16)
    spec = inputs.spec("mosaic_gpu", (e, c, None), layout, None, None, **options)
    one_pass = mosaic_gpu.one_pass(spec, e, c, None, labels)
    assert one_pass == case.startswith("one_pass")

    def gradients(e, c, labels):
        g = jnp.ones(tokens)
        if one_pass:
            return mosaic_gpu.forward_backward(spec, e, c, None, g, labels)[2][:2]
        (_, lse, _), saved = mosaic_gpu.forward_saving(spec, e, c, None, labels)
        return mosaic_gpu.backward(spec, e, c, None, labels, lse, g, 0 * g, jnp.float32(1), *saved)[:2]

    lowered = jax.jit(gradients).trace(e, c, labels).lower(lowering_platforms=("cuda",))
    assert [x.shape for x in lowered.out_info] == [e.shape, c.shape]


def test_the_filter_finds_nothing_where_its_lists_are_too_short():
    from pallas_kernels.linear_cross_entropy import hopper_filter

    maxima, least = jnp.ones((80, 128)), jnp.zeros(128)
    _, _, count, fits = hopper_filter._tiles(128, least, maxima)
    assert count == 0 and not fits


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", FILTERED)
def test_interpreted_filter_keeps_its_bound(case, monkeypatch):
    """Every entry of the logits' gradient moves by less than eps * |g + h|; those that are kept do not move."""
    from pallas_kernels.linear_cross_entropy import hopper_filter, mosaic_gpu

    monkeypatch.setattr(hopper_filter, "LEAST_VOCABULARY", 0)
    if case != "too_many":  # so few tokens are all one warpgroup's, with a list for its share of a full GPU's
        monkeypatch.setattr(hopper_filter, "_ENTRIES_PER_TOKEN", 2048)
    tokens, vocabulary, width, options = FILTERED[case]
    h_only = options.get("h_only")
    # In "too_many" each of the 600 entries of a token is kept, 64 fit: the exact gradients are computed instead.
    eps = 1e-4 if case == "too_many" else 2.0**-6
    options = {name: value for name, value in options.items() if name != "h_only"}
    spec, operands, labels, (g, h) = problem(tokens, vocabulary, width, filter_eps=eps, **options)
    if h_only:
        g = jnp.zeros_like(g)
    with interpreter():
        (_, lse, _), saved = mosaic_gpu.forward_saving(spec, *operands, labels)
        de, dc, _ = mosaic_gpu.backward(spec, *operands, labels, lse, g, h, jnp.float32(1), *saved)
    check_bound(de, dc, spec, operands, labels, lse, g, h, 0.0 if case == "too_many" else eps)
    if case in ("uniform", "one_hot"):  # nothing that matters is lost
        check_gradients((de, dc, None), spec, operands, labels, (g, h), excess=2.0**-9)


@interpreted
@pytest.mark.slow
def test_interpreted_filter_spreads_what_it_leaves_out_by_the_prior(monkeypatch):
    """Against the definition in float32, entry by entry: the gradients' rounding to bfloat16, half a unit in the last
    place of the largest. Spread evenly they would differ by more."""
    from pallas_kernels.linear_cross_entropy import hopper_filter, mosaic_gpu

    monkeypatch.setattr(hopper_filter, "LEAST_VOCABULARY", 0)
    monkeypatch.setattr(hopper_filter, "_ENTRIES_PER_TOKEN", 2048)
    eps = 2.0**-6
    spec, (e, c, b), labels, (g, h) = problem(20, 300, 24, peak=1.5, filter_eps=eps)
    operands = e + 2 * e[:1], c, b  # tokens that have something in common
    with interpreter():
        (_, lse, _), saved = mosaic_gpu.forward_saving(spec, *operands, labels)
        got = mosaic_gpu.backward(spec, *operands, labels, lse, g, h, jnp.float32(1), *saved)[:2]
    e, c = (x.astype(jnp.float32) for x in operands[:2])
    p = jnp.exp(reference.logits(spec, *operands) - lse[:, None])
    hit = labels[:, None] == jnp.arange(300)[None]
    out = (p < eps) & ~hit
    prior = spread.prior(spec, e, c, g + h != 0)[0][None]
    mass, of_prior = (jnp.where(out, x, 0).sum(1, keepdims=True) for x in (p, prior))
    most = jnp.minimum(p.max(1, keepdims=True), eps)  # of any entry: all that the kernel knows
    multiple, even = spread.rates(spread.cap(eps, 300), mass, most, out.sum(1, keepdims=True), of_prior)
    evenly = mass / out.sum(1, keepdims=True)
    by_prior, evenly = (
        jnp.where(out, x, p) * (g + h)[:, None] - hit * g[:, None] for x in (multiple * prior + even, evenly)
    )
    for ours, dz, other, x in zip(got, (by_prior, by_prior.T), (evenly, evenly.T), (c, e), strict=True):
        rounding = 2.0**-8 * jnp.abs(dz @ x).max()
        assert jnp.abs(ours.astype(jnp.float32) - dz @ x).max() <= rounding < jnp.abs(other @ x - dz @ x).max()


def check_bound(de, dc, spec, operands, labels, lse, g, h, eps):
    """Each softmax entry below eps may be replaced by another value below it; beside that, rounding to bfloat16."""
    want = spec._replace(implementation="chunked")
    exact_e, exact_c, _ = chunked.backward(want, *operands, labels, lse, g, h, jnp.float32(1))
    e, c, _ = (None if x is None else np.asarray(x.astype(jnp.float32)) for x in operands)
    p = np.exp(np.asarray(reference.logits(spec, *operands)) - np.asarray(lse)[:, None])
    out = (p < eps * 1.01) & (np.arange(p.shape[1]) != np.asarray(labels)[:, None])
    moved = eps * np.abs(g + h)[:, None] * out
    rounding = 2.0**-7
    by_entry = spec.classifier_layout == "vd"
    bound_e = moved @ np.abs(c if by_entry else c.T) * spec.filter_embeddings + rounding * np.abs(exact_e).max()
    bound_c = moved.T @ np.abs(e) * spec.filter_classifier + rounding * np.abs(exact_c).max()
    bound_c = bound_c if by_entry else bound_c.T
    assert (np.abs(de.astype(jnp.float32) - exact_e) <= bound_e).all()
    assert (np.abs(dc.astype(jnp.float32) - exact_c) <= bound_c).all()


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

target, tokens, vocabulary, width, options = sys.argv[1:]
tokens, vocabulary, width, options = int(tokens), int(vocabulary), int(width), json.loads(options)
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
mesh = jax.sharding.Mesh(np.array([device]), ("x",))
shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
args = shape((tokens, width), jnp.bfloat16), shape((vocabulary, width), jnp.bfloat16), shape((tokens,), jnp.int32)
loss = lambda e, c, y: linear_cross_entropy(e, c, y, implementation="mosaic_gpu", **options)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    found = {}
    for name, function in (("forward", loss), ("both", jax.value_and_grad(loss, (0, 1)))):
        memory = jax.jit(function).lower(*args).compile().memory_analysis()
        found[name] = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20
print(json.dumps(found))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    ("shape", "options", "forward_mib", "both_mib"),
    [
        ((8192, 256000, 2304), {}, 4, 1450),
        ((8192, 256000, 2304), {"filter_eps": "auto"}, 4, 1250 if jax.__version_info__ < (0, 11) else 1200),
        ((32768, 50304, 768), {}, 6, 800),
        ((1000, 50257, 776), {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}, 90, 400),
    ],
    ids=["exact", "filtered", "one_pass", "odd_sizes"],
)
def test_compiles_for_hopper_within_its_memory(shape, options, forward_mib, both_mib, record_property):
    """Beyond the gradients (1161 MiB at the first shape) one slab and the embeddings' gradient in float32; in one pass
    a chunk of numerators and both gradients in float32 (here 393 and 243 MiB). XLA before JAX 0.11 shares less."""
    sizes = [str(size) for size in shape]
    found = compile_in_a_process(COMPILE, H200, *sizes, json.dumps(options), environment=GPU)
    record_property("MiB", found)
    print(found)
    assert found["forward"] <= forward_mib
    assert found["both"] <= both_mib


OVER_DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from pallas_kernels.linear_cross_entropy import linear_cross_entropy

target, vocabulary, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x2x1").devices
mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

def total(e, c, y):
    return jax.lax.psum(linear_cross_entropy(e, c, y, reduction="sum", implementation="mosaic_gpu", **options), "data")

loss = jax.shard_map(total, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P())
shape = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
args = (shape((1024, 256), jnp.bfloat16, P("data")), shape((vocabulary, 256), jnp.bfloat16, P()),
        shape((1024,), jnp.int32, P("data")))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*args).compile().as_text()
print(json.dumps([text.count("mosaic_gpu_v2"), text.count(" all-reduce(") + text.count(" all-reduce-start(")]))
"""


@needs_cuda_plugin
@pytest.mark.gpu_aot
@pytest.mark.parametrize(
    ("vocabulary", "options"),
    [(8192, {}), (70016, {"softcap": 30.0}), (70016, {"filter_eps": "auto"})],
    ids=["one_pass", "exact", "filtered"],
)
def test_compiles_for_tokens_split_over_two_gpus(vocabulary, options):
    """Inside shard_map, which checks over which axes values vary; the gradients of the classifier are summed."""
    kernels, sums = compile_in_a_process(OVER_DEVICES, H200, str(vocabulary), json.dumps(options), environment=GPU)
    assert kernels >= 2 and sums >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 0.01}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("filter_eps", [0.0, 1e-7])
def test_on_a_gpu_gradients_equal_the_reference(options, filter_eps):
    """bfloat16 gradients: half a unit in the last place of the largest, 2**-8, and as much from the logits'."""
    _, (e, c, _), labels, _ = problem(300, 70000, 256)
    labels = labels.at[0].set(-100)

    def gradients(implementation, e, c, **options):
        return jax.value_and_grad(
            lambda e, c: linear_cross_entropy(e, c, labels, implementation=implementation, **options), (0, 1)
        )(e, c)

    loss, got = gradients("mosaic_gpu", e, c, filter_eps=filter_eps, **options)
    exact, want = gradients("reference", e.astype(jnp.float32), c.astype(jnp.float32), **options)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    for ours, truth in zip(got, want, strict=True):
        assert jnp.abs(ours.astype(jnp.float32) - truth).max() <= 2**-7 * jnp.abs(truth).max()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"label_smoothing": 0.1}, {"layout": "dv"}], ids=str)
def test_on_a_gpu_the_filter_keeps_its_bound(options):
    from pallas_kernels.linear_cross_entropy import mosaic_gpu

    eps = 2.0**-12
    spec, operands, labels, (g, h) = problem(300, 70000, 256, peak=6.0, filter_eps=eps, **options)
    (_, lse, _), saved = mosaic_gpu.forward_saving(spec, *operands, labels)
    de, dc, _ = mosaic_gpu.backward(spec, *operands, labels, lse, g, h, jnp.float32(1), *saved)
    check_bound(de, dc, spec, operands, labels, lse, g, h, eps)
    again = mosaic_gpu.backward(spec, *operands, labels, lse, g, h, jnp.float32(1), *saved)
    assert (again[0] == de).all() and (again[1] == dc).all()  # every sum has one order
    exact = chunked.backward(spec, *operands, labels, lse, g, h, jnp.float32(1))
    assert (np.asarray(dc.astype(jnp.float32)) != np.asarray(exact[1].astype(dc.dtype).astype(jnp.float32))).any()


@pytest.mark.gpu
def test_on_a_gpu_labels_are_drawn_as_elsewhere():
    """Up to rounding of the logits: at most one token in a thousand may differ."""
    _, (e, c, _), _, _ = problem(4000, 5000, 256)
    drawn = [sample_linear_categorical(jax.random.key(1), e, c, implementation=i) for i in ("mosaic_gpu", "chunked")]
    assert (drawn[0] != drawn[1]).mean() <= 1e-3


def test_elsewhere_it_says_what_it_needs():
    e, c, labels = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16), jnp.zeros(4, jnp.int32)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        linear_cross_entropy(e, c, labels, implementation="mosaic_gpu")
