"""The mesh, and how parameters, optimizer state and batches lie on it.

Axes: "data" (batch split, parameters replicated), "fsdp" (batch split, parameters split too), "tensor" (a layer's
matrices split). One device is the mesh of size one, so there is one code path.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
Rules = Sequence[tuple[str, P]]
REPLICATE: Rules = ((r".*", P()),)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data x fsdp x tensor; one size may be -1, meaning all devices that are left.

    Raises ValueError when the sizes do not multiply to the number of devices.

    >>> make_mesh(devices=jax.devices()[:1]).shape["data"]
    1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes {data}, {fsdp}, {tensor}: wanted positive numbers, at most one of them -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not cover {len(devices)} devices; "
            f"choose sizes whose product is {len(devices)}"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_shardings(params, mesh: Mesh, rules: Rules = REPLICATE) -> Any:
    """A NamedSharding for each parameter: the first rule whose pattern matches its whole path decides.

    `params` are arrays or ShapeDtypeStructs; paths are written "layers/mlp/up/kernel". A mesh axis that does not
    divide its dimension is dropped there, so the parameter is replicated along it (a fact of memory, not of results).

    Raises ValueError for a parameter that no rule matches and for a rule with more axes than the parameter.
    """

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, name)), None)
        if spec is None:
            raise ValueError(f"no partition rule matches parameter {name!r}; add one, or (r'.*', P()) to replicate")
        if len(spec) > leaf.ndim:
            raise ValueError(f"the rule for {name!r} is {spec}, but the parameter has shape {leaf.shape}")
        axes = [axis if axis and leaf.shape[i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(spec)]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(sharding, params)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, P())


def optimizer_state_shardings(tx: optax.GradientTransformation, params, shardings, mesh: Mesh) -> Any:
    """Shardings of `tx.init(params)`: what mirrors a parameter lies as it does, everything else is replicated."""
    return optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def check_batch_size(batch_size: int, mesh: Mesh, *, parts: int = 1) -> None:
    """Raise ValueError unless `batch_size` rows split into `parts` and over the mesh's batch axes without rest."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or batch_size % (shards * parts):
        raise ValueError(
            f"a batch of {batch_size} does not split into {parts} part(s) over {shards} devices "
            f"(data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}); make it a multiple of {shards * parts}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global device arrays from each process's own rows, split over the batch axes.

    Process p of n holds rows [p B/n, (p+1) B/n) of the global batch. The batch axes must therefore be what splits
    the processes: a "tensor" axis stays inside one process.
    """
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    count = jax.process_count()
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (rows.shape[0] * count, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`x`, inside jit, lying as `spec` says on the mesh in force, if that has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec)
