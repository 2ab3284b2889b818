"""The GPT-2 training step, compiled for NVIDIA GPUs that are not there: which attention, how much memory."""

import importlib.util

import pytest

from tests.aot import compile_in_a_process

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)), reason="no CUDA plugin wheel"
    ),
]

PROGRAM = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxskip import training
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, decay_mask, decoder_config
from jaxskip.models.decoder import attention_implementation

target, dtype, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
axes = ("data", "fsdp", "tensor")
mesh = jax.sharding.Mesh(np.array(topology.devices).reshape(1, 1, 1), axes, axis_types=(AxisType.Auto,) * 3)
config = decoder_config("gpt2-small", dtype=jnp.dtype(dtype))
# cuDNN's attention is chosen but not compiled: its plan is built on the device, by a library that is not here.
model = Decoder(dataclasses.replace(config, attention="xla", remat="dots"))
tx = training.make_optimizer("sophia_g", 1e-4, weight_decay_mask=decay_mask)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state = training.abstract_state(
        lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], tx, mesh, DECODER_PARTITION_RULES)
    rows = jax.ShapeDtypeStruct((batch, 1024), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    step = training.make_train_step(training.next_token_loss(model), tx)
    m = step.lower(state, {"inputs": rows, "targets": rows}).compile().memory_analysis()
    attention = attention_implementation(config)
print(json.dumps({
    "bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes,
    "attention": attention}))
"""

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
    result = compile_in_a_process(PROGRAM, target, dtype, str(batch), environment=environment)
    assert result["attention"] == attention
    assert result["bytes"] < 0.95 * memory
