import numpy as np
import pytest

from experiments import cli
from experiments.benchmarks import skip_attention
from experiments.benchmarks.jax_skip_attention import kept_blocks
from experiments.benchmarks.measuring import Results
from experiments.claims import Report


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_table(tmp_path):
    arguments = ["--preset", "smoke", "--runs", str(tmp_path), "--sequences", "1", "256", "2", "64"]
    cli.run(skip_attention.main, skip_attention.Config, skip_attention.PRESETS, args=arguments)
    (folder,) = (tmp_path / "skip_attention").iterdir()
    report = Report.load(folder)
    sequences, decoding = report.tables.values()
    assert {row[0] for row in sequences.rows} == {"ours", "xla"} and all(row[2] > 0 for row in sequences.rows)
    errors = [row[7] for row in sequences.rows if row[7] is not None]
    assert len(errors) == 8 and max(errors) < 1e-5  # float32, a softmax of at most 256 terms
    assert [row[4] for row in decoding.rows[:3]] == [1.0, 0.5, 0.2]  # MB of the sequences that run
    assert not report.claims and not any("left out" in note for note in report.notes)


def test_the_share_of_the_triangle_is_left_out_of_every_head():
    mask = kept_blocks(3, 8, 0.5)
    assert (mask.sum(axis=(1, 2)) == 18).all() and mask[:, np.arange(8), np.arange(8)].all()
    assert not np.triu(mask, 1).any() and (mask[0] != mask[1]).any()
    assert kept_blocks(1, 8, 0.25, causal=False).sum() == 48


def test_claims_hold_and_fail_by_what_was_measured(tmp_path):
    results = Results(tmp_path / "measured.json")
    results.add({"framework": "jax", "device": "NVIDIA H200", "copy_mb": 1, "copy_tbps": 4.0})

    def timed(shape, row, kind, ms, share=0.0, **facts):
        results.add({"shape": shape, "row": row, "kind": kind, "times": [ms], "mb": 0.0, "share": share, **facts})

    timed("sequences", "ours", "causal, forward", 2.3, flops=1.1e12)
    timed("sequences", "cudnn", "causal, forward", 2.0, flops=1.1e12)
    timed("sequences", "ours", "causal, 50% of the blocks skipped, forward", 1.3, share=0.5, flops=0.55e12)
    timed("sequences", "ours", "causal, 75% of the blocks skipped, forward", 0.7, share=0.75, flops=0.3e12)
    timed("decode", "ours", "100% of the sequences", 0.5, share=1.0, read_mb=2048.0)
    timed("decode", "ours", "50% of the sequences", 0.35, share=0.5, read_mb=1024.0)
    report = skip_attention.report(skip_attention.Config(), results)
    assert [(claim.measured, claim.holds) for claim in report.claims] == [
        ("0.870 (478 of 550 TFLOP/s)", False),
        ("0.565", True),
        ("0.304", False),
        ("0.700", False),
    ]
    floors = [row[5] for row in list(report.tables.values())[1].rows]
    assert floors == [1e3 * mb * 2**20 / 4.3e12 for mb in (2048, 1024)]


def test_unknown_rows_are_refused():
    with pytest.raises(ValueError, match="rows: .* unknown"):
        skip_attention.Config(rows=("fast",))
