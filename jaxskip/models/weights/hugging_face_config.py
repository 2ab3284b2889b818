"""config.json of Hugging Face's Llama, Qwen2, Mistral and GPT-2 as a decoder's configuration, and back."""

import pathlib
from typing import Any

from jaxskip.models.decoder import DecoderConfig, RopeScaling

_MODEL_TYPES = ("gpt2", "llama", "mistral", "qwen2")


class _Fields:
    """The fields of one config.json; errors name the field, its value and what is allowed."""

    def __init__(self, fields: dict[str, Any], path: pathlib.Path):
        self.fields, self.path = fields, path

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value; the default where it is absent or null."""
        value = self.fields.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise ValueError(f"{self.path} lacks the field {name!r}")
        return value

    def only(self, name: str, *allowed, default) -> Any:
        """The field's value, which must be one of `allowed` or the default (meant where it is absent)."""
        if (value := self.get(name, default)) not in (*allowed, default):
            raise self.refusal(name, value, f"one of {[*dict.fromkeys((*allowed, default))]}")
        return value

    def refusal(self, name: str, value, wanted: str) -> ValueError:
        return ValueError(f"{name} is {value!r} in {self.path}; this decoder takes {wanted}")


def read(fields: dict[str, Any], path: pathlib.Path, dtype) -> DecoderConfig:
    """The decoder that config.json, read from `path`, describes; parameters and computation in `dtype`.

    Raises ValueError for what the decoder cannot express, naming the field, its value and what is allowed.
    """
    f = _Fields(fields, path)
    if (family := f.get("model_type")) not in _MODEL_TYPES:
        raise f.refusal("model_type", family, f"one of {list(_MODEL_TYPES)}")
    if (method := f.get("quantization_config")) is not None:
        raise f.refusal("quantization_config", method, "weights that are not quantised")
    settings = _gpt2(f) if family == "gpt2" else _llama(f, family)
    return DecoderConfig(vocab_size=f.need("vocab_size"), dtype=dtype, param_dtype=dtype, **settings)


def _gpt2(f: _Fields) -> dict[str, Any]:
    f.only("activation_function", "gelu_pytorch_tanh", default="gelu_new")
    f.only("scale_attn_weights", default=True)
    f.only("add_cross_attention", default=False)
    return {
        "context_length": f.need("n_positions"),
        "num_layers": f.need("n_layer"),
        "num_heads": f.need("n_head"),
        "embed_dim": f.need("n_embd"),
        "mlp_dim": f.get("n_inner"),
        "position": "learned",
        "norm": "layernorm",
        "norm_eps": f.get("layer_norm_epsilon", 1e-5),
        "activation": "gelu",
        "use_bias": True,
        "tie_embeddings": f.only("tie_word_embeddings", False, default=True),
        "scale_attention_by_layer": f.only("scale_attn_by_inverse_layer_idx", True, default=False),
    }


def _llama(f: _Fields, family: str) -> dict[str, Any]:
    f.only("hidden_act", "swish", default="silu")
    context = f.need("max_position_embeddings")
    # Mistral's window is on unless it is null; Qwen2's is off unless it is asked for.
    if family == "mistral" or (family == "qwen2" and f.get("use_sliding_window", False)):
        window = f.fields.get("sliding_window", 4096)
        if window is not None and window < context:
            raise f.refusal(
                "sliding_window",
                window,
                f"null or at least max_position_embeddings, {context} (lowering that to {window} there makes a model "
                "of shorter texts)",
            )
    bias = False
    if family == "llama":
        bias = f.only("attention_bias", True, default=False)
        if f.get("mlp_bias", False) != bias:
            raise f.refusal("mlp_bias", not bias, f"the value of attention_bias, {bias}")
    theta, scaling = _rope(f)
    return {
        "context_length": context,
        "num_layers": f.need("num_hidden_layers"),
        "num_heads": f.need("num_attention_heads"),
        "num_kv_heads": f.get("num_key_value_heads"),
        "head_dim": f.get("head_dim"),
        "embed_dim": f.need("hidden_size"),
        "mlp_dim": f.need("intermediate_size"),
        "position": "rotary",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm": "rmsnorm",
        "norm_eps": f.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "use_bias": bias,
        "qkv_bias": True if family == "qwen2" else None,
        "tie_embeddings": f.only("tie_word_embeddings", True, default=False),
    }


def _rope(f: _Fields) -> tuple[float, RopeScaling | None]:
    # transformers 5 has one field, rope_parameters, for what were rope_theta and rope_scaling (its type: "type").
    name = "rope_parameters" if f.get("rope_parameters") else "rope_scaling"
    rope = f.get(name, {})
    theta = rope.get("rope_theta", f.get("rope_theta", 10_000.0))
    if (partial := rope.get("partial_rotary_factor", f.get("partial_rotary_factor", 1.0))) != 1:
        raise f.refusal("partial_rotary_factor", partial, "1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise f.refusal(f"{name}'s rope_type", kind, "'default' or 'llama3'")
    wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if lacking := [field for field in wanted if field not in rope]:
        raise ValueError(f"{name} in {f.path} lacks the field {lacking[0]!r}")
    return float(theta), RopeScaling(*(rope[field] for field in wanted))


def written(config: DecoderConfig) -> dict[str, Any]:
    """config.json of the family that computes what `config` says. ValueError where there is none."""
    style = (config.position, config.norm, config.activation)
    if config.fused:
        raise ValueError("fused is True; no family of Hugging Face has fused matrices, save the unfused parameters")
    if style == ("learned", "layernorm", "gelu"):
        return _written_gpt2(config)
    if style != ("rotary", "rmsnorm", "swiglu"):
        raise ValueError(
            f"position, norm and activation are {style}; a Hugging Face folder can hold "
            "('learned', 'layernorm', 'gelu') and ('rotary', 'rmsnorm', 'swiglu')"
        )
    return _written_llama(config)


def _written_gpt2(config: DecoderConfig) -> dict[str, Any]:
    own = {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    for name, wanted in (("num_kv_heads", config.num_heads), ("head_dim", config.embed_dim / config.num_heads)):
        if own[name] != wanted:
            raise ValueError(f"{name} is {own[name]}; GPT-2's is {wanted:g} with these heads and this width")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.embed_dim,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "scale_attn_by_inverse_layer_idx": config.scale_attention_by_layer,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _written_llama(config: DecoderConfig) -> dict[str, Any]:
    biases = (config.use_bias, config.use_bias if config.qkv_bias is None else config.qkv_bias)
    if biases == (True, False) or config.scale_attention_by_layer:
        raise ValueError(
            f"use_bias is {config.use_bias}, qkv_bias {config.qkv_bias}, scale_attention_by_layer "
            f"{config.scale_attention_by_layer}; Llama and Qwen2 have all biases, none, or those of query, key and "
            "value, and do not scale attention by layer"
        )
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if biases == (False, True):
        fields |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
        del fields["attention_bias"], fields["mlp_bias"]
    if (scaling := config.rope_scaling) is not None:
        fields["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return fields
