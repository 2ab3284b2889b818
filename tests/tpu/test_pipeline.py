"""A pipeline's training step, compiled for real TPUs: what its chips say to each other, and memory a chip."""

import re

import pytest

from tests.aot import PIPELINE_STEP, TPU, compile_in_a_process

pytestmark = pytest.mark.tpu_aot
pytest.importorskip("libtpu")

HBM = {"v5e:2x4": 16 * 2**30, "v6e:2x4": 32 * 2**30}
STAGES, BATCH = 4, 64


def instructions(hlo: str) -> list[tuple[str, str, str]]:
    """(computation it is in, opcode, line) of every collective and conditional."""
    found, computation = [], ""
    for line in hlo.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = start[1]
        if opcode := re.search(
            r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|conditional)"
            r"(?:-start)?\(",
            line,
        ):
            found.append((computation, opcode[1], line))
    return found


@pytest.mark.parametrize(("topology", "order"), [("v5e:2x4", "1f1b"), ("v6e:2x4", "gpipe")])
def test_messages_are_permutes_in_one_conditional_and_replicas_are_reduced(topology, order, record_property):
    result = compile_in_a_process(PIPELINE_STEP, topology, "gpt2-small", "{}", str(BATCH), order, environment=TPU)
    record_property("bytes_per_chip", result["bytes"])
    found = instructions(result["hlo"])
    print(
        f"gpt2-small on {topology}, {order}: {result['bytes'] / 2**30:.2f} GiB a chip;",
        {kind: sum(opcode == kind for _, opcode, _ in found) for kind in sorted({opcode for _, opcode, _ in found})},
    )
    assert {opcode for _, opcode, _ in found} == {"all-reduce", "collective-permute", "conditional"}
    # Messages: a branch for each permutation of the table, all of one conditional that sits in the loop over ticks.
    branches = [
        {name.strip(" %") for name in re.search(r"branch_computations=\{([^}]*)\}", line)[1].split(",")}
        for _, opcode, line in found
        if opcode == "conditional" and "branch_computations" in line
    ]
    senders = [computation for computation, opcode, _ in found if opcode == "collective-permute"]
    assert len(senders) == len({*senders}) == result["messages"]
    assert sum(bool({*senders} & names) for names in branches) == 1 and any({*senders} <= names for names in branches)
    # Reductions: layers over the two replicas of a stage; what all chips hold, loss and norm over more.
    groups = [re.search(r"replica_groups=(\S+)", line)[1] for _, op, line in found if op == "all-reduce"]
    assert len(groups) <= 6 and len({*groups}) >= 2
    # The state: each chip holds the layers of its stage, and embedding and norm whole, each with two moments.
    state = 3 * (result["layers"] / STAGES + result["ends"])
    assert result["arguments"] == pytest.approx(state, rel=0.005)
    assert result["aliased"] > 0.98 * state and result["bytes"] < 0.95 * HBM[topology]
