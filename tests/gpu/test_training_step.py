"""The GPT-2 training step, compiled for NVIDIA GPUs that are not there: which attention, how much memory."""

import json

import pytest

from experiments.benchmarks.collectives import collectives
from tests.aot import GPU, H200, T4, TRAINING_STEP, compile_in_a_process, needs_cuda_plugin

pytestmark = [pytest.mark.gpu_aot, needs_cuda_plugin]


@pytest.mark.parametrize(
    ("target", "dtype", "batch", "attention", "memory"),
    [(H200, "bfloat16", 64, "cudnn", 151e9), (T4, "float32", 4, "xla", 15.6e9)],
    ids=["H200 bf16", "T4 f32"],
)
def test_the_training_step_fits_and_takes_the_attention_that_the_gpu_has(target, dtype, batch, attention, memory):
    changes = json.dumps({"dtype": dtype})
    result = compile_in_a_process(
        TRAINING_STEP, "cuda", "1x1x1", target, "gpt2-small", changes, str(batch), environment=GPU
    )
    assert result["attention"] == attention
    assert result["bytes"] < 0.95 * memory


def test_the_step_over_two_gpus_gathers_parameters_and_scatters_gradients():
    result = compile_in_a_process(TRAINING_STEP, "cuda", "1x2x1", H200, "gpt2-medium", "{}", "32", environment=GPU)
    found = collectives(result["hlo"])
    # Each 355M parameters in 16 bits, gathered for either direction; a device keeps half of the gradients' sum.
    assert 2 * 640 <= found["all-gather"]["mb"] <= 2 * 780
    assert 320 <= found["reduce-scatter"]["mb"] <= 390
    assert found["all-gather"]["runs"] >= 48 > found["all-gather"]["program"]
