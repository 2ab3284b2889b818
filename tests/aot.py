"""Ahead-of-time compilation for accelerators that are not there.

Runs a program in a process of its own (a compiler's failure can end Python, and the target is chosen before JAX is
imported) and returns the last line of its output as JSON.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


GPU = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}


def gpu_target(name: str, major: int, minor: int, shared_kib: int, cores: int, l2_mib: int, memory: int) -> str:
    """The target configuration of an NVIDIA GPU: `shared_kib` is what one block may use, `memory` is in bytes."""
    threads = 1024 if major < 8 else 2048
    return f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
 registers_per_block_limit: 65536 fpus_per_core: 128 clock_rate_ghz: 1.6 memory_bandwidth: 1000000000000
 shared_memory_per_core: {(shared_kib + 1) * 1024} shared_memory_per_block_optin: {shared_kib * 1024}
 threads_per_core_limit: {threads} core_count: {cores} l2_cache_size: {l2_mib * 2**20} device_memory_size: {memory}
 cuda_compute_capability {{ major: {major} minor: {minor} }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}\""""


H200 = gpu_target("NVIDIA H200", 9, 0, 227, 132, 50, 151_397_597_184)
A100 = gpu_target("NVIDIA A100-SXM4-80GB", 8, 0, 163, 108, 40, 85_000_000_000)
L4 = gpu_target("NVIDIA L4", 8, 9, 99, 58, 48, 24_000_000_000)
T4 = gpu_target("Tesla T4", 7, 5, 64, 40, 4, 15_655_829_504)
needs_cuda_plugin = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13)), reason="no CUDA plugin wheel"
)
# To lower a kernel for CUDA no plugin is needed.
needs_mosaic_gpu = pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="Mosaic GPU of this JAX is too old")


def compile_in_a_process(program: str, *arguments: str, environment: dict[str, str], timeout: float = 900):
    """What `program` (Python source) prints last, parsed; its stderr is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        cwd=pathlib.Path(__file__).resolve().parent.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def compile_mosaic_kernels(program: str, *arguments: str, folder: pathlib.Path):
    """`compile_in_a_process` for a GPU, and what the assembler said of the Mosaic kernels: bytes "spilled" by all, and
    "registers" of each (none by JAX that does not write it into the empty `folder`)."""
    dump = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    found = compile_in_a_process(program, *arguments, environment=GPU | dump)
    text = "".join(path.read_text() for path in folder.glob("*.ptxas"))
    found["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill", text)))
    found["registers"] = list(map(int, re.findall(r"Used (\d+) registers", text)))
    return found


# Compiles the training step of a preset with Sophia's state on all devices of a topology, laid along "fsdp".
# Arguments: platform, topology name, target configuration ("" on TPU), preset, changes of its fields (JSON), batch.
TRAINING_STEP = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxskip import training
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, decay_mask, decoder_config
from jaxskip.models.decoder import attention_implementation

platform, topology, target, preset, changes, batch = sys.argv[1:]
named = {"target_config": target, "topology": topology} if target else {"topology_name": topology}
devices = topologies.get_topology_desc(platform=platform, **named).devices
axes = ("data", "fsdp", "tensor")
mesh = jax.sharding.Mesh(np.array(devices).reshape(1, -1, 1), axes, axis_types=(AxisType.Auto,) * 3)
config = decoder_config(preset, **json.loads(changes))
# cuDNN's attention is chosen but not compiled: its plan is built on the device, by a library that is not here.
model = Decoder(dataclasses.replace(config, attention="xla", remat="dots"))
tx = training.make_optimizer("sophia_g", 1e-4, weight_decay_mask=decay_mask)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state = training.abstract_state(
        lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"], tx, mesh, DECODER_PARTITION_RULES)
    rows = jax.ShapeDtypeStruct((int(batch), 1024), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    step = training.make_train_step(training.next_token_loss(model), tx)
    compiled = step.lower(state, {"inputs": rows, "targets": rows}).compile()
    attention = attention_implementation(config)
m = compiled.memory_analysis()
print(json.dumps({
    "bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes,
    "arguments": m.argument_size_in_bytes, "aliased": m.alias_size_in_bytes, "attention": attention,
    "hlo": compiled.as_text()}))
"""


