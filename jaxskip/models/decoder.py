"""One decoder-only transformer whose configuration covers GPT-2 and Llama.

Shape letters: B batch, T tokens, D width, H query heads, G key/value heads, K head width, F feed-forward width,
V vocabulary, L layers. Parameters of the L layers are stacked on a leading axis and run by one scan.
"""

import dataclasses
import re
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and style of a decoder. Hashable, so it may be a static argument.

    Attributes:
      vocab_size: V, rows of the token embedding.
      context_length: most tokens a sequence may have (the table's length for learned positions).
      num_layers, num_heads, embed_dim: L, H, D.
      num_kv_heads: G, key/value heads shared by H / G query heads each; None means H.
      head_dim: K; None means D / H.
      mlp_dim: F; None means 4 D.
      position: "learned" (GPT-2) or "rotary" (Llama, halves rotated as in Hugging Face's implementation).
      norm: "layernorm" or "rmsnorm".
      activation: "gelu" (tanh form, one matrix up) or "swiglu" (gate and up).
      use_bias: biases in projections and LayerNorm; Sophia's and nanoGPT's pre-training set-ups have none.
      tie_embeddings: the classifier is the token embedding; otherwise a matrix "head" [D, V] of its own.
      scale_attention_by_layer: divide attention logits by (layer index + 1), as the Sophia authors do.
      init_std: standard deviation of all weights; residual projections use init_std / sqrt(2 L).
      dtype: activations and matrix products; norms and softmax accumulate in float32.
      param_dtype: parameters.
      remat: "none", "dots" (keep matrix products, recompute the rest) or "full" (keep only each layer's input).
      attention: "xla", "cudnn", or None for cuDNN's flash attention where it can run (NVIDIA compute capability
        8.0 or later, 16-bit dtype) and XLA elsewhere.
      scan_unroll: layers per iteration of the scan; L removes the loop (faster on GPU, longer to compile).
    """

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    embed_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    position: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = False
    tie_embeddings: bool = True
    scale_attention_by_layer: bool = False
    init_std: float = 0.02
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.float32
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["xla", "cudnn"] | None = None
    scan_unroll: int = 1

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {allowed}")
        for name in ("vocab_size", "context_length", "num_layers", "num_heads", "embed_dim", "scan_unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; or give head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, not {self.head_width}")

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """K."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        """F."""
        return 4 * self.embed_dim if self.mlp_dim is None else self.mlp_dim


_CHOICES = {
    "position": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "remat": ("none", *REMAT_POLICIES),
    "attention": (None, "xla", "cudnn"),
}

_GPT2 = {"vocab_size": 50304, "context_length": 1024}
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-tiny": {"vocab_size": 256, "context_length": 64, "num_layers": 2, "num_heads": 2, "embed_dim": 64},
    "gpt2-small": {**_GPT2, "num_layers": 12, "num_heads": 12, "embed_dim": 768},
    "gpt2-medium": {**_GPT2, "num_layers": 24, "num_heads": 16, "embed_dim": 1024},
    "gpt2-large": {**_GPT2, "num_layers": 36, "num_heads": 20, "embed_dim": 1280},
}


def decoder_config(preset: str, **overrides) -> DecoderConfig:
    """A named configuration with some fields replaced.

    The GPT-2 presets are nanoGPT's pre-training shapes (no biases, tied head, vocabulary padded to 50,304):
    124,373,760, 354,599,936 and 773,582,080 parameters. "gpt2-tiny" is for a laptop: bytes, 2 layers, width 64.

    >>> decoder_config("gpt2-small", remat="dots").num_layers
    12
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown model {preset!r}; it must be one of {sorted(PRESETS)}")
    return DecoderConfig(**{**PRESETS[preset], **overrides})


def attention_implementation(config: DecoderConfig) -> Literal["xla", "cudnn"]:
    """The attention that `config.attention` means on the target of this program."""
    if config.attention is not None:
        return config.attention
    target = dispatch.target()
    flash = (
        target.platform == "gpu"
        and (target.compute_capability or (0, 0)) >= (8, 0)
        and jnp.dtype(config.dtype).itemsize == 2
        and config.head_width % 8 == 0
        and config.head_width <= 128
    )
    return "cudnn" if flash else "xla"


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., T, K/2] in float32 of rotary position embedding (arXiv 2104.09864).

    >>> cos, sin = rotary_tables(jnp.arange(3), 8, 10_000.0)
    >>> cos.shape, float(sin[0, 0])
    ((3, 4), 0.0)
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x_BxTxHxK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first half of each head against the second, in float32; the dtype is kept."""
    cos, sin = (table[None, :, None, :] for table in tables)
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


# Norms and activations are recomputed in the backward pass whatever `remat` says: from their 16-bit input, which is
# kept anyway, instead of from float32 intermediates that would have to be written and read.
def _norm(config: DecoderConfig, name: str) -> nn.Module:
    style = {"epsilon": config.norm_eps, "dtype": config.dtype, "param_dtype": config.param_dtype, "name": name}
    if config.norm == "rmsnorm":
        return nn.remat(nn.RMSNorm)(**style)
    return nn.remat(nn.LayerNorm)(use_bias=config.use_bias, **style)


def _projection(config: DecoderConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    std = config.init_std / (2 * config.num_layers) ** 0.5 if residual else config.init_std
    return nn.Dense(
        features,
        use_bias=config.use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(std),
        name=name,
    )


@jax.checkpoint
def _gelu(x):
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


@jax.checkpoint
def _swiglu(gate, up):
    return (nn.silu(gate.astype(jnp.float32)) * up).astype(up.dtype)


class Attention(nn.Module):
    """Causal self-attention [B, T, D] -> [B, T, D] with grouped key/value heads."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, layer_scale, rotary):
        c = self.config
        heads = (*x_BxTxD.shape[:2], -1, c.head_width)
        q = _projection(c, c.num_heads * c.head_width, "query")(x_BxTxD).reshape(heads)
        k = _projection(c, c.kv_heads * c.head_width, "key")(x_BxTxD).reshape(heads)
        v = _projection(c, c.kv_heads * c.head_width, "value")(x_BxTxD).reshape(heads)
        if rotary is not None:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if c.scale_attention_by_layer:
            q = q * layer_scale.astype(q.dtype)
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention_implementation(c))
        return _projection(c, c.embed_dim, "out", residual=True)(out.reshape(*x_BxTxD.shape[:2], -1))


