import numpy as np
import pytest

from experiments import cli
from experiments.benchmarks import group_rational, jax_group_rational
from experiments.benchmarks.measuring import Results
from experiments.claims import Report


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_table(tmp_path):
    args = ["--preset", "smoke", "--runs", str(tmp_path)]
    cli.run(group_rational.main, group_rational.Config, group_rational.PRESETS, args=args)
    (folder,) = (tmp_path / "group_rational").iterdir()
    report = Report.load(folder)
    times = report.tables["group rational, milliseconds"].rows
    assert len(times) == 2 * 2 * 2 and all(row[4] > 0 for row in times)
    errors = {row[0]: row[1:] for row in next(t.rows for name, t in report.tables.items() if "rounding" in name)}
    # One by one is worse than by blocks in all four columns; the op is nearer to the second.
    assert all(
        worst > 4 * theirs for worst, theirs in zip(errors["KAT's order"], errors["FlashKAT's order"], strict=True)
    )
    assert errors["chunked"][0] < errors["KAT's order"][0] / 4
    assert not any("floor" in claim.statement for claim in report.claims)  # goals are a GPU's


def test_orders_of_adding_give_the_sums():
    """Integers, so that no order rounds; 70 rows leave a block of 6."""
    terms = np.random.default_rng(0).integers(-9, 9, (10, 70, 2, 3)).astype(np.float32)
    for order in (jax_group_rational._one_by_one, jax_group_rational._by_blocks):
        np.testing.assert_array_equal(order(terms), terms.sum((1, 3)))


def test_terms_are_those_of_the_op():
    """Float32 sums of 21 rows in another order."""
    x, a, b, g = jax_group_rational._inputs(2, "3x7x8", "float32")
    _, da, db = jax_group_rational._backward(jax_group_rational._op("reference"))(x, a, b, g)
    terms = jax_group_rational._terms(2, *(np.asarray(value).reshape(21, 8) for value in (x, g)))
    np.testing.assert_allclose(terms.sum((1, 3)), np.concatenate([da, db], 1).T, rtol=1e-4, atol=1e-5)


def test_claims_hold_and_fail_by_what_was_measured(tmp_path):
    config = group_rational.Config(dtypes=("float32",), rows=("mosaic_gpu", "mosaic_gpu 12x256", "FlashKAT"))
    found = Results(tmp_path / "measured.json")
    found.add({"framework": "jax", "device": "NVIDIA H200", "copy_mb": 1, "copy_tbps": 4.0})
    # The bytes take 0.2882 and 0.4324 ms at 4.3 TB/s.
    for row, times in {"mosaic_gpu": (0.37, 0.6), "mosaic_gpu 12x256": (0.4, 0.57), "FlashKAT": (0.1, 0.1)}.items():
        for direction, ms in zip(("forward", "backward"), times, strict=True):
            found.add({"shape": "1024x197x768", "row": row, "kind": f"float32 {direction}", "times": [ms], "mb": 0.0})
    for row, mean in {"KAT's order": 1.0, "FlashKAT's order": 0.1, "mosaic_gpu": 0.05}.items():
        for name in ("dA", "dB"):
            found.add({"shape": "s", "row": row, "kind": f"rounding {name}", "mean": mean, "var": 0.0})
    report = group_rational.report(config, found)
    assert [(claim.measured.split(";")[0], claim.holds) for claim in report.claims] == [
        ("1.28 (0.370 ms, mosaic_gpu)", True),
        ("1.32 (0.570 ms, mosaic_gpu 12x256)", False),
        ("5.00e-02 against 1.00e-01", True),
        ("5.00e-02 against 1.00e-01", True),
    ]


@pytest.mark.parametrize(
    ("change", "message"), [({"rows": ("fast",)}, "rows: .* unknown"), ({"rounding": "4x9"}, "do not split into 8")]
)
def test_unknown_names_and_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        group_rational.Config(**change)
