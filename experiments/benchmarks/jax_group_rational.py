"""The measuring process of `experiments.benchmarks.group_rational`: the op of `pallas_kernels` and its rounding."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.measuring import Program, emit, in_turns, jax_copy_rate
from pallas_kernels.group_rational import group_rational

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "triton", "chunked", "reference")
DEGREE = (5, 4)
# Swish on [-3, 3], by the method's authors.
NUMERATOR = (3.054879741e-7, 0.50000078537, 0.24999783423, 0.05326628273, 0.00580303457, 0.00027519610)
DENOMINATOR = (-4.11155e-6, 0.10652899335, -1.26900e-6, 0.00055023313)


def least_bytes(shape: str, dtype: str, direction: str) -> int:
    """x is read and y written; or x and the cotangent are read, the gradient is written."""
    arrays = {"forward": 2, "backward": 3}[direction]
    return arrays * math.prod(sizes(shape)) * np.dtype(jnp.dtype(dtype)).itemsize


def sizes(shape: str) -> tuple[int, ...]:
    return tuple(map(int, shape.split("x")))


def measure(task: str) -> None:
    """Measure the rows of a task, an event a line."""
    asked = json.loads(task)
    emit(framework="jax", device=jax.devices()[0].device_kind, **jax_copy_rate(asked["copy_mb"]))
    for shape in asked["shapes"]:
        for dtype in asked["dtypes"]:
            inputs = functools.cache(functools.partial(_inputs, asked["groups"], shape, dtype))
            programs = [
                Program(row, f"{dtype} {direction}", functools.partial(_build, inputs, row, direction))
                for row in asked["names"]
                for direction in ("forward", "backward")
            ]
            in_turns(asked, shape, programs, jax.block_until_ready, lambda program, out: {})
    _rounding(asked)


def _inputs(groups: int, shape: str, dtype: str):
    keys = jax.random.split(jax.random.key(0))
    x, g = (jax.random.normal(key, sizes(shape), dtype) for key in keys)
    return (x, *_coefficients(groups), g)


def _coefficients(groups: int) -> tuple[jax.Array, jax.Array]:
    a, b = (np.tile(np.float32(row), (groups, 1)) for row in (NUMERATOR, DENOMINATOR))
    return jnp.asarray(a), jnp.asarray(b)


def _op(row: str):
    """A row is an implementation and, if need be, its tiles: "mosaic_gpu 16x256"."""
    name, *blocks = row.split()
    return functools.partial(group_rational, implementation=name, block_sizes=sizes(blocks[0]) if blocks else None)  # pyright: ignore[reportArgumentType]


def _backward(op):
    return lambda x, a, b, g: jax.vjp(op, x, a, b)[1](g)


def _build(inputs, row: str, direction: str):
    x, a, b, g = inputs()
    op = _op(row)
    if direction == "forward":
        program, arguments = jax.jit(op), (x, a, b)
    else:
        program, arguments = jax.jit(_backward(op)), (x, a, b, g)
    compiled = program.lower(*arguments).compile()
    return lambda: compiled(*arguments), compiled.memory_analysis().temp_size_in_bytes / 2**20


def _rounding(asked: dict) -> None:
    """Events of how far float32 gradients of the coefficients are from float64, and what two orders of adding give."""
    shape, groups = asked["rounding"], asked["groups"]
    x, a, b, g = _inputs(groups, shape, "float32")
    rows = [np.asarray(value).reshape(-1, x.shape[-1]) for value in (x, g)]
    truth = _terms(groups, *(value.astype(np.float64) for value in rows)).sum((1, 3))
    terms = _terms(groups, *rows)
    found = {"KAT's order": _one_by_one(terms), "FlashKAT's order": _by_blocks(terms)}
    del terms
    for row in asked["names"]:
        try:
            _, da, db = jax.jit(_backward(_op(row)))(x, a, b, g)
        except NotImplementedError as error:
            emit(shape=shape, row=row, kind="rounding", missing=str(error).split(":")[0])
            continue
        found[row] = np.concatenate([np.asarray(da), np.asarray(db)], 1).T
    for row, sums in found.items():
        errors = sums.astype(np.float64) - truth
        for name, part in (("dA", errors[: DEGREE[0] + 1]), ("dB", errors[DEGREE[0] + 1 :])):
            emit(shape=shape, row=row, kind=f"rounding {name}", mean=float(np.abs(part).mean()), var=float(part.var()))


def _terms(groups: int, x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """What each element adds to its group's gradients, in x's dtype: [10, rows, groups, channels of a group]."""
    size = np.abs(x)
    a, b = (np.float32(row).astype(x.dtype) for row in (NUMERATOR, DENOMINATOR))
    q = 1 + sum(abs(b[j]) * size ** (j + 1) for j in range(DEGREE[1]))
    p = sum(a[i] * x**i for i in range(DEGREE[0] + 1))
    found = [x**i * g / q for i in range(DEGREE[0] + 1)]
    found += [-np.copysign(1, b[j]) * p / q**2 * size ** (j + 1) * g for j in range(DEGREE[1])]
    return np.stack(found).reshape(len(found), len(x), groups, -1)


def _one_by_one(terms: np.ndarray) -> np.ndarray:
    """Every term is added to one number in memory: [10, groups]."""
    return np.stack(
        [np.add.accumulate(terms[:, :, k].reshape(len(terms), -1), 1)[:, -1] for k in range(terms.shape[2])], 1
    )


def _by_blocks(terms: np.ndarray) -> np.ndarray:
    """Blocks of 64 rows are summed by themselves, pairwise, then added to one number in memory: [10, groups]."""
    count, rows, groups, _ = terms.shape
    whole = rows // 64 * 64
    blocks = terms[:, :whole].reshape(count, -1, 64, groups, terms.shape[3]).transpose(0, 3, 1, 2, 4)
    parts = [np.ascontiguousarray(blocks).reshape(count, groups, -1, 64 * terms.shape[3]).sum(-1)]
    if whole < rows:
        parts.append(terms[:, whole:].transpose(0, 2, 1, 3).reshape(count, groups, 1, -1).sum(-1))
    return np.add.accumulate(np.concatenate(parts, 2), 2)[:, :, -1]
