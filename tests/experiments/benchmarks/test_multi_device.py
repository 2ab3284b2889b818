import dataclasses
from collections import Counter

import numpy as np
import pytest

from experiments import cli
from experiments.benchmarks import jax_pipeline, multi_device
from experiments.benchmarks.measuring import Results, compiled_together
from experiments.claims import Report

SMALL = dataclasses.replace(multi_device.Config(), devices=4)


@pytest.mark.slow
@pytest.mark.multidevice
def test_the_smallest_run_from_command_line_to_table(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    args = ["--preset", "smoke", "--devices", "8", "--runs", str(tmp_path)]
    cli.run(multi_device.main, multi_device.Config, multi_device.PRESETS, args=args)
    (folder,) = (tmp_path / "multi_device").iterdir()
    report = Report.load(folder)
    assert not any("left out" in note for note in report.notes)
    assert len(report.claims) == 3 and report.held == 3  # virtual devices: only what is computed
    training = {tuple(row[:2]): row for row in report.tables["training step, gpt2-tiny, float32"].rows}
    assert len(training) == 7
    whole, part = (training[key][6] for key in (("one device", "baseline"), ("fsdp", "strong")))
    assert part < whole / 4 and training["data", "weak"][6] == whole  # norms are on every device
    moved = {tuple(row[:4]) for row in report.tables["collectives"].rows}
    assert ("training", "data", "strong", "all-reduce") in moved
    assert ("training", "fsdp", "weak", "all-gather") in moved
    assert not any(row[1] == "one device" for row in moved)
    rows = report.tables["pipeline, float32"].rows
    assert {(row[0], row[1]) for row in rows} == {(p, o) for p in jax_pipeline.PLANS for o in jax_pipeline.ORDERS}
    assert all(None not in row for row in rows)


def events(tmp_path, platform="gpu", **changes):
    """A planted run on 4 devices; ``changes`` are milliseconds of single programs, and errors."""
    tmp_path.mkdir(exist_ok=True)
    found = Results(tmp_path / "measured.json")
    machine = {"platform": platform, "kind": "NVIDIA H200", "count": 4, "host": "here"}
    found.add({"framework": "jax", "device": "NVIDIA H200", "machine": machine, "copy_mb": 1, "copy_tbps": 4.0})

    def add(shape, row, kind, milliseconds, **facts):
        name = f"{row}, {kind}".replace("%", "").replace(" ", "_").replace(",", "")
        times = [changes.get(name, milliseconds)]
        found.add({"shape": shape, "row": row, "kind": kind, "times": times, "mb": 1.0, **facts})

    first = {"loss": 10.0, "grad_norm": 2.0, "state_mb": 4000.0, "collectives": {}}
    add("training", "one device", "baseline", 100.0, tokens=1000, **first)
    moved = {"all-reduce": {"program": 2, "runs": 3, "mb": 5.0}}
    strong = first | {"collectives": moved, "loss": changes.get("loss", 10.0)}
    add("training", "fsdp", "strong", 40.0, tokens=1000, **strong)
    add("training", "fsdp", "weak", 105.0, tokens=4000, **first)
    add("pipeline costs", "message", "20 hops", 20 * 1.0)
    for layers, forward in ((6, 6.0), (8, 8.0)):
        add("pipeline costs", "F", f"{layers} layers", forward)
        add("pipeline costs", "B", f"{layers} layers", 3 * forward)
    add("pipeline costs", "H", "head", 2.0)
    for row, layers in (("full", 6), ("33 % skipped", 8)):
        topology, paths = jax_pipeline.make_plan(row, 4, 8)
        facts = {"stages": topology.stages, "memory": topology.memory, "paths": paths, "layers": layers, "tokens": 100}
        for order in jax_pipeline.ORDERS:
            add("pipeline", row, order, 300.0, **facts)
            add("pipeline in float32", row, order, 1.0, error=changes.get("error", 1e-6), **facts)
    errors = {"loss": 0.0, "embeddings": 1e-4, "classifier": 2e-4}
    add("cross-entropy", "one device", "loss and gradients", 60.0, classifier_mb=8.0, collectives={})
    add("cross-entropy", "tensor", "loss and gradients", 20.0, classifier_mb=2.0, collectives=moved, errors=errors)
    return found


def predictions(results):
    costs, timed = (
        {key[1:]: entry for key, entry in results.programs().items() if key[0] == shape}
        for shape in ("pipeline costs", "pipeline")
    )
    return {key: multi_device.predict(entry, key[1], costs) for key, entry in timed.items()}


def test_claims_hold_and_fail_by_what_was_measured(tmp_path):
    planned = predictions(events(tmp_path / "plan"))
    full, skipped = (1e3 * planned[row, "1f1b"].simulation.makespan for row in ("full", "33 % skipped"))
    ms = {"full_1f1b": full, "33__skipped_1f1b": skipped, "full_gpipe": 2 * full, "33__skipped_gpipe": 2 * full}
    report = multi_device.report(SMALL, events(tmp_path, **ms))
    verdicts = {claim.statement: claim.holds for claim in report.claims}
    assert verdicts == {
        "loss and gradient norm of a training step are those of one device": True,
        "the pipeline's loss and gradients in float32 are those of one device": True,
        "vocabulary-parallel cross-entropy: loss and gradients are those of one device": True,
        "4 GPUs: weak-scaling efficiency of FSDP training": True,
        "4 GPUs: full, 1f1b: a step of the pipeline takes what the simulator says": True,
        "4 GPUs: full, gpipe: a step of the pipeline takes what the simulator says": False,
        "4 GPUs: 33 % skipped, 1f1b: a step of the pipeline takes what the simulator says": True,
        "4 GPUs: 33 % skipped, gpipe: a step of the pipeline takes what the simulator says": False,
        "4 GPUs: 33 % skipped, 1f1b: faster than the full pipeline by what the simulator says": True,
        "4 GPUs: 33 % skipped, gpipe: faster than the full pipeline by what the simulator says": False,
    }
    rows = {tuple(row[:2]): row for row in next(iter(report.tables.values())).rows}
    assert rows["fsdp", "weak"][5] == round(100 / 105, 3)
    assert rows["fsdp", "strong"][5] == round(100 / 40 / 4, 3)
    assert report.tables["collectives"].rows[0][:4] == ["training", "fsdp", "strong", "all-reduce"]
    assert report.devices["count"] == 4


def test_what_differs_from_one_device_fails(tmp_path):
    report = multi_device.report(SMALL, events(tmp_path, fsdp_weak=120.0, loss=10.1, error=1e-3))
    assert [claim.holds for claim in report.claims[:4]] == [False, False, True, False]


def test_no_claim_of_speed_on_virtual_devices(tmp_path):
    report = multi_device.report(SMALL, events(tmp_path, platform="cpu"))
    assert len(report.claims) == 3 and report.held == 3


def test_predictions_agree_with_the_closed_form(tmp_path):
    """Without skipping, with messages that take no time and memory for all: (M + S - 1) (f + b), and heads."""
    planned = predictions(events(tmp_path, message_20_hops=0.0, H_head=1e-9))
    expected = 1e-3 * (8 + 4 - 1) * (6 + 18)
    assert planned["full", "gpipe"].simulation.makespan == pytest.approx(expected, rel=0.02)
    assert planned["full", "gpipe"].idle(expected, 4) == pytest.approx(3 / 11)
    # Nodes of a tick differ in what they do, and wait for each other.
    assert planned["full", "1f1b"].table > expected


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_plans_leave_out_their_share_and_use_all_nodes(devices):
    fits = ["full"] if devices == 2 else list(jax_pipeline.PLANS)
    plans = {row: jax_pipeline.make_plan(row, devices, 12) for row in jax_pipeline.PLANS}
    assert [row for row, plan in plans.items() if plan is not None] == fits
    for row in fits:
        topology, paths = plans[row]
        assert topology.nodes == devices and len(paths) == 12
        skipped = 1 - np.mean([len(path) for path in paths]) / len(topology.stages)
        assert f"{skipped:.0%}" == {"full": "0%", "25 % skipped": "25%", "33 % skipped": "33%"}[row]
        visits = Counter(node for path in paths for node in path)
        for nodes in (topology.stages[0], [node for others in topology.stages[1:] for node in others]):
            assert len({visits[node] for node in nodes}) == 1


def test_a_program_that_does_not_compile_takes_no_other_along():
    class Lowered:
        def compile(self):
            return "program"

    def fails():
        raise ValueError("cannot be lowered")

    compiled = compiled_together({"a": fails, "b": Lowered})
    assert compiled("b") == "program"
    with pytest.raises(ValueError, match="cannot be lowered"):
        compiled("a")
