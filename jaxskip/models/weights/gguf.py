"""GGUF files: a reader of their layout, and Llama-family decoders in them."""

import math
import mmap
import os
import pathlib
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxskip.data import BPETokenizer
from jaxskip.models.decoder import DecoderConfig
from jaxskip.models.weights.parameters import Index, Part, TensorInfo, check_tensors


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = (blocks[..., i : i + 2].copy().view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = blocks[..., 4:]
    values = np.empty((*blocks.shape[:-1], 32), np.float32)
    values[..., :16] = nibbles & 15  # low nibbles are the first half of a block, not every other element
    values[..., 16:] = nibbles >> 4
    values *= scale
    values += minimum
    return values


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    return blocks[..., 2:].view(np.int8) * scale


def _plain(dtype) -> Callable[[np.ndarray], np.ndarray]:
    return lambda blocks: np.ascontiguousarray(blocks).view(dtype).astype(np.float32)


class _Type(NamedTuple):
    elements: int  # in a block
    bytes: int  # of a block
    to_float32: Callable[[np.ndarray], np.ndarray]  # uint8 [..., bytes] -> float32 [..., elements]


_TYPES = {
    "F32": _Type(1, 4, _plain(np.float32)),
    "F16": _Type(1, 2, _plain(np.float16)),
    "BF16": _Type(1, 2, _plain(ml_dtypes.bfloat16)),
    "Q8_0": _Type(32, 34, _q8_0),
    "Q4_1": _Type(32, 20, _q4_1),
}
# The names are for error messages too, so those that cannot be read are here as well.
_TYPE_NAMES = dict(
    enumerate(
        [
            "F32",
            "F16",
            "Q4_0",
            "Q4_1",
            "Q4_2",
            "Q4_3",
            "Q5_0",
            "Q5_1",
            "Q8_0",
            "Q8_1",
            "Q2_K",
            "Q3_K",
            "Q4_K",
            "Q5_K",
            "Q6_K",
            "Q8_K",
        ]
    )
)
_TYPE_NAMES |= dict(
    enumerate(
        [
            "IQ2_XXS",
            "IQ2_XS",
            "IQ3_XXS",
            "IQ1_S",
            "IQ4_NL",
            "IQ3_S",
            "IQ2_S",
            "IQ4_XS",
            "I8",
            "I16",
            "I32",
            "I64",
            "F64",
        ],
        16,
    )
)
_TYPE_NAMES |= {29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFFile:
    """A GGUF file (versions 2 and 3, little-endian), memory-mapped: tensors are read and dequantised when asked for.

    Attributes:
      metadata: the file's key-value pairs; arrays of numbers are NumPy arrays.
      tensors: name -> (shape, type name). Shapes are NumPy's (a projection is [out, in]), the reverse of the file's.

    Raises ValueError for a file that is not GGUF or ends too early, and for tensors of a type other than F32, F16,
    BF16, Q8_0 and Q4_1, with the tensor's name.

    >>> import tempfile
    >>> header = struct.pack("<4sIQQQ1sIQIQ", b"GGUF", 3, 1, 0, 1, b"w", 1, 2, 0, 0)  # one float32 tensor [2]: "w"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "tiny.gguf")
    ...     _ = path.write_bytes(header.ljust(64, bytes(1)) + struct.pack("<2f", 1, 2))
    ...     GGUFFile(path).read("w").tolist()
    [1.0, 2.0]
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        with open(self.path, "rb") as file:
            if self.path.stat().st_size < 24 or file.read(4) != b"GGUF":
                raise ValueError(f"{self.path} is not a GGUF file")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(self._bytes, 4)
        try:
            version, tensor_count, pair_count = cursor.take("IQQ")
            if version not in (2, 3):
                raise ValueError(f"{self.path} has GGUF version {version}; 2 and 3, little-endian, can be read")
            self.metadata: dict[str, Any] = {}
            for _ in range(pair_count):
                key = cursor.string()
                self.metadata[key] = cursor.value(*cursor.take("I"))
            headers = [self._tensor_header(cursor) for _ in range(tensor_count)]
        except (struct.error, EOFError) as error:
            raise ValueError(f"{self.path} ends inside its header: the file is truncated") from error
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-cursor.position // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        for name, info, offset in headers:
            end = start + offset + _byte_count(info)
            if end > len(self._bytes):
                raise ValueError(
                    f"tensor {name!r} ends at byte {end} of {self.path}, which has {len(self._bytes)}: it is truncated"
                )
            self.tensors[name], self._starts[name] = info, start + offset

    def _tensor_header(self, cursor: "_Cursor") -> tuple[str, TensorInfo, int]:
        name = cursor.string()
        (rank,) = cursor.take("I")
        shape = cursor.take(f"{rank}Q")[::-1]
        code, offset = cursor.take("IQ")
        kind = _TYPE_NAMES.get(code, f"number {code}")
        if kind not in _TYPES:
            raise ValueError(f"tensor {name!r} of {self.path} has type {kind}; these can be read: {', '.join(_TYPES)}")
        if not shape or shape[-1] % _TYPES[kind].elements:
            raise ValueError(f"tensor {name!r} of {self.path} has shape {shape}, which its type {kind} cannot have")
        return name, TensorInfo(shape, kind), offset

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor in float32, or the block of it at `index`: one slice an axis (or row numbers, but on the last).

        Only the asked rows and, in them, the blocks of 32 that hold asked columns are read.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}")
        (*rows, columns), kind = self.tensors[name].shape, _TYPES[self.tensors[name].type]
        *row_index, column_index = index or [slice(None)] * (len(rows) + 1)
        first, stop, _ = column_index.indices(columns)
        skipped = first // kind.elements
        count = _byte_count(self.tensors[name])
        stored = np.frombuffer(self._bytes, np.uint8, count, self._starts[name])
        stored = stored.reshape(*rows, columns // kind.elements, kind.bytes)
        values = kind.to_float32(stored[(*row_index, slice(skipped, -(-stop // kind.elements)))])
        values = values.reshape(*values.shape[:-2], values.shape[-2] * values.shape[-1])
        return values[..., first - skipped * kind.elements : stop - skipped * kind.elements]


class _Cursor:
    """Takes values off a buffer, front to back."""

    def __init__(self, buffer, position: int):
        self.buffer, self.position = buffer, position

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.buffer, self.position)
        self.position += struct.calcsize("<" + layout)
        return values

    def bytes(self, count: int) -> bytes:
        if self.position + count > len(self.buffer):
            raise EOFError
        self.position += count
        return self.buffer[self.position - count : self.position]

    def string(self) -> str:
        return self.bytes(*self.take("Q")).decode()

    def value(self, kind: int):
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.take("IQ")
            if kind in _SCALARS:
                return np.frombuffer(self.bytes(count * struct.calcsize("<" + _SCALARS[kind])), "<" + _SCALARS[kind])
            return [self.value(kind) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"unknown GGUF value type {kind}: the header is damaged")
        (value,) = self.take(_SCALARS[kind])
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if _SCALARS[kind] == "f" else value


def _byte_count(info: TensorInfo) -> int:
    kind = _TYPES[info.type]
    return math.prod(info.shape) // kind.elements * kind.bytes


def open_model(path: str | os.PathLike, dtype) -> tuple[GGUFFile, DecoderConfig, dict[str, Part]]:
    """A file, the decoder in it and where its parameters lie, checked."""
    file = GGUFFile(path)
    config = decoder_config(file, dtype)
    parts = decoder_parts(config)
    check_tensors(file, parts, config, types=list(_TYPES))
    return file, config, parts


def decoder_config(file: GGUFFile, dtype) -> DecoderConfig:
    """The decoder that a file of the Llama architecture describes."""
    fields = file.metadata
    _only(file, "general.architecture", ["llama"])
    _only(file, "llama.expert_count", [0], absent=0)
    _only(file, "llama.rope.scaling.type", ["none"], absent="none")

    def need(name):
        if name not in fields:
            raise ValueError(f"{file.path} lacks the field {name!r}")
        return fields[name]

    heads, width = need("llama.attention.head_count"), need("llama.embedding_length")
    head_dim = fields.get("llama.attention.key_length", width // heads)
    _only(file, "llama.rope.dimension_count", [head_dim], absent=head_dim)
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight'")
    return DecoderConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        context_length=need("llama.context_length"),
        num_layers=need("llama.block_count"),
        num_heads=heads,
        num_kv_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        embed_dim=width,
        mlp_dim=need("llama.feed_forward_length"),
        position="rotary",
        rope_theta=fields.get("llama.rope.freq_base", 10_000.0),
        norm="rmsnorm",
        norm_eps=need("llama.attention.layer_norm_rms_epsilon"),
        activation="swiglu",
        tie_embeddings="output.weight" not in file.tensors,
        dtype=dtype,
        param_dtype=dtype,
    )


def decoder_parts(config: DecoderConfig) -> dict[str, Part]:
    """Where each parameter lies. Rows of q and k are stored in the order of interleaved rotary positions."""
    parts = {
        "embed/embedding": Part("token_embd.weight"),
        "final_norm/scale": Part("output_norm.weight"),
        "layers/attention_norm/scale": Part("blk.{}.attn_norm.weight"),
        "layers/mlp_norm/scale": Part("blk.{}.ffn_norm.weight"),
        "layers/attention/query/kernel": Part("blk.{}.attn_q.weight", True, interleaved_heads=config.num_heads),
        "layers/attention/key/kernel": Part("blk.{}.attn_k.weight", True, interleaved_heads=config.kv_heads),
        "layers/attention/value/kernel": Part("blk.{}.attn_v.weight", True),
        "layers/attention/out/kernel": Part("blk.{}.attn_output.weight", True),
        "layers/mlp/gate/kernel": Part("blk.{}.ffn_gate.weight", True),
        "layers/mlp/up/kernel": Part("blk.{}.ffn_up.weight", True),
        "layers/mlp/down/kernel": Part("blk.{}.ffn_down.weight", True),
    }
    if not config.tie_embeddings:
        parts["head"] = Part("output.weight", True)
    return parts


# What is cut out of a text before merging, by the name that the file gives its pre-tokenizer.
_SPLITS_DIGITS = {"smollm": True, "gpt-2": False}
_CONTROL = 3


def tokenizer(file: GGUFFile) -> BPETokenizer | None:
    """The file's own byte-level BPE; None for a file without a tokenizer."""
    fields = file.metadata
    if "tokenizer.ggml.model" not in fields:
        return None
    instead = "; load(..., tokenizer=False) leaves the tokenizer out"
    _only(file, "tokenizer.ggml.model", ["gpt2"], instead=instead)
    _only(file, "tokenizer.ggml.pre", list(_SPLITS_DIGITS), instead=instead)
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields.get("tokenizer.ggml.token_type", [])
    stops = (fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return BPETokenizer.from_merges(
        tokens,
        [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]],
        special_tokens=[token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL],
        split_digits=_SPLITS_DIGITS[fields["tokenizer.ggml.pre"]],
        lossless=False,
        bos_token=fields.get("tokenizer.ggml.bos_token_id"),
        stop_tokens=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
    )


def _only(file: GGUFFile, name: str, allowed: list, *, absent=None, instead: str = "") -> None:
    if (value := file.metadata.get(name, absent)) not in allowed:
        raise ValueError(f"{name} is {value!r} in {file.path}; it must be one of {allowed}{instead}")
