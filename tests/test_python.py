"""The public face in Python agrees with what the commands and the training compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from tiny_model import CHAT_TEMPLATE, write_tiny_model

import dpo
from dpo.config import DataConfig
from dpo.outcomes import UserError


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> dpo.LanguageModel:
    return dpo.load(str(tiny_model_dir))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dpo.LanguageModel:
    return dpo.load(str(write_tiny_model(tmp_path_factory.mktemp("other"), seed=1)))


def test_scores_are_those_of_the_model_itself(model: dpo.LanguageModel) -> None:
    """Against one forward pass over the tokens of prompt and response, without packing or sharing."""
    import jax
    import jax.numpy as jnp

    prompts, responses = ["Say A.", [{"role": "user", "content": "Say B."}]], ["A", "It is B"]
    scored = model.score(prompts, responses)
    tokenizer = model.pretrained.tokenizer
    for i, text in enumerate(("Say A.", "Say B.")):
        messages = [{"role": "user", "content": text}]
        start: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = [*start, *scored.token_ids[i, : scored.lengths[i]]]
        assert str(tokenizer.decode(ids[len(start) :])).startswith(responses[i])
        row = jnp.arange(len(ids))[None]
        hidden = model.pretrained.model.hidden(jnp.array([ids]), row, 1 + 0 * row, 0 * row)
        log_probs = jax.nn.log_softmax(model.pretrained.model.logits(hidden))[0]
        expected = [log_probs[t - 1, ids[t]] for t in range(len(start), len(ids))]
        assert_allclose(scored.token_logps[i, : scored.lengths[i]], expected, rtol=1e-4, atol=1e-4)
    assert (scored.token_logps[0, scored.lengths[0] :] == 0).all()
    assert (scored.token_ids[0, scored.lengths[0] :] == -1).all()
    assert_allclose(scored.logps, scored.token_logps.sum(1), rtol=1e-5)


@pytest.mark.ci
def test_a_response_scores_alike_whatever_it_is_beside(model: dpo.LanguageModel) -> None:
    together = model.score(["Say A.", "Say B."], ["A", "B, and no more"]).logps
    alone = np.concatenate(
        [model.score(["Say A."], ["A"]).logps, model.score(["Say B."], ["B, and no more"]).logps]
    )
    assert_allclose(together, alone, rtol=1e-5)


class SeenError(Exception):
    """Has the rows that are about to be scored."""


@pytest.mark.parametrize(
    "text",
    ["\n\nHuman: Say A.\n\nAssistant:", '[{"role": "user", "content": "Say A."}]', "A\n<extra_id_1>User\nB"],
)
def test_a_text_is_scored_as_a_text_whatever_it_looks_like(
    text: str, model: dpo.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`generate` takes it so; rows of data files have such texts for conversations."""

    def see(rows: Any) -> None:
        raise SeenError(rows)

    monkeypatch.setattr(model, "_score", see)
    with pytest.raises(SeenError) as seen:
        model.score([text], [text])
    (row,) = seen.value.args[0]
    assert (row.prompt, row.responses) == (text, (text,))


def test_generating_is_a_function_of_prompt_and_seed(model: dpo.LanguageModel) -> None:
    drawn = model.generate(["Say A.", "Say B."], max_new_tokens=6, temperature=1.0, min_p=None, seed=3)
    assert len(drawn) == 2
    assert model.generate(["Say B."], max_new_tokens=6, temperature=1.0, min_p=None, seed=3) == drawn[1:]


