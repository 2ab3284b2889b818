"""Hugging Face folders, read and written: config.json, *.safetensors, tokenizer; Llama, Qwen2, Mistral and GPT-2."""

import collections
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxskip.data import BPETokenizer
from jaxskip.models.decoder import DecoderConfig
from jaxskip.models.weights import hugging_face_config
from jaxskip.models.weights.parameters import Index, Part, TensorInfo, check_tensors, parameter_path, parameter_shapes

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = ("F32", "F16", "BF16")
# Constants that older checkpoints hold beside the parameters.
_BUFFERS = r".*rotary_emb\.inv_freq|.*\.attn\.(masked_)?bias"


class HuggingFaceFolder:
    """config.json and the safetensors of a folder, memory-mapped: blocks of tensors are read when asked for."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.config = _json(self.path / "config.json")
        indexed = _json(self.path / _INDEX)["weight_map"] if (self.path / _INDEX).is_file() else {}
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, Any] = {}
        for name in sorted(set(indexed.values())) or [_SINGLE]:
            file = _open(self.path / name)
            for tensor in file.keys():  # noqa: SIM118 (not a dictionary)
                header = file.get_slice(tensor)
                self.tensors[tensor] = TensorInfo(tuple(header.get_shape()), header.get_dtype())
                self._files[tensor] = file
        if lost := sorted(indexed.keys() - self.tensors.keys()):
            raise ValueError(f"{self.path / _INDEX} lists tensor {lost[0]!r}, but {indexed[lost[0]]} does not hold it")

    def read(self, name: str, index: Index) -> np.ndarray:
        """The block of a tensor at `index`, one slice an axis, in the file's dtype."""
        return self._files[name].get_slice(name)[tuple(index)]


def _json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('safetensors files need a package: pip install "jaxskip[interop]"') from error
    return safetensors


def _open(path: pathlib.Path):
    package = _safetensors()
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: weights are {_SINGLE}, or files listed in {_INDEX}")
    try:
        return package.safe_open(path, framework="numpy")
    except package.SafetensorError as error:
        raise ValueError(f"cannot read {path} as safetensors: {_cut_tensor(path) or error}") from error


