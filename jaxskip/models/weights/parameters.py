"""Parameters out of tensor files: which tensor holds which, whether all are there, and reading them shard by shard."""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxskip.models.decoder import Decoder, DecoderConfig

Index = Sequence[Any]  # of slices; a file that stores interleaved heads takes row numbers as well
Bounds = tuple[tuple[int, int], ...]  # first and last + 1 of a block along each axis


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor; type names are those that GGUF and safetensors share, such as "BF16"."""

    shape: tuple[int, ...]
    type: str


class TensorFile(Protocol):
    """Named tensors of which blocks can be read without reading the rest."""

    path: pathlib.Path
    tensors: dict[str, TensorInfo]

    def read(self, name: str, index: Index) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Where a parameter lies in a file.

    Attributes:
      tensor: the name there; "{}" stands for the number of the layer.
      transposed: the file holds [out, in] for our [in, out].
      chunk: (i, n): the parameter is the i-th of n equal parts of the tensor's last axis (ours, before transposing).
      interleaved_heads: not 0: in each of so many heads, output 2 i + j of the file is our j K / 2 + i.
    """

    tensor: str
    transposed: bool = False
    chunk: tuple[int, int] = (0, 1)
    interleaved_heads: int = 0

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter of one layer with this shape."""
        shape = (*shape[:-1], shape[-1] * self.chunk[1])
        return shape[::-1] if self.transposed else shape

    def read(self, file: TensorFile, layer: int, shape: tuple[int, ...], bounds: Bounds) -> np.ndarray:
        """A block of the parameter of one layer, which has this shape."""
        index: list[Any] = [slice(*bound) for bound in bounds]
        first, stop = bounds[-1]
        if self.interleaved_heads:
            width = shape[-1] // self.interleaved_heads
            head, inside = np.divmod(np.arange(first, stop), width)
            half, pair = np.divmod(inside, width // 2)
            index[-1] = head * width + 2 * pair + half
        elif self.chunk[0]:
            start = self.chunk[0] * shape[-1]
            index[-1] = slice(start + first, start + stop)
        if self.transposed:
            return file.read(self.tensor.format(layer), index[::-1]).T
        return file.read(self.tensor.format(layer), index)


@functools.lru_cache(maxsize=8)  # tracing a decoder takes a quarter of a second, and a load asks twice
def parameter_shapes(config: DecoderConfig) -> Any:
    """The decoder's parameter tree, of ShapeDtypeStructs."""
    model, tokens = Decoder(config), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens)["params"], tokens)


def parameter_path(path) -> str:
    """A parameter's path as "layers/mlp/up/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_tensors(
    file: TensorFile, parts: Mapping[str, Part], config: DecoderConfig, *, types: Sequence[str], ignored: str = ""
) -> None:
    """Raise ValueError naming the tensors unless the file holds what `parts` wants and nothing else.

    `types` can be read; names that match the pattern `ignored` are let pass.
    """
    wanted = {}
    for path, struct in jax.tree_util.tree_leaves_with_path(parameter_shapes(config)):
        part, shape = parts[parameter_path(path)], struct.shape
        layers = [part.tensor.format(layer) for layer in range(config.num_layers)] if "{}" in part.tensor else []
        wanted |= dict.fromkeys(layers or [part.tensor], part.file_shape(shape[1:] if layers else shape))
    complaints = []
    if missing := [name for name in wanted if name not in file.tensors]:
        complaints.append(f"lacks {_listed(missing)}, which its configuration wants")
    if extra := [name for name in file.tensors if name not in wanted and not re.fullmatch(ignored, name)]:
        complaints.append(f"holds {_listed(extra)}, for which this decoder has no place")
    if complaints:
        raise ValueError(f"{file.path} {', and '.join(complaints)}")
    for name, shape in wanted.items():
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"tensor {name!r} of {file.path} has shape {file.tensors[name].shape}; its configuration wants {shape}"
            )
        if file.tensors[name].type not in types:
            raise ValueError(
                f"tensor {name!r} of {file.path} has type {file.tensors[name].type}; "
                f"these can be read: {', '.join(types)}"
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"tensor {shown}" if len(names) == 1 else f"{len(names)} tensors ({shown}{', ...' if names[3:] else ''})"


def read_parameters(file: TensorFile, parts: Mapping[str, Part], config: DecoderConfig, mesh, rules) -> Any:
    """The decoder's parameters in `config.param_dtype`, on the default device or spread over `mesh` by `rules`.

    The host holds one shard at a time (of a stacked parameter, its layers together).
    """
    shapes = parameter_shapes(config)
    if mesh is None:
        shardings = jax.tree.map(lambda _: None, shapes)
    else:
        from jaxskip.training.sharding import param_shardings  # here, since the package imports models

        shardings = param_shardings(shapes, mesh, rules)

    def read(path, struct, sharding):
        part = parts[parameter_path(path)]
        if sharding is None:
            return jax.device_put(_block(file, part, struct, tuple((0, size) for size in struct.shape)))
        devices = collections.defaultdict(list)
        for device, index in sharding.addressable_devices_indices_map(struct.shape).items():
            bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, struct.shape, strict=True))
            devices[bounds].append(device)
        placed = []
        for bounds, holders in devices.items():
            block = _block(file, part, struct, bounds)
            placed += jax.block_until_ready([jax.device_put(block, device) for device in holders])
        return jax.make_array_from_single_device_arrays(struct.shape, sharding, placed)

    return jax.tree_util.tree_map_with_path(read, shapes, shardings)


def _block(file: TensorFile, part: Part, struct: jax.ShapeDtypeStruct, bounds: Bounds) -> np.ndarray:
    block = np.empty([stop - first for first, stop in bounds], struct.dtype)
    if "{}" not in part.tensor:
        block[...] = part.read(file, 0, struct.shape, bounds)
        return block
    for row, layer in enumerate(range(*bounds[0])):
        block[row] = part.read(file, layer, struct.shape[1:], bounds[1:])
    return block
