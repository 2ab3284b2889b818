"""The whole GPT-2 training step, compiled for real TPUs: memory a chip and collectives."""

import math
import re

import pytest

from tests.aot import TPU, TRAINING_STEP, compile_in_a_process

pytestmark = pytest.mark.tpu_aot
pytest.importorskip("libtpu")

HBM = {"v5e:2x2": 16 * 2**30, "v6e:2x2": 32 * 2**30}
WIDTH = {"gpt2-small": 768, "gpt2-large": 1280}
SIZE = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(hlo: str) -> list[tuple[str, str, int]]:
    """(kind, dtype, bytes of the result) of every collective."""
    found = re.findall(
        r"= (bf16|f32|s32|u32)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", hlo
    )
    return [(kind, dtype, SIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims, kind in found]


@pytest.mark.parametrize("topology", HBM)
@pytest.mark.parametrize(("preset", "batch"), [("gpt2-small", 64), ("gpt2-large", 16)])
def test_the_training_step_fits_and_gathers_one_layer_at_a_time(preset, batch, topology, record_property):
    result = compile_in_a_process(TRAINING_STEP, "tpu", topology, "", preset, "{}", str(batch), environment=TPU)
    record_property("bytes_per_chip", result["bytes"])
    print(f"{preset} on {topology}, {batch} x 1024: {result['bytes'] / 2**30:.2f} GiB a chip")
    assert result["bytes"] < 0.95 * HBM[topology]
    # Parameters, two moments and the batch are a quarter each, and all but the batch is updated in place.
    assert result["aliased"] > 0.98 * (result["arguments"] - 2 * batch * 1024 * 4)
    width = WIDTH[preset]
    found = collectives(result["hlo"])
    gathered = [(dtype, size) for kind, dtype, size in found if kind == "all-gather"]
    one_layer, classifier = 2 * 4 * width * width, 2 * 50304 * width
    # FSDP gathers 16-bit weights: one matrix of one layer, once the classifier; never the stack, never float32.
    assert gathered and all(dtype != "f32" for dtype, _ in gathered)
    assert all(size <= one_layer or size == classifier for _, size in gathered)
    assert sum(size == classifier for _, size in gathered) == 1
    # Activations move only where the embedding's gradient is split by columns instead of rows.
    assert sum(kind == "all-to-all" for kind, *_ in found) <= 1
