"""The GPT-2 training step, compiled for NVIDIA GPUs that are not there: which attention, how much memory."""

import importlib.util
import json

import pytest

from tests.aot import TRAINING_STEP, compile_in_a_process

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)), reason="no CUDA plugin wheel"
    ),
]

_COMMON = """threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 fpus_per_core: 64
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
 registers_per_block_limit: 65536"""
H200 = f"""gpu_device_info {{ {_COMMON} shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
 threads_per_core_limit: 2048 core_count: 132 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
 clock_rate_ghz: 1.98 device_memory_size: 151397597184 cuda_compute_capability {{ major: 9 minor: 0 }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "NVIDIA H200\""""
T4 = f"""gpu_device_info {{ {_COMMON} shared_memory_per_core: 65536 shared_memory_per_block_optin: 65536
 threads_per_core_limit: 1024 core_count: 40 memory_bandwidth: 320000000000 l2_cache_size: 4194304
 clock_rate_ghz: 1.59 device_memory_size: 15655829504 cuda_compute_capability {{ major: 7 minor: 5 }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "Tesla T4\""""


@pytest.mark.parametrize(
    ("target", "dtype", "batch", "attention", "memory"),
    [(H200, "bfloat16", 64, "cudnn", 151e9), (T4, "float32", 4, "xla", 15.6e9)],
    ids=["H200 bf16", "T4 f32"],
)
def test_the_training_step_fits_and_takes_the_attention_that_the_gpu_has(target, dtype, batch, attention, memory):
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    }
    changes = json.dumps({"dtype": dtype})
    result = compile_in_a_process(
        TRAINING_STEP, "cuda", "1x1x1", target, "gpt2-small", changes, str(batch), environment=environment
    )
    assert result["attention"] == attention
    assert result["bytes"] < 0.95 * memory
