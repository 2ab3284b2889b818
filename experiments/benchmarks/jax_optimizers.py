"""The measuring process of `experiments.benchmarks.optimizers`: update rules in JAX and the least that each moves."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks.measuring import Program, emit, in_turns, jax_copy_rate
from jaxskip import optim
from jaxskip.models import Decoder, decoder_config

_RATE = 1e-4


def _update(tx: optax.GradientTransformationExtraArgs) -> Callable:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule to time.

    ``program(tx)`` is what is timed: (params, state, grads) -> (params, state). ``rereads``: how many more times it
    must read something of the gradients' size, because a sum or a threshold over an array has to be known before the
    first entry of that array can change. ``kind`` says what should bound the time: the memory traffic ("elementwise"
    with one pass, "reductions" with several) or "arithmetic".
    """

    make: Callable[[], Any]
    kind: Literal["elementwise", "reductions", "arithmetic"] = "elementwise"
    rereads: int = 0
    program: Callable[[Any], Callable] = _update


def _without_win_rate() -> optax.GradientTransformation:
    """Sophia that counts no wins: what the count costs."""
    tx = optim.scale_by_sophia()

    def update(updates, state, params=None):
        updates, new = tx.update(updates, state, params)
        return updates, new._replace(win_rate=state.win_rate)  # pyright: ignore[reportAttributeAccessIssue]

    rule = optax.GradientTransformation(tx.init, update)
    return optax.chain(rule, optax.add_decayed_weights(0.2), optax.scale_by_learning_rate(_RATE))


def _fira(rule: str) -> optax.GradientTransformation:
    return optim.fira(_RATE, rank=128, rule=rule, external_refresh=True)


def _refresh_fira(tx) -> Callable:
    del tx
    return lambda params, state, grads: (params, optim.refresh_projection(grads, state, projector="subspace"))


def _refresh_sophia(tx) -> Callable:
    del tx
    return lambda params, state, grads: (params, optim.update_hessian(state, grads))


# Two passes over gradients and parameters before the update: their products, and the norm of the difference.
_PROJECTION = {"kind": "reductions", "rereads": 4}
RULES = {
    "optax.adamw": Rule(lambda: optax.adamw(_RATE, weight_decay=0.1)),
    "optax.lion": Rule(lambda: optax.lion(_RATE, weight_decay=0.1)),
    "optax.sgd": Rule(lambda: optax.sgd(_RATE, momentum=0.9)),
    "sophia": Rule(lambda: optim.sophia(_RATE)),
    "sophia_no_win_rate": Rule(_without_win_rate),
    "sophia_official": Rule(lambda: optim.sophia(_RATE, refresh="after", eps=1e-15)),
    "sophia_optax": Rule(lambda: optim.sophia(_RATE, refresh="optax", bias_correct_h=True)),
    "sophia_refresh": Rule(lambda: optim.sophia(_RATE), program=_refresh_sophia),
    "diffgrad": Rule(lambda: optim.diffgrad(_RATE)),
    "diffgrad_bf16": Rule(lambda: optim.diffgrad(_RATE, prev_dtype=jnp.bfloat16)),
    "diffgrad_std": Rule(lambda: optim.diffgrad(_RATE, friction="std")),
    "adagrad": Rule(lambda: optim.adagrad(_RATE)),
    "adagrad_norm": Rule(lambda: optim.adagrad_norm(_RATE), "reductions", rereads=1),
    "sgd_clip": Rule(lambda: optim.sgd_coordinate_clip(_RATE, method="ema")),
    "adam_clip": Rule(lambda: optim.adam_clip_first_moment(_RATE, method="ema")),
    "adam_clip_update": Rule(lambda: optim.adam_clip_update(_RATE, method="ema")),
    "lion_clip": Rule(lambda: optim.lion_coordinate_clip(_RATE, method="ema")),
    # The means of squares, the mean square of the direction, and that of the parameters.
    "adafactor_clip": Rule(lambda: optim.adafactor_coordinate_clip(_RATE, method="ema"), "reductions", rereads=3),
    "sgd_clip_histogram": Rule(lambda: optim.sgd_coordinate_clip(_RATE, method="histogram"), "reductions", rereads=1),
    "sgd_clip_sort": Rule(lambda: optim.sgd_coordinate_clip(_RATE, method="sort"), "arithmetic", rereads=1),
    "running_average": Rule(lambda: optim.running_average(optax.adamw(_RATE, weight_decay=0.1))),
    "langevin": Rule(lambda: optax.chain(optax.sgd(_RATE), optim.add_langevin_noise(1e-10)), "arithmetic"),
    "spherical_sgd": Rule(lambda: optim.spherical_sgd(_RATE), **_PROJECTION),
    "perp_adamw": Rule(lambda: optax.chain(optim.perp_grad(), optax.adamw(_RATE, weight_decay=0.0)), **_PROJECTION),
    "norm_growth": Rule(lambda: optax.chain(optax.sgd(_RATE), optim.limit_norm_growth()), "reductions", rereads=1),
    "galore": Rule(lambda: _fira("galore"), "arithmetic"),
    "fira": Rule(lambda: _fira("fira"), "arithmetic", rereads=1),
    "fira_refresh": Rule(lambda: _fira("fira"), "arithmetic", program=_refresh_fira),
}


