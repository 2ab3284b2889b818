"""Hugging Face's generate on the networks of the JAX rows, with random weights."""

import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.benchmarks.jax_decode import SHAPES
from experiments.benchmarks.measuring import OUT_OF_TIME, emit

_SHORT = 16


def measure(task: str) -> None:
    """Measure the rows of a task, an event a line: the time of `tokens` more tokens."""
    asked = json.loads(task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    emit(framework="transformers", device=torch.cuda.get_device_name() if device == "cuda" else "cpu", copy_mb=0,
         copy_tbps=0.0)  # fmt: skip
    for shape in asked["shapes"]:
        model = _model(SHAPES[shape]).to(device, getattr(torch, asked["dtype"])).eval()
        for batch in asked["batches"]:
            for row in asked["names"]:
                name = {"shape": shape, "row": row, "kind": f"batch {batch}"}
                if [*name.values()] in asked["done"]:
                    continue
                if time.time() > asked["deadline"]:
                    emit(**name, missing=OUT_OF_TIME)
                    continue
                try:
                    times = _times(asked, model, batch, "compiled" in row)
                except Exception as error:  # a peer that fails must not take the others' figures along
                    emit(**name, missing=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                    continue
                emit(**name, mb=None, tokens=1, skips="nothing", times=times)
        del model


def _model(c):
    config = LlamaConfig(
        hidden_size=c.embed_dim,
        intermediate_size=c.mlp_width,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.kv_heads,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.context_length,
        tie_word_embeddings=c.tie_embeddings,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def _times(asked: dict, model, batch: int, compiled: bool) -> list[float]:
    """Milliseconds a token, from the difference between a long and a short answer."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, asked["prompt"]), device=model.device)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    if compiled:
        settings["cache_implementation"] = "static"

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.generate(tokens, max_new_tokens=count, min_new_tokens=count, **settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    long = _SHORT + asked["tokens"]
    seconds(_SHORT), seconds(long)
    return [1e3 * (seconds(long) - seconds(_SHORT)) / asked["tokens"] for _ in range(asked["repeats"])]
