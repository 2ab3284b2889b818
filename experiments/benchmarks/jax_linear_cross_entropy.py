"""The measuring process of `experiments.benchmarks.linear_cross_entropy`: its JAX rows."""

import functools
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks.measuring import OUT_OF_TIME, Program, emit, in_turns, milliseconds

OURS = ("mosaic_gpu", "mosaic_tpu", "triton", "chunked")  # best first
# Our gradients: the paper's presets as options of the op.
PRESETS: dict[str, dict[str, Any]] = {
    "kahan": {"filter_eps": "auto"},
    "kahan_full_c": {"filter_eps": "auto", "filter_classifier": False},
    "exact": {},
}


def compared(tokens: int, vocabulary: int) -> tuple[list[int], list[int], list[int]]:
    """The tokens, the frequent entries and the other entries (64 each) on which gradients are compared."""
    others = range(64, vocabulary, max((vocabulary - 64) // 64, 1))
    return list(range(0, tokens, max(tokens // 64, 1)))[:64], list(range(64)), list(others)[:64]


def measure(task: str) -> None:
    """Measure the JAX rows of a task, an event a line."""
    import jax

    asked = json.loads(task)
    size = 256 if jax.default_backend() == "cpu" else 8192
    emit(framework="jax", device=jax.devices()[0].device_kind, size=size, tflops=_product_rate(size) / 1e12)
    reasons = {name: unavailable(name) for name in asked["names"]}
    for name, reason in reasons.items():
        if reason is not None:
            emit(shape="", row=name, kind="", missing=reason)
    for shape, wanted in asked["shapes"].items():
        names = [name for name in asked["names"] if name in wanted["rows"] and reasons[name] is None]
        if time.time() > asked["deadline"]:
            for name in names:
                emit(shape=shape, row=name, kind="", missing=OUT_OF_TIME)
            continue
        inputs = zipf_inputs(jax.random.key(0), *wanted["size"], shuffle=asked["shuffle"])
        programs = [program for name in names for program in _programs(name, *inputs)]
        if wanted["brief"]:
            programs = [program for program in programs if program.kind != "kahan_full_c"]
            facts = functools.partial(_facts, None, None)
        else:
            chosen = tuple(map(np.array, compared(*wanted["size"][:2])))
            facts = functools.partial(_facts, chosen, exact_gradients(*inputs, *chosen))
        in_turns(asked, shape, programs, jax.block_until_ready, facts)


def unavailable(row: str, dtype: str = "bfloat16") -> str | None:
    """Why a row cannot be measured on this machine with operands of that dtype, or None."""
    if row not in OURS:
        package = {"xla": "optax", "tokamax": "tokamax"}[row]
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported ({error})"
        return None
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear_cross_entropy import linear_cross_entropy

    x, labels = jax.ShapeDtypeStruct((128, 128), jnp.dtype(dtype)), jax.ShapeDtypeStruct((128,), jnp.int32)
    try:
        jax.eval_shape(functools.partial(linear_cross_entropy, implementation=row), x, x, labels)
    except (ImportError, NotImplementedError, ValueError) as error:
        return str(error)
    return None


def zipf_inputs(key, tokens: int, vocabulary: int, width: int, *, shuffle: bool = False) -> tuple[Any, Any, Any]:
    """Embeddings [N, D] and classifier [V, D] in bfloat16 and labels [N], of a model that knows what may follow.

    Classifier N(0, 1/D); a label and four rivals a token by Zipf's law, token ids by frequency or shuffled; embedding
    8 x the label's row + 6 x the sum of the rivals' + N(0, 1).
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def make(key):
        for_classifier, for_ids, for_noise, for_order = jax.random.split(key, 4)
        c = jax.random.normal(for_classifier, (vocabulary, width)) / width**0.5
        frequency = 1 / jnp.arange(1, vocabulary + 1, dtype=jnp.float32)
        ids = jax.random.choice(for_ids, vocabulary, (tokens, 5), p=frequency / frequency.sum())
        if shuffle:
            ids = jax.random.permutation(for_order, vocabulary)[ids]
        e = 8 * c[ids[:, 0]] + 6 * c[ids[:, 1:]].sum(1) + jax.random.normal(for_noise, (tokens, width))
        return e.astype(jnp.bfloat16), c.astype(jnp.bfloat16), ids[:, 0].astype(jnp.int32)

    return make(key)


def exact_gradients(e, c, labels, tokens, frequent, others) -> tuple[Any, Any, Any]:
    """Gradients of the mean loss in float32: of some tokens' embeddings and of two choices of classifier rows.

    The log-sum-exp of all tokens comes from the device, the rest from NumPy: compiling these few products with all of
    the vocabulary took XLA three minutes on a GPU.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def log_sum_exp(rows, c):
        return jax.nn.logsumexp(jnp.einsum("nd,vd->nv", rows, c, preferred_element_type=jnp.float32), axis=1)

    rows = math.gcd(e.shape[0], 512)
    lse = np.concatenate([log_sum_exp(e[start : start + rows], c) for start in range(0, e.shape[0], rows)])
    labels, (e, c) = np.asarray(labels), (np.asarray(x).astype(np.float32) for x in (e, c))

    def off(tokens, entries):
        """The softmax minus the label's 1."""
        p = np.exp(e[tokens] @ c[entries].T - lse[tokens, None])
        return (p - (labels[tokens, None] == np.arange(c.shape[0])[None, entries])) / e.shape[0]

    every = slice(None)
    return off(tokens, every) @ c, off(every, frequent).T @ e, off(every, others).T @ e


def _facts(chosen, exact, program: Program, out) -> dict:
    """The loss and, where there is something to compare with, the gradients' errors in roundings to bfloat16."""
    import jax.numpy as jnp

    if program.kind == "forward":
        return {"loss": float(out)}
    loss, (de, dc) = out
    if exact is None:
        return {"loss": float(loss)}
    dc = dc.T if program.row == "tokamax" else dc
    errors = []
    for gradient, index, reference in zip((de, dc, dc), chosen, exact, strict=True):
        rounding = jnp.linalg.norm(reference.astype(jnp.bfloat16).astype(jnp.float32) - reference)
        errors.append(float(jnp.linalg.norm(gradient[index].astype(jnp.float32) - reference) / rounding))
    return {"loss": float(loss), "error": errors}


def _programs(row: str, e, c, labels) -> list[Program]:
    """The forward pass and the gradients of one row."""
    import jax

    leaves_out = row in OURS and row != "chunked"
    functions = {kind: _loss(row, **options) for kind, options in PRESETS.items() if leaves_out or kind == "exact"}
    if row == "tokamax":
        c = c.T.copy()  # its layout is [D, V]

    def build(function):
        compiled = jax.jit(function).lower(e, c, labels).compile()
        memory = compiled.memory_analysis()
        return lambda: compiled(e, c, labels), (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**20

    gradients = {kind: jax.value_and_grad(function, (0, 1)) for kind, function in functions.items()}
    return [
        Program(row, kind, functools.partial(build, function))
        for kind, function in {"forward": functions["exact"], **gradients}.items()
    ]


def _loss(row: str, **options: Any) -> Callable[[Any, Any, Any], Any]:
    """The mean loss of (embeddings, classifier, labels)."""
    import jax.numpy as jnp

    if row == "tokamax":
        import tokamax

        return lambda e, c, labels: tokamax.linear_softmax_cross_entropy_loss(
            e, labels, c, reduction="mean", implementation="chunked_xla"
        )
    if row == "xla":
        import optax

        def materialised(e, c, labels):
            logits = jnp.einsum("nd,vd->nv", e, c, preferred_element_type=jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return materialised
    from pallas_kernels.linear_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, implementation=row, **options)


def _product_rate(size: int) -> float:
    """FLOP/s of a chain of square bf16 matrix products."""
    import jax
    import jax.numpy as jnp

    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))

    @jax.jit
    def chain(a, b):
        return jax.lax.fori_loop(0, 10, lambda i, x: (x @ b) * jnp.bfloat16(size**-0.5), a)

    times = milliseconds(lambda: chain(a, b), jax.block_until_ready, 5)
    return 10 * 2 * size**3 / (1e-3 * statistics.median(times))