# Compiles the reading of prompts and a chunk of decoding on the first chips of a topology, laid along "tensor".
# Arguments: platform, topology name, target configuration ("" on TPU), fields of the decoder (JSON), the policy (an
# expression over jaxskip.skipping), chips, batch, prompt slots, room for new tokens, "stacked" or "unrolled".
DECODING = """
import importlib, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxskip import skipping, training
from jaxskip.models import DECODER_PARTITION_RULES, Decoder, DecoderConfig
from jaxskip.skipping import cache as caches

programs = importlib.import_module("jaxskip.skipping.generate")
platform, topology, target, fields, policy, *numbers, form = sys.argv[1:]
chips, batch, prompt, room = map(int, numbers)
named = {"target_config": target, "topology": topology} if target else {"topology_name": topology}
devices = topologies.get_topology_desc(platform=platform, **named).devices[:chips]
axes = ("data", "fsdp", "tensor")
mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 1, -1), axes, axis_types=(AxisType.Auto,) * 3)
config = DecoderConfig(**json.loads(fields), param_dtype=jnp.bfloat16, attention="xla")
policy = eval(policy, vars(skipping))
whole = NamedSharding(mesh, P())
place = lambda tree, sharding: jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding)
alike = lambda tree: place(tree, jax.tree.map(lambda _: whole, tree))
plain = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
layout, rows = policy.layout(config.num_layers), jnp.zeros((1, 8), jnp.int32)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    params = jax.eval_shape(lambda key: Decoder(config).init(key, rows)["params"], jax.random.key(0))
    params = place(params, training.param_shardings(params, mesh, DECODER_PARTITION_RULES))
    if form == "unrolled":
        rules = [(pattern, P(*spec[1:]) if "layers" in pattern else spec) for pattern, spec in DECODER_PARTITION_RULES]
        shapes = jax.eval_shape(skipping.unstack_layers, params)
        params = place(shapes, training.param_shardings(shapes, mesh, rules))
    sharding = programs._cache_sharding(config, params, batch, form == "stacked")
    cache = jax.eval_shape(lambda: caches.empty_cache(config, layout, batch, prompt, room, form == "stacked"))
    cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or whole), cache)
    lengths, key = plain((batch,), jnp.int32), alike(jax.eval_shape(lambda: jax.random.key(0)))
    prefill = programs._prefill.lower(config, policy, params, None, plain((batch, prompt), jnp.int32), lengths, cache)
    state = alike(prefill.out_info[2])
    count = plain((), jnp.int32)
    loop = programs.Loop(cache, state, lengths, plain((batch,), bool), plain((config.num_layers, 2), jnp.int32), count)
    decode = programs._decode_chunk.lower(
        config, policy, skipping.Sampling(), 16, params, None, loop, lengths, count, count, count,
        plain((1,), jnp.int32), key)
    found = {}
    for name, lowered in (("prefill", prefill), ("decode", decode)):
        compiled = lowered.compile()
        m = compiled.memory_analysis()
        found[name] = {
            "bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes,
            "arguments": m.argument_size_in_bytes, "temporary": m.temp_size_in_bytes,
            "aliased": m.alias_size_in_bytes, "hlo": compiled.as_text()}
found["cache"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
print(json.dumps(found))
"""


# Compiles a training step of a decoder as a pipeline of 4 stages x 2 replicas, AdamW with a clip included.
# Arguments: topology name (TPU, 8 chips), preset, changes of its fields (JSON), sequences, order of the table.
PIPELINE_STEP = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxskip import pipeline, training
from jaxskip.models import Decoder, decoder_config

topology, preset, changes, batch, order = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
config = decoder_config(preset, **json.loads(changes))
nodes = pipeline.Topology([[0, 1], [2, 3], [4, 5], [6, 7]])
paths = [(0, 2, 4), (1, 5, 7), (0, 4, 2), (1, 3, 7), (0, 4, 6), (1, 7, 5), (0, 2, 6), (1, 3, 5)]
table = pipeline.compile_table(paths, nodes, order)
mesh = pipeline.stage_mesh(nodes, devices)
tx = training.make_optimizer("adamw", 1e-4)
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    state = training.abstract_state(
        lambda key: Decoder(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"], tx, mesh, pipeline.STAGE_RULES)
    rows = jax.ShapeDtypeStruct((int(batch), 1024), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    step = training.make_train_step(pipeline.pipelined_loss(config, table, mesh), tx)
    compiled = step.lower(state, {"inputs": rows, "targets": rows}).compile()
m = compiled.memory_analysis()
size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
layers = size(state.params["layers"])
print(json.dumps({
    "bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes,
    "arguments": m.argument_size_in_bytes, "aliased": m.alias_size_in_bytes, "layers": layers,
    "ends": size(state.params) - layers, "messages": sum(map(bool, table.permutations)), "hlo": compiled.as_text()}))
"""