class FeedForward(nn.Module):
    """Position-wise feed-forward block [B, T, D] -> [B, T, D]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        hidden = _projection(c, c.mlp_width, "up")(x_BxTxD)
        if c.activation == "swiglu":
            hidden = _swiglu(_projection(c, c.mlp_width, "gate")(x_BxTxD), hidden)
        else:
            hidden = _gelu(hidden)
        return _projection(c, c.embed_dim, "down", residual=True)(hidden)


class Block(nn.Module):
    """Pre-norm layer; returns (hidden states [B, T, D], None) as a scan body must."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BxTxD, layer_scale, rotary):
        c = self.config
        x_BxTxD = x_BxTxD + Attention(c, name="attention")(_norm(c, "attention_norm")(x_BxTxD), layer_scale, rotary)
        x_BxTxD = x_BxTxD + FeedForward(c, name="mlp")(_norm(c, "mlp_norm")(x_BxTxD))
        return x_BxTxD, None


class Decoder(nn.Module):
    """Decoder-only language model: GPT-2 or Llama, by configuration.

    `apply(variables, tokens)` with tokens int [B, T], T <= context_length, gives float32 logits [B, T, V];
    with `return_hidden=True` the normalised hidden states [B, T, D] in `config.dtype`, which together with
    `classifier(params, config)` feed a fused loss that never builds the logits.
    Token ids are not checked here (a traced value cannot raise): the data pipeline does it.

    Raises ValueError for a sequence longer than the context and TypeError for tokens that are not integers.

    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> tokens = jnp.zeros((1, 8), jnp.int32)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape
    (1, 8, 256)
    """

    config: DecoderConfig

    @nn.compact
    def __call__(self, tokens_BxT, *, return_hidden: bool = False):
        c = self.config
        if not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, not {tokens_BxT.dtype}")
        if tokens_BxT.ndim != 2 or tokens_BxT.shape[1] > c.context_length:
            raise ValueError(f"tokens have shape {tokens_BxT.shape}; wanted [B, T] with T <= {c.context_length}")
        length = tokens_BxT.shape[1]
        table = {
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
            "embedding_init": nn.initializers.normal(c.init_std),
        }
        embed = nn.Embed(c.vocab_size, c.embed_dim, name="embed", **table)
        x = embed(tokens_BxT)
        rotary = None
        if c.position == "learned":
            x = x + nn.Embed(c.context_length, c.embed_dim, name="positions", **table)(jnp.arange(length))[None]
        else:
            rotary = rotary_tables(jnp.arange(length), c.head_width, c.rope_theta)

        block = Block
        if c.remat != "none":
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            unroll=min(c.scan_unroll, c.num_layers),
        )
        layer_scale = 1.0 / (1.0 + jnp.arange(c.num_layers, dtype=jnp.float32))
        x, _ = layers(c, name="layers")(x, layer_scale, rotary)
        x = _norm(c, "final_norm")(x)
        if return_hidden:
            return x
        if c.tie_embeddings:
            matrix, layout = embed.embedding, "vd"
        else:
            init = nn.initializers.normal(c.init_std)
            matrix, layout = self.param("head", init, (c.embed_dim, c.vocab_size), c.param_dtype), "dv"
        # Flattened because the CPU backend of JAX 0.7 lacks the 16-bit product with a float32 result in the 3-D form.
        rows = x.reshape(-1, c.embed_dim)
        logits = jnp.einsum(f"nd,{layout}->nv", rows, matrix.astype(c.dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*tokens_BxT.shape, c.vocab_size)


def classifier(params, config: DecoderConfig) -> tuple[jax.Array, Literal["vd", "dv"]]:
    """The output matrix in `config.dtype` and its layout, for `linear_cross_entropy`.

    "vd" is [V, D] (the tied embedding), "dv" is [D, V] (a head of its own).

    >>> model = Decoder(decoder_config("gpt2-tiny"))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    >>> matrix, layout = classifier(params, model.config)
    >>> matrix.shape, layout
    ((256, 64), 'vd')
    """
    if config.tie_embeddings:
        return params["embed"]["embedding"].astype(config.dtype), "vd"
    return params["head"].astype(config.dtype), "dv"


# Parameter path -> how its axes lie on the mesh. Layers are stacked, so the first axis of "layers/..." is L.
# Columns of what enters a block and rows of what leaves it are split over "tensor": one all-reduce a block.
PARTITION_RULES = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"positions/embedding", P(None, "fsdp")),
    (r"layers/.*/(query|key|value|up|gate)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(query|key|value|up|gate)/bias", P(None, "tensor")),
    (r"layers/.*/(out|down)/kernel", P(None, "tensor", "fsdp")),
    (r"layers/.*/(out|down)/bias", P()),
    (r"(layers/.*|final)_norm/(scale|bias)", P()),
    (r"head", P("fsdp", "tensor")),
)


def decay_mask(params) -> Any:
    """True for the matrices of the layers and a separate head, the weights that the Sophia authors decay.

    Embeddings (also when they are the tied classifier), norms and biases are left out.

    >>> decay_mask({"embed": {"embedding": 0}, "layers": {"mlp": {"up": {"kernel": 0, "bias": 0}}}})
    {'embed': {'embedding': False}, 'layers': {'mlp': {'up': {'bias': False, 'kernel': True}}}}
    """

    def decayed(path, _):
        return (
            re.fullmatch(r"layers/.*/kernel|head", jax.tree_util.keystr(path, simple=True, separator="/")) is not None
        )

    return jax.tree_util.tree_map_with_path(decayed, params)
