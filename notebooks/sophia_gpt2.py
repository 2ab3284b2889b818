# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sophia against AdamW on a small GPT-2
#
# Trains the same decoder-only transformer with AdamW, Lion, Sophia-H and Sophia-G
# ([arXiv 2305.14342](https://arxiv.org/abs/2305.14342)) and draws the losses. It runs on Colab and Kaggle, on TPU, GPU
# or CPU, with the runtime's own JAX left as it is, and needs no data set: the text is Python's standard library.

# %%
# On Colab or Kaggle: put the address you got this notebook from here, then run the cell.
REPOSITORY = ""

import os
import pathlib
import subprocess
import sys

HOSTED = "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ
if HOSTED and not pathlib.Path("jaxskip/pyproject.toml").exists():
    assert REPOSITORY, "set REPOSITORY to the git address of jaxskip, or upload its folder beside this notebook"
    subprocess.run(["git", "clone", "-q", REPOSITORY, "jaxskip"], check=True)
if HOSTED:
    os.chdir("jaxskip")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", "."], check=True)
elif pathlib.Path("../pyproject.toml").exists():
    os.chdir("..")
sys.path.insert(0, os.getcwd())

# %%
import jax

print("JAX", jax.__version__, "on", jax.devices())

# %% [markdown]
# ## Train
#
# Four optimizers, the same batches. A minute or so on an accelerator, about three on a CPU.

# %%
from experiments import cli, sophia_gpt2

preset = "smoke" if os.environ.get("JAXSKIP_FAST") == "1" else "default"
config = sophia_gpt2.PRESETS[preset]
run = cli.start("sophia_gpt2", config, preset=preset)
report = cli.execute(sophia_gpt2.main, config, run, "sophia_gpt2")

# %% [markdown]
# ## Look

# %%
from IPython.display import Image

Image(str(run.directory / "loss.png"))

# %% [markdown]
# A claim that fails is printed as failed: the paper's gain is for models of 125M parameters and more, and independent
# runs there see less of it. `metrics.jsonl` of each optimizer holds every step; Sophia's win rate is the share of
# coordinates whose step was not clipped, and should settle between 0.1 and 0.5 in long runs.

# %%
from jaxskip.training import read_metrics

for row in read_metrics(run.directory / "sophia_g")[:: max(config.steps // 10, 1)]:
    print(f"step {row['step']:4d}  loss {row['loss']:.3f}  win rate {row['win_rate']:.3f}")

# %% [markdown]
# ## Your turn
#
# `dataclasses.replace(config, ...)` changes anything, for instance `steps=2000`, `model="gpt2-small"` on an
# accelerator, `data="FOLDER"` with your own text, or `sophia_g=sophia_gpt2.Sophia(gamma=0.1)`. In your own loop, Sophia
# is one line: `optax.chain(optax.clip_by_global_norm(1.0), jaxskip.optim.sophia(6e-4))`.
