"""The measuring process of `experiments.benchmarks.multi_device`: one program for all devices of this host."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import claims
from experiments.benchmarks import gpt2_training, jax_pipeline
from experiments.benchmarks.collectives import collectives
from experiments.benchmarks.jax_linear_cross_entropy import zipf_inputs
from experiments.benchmarks.measuring import (
    Program,
    compiled_together,
    emit,
    in_turns,
    jax_copy_rate,
    jax_one_at_a_time,
)
from jaxskip import training
from jaxskip.losses import linear_cross_entropy

ONE = "one device"
# One device has all rows of a strong step; a weak step has as many rows on each device.
TRAINING = [
    (ONE, "baseline"),
    *((axis, scaling) for axis in ("fsdp", "data", "tensor") for scaling in ("strong", "weak")),
]


def measure(task: str) -> None:
    """Measure the parts of a task, an event a line."""
    asked = json.loads(task)
    # Has a say only where no GPU or TPU is attached.
    jax.config.update("jax_num_cpu_devices", asked["devices"])
    devices = jax.devices()
    emit(framework="jax", device=devices[0].device_kind, machine=claims.machine(), **jax_copy_rate(asked["copy_mb"]))
    if len(devices) < asked["devices"]:
        return
    parts = {"training": _training, "cross-entropy": _cross_entropy, "pipeline": jax_pipeline.measure}
    for part in asked["names"]:
        parts[part](asked, devices[: asked["devices"]])


def device_megabytes(compiled: Any) -> float:
    """MB of one device that a program takes beyond its inputs; what is donated counts once."""
    memory = compiled.memory_analysis()
    return (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 2**20


def _training(asked: dict, devices: list) -> None:
    """The step of the training loop on meshes along one axis each."""
    config = gpt2_training.Config(**asked["training"])
    model, tx, step = gpt2_training.jax_step("adamw", config)

    @functools.cache
    def mesh(axis: str):
        if axis == ONE:
            return training.make_mesh(1, devices=devices[:1])
        return training.make_mesh(**{"data": 1} | {axis: len(devices)}, devices=devices)

    @functools.cache
    def held(axis: str) -> list:
        return [gpt2_training.jax_state(model, tx, mesh(axis))]

    @functools.cache
    def batch(axis: str, scaling: str):
        rows = config.batch_size * (len(devices) if scaling == "weak" else 1)
        return gpt2_training.jax_batch(model, rows, mesh(axis))

    def lower(axis: str, scaling: str):
        with jax.set_mesh(mesh(axis)):
            return step.lower(held(axis)[0], batch(axis, scaling))

    done = [tuple(key) for key in asked["done"]]
    wanted = [key for key in TRAINING if ("training", *key) not in done]
    compiled = compiled_together({key: functools.partial(lower, *key) for key in wanted})

    def build(axis: str, scaling: str):
        program, state, rows = compiled((axis, scaling)), held(axis), batch(axis, scaling)

        def call():
            state[0], metrics = program(state[0], rows)
            return metrics

        return jax_one_at_a_time(call), device_megabytes(program)

    def facts(program: Program, metrics) -> dict:
        key = program.row, program.kind
        kept = jax.tree.leaves((held(program.row)[0].params, held(program.row)[0].opt_state))
        return {
            # Of the first step, and so comparable, where the batch is the same: weak comes after strong.
            "loss": float(metrics["loss"]),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens": batch(*key)["inputs"].size,
            "state_mb": sum(leaf.addressable_shards[0].data.nbytes for leaf in kept) / 2**20,
            "collectives": collectives(compiled(key).as_text()),
        }

    programs = [Program(*key, functools.partial(build, *key)) for key in TRAINING]
    in_turns(asked, "training", programs, jax.block_until_ready, facts)


def _cross_entropy(asked: dict, devices: list) -> None:
    """Loss and gradients with the classifier split along the vocabulary, and with all of it on one device."""
    tokens, vocabulary, width = asked["cross_entropy"]
    dtype = jnp.dtype(asked["training"]["dtype"])
    e, c, labels = zipf_inputs(jax.random.key(0), tokens, vocabulary, width)
    e, c, labels = e.astype(dtype)[None], c.astype(dtype), labels[None]
    meshes = {
        ONE: training.make_mesh(1, devices=devices[:1]),
        "tensor": training.make_mesh(1, 1, len(devices), devices=devices),
    }

    def lies(row: str):
        mesh = meshes[row]
        return NamedSharding(mesh, P()), NamedSharding(mesh, P("tensor", None)), NamedSharding(mesh, P())

    @functools.cache
    def inputs(row: str):
        return jax.device_put((e, c, labels), lies(row))

    def lower(row: str):
        def loss(e, c, labels):
            return linear_cross_entropy(e, c, labels, vocab_axis_name="tensor")

        whole, split, _ = lies(row)
        with jax.set_mesh(meshes[row]):
            function = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(whole, (whole, split)))
            return function.lower(*inputs(row))

    compiled = compiled_together({row: functools.partial(lower, row) for row in meshes})

    def build(row: str):
        program, operands = compiled(row), inputs(row)
        return jax_one_at_a_time(lambda: program(*operands)), device_megabytes(program)

    @functools.cache
    def expected():
        return compiled(ONE)(*inputs(ONE))

    @jax.jit
    def distance(got, wanted):
        got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
        return jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)

    def facts(program: Program, out) -> dict:
        classifier_mb = inputs(program.row)[1].addressable_shards[0].data.nbytes / 2**20
        found: dict = {"classifier_mb": classifier_mb, "collectives": collectives(compiled(program.row).as_text())}
        if program.row != ONE:
            wanted = jax.device_put(expected(), jax.tree.map(lambda x: x.sharding, out))
            loss, (de, dc) = jax.tree.map(distance, out, wanted)
            found["errors"] = {"loss": float(loss), "embeddings": float(de), "classifier": float(dc)}
        return found

    programs = [Program(row, "loss and gradients", functools.partial(build, row)) for row in meshes]
    in_turns(asked, "cross-entropy", programs, jax.block_until_ready, facts)
