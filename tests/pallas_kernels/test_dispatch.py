"""The choice follows the device that the program is lowered for."""

import inspect
import os
import subprocess
import sys

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Target


def mesh_of(device_kind: str, platform: str, axis_sizes=(1,), axis_names=("d",), **axis_types) -> AbstractMesh:
    """The mesh that an ahead-of-time compilation for this device sets; the platform is named from JAX 0.8 on."""
    named = {"platform": platform} if "platform" in inspect.signature(AbstractDevice).parameters else {}
    device = AbstractDevice(device_kind=device_kind, num_cores=None, **named)
    return AbstractMesh(axis_sizes, axis_names, abstract_device=device, **axis_types)


@pytest.mark.parametrize(
    ("device_kind", "platform", "expected"),
    [
        ("cpu", "cpu", Target("cpu", None)),
        ("TPU v5 lite", "tpu", Target("tpu", None)),
        ("NVIDIA H200", "gpu", Target("gpu", (9, 0))),
        ("NVIDIA A100-SXM4-40GB", "gpu", Target("gpu", (8, 0))),
        ("Tesla T4", "gpu", Target("gpu", (7, 5))),
        ("AMD Instinct MI300X", "gpu", Target("gpu", None)),
    ],
)
def test_the_mesh_that_is_set_decides(device_kind, platform, expected):
    with jax.sharding.use_abstract_mesh(mesh_of(device_kind, platform)):
        assert dispatch.target() == expected
        seen = []
        jax.jit(lambda x: (seen.append(dispatch.target()), x)[1]).trace(1.0)
    assert seen == [expected]


def test_without_a_mesh_the_default_device_decides():
    assert dispatch.target() == Target(jax.default_backend())
    with jax.default_device(jax.devices("cpu")[1]):
        assert dispatch.target() == Target("cpu")


def test_a_mesh_without_a_device_decides_nothing():
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("d",))):
        assert dispatch.target() == Target(jax.default_backend())


def hopper_only(target):
    if target.compute_capability is None or target.compute_capability < (9, 0):
        return "needs compute capability 9.0"
    return None


REGISTRY = {"kernel": hopper_only, "chunked": dispatch.anywhere}


def test_choose_takes_the_best_that_can_run():
    with jax.sharding.use_abstract_mesh(mesh_of("NVIDIA H200", "gpu")):
        assert dispatch.choose("op", None, REGISTRY) == "kernel"
        assert dispatch.choose("op", "chunked", REGISTRY) == "chunked"
    with jax.sharding.use_abstract_mesh(mesh_of("Tesla T4", "gpu")):
        assert dispatch.choose("op", None, REGISTRY) == "chunked"


def test_choose_refuses_with_the_reason():
    with (
        jax.sharding.use_abstract_mesh(mesh_of("Tesla T4", "gpu")),
        pytest.raises(NotImplementedError, match=r"op cannot run on .*7, 5.*needs compute capability 9\.0"),
    ):
        dispatch.choose("op", "kernel", REGISTRY)
    with pytest.raises(NotImplementedError, match="needs compute capability"):
        dispatch.choose("op", None, {"kernel": hopper_only})
    with pytest.raises(ValueError, match=r"'fast' does not exist; use one of \['chunked', 'kernel'\]"):
        dispatch.choose("op", "fast", REGISTRY)


@pytest.mark.parametrize(
    ("entry", "device"),
    [
        (dispatch.mosaic_gpu, ("NVIDIA H200", "gpu")),
        (dispatch.triton, ("Tesla T4", "gpu")),
        (dispatch.mosaic_tpu, ("TPU v5 lite", "tpu")),
    ],
)
def test_a_kernel_is_refused_where_xla_would_have_to_split_it(entry, device):
    registry = {"kernel": entry, "chunked": dispatch.anywhere}
    split = mesh_of(*device, (4, 2, 1), ("data", "tensor", "one"))
    by_hand = mesh_of(*device, (4, 2, 1), ("data", "tensor", "one"), axis_types=(AxisType.Manual,) * 3)
    in_part = mesh_of(
        *device, (4, 2, 1), ("data", "tensor", "one"), axis_types=(AxisType.Auto, AxisType.Manual, AxisType.Auto)
    )
    with jax.sharding.use_abstract_mesh(split):
        assert dispatch.choose("op", None, registry) == "chunked"
        with pytest.raises(NotImplementedError, match=r"over the mesh axes \['data', 'tensor'\]: .* jax\.shard_map"):
            dispatch.choose("op", "kernel", registry)
    with jax.sharding.use_abstract_mesh(in_part), pytest.raises(NotImplementedError, match=r"axes \['data'\]:"):
        dispatch.choose("op", "kernel", registry)
    with jax.sharding.use_abstract_mesh(by_hand):
        assert dispatch.choose("op", None, registry) == "kernel"


def test_importing_starts_no_device():
    environment = {**os.environ, "JAX_PLATFORMS": "a_platform_that_cannot_start"}
    code = "import pallas_kernels.dispatch, pallas_kernels.linear_cross_entropy, jax"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    started = subprocess.run([sys.executable, "-c", code + "; jax.devices()"], env=environment, capture_output=True)
    assert started.returncode != 0  # the check above can fail
