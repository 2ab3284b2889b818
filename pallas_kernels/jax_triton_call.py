"""What kernels called through the optional package jax-triton share: which versions work together, and the call."""

import functools
import importlib.metadata
import re
from typing import Any

import jax

from pallas_kernels.manual_axes import varying_like


def missing() -> str | None:
    """Why what is installed does not work together (None: it does)."""
    pair = "needs jax-triton 0.3.1 and triton 3.6 beside JAX 0.8.2 or later"
    try:
        jax_triton, compiler = (importlib.metadata.version(name) for name in ("jax-triton", "triton"))
    except importlib.metadata.PackageNotFoundError as error:
        return f"{pair}, {error.name} is not installed"
    if work_together(jax_triton, compiler, jax.__version__):
        return None
    return f"{pair}, installed are jax-triton {jax_triton}, triton {compiler} and JAX {jax.__version__}"


def work_together(jax_triton: str, compiler: str, here: str) -> bool:
    """Whether these versions of jax-triton, triton and JAX do; 0.4 is out because it breaks with JAX 0.12."""
    versions = [tuple(int(part) for part in re.findall(r"\d+", text)[:3]) for text in (jax_triton, compiler, here)]
    return (0, 3, 1) <= versions[0] < (0, 4) and versions[1] >= (3, 6) and versions[2] >= (0, 8, 2)


def call(kernel: Any, arrays: tuple[jax.Array, ...], outputs: Any, spec: Any, **options: Any) -> Any:
    """The outputs [(shape, dtype), ...] of a kernel on ``spec.target``; under ``jax.vmap`` a loop."""
    import jax_triton  # optional, and its import changes the environment

    function = functools.partial(
        jax_triton.triton_call,
        kernel=kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        compute_capability=10 * spec.target.compute_capability[0] + spec.target.compute_capability[1],
        **options,
    )
    results = jax.custom_batching.sequential_vmap(function)(*arrays)
    return varying_like(arrays, results)
