import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxskip.data import BPETokenizer
from jaxskip.models import Decoder, DecoderConfig
from jaxskip.models.decoder import RopeScaling
from jaxskip.models.weights import load, save_hugging_face
from jaxskip.models.weights.parameters import parameter_shapes

safetensors_numpy = pytest.importorskip("safetensors.numpy")

TINY = {"vocab_size": 96, "context_length": 32, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "mlp_dim": 48}
LLAMA = DecoderConfig(
    **TINY,
    num_kv_heads=2,
    head_dim=8,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    tie_embeddings=False,
    dtype=jnp.float32,
)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=16)
GPT2 = DecoderConfig(**TINY, use_bias=True, dtype=jnp.float32)
CONFIGS = {
    "llama": LLAMA,
    "llama tied": dataclasses.replace(LLAMA, tie_embeddings=True, rope_theta=500.0, num_kv_heads=4),
    "llama 3": dataclasses.replace(LLAMA, rope_theta=500_000.0, rope_scaling=SCALING),
    "llama biases": dataclasses.replace(LLAMA, use_bias=True),
    "llama wide heads": dataclasses.replace(LLAMA, head_dim=16),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True),
    "gpt2": GPT2,
    "gpt2 of mistral's authors": dataclasses.replace(GPT2, scale_attention_by_layer=True),
    "gpt2 untied": dataclasses.replace(GPT2, tie_embeddings=False),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 32))


def random_params(config, seed=0, dtype=np.float32):
    """Also biases and norms are random, unlike what `init` gives."""
    leaves, tree = jax.tree.flatten(parameter_shapes(config))
    random = np.random.default_rng(seed)
    values = [(0.3 * random.normal(size=leaf.shape) + (leaf.ndim < 3)).astype(dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, values)


def logits(config, params):
    return jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(TOKENS))


def rewrite(folder, change):
    """Applies `change` to the dictionary of tensors."""
    path = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    change(tensors)
    safetensors_numpy.save_file(tensors, path)


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_saved_is_loaded(config, tmp_path):
    params = random_params(config)
    save_hugging_face(tmp_path, config, params)
    loaded_config, loaded, tokenizer = load(tmp_path)
    implied = {"num_kv_heads": config.kv_heads} if config.position == "rotary" else {}
    assert (loaded_config, tokenizer) == (dataclasses.replace(config, **implied), None)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_dtypes(stored, wanted, tmp_path):
    params = random_params(LLAMA, dtype=stored)
    save_hugging_face(tmp_path, LLAMA, params)
    config, loaded, _ = load(tmp_path, dtype=wanted)
    assert (config.param_dtype, config.dtype) == (wanted, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(wanted), strict=True), loaded, params)


def test_several_files_and_their_index(tmp_path):
    params = random_params(LLAMA)
    save_hugging_face(tmp_path, LLAMA, params, max_file_bytes=20_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(path.stat().st_size < 22_000 for path in tmp_path.glob("*.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    (tmp_path / files[1]).unlink()
    with pytest.raises(FileNotFoundError, match=files[1]):
        load(tmp_path)
    index["weight_map"] = dict.fromkeys(index["weight_map"], files[0])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"lists tensor '.*', but {files[0]} does not hold it"):
        load(tmp_path)


def test_gpt2_without_biases_is_saved_with_zeros(tmp_path):
    config = dataclasses.replace(GPT2, use_bias=False)
    params = random_params(config)
    save_hugging_face(tmp_path, config, params)
    loaded_config, loaded, _ = load(tmp_path)
    assert loaded_config.use_bias and not loaded["layers"]["attention"]["key"]["bias"].any()
    np.testing.assert_allclose(logits(loaded_config, loaded), logits(config, params), rtol=1e-5, atol=1e-5)


def test_gpt2s_first_checkpoints_have_no_prefix_and_hold_masks(tmp_path):
    params = random_params(GPT2)
    save_hugging_face(tmp_path, GPT2, params)

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.uint8))
            tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)

    rewrite(tmp_path, change)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


def test_a_copy_of_the_tied_embedding_must_be_one(tmp_path):
    config = CONFIGS["llama tied"]
    save_hugging_face(tmp_path, config, random_params(config))
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "head" not in load(tmp_path)[1]
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' that differs.*tie_word_embeddings"):
        load(tmp_path)


def test_wrong_tensors_are_named(tmp_path):
    save_hugging_face(tmp_path, LLAMA, random_params(LLAMA))
    name = "model.layers.1.mlp.up_proj.weight"
    original = (tmp_path / "model.safetensors").read_bytes()

    def refused(match, change):
        (tmp_path / "model.safetensors").write_bytes(original)
        rewrite(tmp_path, change)
        with pytest.raises(ValueError, match=match):
            load(tmp_path)

    refused(f"lacks tensor '{name}'", lambda t: t.pop(name))
    other = "model.layers.1.mlp.up.weight"
    refused(f"lacks tensor '{name}'.*and holds tensor '{other}'", lambda t: t.update({other: t.pop(name)}))
    refused("holds 2 tensors .'a', 'b'.", lambda t: t.update({"a": t[name], "b": t[name]}))
    refused(rf"'{name}'.*\(32, 48\).*\(48, 32\)", lambda t: t.update({name: t[name].T.copy()}))
    refused(f"'{name}'.*type I8; .*F32, F16, BF16", lambda t: t.update({name: t[name].astype(np.int8)}))


