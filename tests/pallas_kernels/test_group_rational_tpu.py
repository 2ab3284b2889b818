"""The TPU kernels of the group rational: in the TPU interpreter, and what they compile to for real TPUs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.group_rational import group_rational
from tests.aot import TPU, compile_in_a_process
from tests.pallas_kernels.test_group_rational import CASES, assert_formulas, both_passes, problem
from tests.pallas_kernels.test_mosaic_tpu import assert_no_races, tpu

QUICK = ("one_row", "groups_of_24", "one_channel", "no_rows")
# Rows that fill no tile, in two parts of which the second is short; strips of which the last is narrow.
TILED = {"three_tiles": ((37, 192), (1, 8), (5, 4), (16, 192)), "columns": ((20, 320), (8, 8), (3, 2), (16, 128))}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_kernels_give_the_formulas(case, dtype):
    """In memory that holds NaN until it is written, beyond the end of x too; no races."""
    arguments = problem(*CASES[case], dtype)
    with tpu():
        got = both_passes(functools.partial(group_rational, implementation="mosaic_tpu"), *arguments)
    assert_no_races()
    assert_formulas(got, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_interpreted_tiles_do_not_matter(case, dtype):
    *sizes, block_sizes = TILED[case]
    arguments = problem(*sizes, dtype)
    op = functools.partial(group_rational, implementation="mosaic_tpu", block_sizes=block_sizes)
    with tpu("TPU v4"):
        got = both_passes(op, *arguments)
    assert_no_races()
    assert_formulas(got, *arguments)


@pytest.mark.parametrize("block_sizes", [(8, 128), (16, 100), (2**14, 128)])
def test_tiles_that_the_kernels_do_not_have(block_sizes):
    x, a, b, _ = problem((40, 192), (1, 8), (5, 4))
    with tpu(), pytest.raises(ValueError, match="a multiple of 16 rows and of all 192 or a multiple of 128"):
        group_rational(x, a, b, implementation="mosaic_tpu", block_sizes=block_sizes)


def test_float64_is_refused():
    x, a, b, _ = problem((2, 8), (1, 8), (5, 4))
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(), tpu():  # noqa: SIM117
        with pytest.raises(NotImplementedError, match="not float64"):
            group_rational(np.asarray(x, np.float64), a, b, implementation="mosaic_tpu")


def test_a_kernel_has_first_derivatives_only():
    x, a, b, _ = problem((2, 8), (1, 8), (5, 4))
    with tpu(), pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.jvp(jax.grad(lambda x: group_rational(x, a, b, implementation="mosaic_tpu").sum()), (x,), (x,))


@pytest.mark.slow
def test_mapped_kernels_are_a_loop():
    x, a, b, g = problem((3, 16), (1, 8), (5, 4))
    many = jnp.stack([x, x + 1])
    with tpu():
        op = functools.partial(group_rational, implementation="mosaic_tpu")
        got = jax.vmap(lambda x: both_passes(op, x, a, b, g))(many)
    for i in range(2):
        assert_formulas([value[i] for value in got], many[i], a, b, g)


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from pallas_kernels import dispatch
from pallas_kernels.group_rational import group_rational

devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("d",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
found = []
for shape, dtype, degree in json.loads(sys.argv[2]):
    x, a, b = array(shape, dtype), array((1, degree[0] + 1), jnp.float32), array((8, degree[1]), jnp.float32)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        forward = jax.jit(group_rational).lower(x, a, b).compile()
        backward = jax.jit(lambda x, a, b, g: jax.vjp(group_rational, x, a, b)[1](g)).lower(x, a, b, x).compile()
    texts = [compiled.as_text() for compiled in (forward, backward)]
    found.append([[compiled.memory_analysis().temp_size_in_bytes for compiled in (forward, backward)],
                  all("tpu_custom_call" in text for text in texts)])
print(json.dumps({"found": found, "refusal": dispatch.mosaic_tpu_refusal(devices[0])}))
"""


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_compiled_for_real_tpus_memory_is_that_of_the_sums(topology, record_property):
    """The default there. Temporaries: the table, its gradient by part and sublane (0.5 MB at 768
    channels), and 512 KiB for small operands that the compiler keeps nearer (v5p).

    197 rows are no whole registers: XLA hands x over in an order of its own, and the kernel's costs one copy of each
    operand and result, but no more.
    """
    pytest.importorskip("libtpu")
    cases = [
        ((64, 208, 768), "float32", (5, 4)),
        ((16, 208, 3072), "bfloat16", (5, 4)),
        ((8, 197, 768), "bfloat16", (5, 4)),
        ((1, 1, 8), "float32", (0, 1)),
        ((77, 40), "bfloat16", (7, 6)),
    ]
    result = compile_in_a_process(COMPILE, topology, json.dumps(cases), environment=TPU)
    assert result["refusal"] is None
    record_property("bytes", result["found"])
    print(topology, result["found"])
    for (shape, *_), ((forward, backward), is_kernel) in zip(cases, result["found"], strict=True):
        assert is_kernel
        channels = max(shape[-1], 128)
        copy = 2 * 8 * 208 * 768 if shape[-2] == 197 else 0
        assert forward <= 2 * copy + 32 * 4 * channels + 2**19
        assert backward <= 3 * copy + (2 * 16 * 8 + 64) * 4 * channels + 2**19
