"""Which implementation runs where: the one place that knows about platforms.

A kernel lowered for a device that cannot run it may abort the process instead of raising, so the choice is made
before lowering, from the device the program is lowered for, and never by trying.
"""

import concurrent.futures
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# The mesh of an ahead-of-time compilation names its GPU but not the GPU's compute capability.
_COMPUTE_CAPABILITY = {
    "T4": (7, 5),
    "A100": (8, 0),
    "A10G": (8, 6),
    "L4": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
}


class Target(NamedTuple):
    """What a program is lowered for: ``platform`` is "cpu", "gpu" or "tpu"; ``compute_capability`` is (major, minor)
    for an NVIDIA GPU and None for everything else, and for a GPU that is neither attached nor known by name."""

    platform: str
    compute_capability: tuple[int, int] | None = None


# A registry of implementations, best first: name -> why it cannot run on the target (None: it can).
Registry = Mapping[str, Callable[[Target], str | None]]


def anywhere(target: Target) -> str | None:
    """The registry entry of an implementation that XLA alone compiles."""
    del target
    return None


def mosaic_tpu(target: Target) -> str | None:
    """The registry entry of a Pallas kernel for TPU."""
    if target.platform != "tpu" or device_kind() in ("TPU v2", "TPU v3"):
        return "needs a TPU v4 or later"
    attached = [device for device in jax.local_devices() if device.platform == "tpu"]
    return _indivisible() or (mosaic_tpu_refusal(attached[0]) if attached else None)


def mosaic_gpu(target: Target) -> str | None:
    """The registry entry of a Pallas kernel for NVIDIA Hopper."""
    if target.platform != "gpu" or target.compute_capability != (9, 0):
        return "needs an NVIDIA Hopper GPU"
    return _indivisible()


def triton(target: Target) -> str | None:
    """The registry entry of a Triton kernel, before it is asked which GPUs it takes."""
    return "needs an NVIDIA GPU" if target.platform != "gpu" else _indivisible()


def _indivisible() -> str | None:
    """Why the mesh that is set allows no kernel (None: it does): XLA would have to split it over some axis."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    split = [name for name, size in mesh.shape.items() if size > 1 and kinds[name] != jax.sharding.AxisType.Manual]
    if split:
        return f"cannot be partitioned by XLA over the mesh axes {split}: call it inside jax.shard_map"
    return None


@functools.cache
def mosaic_tpu_refusal(device: Any) -> str | None:
    """Why the compiler of ``device`` takes no Pallas kernel at all (None: it does).

    Compiles the smallest kernel, once per process: hosted notebooks pair JAX with a libtpu that is older than JAX
    expects, and there every kernel fails, with an error that depends on the two versions.
    """
    from jax.experimental import pallas as pl

    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    def compile_copy():
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
        jax.jit(pl.pallas_call(copy, out_shape=x)).lower(x).compile()

    try:
        # In a thread of its own nothing of the program being traced is in force: no mesh, no mapped axes.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            thread.submit(compile_copy).result()
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return (
            f"needs a compiler that takes Pallas kernels, and this one does not ({first_line}): "
            "install libtpu>=0.0.23 before JAX is imported"
        )
    return None


def target() -> Target:
    """Says what the program being traced is lowered for.

    The mesh that is set (``jax.set_mesh``, or ``jax.sharding.use_abstract_mesh`` with the mesh of an ahead-of-time
    topology) decides; without one, ``jax.default_device``, else the default backend. A jit whose arguments carry
    shardings of another platform cannot be seen from here: set their mesh.

    Example:
        >>> from pallas_kernels.dispatch import target
        >>> target().platform in ("cpu", "gpu", "tpu")
        True
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return _described(device)
    device = _default_device()
    return Target(_platform(device), _capability(device))


def device_kind() -> str:
    """The kind of the device that ``target`` describes, as JAX names it, such as "TPU v5 lite"."""
    return (getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) or _default_device()).device_kind


def choose(op: str, implementation: str | None, registry: Registry) -> str:
    """The name of the implementation of ``op`` to use: the one asked for, or the first that runs on ``target()``.

    Raises ValueError for a name outside the registry and NotImplementedError, with the reason, for one that cannot
    run on the target.

    Example:
        >>> from pallas_kernels import dispatch
        >>> dispatch.choose("my_op", None, {"chunked": dispatch.anywhere, "reference": dispatch.anywhere})
        'chunked'
    """
    if implementation is not None and implementation not in registry:
        raise ValueError(
            f"{op}: implementation={implementation!r} does not exist; use one of {sorted(registry)}, "
            "or None for the best on this device"
        )
    here = target()
    reasons = {}
    for name in registry if implementation is None else [implementation]:
        reasons[name] = registry[name](here)
        if reasons[name] is None:
            return name
    why = "; ".join(f"{name!r} {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"{op} cannot run on {here}: {why}. implementation=None chooses what can run")


def once_differentiated(spec: Any, f: Callable) -> Callable:
    """``f(spec, ...)`` of the operands, a part of the custom derivative of ``spec.implementation``; if that is a
    kernel, it refuses to be differentiated once more and says why."""
    f = functools.partial(f, spec)
    if spec.implementation == "chunked":
        return f

    def refuse(*_):
        raise NotImplementedError(
            f"implementation={spec.implementation!r} has first derivatives only; "
            "implementation='chunked' has jax.jvp(jax.grad(...)) too"
        )

    kernel = jax.custom_jvp(f)
    kernel.defjvp(refuse)
    return kernel


def looped(f: Callable) -> Callable:
    """``f(spec, ...)``, which runs in a loop under ``jax.vmap``: a kernel's operands in HBM cannot be mapped."""
    return lambda spec, *operands: jax.custom_batching.sequential_vmap(functools.partial(f, spec))(*operands)


def _default_device() -> Any:
    device = jax.config.jax_default_device
    return jax.local_devices(backend=device)[0] if device is None or isinstance(device, str) else device


def _described(device: Any) -> Target:
    """The target of an abstract device, which has a name and, from JAX 0.8 on, a platform."""
    platform = _platform(device)
    if platform != "gpu":
        return Target(platform)
    for attached in jax.local_devices():
        if attached.device_kind == device.device_kind:
            return Target(platform, _capability(attached))
    words = re.findall(r"\w+", device.device_kind)
    return Target(platform, next((_COMPUTE_CAPABILITY[word] for word in words if word in _COMPUTE_CAPABILITY), None))


def _platform(device: Any) -> str:
    named = getattr(device, "platform", None)
    if named is None:
        kind = device.device_kind.lower()
        named = "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"
    return "gpu" if named in ("cuda", "rocm") else named


def _capability(device: Any) -> tuple[int, int] | None:
    version = re.fullmatch(r"(\d+)\.(\d+)", str(getattr(device, "compute_capability", "")))
    return (int(version[1]), int(version[2])) if version else None