def test_truncated_files_are_refused(tmp_path):
    save_hugging_face(tmp_path, LLAMA, random_params(LLAMA))
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    last = max(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"tensor '{last}' ends at byte {len(content)}, .*truncated"):
        load(tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="ends inside its header"):
        load(tmp_path)
    path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="cannot read .*as safetensors"):
        load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "bloom"}, r"model_type is 'bloom' .*\['gpt2', 'llama', 'mistral', 'qwen2'\]"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu' .*'silu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type is 'yarn' .*'llama3'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks the field 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"attention_bias": True}, "mlp_bias is False .*attention_bias, True"),
        ({"mlp_bias": True}, "mlp_bias is True .*attention_bias, False"),
        ({"model_type": "mistral", "sliding_window": 8}, "sliding_window is 8 .*at least max_position_embeddings, 32"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}, "sliding_window is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is .*not quantised"),
        ({"hidden_size": None}, "lacks the field 'hidden_size'"),
    ],
    ids=str,
)
def test_configurations_that_the_decoder_cannot_express(fields, match, tmp_path):
    save_hugging_face(tmp_path, LLAMA, random_params(LLAMA))
    configure(tmp_path, **fields)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 32},
        {"model_type": "mistral"},  # 4096 by default
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {"rope_scaling": None, "pretraining_tp": 1, "attention_dropout": 0.1, "num_key_value_heads": 2},
    ],
    ids=str,
)
def test_other_words_for_the_same_decoder(fields, tmp_path):
    save_hugging_face(tmp_path, LLAMA, random_params(LLAMA))
    configure(tmp_path, **fields)
    assert load(tmp_path)[0] == LLAMA


def test_what_no_family_has_is_not_saved(tmp_path):
    params = random_params(LLAMA)
    for change, match in (
        ({"norm": "layernorm"}, "position, norm and activation are"),
        ({"qkv_bias": False, "use_bias": True}, "qkv_bias False"),
        ({"scale_attention_by_layer": True}, "scale_attention_by_layer True"),
        ({"fused": True}, "fused is True"),
        ({"embed_dim": 64}, "params do not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            save_hugging_face(tmp_path / "new", dataclasses.replace(LLAMA, **change), params)
    with pytest.raises(ValueError, match="num_kv_heads is 2; GPT-2's is 4"):
        save_hugging_face(tmp_path / "new", dataclasses.replace(GPT2, num_kv_heads=2), params)
    assert not (tmp_path / "new").exists()
    save_hugging_face(tmp_path, LLAMA, params)
    with pytest.raises(FileExistsError, match="config.json"):
        save_hugging_face(tmp_path, LLAMA, params)


def test_tokenizers_of_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    config = dataclasses.replace(GPT2, vocab_size=300)
    own = BPETokenizer.train(["the cat sat on the mat"], vocab_size=264)
    save_hugging_face(tmp_path / "own", config, random_params(config), tokenizer=own)
    loaded = load(tmp_path / "own")[2]
    assert loaded is not None and loaded.encode("the mat").tolist() == own.encode("the mat").tolist()
    assert (loaded.bos_token, loaded.stop_tokens) == (None, ())

    configure(tmp_path / "own", bos_token_id=5, eos_token_id=7)
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    loaded = load(tmp_path / "own")[2]
    assert loaded is not None
    assert (loaded.bos_token, loaded.stop_tokens, loaded.end_of_text) == (5, (7, 9), own.end_of_text)

    # Qwen2's kind: composes characters, so that not every text comes back.
    composing = tokenizers.Tokenizer.from_file(str(tmp_path / "own" / "tokenizer.json"))
    composing.normalizer = tokenizers.normalizers.NFC()
    composing.save(str(tmp_path / "own" / "tokenizer.json"))
    loaded = load(tmp_path / "own")[2]
    assert loaded is not None and loaded.decode(loaded.encode("e\u0301")) == "\u00e9"

    save_hugging_face(tmp_path / "gpt2", config, random_params(config))
    symbols = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "<|endoftext|>"]
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\nt h\n")
    loaded = load(tmp_path / "gpt2")[2]
    assert loaded is not None and loaded.encode_special("th<|endoftext|>").tolist() == [256, 257]
    configure(tmp_path / "gpt2", vocab_size=200)
    rewrite(tmp_path / "gpt2", lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"][:200]}))
    with pytest.raises(ValueError, match="258 ids, the model 200.*tokenizer=False"):
        load(tmp_path / "gpt2")
    assert load(tmp_path / "gpt2", tokenizer=False)[2] is None


def peers(name):
    """A model of transformers and what its configuration says beyond the sizes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)
        return transformers.GPT2LMHeadModel(config)
    if name == "qwen2":
        config = transformers.Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True)
        return transformers.Qwen2ForCausalLM(config)
    if name == "mistral":
        config = transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=None, head_dim=16)
        return transformers.MistralForCausalLM(config)
    config = {"num_key_value_heads": 2, "tie_word_embeddings": name == "llama tied"}
    if name == "llama 3":
        config["rope_parameters"] = {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    if name == "llama biases":
        config |= {"attention_bias": True, "mlp_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **config))


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "llama tied", "llama 3", "llama biases", "qwen2", "mistral", "gpt2"])
def test_logits_are_those_of_transformers(name, tmp_path):
    """Their checkpoint read by us, and ours by them. Float32 in another order of summation, logits of about 1 to 10."""
    torch = pytest.importorskip("torch")
    theirs = peers(name).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that attention is not flat, and biases and norms count
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    theirs.save_pretrained(tmp_path / "theirs")
    config, params, _ = load(tmp_path / "theirs", tokenizer=False)
    np.testing.assert_allclose(logits(config, params), expected, rtol=1e-4, atol=1e-4)

    save_hugging_face(tmp_path / "ours", config, params)
    again = type(theirs) if name != "mistral" else pytest.importorskip("transformers").LlamaForCausalLM
    again, report = again.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(torch.tensor(TOKENS)).logits.numpy(), expected)