def _cut_tensor(path: pathlib.Path) -> str:
    """The tensor that a truncated file breaks off in, in words; empty where the header does not say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            return "it ends inside its header"
        try:
            header = json.loads(file.read(start - 8))
            ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError):
            return ""
    cut = [name for name in sorted(ends, key=ends.__getitem__) if ends[name] > size]
    return f"tensor {cut[0]!r} ends at byte {ends[cut[0]]}, the file at {size}: it is truncated" if cut else ""


def open_model(path: str | os.PathLike, dtype) -> tuple[HuggingFaceFolder, DecoderConfig, dict[str, Part]]:
    """A folder, the decoder that it describes and where its parameters lie, checked."""
    folder = HuggingFaceFolder(path)
    config = hugging_face_config.read(folder.config, folder.path / "config.json", dtype)
    # The first GPT-2 checkpoints were saved without the prefix.
    parts = decoder_parts(config, "" if "wte.weight" in folder.tensors else "transformer.")
    ignored = _BUFFERS
    if config.tie_embeddings and "lm_head.weight" in folder.tensors:
        _check_copy(folder, parts["embed/embedding"].tensor, "lm_head.weight")
        ignored += r"|lm_head\.weight"
    check_tensors(folder, parts, config, types=_TYPES, ignored=ignored)
    return folder, config, parts


def _check_copy(folder: HuggingFaceFolder, embedding: str, head: str) -> None:
    same = embedding in folder.tensors and folder.tensors[embedding].shape == folder.tensors[head].shape
    count = folder.tensors[head].shape[0]
    blocks = [[slice(i, min(i + 4096, count))] for i in range(0, count, 4096)]  # never the whole of it in memory
    if not same or any((folder.read(embedding, block) != folder.read(head, block)).any() for block in blocks):
        raise ValueError(
            f"{folder.path} holds tensor {head!r} that differs from {embedding!r}, but config.json ties the two; set "
            "tie_word_embeddings to false there if the head is a matrix of its own"
        )


def decoder_parts(config: DecoderConfig, gpt2_prefix: str = "transformer.") -> dict[str, Part]:
    """Where each parameter lies."""
    parts = _gpt2_parts(gpt2_prefix) if config.position == "learned" else _llama_parts(config)
    if not config.tie_embeddings:
        parts["head"] = Part("lm_head.weight", True)
    return parts


def _gpt2_parts(prefix: str) -> dict[str, Part]:
    layer = prefix + "h.{}."
    parts = {"embed/embedding": Part(f"{prefix}wte.weight"), "positions/embedding": Part(f"{prefix}wpe.weight")}
    for theirs, ours in (("weight", "scale"), ("bias", "bias")):
        parts[f"final_norm/{ours}"] = Part(f"{prefix}ln_f.{theirs}")
        parts[f"layers/attention_norm/{ours}"] = Part(f"{layer}ln_1.{theirs}")
        parts[f"layers/mlp_norm/{ours}"] = Part(f"{layer}ln_2.{theirs}")
    for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
        for i, name in enumerate(("query", "key", "value")):
            parts[f"layers/attention/{name}/{ours}"] = Part(f"{layer}attn.c_attn.{theirs}", chunk=(i, 3))
        parts[f"layers/attention/out/{ours}"] = Part(f"{layer}attn.c_proj.{theirs}")
        parts[f"layers/mlp/up/{ours}"] = Part(f"{layer}mlp.c_fc.{theirs}")
        parts[f"layers/mlp/down/{ours}"] = Part(f"{layer}mlp.c_proj.{theirs}")
    return parts


def _llama_parts(config: DecoderConfig) -> dict[str, Part]:
    layer = "model.layers.{}."
    parts = {
        "embed/embedding": Part("model.embed_tokens.weight"),
        "final_norm/scale": Part("model.norm.weight"),
        "layers/attention_norm/scale": Part(f"{layer}input_layernorm.weight"),
        "layers/mlp_norm/scale": Part(f"{layer}post_attention_layernorm.weight"),
    }
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    names = {f"layers/attention/{ours}": f"{layer}self_attn.{theirs}_proj" for ours, theirs in attention.items()}
    names |= {f"layers/mlp/{name}": f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")}
    qkv_bias = config.use_bias if config.qkv_bias is None else config.qkv_bias
    for ours, theirs in names.items():
        parts[f"{ours}/kernel"] = Part(f"{theirs}.weight", True)
        if qkv_bias if ours.endswith(("query", "key", "value")) else config.use_bias:
            parts[f"{ours}/bias"] = Part(f"{theirs}.bias")
    return parts


def tokenizer(folder: HuggingFaceFolder) -> BPETokenizer | None:
    """The folder's tokenizer.json, else GPT-2's vocab.json and merges.txt, else None."""
    path, fields = folder.path, dict(folder.config)
    if (path / "generation_config.json").is_file():
        fields |= _json(path / "generation_config.json")
    stops = fields.get("eos_token_id")
    stops = () if stops is None else tuple(stops) if isinstance(stops, list) else (stops,)
    ids = {"bos_token": fields.get("bos_token_id"), "stop_tokens": stops}
    if (path / "tokenizer.json").is_file():
        return BPETokenizer.load(path / "tokenizer.json", lossless=False, **ids)
    if fields["model_type"] == "gpt2" and (path / "vocab.json").is_file():
        return BPETokenizer.from_gpt2(path, **ids)
    return None


def save_hugging_face(
    path: str | os.PathLike,
    config: DecoderConfig,
    params: Any,
    *,
    tokenizer: BPETokenizer | None = None,
    max_file_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json, safetensors (several and an index past `max_file_bytes`) and tokenizer.json into a folder.

    `load` and `transformers` read it: as GPT-2 (learned positions, LayerNorm, GELU), Qwen2 (rotary, RMSNorm, SwiGLU,
    biases on query, key and value alone) or Llama (the same with all biases or none). GPT-2's biases are written as
    zeros where the decoder has none. The dtype is the parameters'. Needs `jaxskip[interop]`; params on a mesh must be
    addressable by this process.

    Raises ValueError for a configuration that no family has and for parameters that do not fit it, FileExistsError for
    a folder that holds a model.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxskip.models import Decoder, decoder_config
    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_hugging_face(folder, model.config, params)
    ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
    ['config.json', 'model.safetensors']
    """
    _safetensors()
    folder, fields = pathlib.Path(path), hugging_face_config.written(config)
    expected, given = parameter_shapes(config), jax.tree.map(lambda leaf: leaf.shape, params)
    if jax.tree.map(lambda leaf: leaf.shape, expected) != given:
        raise ValueError(f"params do not fit config: they have the shapes {given}")
    folder.mkdir(parents=True, exist_ok=True)
    if there := sorted(file.name for pattern in ("*.safetensors", "config.json") for file in folder.glob(pattern)):
        raise FileExistsError(f"{folder} holds a model already ({there[0]}); give another folder")
    fields["torch_dtype"] = str(jax.tree.leaves(params)[0].dtype)
    if tokenizer is not None:
        fields |= {"bos_token_id": tokenizer.bos_token, "eos_token_id": list(tokenizer.stop_tokens) or None}
        tokenizer.save(folder / "tokenizer.json")
    _write_tensors(folder, _tensors(config, params), max_file_bytes)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _tensors(config: DecoderConfig, params) -> Iterator[tuple[str, np.ndarray]]:
    leaves = {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    holders = collections.defaultdict(list)  # the parameters of each tensor, chunks in order
    for ours, part in decoder_parts(config).items():
        holders[part.tensor].append((ours, part))
    for tensor, held in holders.items():
        for layer in range(config.num_layers if "{}" in tensor else 1):
            pieces = []
            for ours, _ in held:
                if (leaf := leaves.get(ours)) is None:  # a bias of GPT-2 that this decoder does not have
                    weight = leaves[ours.removesuffix("bias") + ("scale" if "norm" in ours else "kernel")]
                    leaf = np.zeros((*weight.shape[: "{}" in tensor], weight.shape[-1]), weight.dtype)
                pieces.append(np.asarray(leaf[layer] if "{}" in tensor else leaf))
            value = np.concatenate(pieces, axis=-1)
            yield tensor.format(layer), np.ascontiguousarray(value.T if held[0][1].transposed else value)


def _write_tensors(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], max_file_bytes: int) -> None:
    save_file = _safetensors().numpy.save_file
    written: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = waiting = 0

    def write():
        # transformers asks for this entry.
        save_file(pending, folder / f"{len(written)}.safetensors", metadata={"format": "pt"})
        written.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and waiting + tensor.nbytes > max_file_bytes:
            write()
            waiting = 0
        pending[name] = tensor
        waiting += tensor.nbytes
        total += tensor.nbytes
    write()
    weight_map = {}
    for i, names in enumerate(written):
        final = _SINGLE if len(written) == 1 else f"model-{i + 1:05}-of-{len(written):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    if len(written) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
