"""Reading prompts and decoding, compiled for real TPUs: memory a chip, and conditionals that make skipping real."""

import json

import pytest

from tests.aot import DECODING, TPU, compile_in_a_process
from tests.skipping.hlo import sliced_weights

pytestmark = pytest.mark.tpu_aot
pytest.importorskip("libtpu")

HBM = {"v5e": 16 * 2**30, "v6e": 32 * 2**30}
LLAMA = {"context_length": 4096, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}
MODELS = {
    "smollm2": {"vocab_size": 49152, "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "embed_dim": 576,
                "mlp_dim": 1536},
    "llama-1b": {"vocab_size": 128_256, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 2048,
                 "mlp_dim": 8192},
    "llama-8b": {"vocab_size": 128_256, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 4096,
                 "mlp_dim": 14336, "tie_embeddings": False},
}  # fmt: skip
CHIPS = {"smollm2": 1, "llama-1b": 1, "llama-8b": 8}
BATCH, PROMPT, NEW = 8, 512, 512


@pytest.mark.parametrize("chip", HBM)
@pytest.mark.parametrize("name", MODELS)
def test_decoding_fits_and_skips_in_conditionals(name, chip, record_property):
    """FFN-SkipLLM, which decides token by token; the weights of a block are sliced inside the branch that uses them."""
    fields = MODELS[name]
    result = compile_in_a_process(
        DECODING, "tpu", f"{chip}:2x4", "", json.dumps(LLAMA | fields), "FFNSkip()", str(CHIPS[name]), str(BATCH),
        str(PROMPT), str(NEW), "stacked", environment=TPU,
    )  # fmt: skip
    for program in ("prefill", "decode"):
        used = result[program]["bytes"]
        record_property(program, used)
        print(f"{name} on {CHIPS[name]} x {chip}, {program}: {used / 2**30:.2f} GiB a chip")
        assert used < 0.95 * HBM[chip]
    cache = 2 * fields["num_layers"] * BATCH * (PROMPT + NEW) * fields["num_kv_heads"] * 2
    cache *= fields["embed_dim"] // fields["num_heads"]
    assert result["cache"] == cache
    # The cache is updated in place from call to call, and split over the chips.
    assert result["decode"]["aliased"] >= cache / CHIPS[name]
    # No slice of a stacked feed-forward matrix outside a branch.
    width = fields["mlp_dim"] // CHIPS[name]
    shape = f"{fields['embed_dim']},{width}|{width},{fields['embed_dim']}"
    inside, outside = sliced_weights(result["decode"]["hlo"], shape)
    assert inside >= 3 and outside == 0
