import dataclasses
import io
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from experiments import cli, diffgrad
from experiments.claims import Report

SMOKE = diffgrad.PRESETS["smoke"]


@pytest.mark.slow
def test_the_smallest_run_from_command_line_to_picture(tmp_path):
    pytest.importorskip("sklearn")
    flags = ["--preset", "smoke", "--runs", str(tmp_path), "--epochs", "1", "--hidden", "16"]
    cli.run(diffgrad.main, diffgrad.Config, diffgrad.PRESETS, args=flags)
    (folder,) = (tmp_path / "diffgrad").iterdir()
    report = Report.load(folder)
    assert [row[1] for row in report.tables["test accuracy"].rows] == ["Adam", "Adam, half the rate", "diffGrad"]
    assert (folder / "diffgrad.png").read_bytes().startswith(b"\x89PNG")
    assert [claim.holds for claim in report.claims[:3]] == [True] * 3  # the one-dimensional ones
    rows = (folder / "runs.jsonl").read_text()
    config = dataclasses.replace(SMOKE, epochs=1, hidden=16)
    again = diffgrad.train_all(config, diffgrad.load("digits"), cli.Run(folder, True, "smoke"))
    assert (folder / "runs.jsonl").read_text() == rows and len(again) == 6
    friction = {row["optimizer"]: row["friction"][-1] for row in again}
    assert math.isnan(friction["Adam"]) and 0.5 < friction["diffGrad"] < 0.55


def test_the_one_dimensional_functions_end_where_the_notebook_does():
    """Six digits of the method card; float32 and 299 steps leave four."""
    paths = diffgrad.one_dimensional_paths()
    ends = {(name, rule): path[-1] for name, walks in paths.items() for rule, path in walks.items()}
    wanted = {"F1": (0.200115, -0.300300, -0.300071), "F2": (0.000177, -0.835063, -0.812145)}
    for name, values in wanted.items():
        got = [ends[name, rule] for rule in (diffgrad.ADAM, diffgrad.HALF, diffgrad.DIFFGRAD)]
        np.testing.assert_allclose(got, values, atol=1e-4)
    assert [claim.holds for claim in diffgrad._toy_claims(paths)] == [True] * 3


def rows_with(accuracies, friction=0.501):
    return [
        {
            "optimizer": name,
            "learning_rate": rate,
            "seed": seed,
            "accuracy": [value],
            "loss": [1.0],
            "friction": [friction],
        }
        for (name, rate), values in accuracies.items()
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("adam", "half", "ours", "friction", "verdicts"),
    [
        ([0.90, 0.91], [0.90, 0.91], [0.90, 0.91], 0.501, [True, True, False]),
        ([0.90, 0.91], [0.90, 0.91], [0.95, 0.96], 0.501, [True, False, True]),
        ([0.95, 0.96], [0.90, 0.91], [0.95, 0.96], 0.6, [False, False, False]),
    ],
)
def test_claims_can_fail(adam, half, ours, friction, verdicts):
    """Near 0.5; equal to the half rate; better than both controls, not only than Adam."""
    config = dataclasses.replace(SMOKE, learning_rates=(1e-3,))
    rows = rows_with(
        {(diffgrad.ADAM, 1e-3): adam, (diffgrad.HALF, 1e-3): half, (diffgrad.DIFFGRAD, 1e-3): ours}, friction
    )
    accuracy, _ = diffgrad._accuracies(config, rows)
    assert [claim.holds for claim in diffgrad._training_claims(config, rows, accuracy)] == verdicts


def test_the_papers_network_is_resnet_50_for_small_pictures():
    """23,520,842 parameters with ten classes: torchvision's ResNet-50 without its 7 x 7 stem."""
    model = diffgrad.make_model(diffgrad.PRESETS["paper"], 10)
    shapes = jax.eval_shape(lambda k: model.init(k, jnp.zeros((1, 32, 32, 3)), False), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 23_520_842


def test_augmentation_crops_and_flips():
    pictures = jnp.arange(2 * 6 * 6 * 1.0).reshape(2, 6, 6, 1) + 1
    seen = [np.asarray(diffgrad._augmented(pictures, jax.random.key(i))) for i in range(8)]
    assert {x.shape for x in seen} == {(2, 6, 6, 1)}
    assert len({x.tobytes() for x in seen}) == 8
    assert set(np.unique(seen)) <= {0.0, *np.unique(pictures)}


@pytest.mark.slow
def test_pictures_of_tfds_through_a_small_resnet(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class JaxskipTestPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pathlib.Path(__file__).parent  # TFDS cannot find a test module by its name

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(12), "test": self._generate_examples(5)}

        def _generate_examples(self, count):
            for i in range(count):
                picture = io.BytesIO()  # TFDS encodes arrays through TensorFlow, but takes files as they are
                PIL.Image.new("RGB", (8, 8), "white" if i % 2 else "black").save(picture, "png")
                picture.seek(0)
                yield i, {"image": picture, "label": i % 2}

    config = dataclasses.replace(
        diffgrad.PRESETS["paper"],
        data="tfds:jaxskip_test_pictures",
        data_dir=str(tmp_path / "tfds"),
        blocks=(1,),
        width=4,
        batch_size=4,
        epochs=2,
        drop_after=1,
        seeds=2,
    )
    report = diffgrad.main(config, cli.start("diffgrad", config, run_dir=tmp_path / "run"))
    assert report.notes[0].startswith("tfds:jaxskip_test_pictures: 12 training and 5 test pictures")
    assert all(np.isfinite(row[4]) for row in report.tables["test accuracy"].rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"data": "nowhere"}, "data is 'nowhere'"), ({"batch_size": 2000}, "more than the 1400 training pictures")],
)
def test_what_a_user_can_put_right_is_said_at_once(tmp_path, changes, message):
    if "data" not in changes:
        pytest.importorskip("sklearn")
    with pytest.raises(cli.UserError, match=message):
        diffgrad.main(dataclasses.replace(SMOKE, **changes), cli.Run(tmp_path, False, "smoke"))


def test_bad_configurations():
    with pytest.raises(ValueError, match="seeds is 1; it must be at least 2"):
        diffgrad.Config(seeds=1)
    with pytest.raises(ValueError, match="learning_rates is empty"):
        diffgrad.Config(learning_rates=())


def test_the_paper_preset_is_the_papers_setting():
    c = diffgrad.PRESETS["paper"]
    assert (c.data, c.model, c.blocks, c.width) == ("tfds:cifar10", "resnet", (3, 4, 6, 3), 64)
    assert (c.learning_rates, c.epochs, c.drop_after, c.batch_size, c.augment, c.seeds) == (
        (1e-3,),
        100,
        80,
        128,
        True,
        3,
    )
