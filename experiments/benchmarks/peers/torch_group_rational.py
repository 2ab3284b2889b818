"""The kernels of github.com/OSU-STARLAB/FlashKAT, whose folder `rational_kat` has to be importable; Triton, CUDA."""

import functools
import json

import torch
from rational_kat import FlashKAT_Group, KAT_Group

from experiments.benchmarks.jax_group_rational import sizes
from experiments.benchmarks.measuring import Program, emit, in_turns


def measure(task: str) -> None:
    """Measure the rows of a task, an event a line."""
    asked = json.loads(task)
    emit(framework="rational_kat", device=torch.cuda.get_device_name(), copy_mb=0, copy_tbps=0.0)
    for shape in asked["shapes"]:
        for dtype in asked["dtypes"]:
            programs = [
                Program(row, f"{dtype} {direction}", functools.partial(_build, asked, shape, dtype, row, direction))
                for row in asked["names"]
                for direction in ("forward", "backward")
            ]
            in_turns(asked, shape, programs, lambda _: torch.cuda.synchronize(), lambda program, out: {})


def _build(asked: dict, shape: str, dtype: str, row: str, direction: str):
    x, g = (torch.randn(sizes(shape), device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
    groups = asked["groups"]
    if row == "KAT":
        module = KAT_Group(groups, "swish", "cuda").cuda()
    else:
        module = FlashKAT_Group(x.shape[-1], groups, groups, 6, 4, "swish").cuda()
    if direction == "forward":
        return torch.no_grad()(lambda: module(x)), None
    x.requires_grad_()
    y = module(x)
    of = [x, *module.parameters()]
    return lambda: torch.autograd.grad(y, of, g.to(y.dtype), retain_graph=True), None
