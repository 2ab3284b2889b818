import pytest

from experiments import cli
from experiments.benchmarks import decode
from experiments.benchmarks.measuring import Results
from experiments.claims import Report


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_table(tmp_path):
    cli.run(decode.main, decode.Config, decode.PRESETS, args=["--preset", "smoke", "--runs", str(tmp_path)])
    (folder,) = (tmp_path / "decode").iterdir()
    report = Report.load(folder)
    rows = {(row[1], row[2]): row for row in report.tables["a decoding step, float32"].rows}
    assert set(rows) == {(batch, row) for batch in (1, 2) for row in decode.PRESETS["smoke"].rows}
    floor = {key: row[7] for key, row in rows.items()}
    assert floor[1, "half of the layers"] < floor[1, "feed-forward blocks, each token"] < floor[1, "unrolled, fused"]
    assert all(row[3] > 0 for row in rows.values()) and not report.claims  # goals are a GPU's
    assert not any("left out" in note for note in report.notes)


def results(tmp_path, device="NVIDIA H200", **times):
    tmp_path.mkdir(exist_ok=True)
    found = Results(tmp_path / "measured.json")
    found.add({"framework": "jax", "device": device, "copy_mb": 1, "copy_tbps": 4.0})
    for row, (milliseconds, megabytes) in times.items():
        name = row.replace("_", " ").replace("feed forward", "feed-forward").replace("; ", ", ")
        event = {"shape": "llama-1b", "row": name, "kind": "batch 1", "times": [10 * milliseconds], "mb": 0.0}
        found.add({**event, "tokens": 10, "read_mb": megabytes, "skips": decode.ROWS[name][1]})
    return found


def test_claims_hold_and_fail_by_what_was_measured(tmp_path):
    config = decode.Config(shapes=("llama-1b",), batches=(1,))
    measured = {"unrolled;_fused": (1.0, 2400.0), "half_of_the_layers": (0.58, 1200.0)}
    measured["feed_forward_blocks;_each_token"] = (0.75, 1200.0)
    report = decode.report(config, results(tmp_path, **measured))
    assert [(claim.measured, claim.holds) for claim in report.claims] == [
        ("1.000 ms (unrolled, fused)", True),
        ("84%", False),
        ("50%", False),
    ]
    (row,) = (row for row in next(iter(report.tables.values())).rows if row[2] == "unrolled, fused")
    assert row[7] == 1e3 * 2400 * 2**20 / 4.3e12
    assert decode.report(config, results(tmp_path / "cpu", "cpu", **measured)).claims == []


@pytest.mark.parametrize(("change", "message"), [({"shapes": ("gpt",)}, "shapes"), ({"rows": ("fast",)}, "rows")])
def test_unknown_names_are_refused(change, message):
    with pytest.raises(ValueError, match=f"{message}: .* unknown"):
        decode.Config(**change)
