"""LoRA (arXiv 2106.09685) as pure functions on the parameters of a stacked decoder.

Adapters are a pytree of their own: train it, `merge_lora` it into the weights, and run any program on the result.

Shape letters: L layers, I inputs and O outputs of a matrix (O may be several axes), R rank.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def init_lora(key: jax.Array, params, *, rank: int = 8, targets: Sequence[str] | None = None) -> dict[str, Any]:
    """Adapters for the matrices of a decoder's layers: "layers/mlp/up" -> {"a": [L, I, R], "b": [L, R, O]}.

    `targets` are names of projections ("query", "key", "value", "out", "gate", "up", "down"); None takes all.
    `a` is normal with deviation 1 / sqrt(I), `b` zero, so the network starts unchanged; float32.

    Raises ValueError for unrolled or fused layers, for a target that is not there, and for a rank below 1.

    >>> from jaxskip.models import Decoder, decoder_config
    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> adapters = init_lora(jax.random.key(1), params, rank=4, targets=("query", "up"))
    >>> {name: adapter["b"].shape for name, adapter in adapters.items()}
    {'layers/attention/query': (2, 4, 64), 'layers/mlp/up': (2, 4, 256)}
    """
    if isinstance(params["layers"], tuple):
        raise ValueError("adapters are for stacked layers: add and merge them before unstack_layers")
    if "qkv" in params["layers"]["attention"]:
        raise ValueError("adapters are for separate projections: add and merge them before fuse_projections")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    kernels = {name: leaf for name, leaf in _leaves(params) if name.startswith("layers/") and name.endswith("/kernel")}
    kernels = {name.removesuffix("/kernel"): kernel for name, kernel in kernels.items()}
    projections = [name.rsplit("/", 1)[1] for name in kernels]
    targets = projections if targets is None else targets
    if missing := sorted(set(targets) - set(projections)):
        raise ValueError(f"no projection is called {', '.join(missing)}; there are {', '.join(projections)}")
    adapters = {}
    for name, kernel in kernels.items():
        if name.rsplit("/", 1)[1] not in targets:
            continue
        layers, inputs, *outputs = kernel.shape
        key, draw = jax.random.split(key)
        a = jax.random.normal(draw, (layers, inputs, rank), jnp.float32) / inputs**0.5
        adapters[name] = {"a": a, "b": jnp.zeros((layers, rank, *outputs), jnp.float32)}
    return adapters


def merge_lora(params, adapters, *, alpha: float = 16.0):
    """`params` with alpha / R times a @ b added to each adapted matrix, in that matrix's dtype; can be differentiated.

    >>> params = {"layers": {"up": {"kernel": jnp.zeros((1, 2, 3))}}}
    >>> adapters = {"layers/up": {"a": jnp.ones((1, 2, 4)), "b": jnp.ones((1, 4, 3))}}
    >>> float(merge_lora(params, adapters, alpha=8.0)["layers"]["up"]["kernel"][0, 0, 0])
    8.0
    """
    if missing := sorted(set(adapters) - {name.removesuffix("/kernel") for name, _ in _leaves(params)}):
        raise ValueError(f"no matrix for the adapters of {', '.join(missing)}; were the projections fused since?")

    def merged(path, kernel):
        adapter = adapters.get(_name(path).removesuffix("/kernel"))
        if adapter is None:
            return kernel
        change = jnp.einsum("lir,lr...->li...", adapter["a"], adapter["b"]) * (alpha / adapter["a"].shape[-1])
        return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)

    return jax.tree_util.tree_map_with_path(merged, params)


def train_labels(params, *trained: str) -> dict[str, Any]:
    """Labels for `optax.multi_transform`: "train" under these top-level names of `params`, "freeze" elsewhere.

    Raises ValueError for a name that is not there.

    >>> import optax
    >>> params = {"base": {"w": jnp.ones(2)}, "lora": {"a": jnp.ones(2)}}
    >>> labels = train_labels(params, "lora")
    >>> labels
    {'base': {'w': 'freeze'}, 'lora': {'a': 'train'}}
    >>> tx = optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels)
    """
    if missing := sorted(set(trained) - set(params)):
        raise ValueError(f"no parameters are called {', '.join(missing)}; there are {', '.join(params)}")
    return {name: jax.tree.map(lambda _, name=name: _label(name in trained), tree) for name, tree in params.items()}


def _label(train: bool) -> str:
    return "train" if train else "freeze"


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(params):
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]]
