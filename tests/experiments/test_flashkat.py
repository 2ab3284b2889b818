import jax
import numpy as np
import pytest

from experiments import cli, flashkat
from experiments.claims import Report

SMOKE = flashkat.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    cli.run(flashkat.main, flashkat.Config, flashkat.PRESETS, args=["--preset", "smoke", "--runs", str(tmp_path)])
    (folder,) = (tmp_path / "flashkat").iterdir()
    report = Report.load(folder)
    sizes = {row[0]: row[1] for row in report.tables["networks"].rows}
    # 38 coefficients an activation, two activations a layer.
    assert sizes["GR-KAN"] - sizes["GELU MLP"] == sizes["KAT"] - sizes["ViT"] == 76
    assert (folder / "flashkat.png").read_bytes().startswith(b"\x89PNG")
    held = {claim.statement.split(":")[0]: claim.holds for claim in report.claims}
    assert held["denominators that start at 0 learn"] and len(held) == 7
    rows = (folder / "runs.jsonl").read_text()
    again = flashkat.train_all(SMOKE, flashkat.segments(), cli.Run(folder, True, "smoke"))
    assert (folder / "runs.jsonl").read_text() == rows and len(again) == 5  # nothing is trained twice
    losses = {row["network"]: row["loss"] for row in again}
    assert losses["GR-KAN"][-1] < losses["GR-KAN"][0] and losses["GELU MLP"][-1] < losses["GELU MLP"][0]


def test_drawn_digits():
    """Like the digits of scikit-learn in shape and range, all classes, told apart by their mean picture."""
    data = flashkat.segments()
    pictures, labels = data["train"]
    assert pictures.shape == (1400, 8, 8, 1) and pictures.dtype == np.float32 and np.abs(pictures).max() == 1
    assert set(labels) == set(range(10)) and data["test"][0].shape == (397, 8, 8, 1)
    brightness = [pictures[labels == digit].mean() for digit in (1, 8)]
    assert brightness[0] < brightness[1]
    np.testing.assert_array_equal(pictures, flashkat.segments()["train"][0])


def test_both_ways_of_adding_gradients_agree():
    """What is timed is the same thing, to the rounding of 8 * 96 float32 terms."""
    arguments, ways = flashkat.backward_passes(8)
    (dx, da, db), others = (jax.jit(f)(*arguments) for f in ways.values())
    for ours, theirs in zip((dx, da, db), others, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_numbers_of_steps_are_positive():
    with pytest.raises(ValueError, match="steps is 0"):
        flashkat.Config(steps=0)
