"""A model card says what was done, in terms that hold elsewhere, and the hub can read its front matter."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import yaml
from markdown_it import MarkdownIt

from dpo.command_line import load_config
from dpo.config import Config, DataConfig, DistributedConfig, ExportConfig, ModelConfig
from dpo.config.commands import GgufDtype
from dpo.huggingface.gguf_writing import GGUF_DTYPES
from dpo.huggingface.licences import read_front_matter, read_licence
from dpo.huggingface.pretrained import Pretrained
from dpo.training import export
from dpo.training.export import choose_dtype, default_output, export_checkpoint, heldout_metrics
from dpo.training.model_card import model_card, show_parameters

METRICS = {"rewards/accuracies": 0.75, "rewards/margins": 0.5, "lengths/chosen": 12.0}


def base(**changes) -> Pretrained:
    fields = {
        "config": {"model_type": "llama", "dtype": "bfloat16"},
        "licence": "apache-2.0",
        "hub_id": "them/Base-1B",
    }
    fields |= {"model": None, "generation_config": {}, "tokenizer": None, "source": "them/Base-1B@abc"}
    return Pretrained(**fields | changes)


def card(config: Config, pretrained: Pretrained, metrics=METRICS) -> str:
    return model_card(
        config, pretrained, num_steps=41, num_parameters=134_500_000, dtype="float32", metrics=metrics
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = tmp_path / "private" / "pairs.jsonl"
    data.parent.mkdir()
    data.write_text("")
    return Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(source="them/Base-1B"),
        data=DataConfig(train=str(data), eval="hub/preferences"),
        objective={"name": "ipo", "beta": 0.3},
    )


def test_the_card_is_filled_from_the_run(config: Config, tmp_path: Path) -> None:
    text = card(config, base())
    (tmp_path / "README.md").write_text(text)
    assert read_front_matter(tmp_path / "README.md") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["preference-optimization", "ipo"],
        "base_model": "them/Base-1B",
        "base_model_relation": "finetune",
    }
    for part in (
        "# Base-1B, ipo",
        "llama, 134.5 M parameters, float32",
        "| objective | ipo (beta 0.3) |",
        "| beta | 0.3 |",
        "| training data | pairs.jsonl |",
        "| held-out data | hub/preferences |",
        "| steps | 41 of 8 prompts |",
        "| share of pairs that the implicit reward orders as the data do (`rewards/accuracies`) | 0.7500 |",
        "AutoModelForCausalLM.from_pretrained",
    ):
        assert part in text, part


def test_its_settings_repeat_the_run(config: Config, tmp_path: Path) -> None:
    text = card(config, base())
    (tmp_path / "config.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    assert load_config(tmp_path / "config.yaml").objective == config.objective
    assert "run_dir" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_nothing_of_the_machine_or_its_network_is_told(config: Config, tmp_path: Path) -> None:
    where = DistributedConfig(coordinator="10.1.2.3:4567", num_processes=2, process_id=0)
    text = card(dataclasses.replace(config, distributed=where), base())
    assert "10.1.2.3" not in text
    assert str(tmp_path) not in text
    assert "train: pairs.jsonl" in text


def test_what_is_not_known_is_said_so(config: Config) -> None:
    text = card(config, base(licence=None, hub_id=None), metrics=None)
    assert "license: unknown" in text
    assert "| licence of the base | not stated where it was loaded from |" in text
    assert "base_model:" not in text
    assert "Not evaluated at this step." in text


def elements(page: str) -> Counter[str]:
    """What a card consists of behind its front matter."""
    blocks = MarkdownIt("gfm-like", {"linkify": False}).parse(page.split("\n---\n", 1)[1])
    return Counter(token.type for block in blocks for token in (block, *(block.children or ())))


HOSTILE = [
    "mit\n\n# You were chosen\n<script>alert(1)</script>",
    "![x](http://127.0.0.1/pixel.png)",
    "[click](javascript:alert(1)) | <img src=x onerror=y>",
    "``` </td> ```` `",
    "a\u202eb\x1b[31m",
    "http://evil.example",
    "=HYPERLINK(1)|x",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_strings_of_others_are_shown_and_are_no_markdown(config: Config, text: str) -> None:
    """Rendered as GitHub and the hub do: of theirs there is no element but code."""
    hostile = Config(
        model=ModelConfig(source=text), data=DataConfig(train=text, eval=text), objective=config.objective
    )
    page = card(hostile, base(licence=text, hub_id=text))
    assert set(elements(page) - elements(card(config, base()))) <= {"code_inline", "softbreak"}
    assert "\u202e" not in page
    assert "\x1b" not in page
    front = yaml.safe_load(page.split("---\n")[1]) if "---" not in text else {}
    assert front["license"] == text


def test_a_licence_is_read_from_front_matter_only(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert read_licence(tmp_path) is None
    readme.write_text("---\nlicense: mit\ntags: [x]\n---\n# Model\nlicense: other")
    assert read_licence(tmp_path) == "mit"
    for text in ("license: mit", "---\n[unclosed\n---\n", "---\n- a list\n---\n", "---\nlicense: 4\n---\n"):
        readme.write_text(text)
        assert read_licence(tmp_path) is None


def test_the_dtype_of_the_base_is_kept_where_asked(tmp_path: Path) -> None:
    """Without weights: there are none in this directory."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    assert choose_dtype("base", str(tmp_path)) == "bfloat16"
    assert choose_dtype("float16", str(tmp_path)) == "float16"