def shapes(model: str) -> Any:
    """The parameters of a preset of `jaxskip.models.decoder_config` as a tree of ShapeDtypeStructs."""
    decoder = Decoder(decoder_config(model))
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def traced(rule: Rule, params) -> tuple[Any, int]:
    """The rule's program with donated params and state, to be lowered, and the bytes that it must at least move.

    ``params``: tree of ShapeDtypeStructs. Every array that is used is read once, every array that is not handed on as
    it came in is written once, and ``rule.rereads`` are added.
    """
    tx = rule.make()
    state = jax.eval_shape(tx.init, params)
    program = jax.jit(rule.program(tx), donate_argnums=(0, 1)).trace(params, state, params)
    jaxpr = program.jaxpr.jaxpr
    inputs = {id(variable) for variable in jaxpr.invars}
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read = sum(nbytes(variable.aval) for variable in jaxpr.invars if id(variable) in used)
    written = sum(nbytes(variable.aval) for variable in jaxpr.outvars if id(variable) not in inputs)
    return program, read + written + rule.rereads * nbytes(params)


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def measure(task: str) -> None:
    """Measure the JAX rows of a task, an event a line."""
    asked = json.loads(task)
    emit(framework="jax", device=jax.devices()[0].device_kind, **jax_copy_rate(asked["copy_mb"]))
    tree = shapes(asked["model"])
    normal = jax.jit(lambda key, scale: jax.tree.map(lambda x: scale * x, optax.tree.random_like(key, tree)))
    for_params, for_grads = jax.random.split(jax.random.key(0))
    grads = normal(for_grads, 1e-3)
    shared = {}
    facts = {}

    def build(name):
        rule = RULES[name]
        program, least = traced(rule, tree)
        shared["params"] = normal(for_params, 0.02)  # anew, because a program that failed may have eaten them
        held = {"state": jax.jit(rule.make().init)(shared["params"])}
        facts[name] = {"state_mb": nbytes(held["state"]) / 2**20, "least_mb": least / 2**20, "bound": rule.kind}
        compiled = program.lower().compile()

        def call():
            shared["params"], held["state"] = compiled(shared["params"], held["state"], grads)
            return shared["params"], held["state"]

        return call, compiled.memory_analysis().temp_size_in_bytes / 2**20

    programs = [Program(name, "update", functools.partial(build, name)) for name in asked["names"]]
    in_turns(asked, asked["model"], programs, jax.block_until_ready, lambda p, out: facts[p.row], turns=asked["turns"])