def test_another_template_is_that_of_what_is_generated_too(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt is the same text under a template that reads nothing of the first message."""
    template = tmp_path / "template.jinja"
    template.write_text("Always the same.{% for m in messages[1:] %} {{ m.content }}</s>{% endfor %}")
    model = dpo.load(str(tiny_model_dir), data=DataConfig(chat_template=str(template)))
    asked: list[list[int]] = []
    monkeypatch.setattr("dpo.python.generate", lambda _, ids, **rules: asked.extend(ids) or [[]] * len(ids))
    assert model.generate(["Say A.", "Describe the sea."]) == ["", ""]
    assert asked[0] == asked[1]
    assert model.pretrained.tokenizer.decode(asked[0]) == "Always the same."


def test_implicit_rewards_of_equal_models_are_zero_and_scale_with_beta(
    model: dpo.LanguageModel, other: dpo.LanguageModel
) -> None:
    rows = [
        {"prompt": "Say A.", "chosen": "A", "rejected": "B"},
        {"prompt": "Say B.", "responses": ["B", "A", "nothing"], "ranks": [1, 2, 3]},
    ]
    found = dpo.implicit_rewards(model, other, rows, beta=0.5)
    assert_allclose(found.rewards, 0.5 * (found.policy_logps - found.reference_logps), rtol=1e-6)
    assert found.present.tolist() == [[True, True, False], [True] * 3]
    assert found.ranks[1].tolist() == [0, 1, 2]
    assert found.rewards[0, 2] == 0
    flat = model.score(["Say A.", "Say A.", "Say B.", "Say B.", "Say B."], ["A", "B", "B", "A", "nothing"])
    assert_allclose(found.policy_logps[found.present], flat.logps, rtol=1e-5)
    assert (dpo.implicit_rewards(model, model, rows).rewards == 0).all()
    alone = [{"prompt": "Say A.", "response": text, "helpfulness": n} for n, text in enumerate("AB")]
    assert dpo.implicit_rewards(model, model, alone).ranks.tolist() == [[0], [0]]
    with pytest.raises(UserError, match=r"rows\[0\]"):
        dpo.implicit_rewards(model, other, [{"prompt": "Say A.", "chosen": None, "rejected": "B"}])


@pytest.mark.ci
def test_models_whose_templates_mark_other_tokens_are_not_compared(
    model: dpo.LanguageModel, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The same tokens, of which one template has the end of the turn learned and the other has not."""
    template = tmp_path / "marked.jinja"
    answer = "{% generation %}{{ message.content }}{% endgeneration %}"
    template.write_text(CHAT_TEMPLATE.replace("{{ message.content }}", answer))
    marked = dpo.load(str(tiny_model_dir), data=DataConfig(chat_template=str(template)))
    rows = [{"prompt": "Say A.", "chosen": "A", "rejected": "B"}]
    with pytest.raises(ValueError, match="make different tokens of the rows"):
        dpo.implicit_rewards(model, marked, rows)
    scored = [one.score(["Say A."], ["A"]).lengths.tolist() for one in (model, marked)]
    assert scored == [[3], [1]], "A, the end of the turn and a line's end; A alone"


def test_what_cannot_be_is_refused(model: dpo.LanguageModel, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 prompts and 2 responses"):
        model.score(["Say A."], ["A", "B"])
    with pytest.raises(UserError, match="prompts is one text; allowed is a list"):
        model.generate("Say A.")
    short = dpo.load(str(tiny_model_dir), data=DataConfig(max_length=8))
    with pytest.raises(UserError, match=r"responses\[0\]"):
        short.score(["Say A."], ["a long response"])
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match="a run without export"):
        dpo.load(str(tmp_path))


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ("jax", "numpy", "transformers", "yaml")
    code = f"import sys, dpo; print([m for m in {heavy} if m in sys.modules], dpo.Config)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] <class 'dpo.config.run.Config'>")


def test_every_public_name_is_there_and_documented() -> None:
    for name in dpo.__all__:
        assert getattr(dpo, name).__doc__
        assert name in dir(dpo)
    assert "dpo.load" in str(dpo.__doc__)


def test_the_command_gives_the_same_settings_to_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`dpo.train` calls what `dpo train` calls, with the user's word for code that is named."""
    given = []
    monkeypatch.setattr(
        "dpo.commands.train.train_and_report", lambda *a, **k: given.append((a, k)) or "result"
    )
    config = dpo.Config(run_dir=str(tmp_path), objective={"name": "mine:margin"})
    assert dpo.train(config, winrate="mine:judge") == "result"
    ((settings,), how) = given[0]
    assert settings is config
    from dpo.judging.kinds import require_word_for_code
    from dpo.own_code import require_own_word_for_objectives

    require_word_for_code(how["judge"], setting="winrate", arguments=how["arguments"])
    require_own_word_for_objectives([config.objective], arguments=how["arguments"])
    assert json.dumps(how["judge"])
