import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxskip.models import (
    DECODER_PARTITION_RULES,
    Decoder,
    DecoderConfig,
    classifier,
    decay_mask,
    decoder_config,
    fuse_projections,
)
from jaxskip.training import make_mesh, param_shardings
from pallas_kernels.skip_attention import SkipSpec

TINY = {"vocab_size": 96, "context_length": 16, "num_layers": 2, "num_heads": 4, "embed_dim": 32, "dtype": jnp.float32}
GPT2 = DecoderConfig(**TINY, use_bias=True)
LLAMA = DecoderConfig(
    **TINY,
    num_kv_heads=2,
    mlp_dim=48,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    tie_embeddings=False,
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


def init(config, seed=0):
    return jax.jit(Decoder(config).init)(jax.random.key(seed), jnp.asarray(TOKENS))["params"]


def logits(config, params, tokens=TOKENS):
    return jax.jit(Decoder(config).apply)({"params": params}, jnp.asarray(tokens))


@pytest.mark.parametrize(
    ("preset", "count"), [("gpt2-small", 124_373_760), ("gpt2-medium", 354_599_936), ("gpt2-large", 773_582_080)]
)
def test_presets_have_nanogpts_parameter_counts(preset, count):
    """V D + T D + L (12 D^2 + 2 D) + D: the padded vocabulary and no biases."""
    model = Decoder(decoder_config(preset))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_initialisation_is_nanogpts():
    config = decoder_config("gpt2-tiny", vocab_size=512, embed_dim=256, num_heads=4, num_layers=8)
    params = init(config)
    layers = params["layers"]
    for plain in (params["embed"]["embedding"], layers["attention"]["query"]["kernel"], layers["mlp"]["up"]["kernel"]):
        np.testing.assert_allclose(plain.std(), 0.02, rtol=0.02)
    for residual in (layers["attention"]["out"]["kernel"], layers["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(residual.std(), 0.02 / np.sqrt(16), rtol=0.02)
    # Layers are drawn independently.
    assert abs(np.corrcoef(*layers["mlp"]["up"]["kernel"][:2].reshape(2, -1))[0, 1]) < 0.02
    assert (params["final_norm"]["scale"] == 1).all()


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_later_tokens_do_not_reach_earlier_logits(config):
    params = init(config)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % 96
    before, after = logits(config, params), logits(config, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert float(jnp.abs(before[:, 7:] - after[:, 7:]).max()) > 1e-3


@pytest.mark.parametrize("change", [{"remat": "dots"}, {"remat": "full"}, {"scan_unroll": 2}], ids=str)
def test_remat_and_unrolling_change_nothing_but_cost(change):
    """Same operations in another order of evaluation: float32 rounding only."""
    params = init(LLAMA)

    def gradient(config):
        loss = lambda p: jnp.mean(Decoder(config).apply({"params": p}, jnp.asarray(TOKENS)) ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, changed = gradient(LLAMA), gradient(dataclasses.replace(LLAMA, **change))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), plain, changed)


def test_layer_scale_divides_the_attention_logits_of_layer_i_by_i_plus_1():
    params = init(GPT2)
    scaled = logits(dataclasses.replace(GPT2, scale_attention_by_layer=True), params)
    by_hand = jax.tree.map(lambda x: x, params)
    query = by_hand["layers"]["attention"]["query"]
    scale = np.array([1.0, 0.5])
    by_hand["layers"]["attention"]["query"] = {
        "kernel": query["kernel"] * scale[:, None, None],
        "bias": query["bias"] * scale[:, None],
    }
    np.testing.assert_allclose(scaled, logits(GPT2, by_hand), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["tied", "separate head"])
def test_hidden_states_and_classifier_give_the_logits(config):
    params = init(config)
    hidden = Decoder(config).apply({"params": params}, jnp.asarray(TOKENS), return_hidden=True)
    matrix, layout = classifier(params, config)
    rebuilt = hidden @ (matrix.T if layout == "vd" else matrix)
    np.testing.assert_allclose(rebuilt, logits(config, params), rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(GPT2, dtype=jnp.bfloat16)
    params = init(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = logits(config, params)
    assert out.dtype == jnp.float32
    # bf16 has 8 bits: 0.4 % a rounding, a few of which add up over two layers; logits here are below 1.
    np.testing.assert_allclose(out, logits(GPT2, params), atol=0.02)


@pytest.mark.multidevice
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_sharded_logits_are_those_of_one_device(config, axes):
    params = init(config)
    mesh = make_mesh(*axes)
    sharded = jax.device_put(params, param_shardings(params, mesh, DECODER_PARTITION_RULES))
    tokens = np.concatenate([TOKENS] * 4)
    with jax.set_mesh(mesh):
        on_mesh = jax.jit(Decoder(config).apply)(
            {"params": sharded}, jax.device_put(tokens, jax.NamedSharding(mesh, P(("data", "fsdp"))))
        )
    np.testing.assert_allclose(on_mesh, logits(config, params, tokens), rtol=1e-4, atol=1e-6)


def test_tensor_axis_splits_every_matrix_of_a_layer():
    params = jax.eval_shape(lambda: Decoder(LLAMA).init(jax.random.key(0), jnp.asarray(TOKENS))["params"])
    mesh = make_mesh(2, 2, 2)
    for tree in (params, jax.eval_shape(lambda p: fuse_projections(p, LLAMA)[0], params)):
        specs = jax.tree.map(lambda s: s.spec, param_shardings(tree, mesh, DECODER_PARTITION_RULES))
        for module in ("attention", "mlp"):
            for name, projection in specs["layers"][module].items():
                (matrix,) = projection.values()
                assert {"tensor", "fsdp"} <= set(matrix), name


def test_decay_mask_names_matrices_only():
    mask = decay_mask(init(LLAMA))
    assert mask["head"] and mask["layers"]["mlp"]["down"]["kernel"]
    assert not mask["embed"]["embedding"] and not mask["layers"]["mlp_norm"]["scale"]
    assert not any(
        jax.tree.leaves(
            jax.tree.map(lambda a: a["bias"], decay_mask(init(GPT2))["layers"]["mlp"], is_leaf=lambda x: "bias" in x)
        )
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads 5"),
        ({"num_kv_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"position": "alibi"}, "must be one of"),
        ({"num_layers": 0}, "at least 1"),
        ({"position": "rotary", "head_dim": 7}, "even head width"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**TINY, **change})


def test_unknown_preset_long_sequence_and_float_tokens_are_refused():
    with pytest.raises(ValueError, match="gpt2-small"):
        decoder_config("gpt3")
    params = init(GPT2)
    with pytest.raises(ValueError, match="T <= 16"):
        Decoder(GPT2).apply({"params": params}, jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(TypeError, match="integers"):
        Decoder(GPT2).apply({"params": params}, jnp.zeros((1, 4)))


def _from_torch(state, config, names, *, transpose):
    """Our parameter tree from a Hugging Face state dict; `names` maps our leaf paths to theirs."""
    state = {name: value.numpy() for name, value in state.items()}
    tree = {}
    for ours, theirs in names.items():
        *parents, leaf = ours.split("/")
        if "{}" in theirs:
            value = np.stack([state[theirs.format(i)] for i in range(config.num_layers)])
        else:
            value = state[theirs]
        if leaf in ("kernel", "head") and transpose:
            value = value.swapaxes(-1, -2)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = jnp.asarray(value)
    return tree


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_hugging_faces_gpt2():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # so that biases and norms are no longer 0 and 1
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    layer = "transformer.h.{}."
    names = {
        "embed/embedding": "transformer.wte.weight",
        "positions/embedding": "transformer.wpe.weight",
        "final_norm/scale": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
    }
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        names |= {
            f"layers/attention/qkv/{leaf}": f"{layer}attn.c_attn.{kind}",
            f"layers/attention/out/{leaf}": f"{layer}attn.c_proj.{kind}",
            f"layers/mlp/up/{leaf}": f"{layer}mlp.c_fc.{kind}",
            f"layers/mlp/down/{leaf}": f"{layer}mlp.c_proj.{kind}",
        }
    for kind, leaf in (("weight", "scale"), ("bias", "bias")):
        names |= {
            f"layers/attention_norm/{leaf}": f"{layer}ln_1.{kind}",
            f"layers/mlp_norm/{leaf}": f"{layer}ln_2.{kind}",
        }
    params = _from_torch(theirs.state_dict(), GPT2, names, transpose=False)  # GPT-2's Conv1D is already [in, out]
    attention = params["layers"]["attention"]
    qkv = attention.pop("qkv")
    for i, name in enumerate(("query", "key", "value")):
        attention[name] = {leaf: jnp.split(value, 3, axis=-1)[i] for leaf, value in qkv.items()}
    np.testing.assert_allclose(logits(GPT2, params), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_of_hugging_faces_llama():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    layer = "model.layers.{}."
    names = {
        "embed/embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "final_norm/scale": "model.norm.weight",
        "layers/attention_norm/scale": f"{layer}input_layernorm.weight",
        "layers/mlp_norm/scale": f"{layer}post_attention_layernorm.weight",
    }
    names |= {
        f"layers/attention/{ours}/kernel": f"{layer}self_attn.{theirs_}_proj.weight"
        for ours, theirs_ in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o"))
    }
    names |= {f"layers/mlp/{name}/kernel": f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    params = _from_torch(theirs.state_dict(), LLAMA, names, transpose=True)
    np.testing.assert_allclose(logits(LLAMA, params), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change", [{}, {"remat": "full", "scan_unroll": 2}])
def test_attention_that_skips_gives_the_same_logits_and_gradients(change):
    """With all blocks below the diagonal kept; float32 sums in another order."""
    params = init(LLAMA)
    skip = SkipSpec.sliding(3, 4, window=3)

    def loss(params, config, **options):
        return jnp.square(Decoder(config).apply({"params": params}, jnp.asarray(TOKENS), **options)).mean()

    plain = jax.jit(jax.value_and_grad(lambda p: loss(p, LLAMA)))(params)
    config = dataclasses.replace(LLAMA, attention="skip", **change)
    skipping = jax.jit(jax.value_and_grad(lambda p: loss(p, config, skip=skip)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, skipping)


def test_documents_packed_into_a_row_do_not_see_each_other():
    """Rotary positions are relative: a packed document has the logits that it has alone."""
    params = init(LLAMA)
    segments = jnp.broadcast_to(jnp.arange(12)[None] // 5, (2, 12))
    packed = Decoder(LLAMA).apply({"params": params}, jnp.asarray(TOKENS), segments=segments)
    for start, stop in ((0, 5), (5, 10), (10, 12)):
        alone = logits(LLAMA, params, TOKENS[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, rtol=1e-4, atol=1e-4)


def test_other_attentions_refuse_to_leave_something_out():
    config = dataclasses.replace(LLAMA, attention="xla")
    with pytest.raises(ValueError, match="leaves nothing out"):
        Decoder(config).apply({"params": init(LLAMA)}, jnp.asarray(TOKENS), skip=SkipSpec.sliding(3, 4, window=1))