def test_a_base_without_a_dtype_is_refused_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(export, "policy_to_write", lambda *_: pytest.fail("weights were loaded"))
    given = ExportConfig(run=str(tmp_path), dtype="base")
    with pytest.raises(ValueError, match=r"dtype None; allowed: float32, bfloat16, float16"):
        export_checkpoint(given, Config(model=ModelConfig(source=str(tmp_path))))


def test_another_step_is_exported_beside_the_runs_own_policy() -> None:
    assert default_output(ExportConfig(run="run"), "float32") == Path("run/export")
    assert default_output(ExportConfig(run="run", step=3), "float32") == Path("run/export-3")
    assert default_output(ExportConfig(run="run", step=3, format="adapter"), "float32") == Path(
        "run/adapter-3"
    )


def test_another_dtype_is_exported_beside_the_runs_own_policy() -> None:
    assert default_output(ExportConfig(run="run"), "bfloat16") == Path("run/export-bfloat16")
    assert default_output(ExportConfig(run="run", step=3), "float16") == Path("run/export-3-float16")
    assert default_output(ExportConfig(run="run", format="adapter"), "bfloat16") == Path("run/adapter")


def test_a_gguf_file_stands_beside_the_runs_own_policy() -> None:
    assert default_output(ExportConfig(run="run", format="gguf"), "f32") == Path("run/export.gguf")
    assert default_output(ExportConfig(run="run", format="gguf", step=3), "q8_0") == Path(
        "run/export-3-q8_0.gguf"
    )


def test_how_a_gguf_file_stores_matrices_is_named_alike_everywhere() -> None:
    assert get_args(GgufDtype) == tuple(GGUF_DTYPES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"dtype": "q8_0"},
            r"q8_0, in which a GGUF file stores matrices, and format is merged; allowed: float32",
        ),
        (
            {"format": "gguf", "output": "x"},
            r"output is x, and format is gguf; allowed: a file named \*\.gguf",
        ),
        ({"format": "adapter", "dtype": "bfloat16"}, "dtype is bfloat16, and format is adapter; allowed"),
        ({"format": "gguf", "hub_id": "me/x"}, "hub_id uploads a directory, and format gguf writes a file"),
    ],
)
def test_settings_of_an_export_that_do_not_fit_each_other_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportConfig(run="run", **given)


def test_heldout_metrics_are_those_of_the_step(tmp_path: Path) -> None:
    assert heldout_metrics(tmp_path, 2) is None
    lines = [
        '{"step": 2, "loss": 0.5}',
        '{"step": 2, "eval/rewards/accuracies": 0.7}',
        '{"step": 4, "eval/x": 1.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    assert heldout_metrics(tmp_path, 2) == {"rewards/accuracies": 0.7}
    assert heldout_metrics(tmp_path, 3) is None


def test_a_small_model_is_not_said_to_have_no_parameters():
    assert [show_parameters(n) for n in (26_784, 999_999, 1_000_000)] == ["26,784", "999,999", "1.0 M"]
