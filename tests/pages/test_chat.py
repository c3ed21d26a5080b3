"""What is printed piece by piece is the response that `generate` gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo.cli import main
from dpo.data.tokenization import tokenize_prompts
from dpo.huggingface.pretrained import Pretrained, load_pretrained
from dpo.judging.samples import stop_tokens
from dpo.models.drawing import SamplingConfig
from dpo.models.sampling import generate
from dpo.pages.chat import _seed_of, converse, respond

RULES = SamplingConfig(max_new_tokens=24, temperature=1.0)


@pytest.fixture(scope="module")
def pretrained(tiny_model_dir: Path) -> Pretrained:
    return load_pretrained(tiny_model_dir)


def generated(pretrained: Pretrained, prompt, seed: int) -> str:
    (ids,) = tokenize_prompts([prompt], pretrained.tokenizer)
    stop = stop_tokens(pretrained)
    (tokens,) = generate(pretrained.model, [ids], sampling=RULES, seeds=[seed], stop_tokens=stop)
    return str(pretrained.tokenizer.decode(tokens, skip_special_tokens=True))


def test_the_pieces_are_the_response(pretrained: Pretrained) -> None:
    """Random bytes: many are half a character, which is shown when it is whole or at the end."""
    pieces = list(respond(pretrained, "Hello", sampling=RULES, seed=4))
    assert len(pieces) > 1
    assert "".join(pieces) == generated(pretrained, "Hello", 4)


def test_a_response_that_ends_is_not_cut_off(pretrained: Pretrained) -> None:
    ends = range(pretrained.model.config.vocab_size)
    ending = pretrained._replace(generation_config={"eos_token_id": list(ends)})
    for model, cuts in ((pretrained, [True]), (ending, [])):
        found: list[bool] = []
        list(respond(model, "Hello", sampling=RULES, seed=4, on_cut=lambda cut=found: cut.append(True)))
        assert found == cuts


def test_a_conversation_is_kept(pretrained: Pretrained) -> None:
    lines, written = iter(["Hello", "", "And now?"]), []

    def read() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    converse(pretrained, system="Be odd.", sampling=RULES, seed=0, read=read, write=written.append)
    system, user = {"role": "system", "content": "Be odd."}, {"role": "user", "content": "Hello"}
    first = generated(pretrained, [system, user], 0)
    messages = [system, user, {"role": "assistant", "content": first.strip()}]
    second = generated(pretrained, [*messages, {"role": "user", "content": "And now?"}], _seed_of(0, 1))
    assert "".join(written) == f"{first}\n{second}\n"


def test_turns_of_neighbouring_seeds_are_drawn_otherwise() -> None:
    found = {_seed_of(seed, turn) for seed in range(-3, 20) for turn in range(20)}
    assert len(found) == 23 * 20
    assert _seed_of(4, 0) == 4


def test_generate_prints_a_response(tiny_model_dir: Path, pretrained, capsys) -> None:
    arguments = ["generate", str(tiny_model_dir), "Hello", "--max_new_tokens=24", "--temperature=1"]
    assert main([*arguments, "--min_p=null", "--seed=4"]) == 0
    printed = capsys.readouterr()
    assert printed.out == generated(pretrained, "Hello", 4) + "\n"
    assert printed.err.endswith("(cut off at 24 tokens: --max_new_tokens)\n"), "of 24 random tokens none ends"


@pytest.mark.parametrize("arguments", [[], ["Hello", "--interactive"]])
def test_a_prompt_or_a_chat_is_needed(tiny_model_dir: Path, arguments: list[str], capsys) -> None:
    assert main(["generate", str(tiny_model_dir), *arguments]) == 2
    assert "give either a prompt or --interactive" in capsys.readouterr().err
