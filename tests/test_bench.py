"""`make bench`: what each contestant runs, and the peers' own programs without their packages."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import bench, bench_tunix, peaks, start

ROOT = Path(__file__).resolve().parents[1]
FILES = bench.Files(Path("rankings.jsonl"), Path("pairs.jsonl"), pairs_a_prompt=1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def command_of(name: str, *options: str, files: bench.Files = FILES) -> list[str]:
    return bench.command_line(bench.CONTESTANTS[name], files, bench.parse(list(options)))


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("peer", bench.PEERS)
def test_a_peer_has_a_program_and_pinned_requirements(peer):
    program = (ROOT / "benchmarks" / f"bench_{peer}.py").read_text()
    assert not re.search(r"^\s*(from|import) (dpo|benchmarks)\b", program, re.MULTILINE)
    requirements = (ROOT / "benchmarks" / f"requirements-{peer}.txt").read_text().splitlines()
    assert any(re.fullmatch(rf"(google-)?{peer}==[\d.]+", line) for line in requirements)


def test_every_contestant_runs_its_tools_program():
    for name, one in bench.CONTESTANTS.items():
        command = command_of(name)
        assert one.tool == "dpo" or Path(command[0]).parts[-3] == f".venv-{one.tool}"
        assert any(f"bench_{one.tool}" in part for part in command)
        assert command[-len(one.options) :] == list(one.options)


@pytest.mark.parametrize(
    ("name", "batch", "pairs_a_prompt", "micro_batches"),
    [
        ("trl_float32", 8, 1, 1),
        ("trl_float32_micro", 8, 1, 8),
        ("trl_float32_micro", 2, 6, 12),
        ("tunix_float32", 8, 1, 8),
    ],
)
def test_a_peers_step_is_whole_or_one_pair_at_a_time(name, batch, pairs_a_prompt, micro_batches):
    command = command_of(name, f"--batch={batch}", files=FILES._replace(pairs_a_prompt=pairs_a_prompt))
    assert option(command, "--batch") == str(batch * pairs_a_prompt)
    assert option(command, "--micro-batches") == str(micro_batches)


def test_tunix_takes_part_only_when_it_is_named():
    tools = {one.tool for one in bench.CONTESTANTS.values() if one.is_default}
    assert tools == {"dpo", "trl"}


def test_both_sides_have_the_same_tokens(tokenizer, tmp_path):
    from dpo.data.preferences import read_preferences
    from dpo.data.tokenization import tokenize

    conversation = [{"role": "user", "content": "Why is the sky blue?"}]
    rows = [
        {"prompt": conversation, "chosen": "Rayleigh.", "rejected": "It is not."},
        {"prompt": "Again?", "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": "No, no."},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    theirs = bench_tunix.read_pairs(path, 2, tokenizer, 512)
    rows[1]["chosen"] = "Yes."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = tokenize(read_preferences(str(path)).preferences, tokenizer, max_length=512, truncation="drop")
    for row, pair in enumerate(theirs):
        assert pair.prompt == list(dataset.prompt(row))
        assert [pair.chosen, pair.rejected] == [list(response) for response in dataset.responses(row)]


def test_tunixs_padding_leaves_out_nothing_and_counts_nothing_twice():
    pairs = [bench_tunix.Pair([5, 2], [7, 2, 9], [8]), bench_tunix.Pair([4, 4, 4], [1], [3, 2])]
    arrays = bench_tunix.pad(pairs, 3, 4, pad_id=2)
    assert arrays["prompt_ids"].tolist() == [[2, 5, 2], [4, 4, 4]]
    assert arrays["prompt_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert arrays["chosen_ids"].tolist() == [[7, 2, 9, 2], [1, 2, 2, 2]]
    assert arrays["chosen_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    masks = [arrays[f"{name}_mask"].sum() for name in ("prompt", "prompt", "chosen", "rejected")]
    assert sum(masks) == sum(pair.num_tokens for pair in pairs)


def test_tunix_gets_the_configurations_rope_theta(tiny_model_dir):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 12_345.0}
    settings, theta = bench_tunix.read_config(config)
    assert settings["rope_theta"] == theta == 12_345
    assert settings["num_layers"] == config["num_hidden_layers"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "qwen3"}, "model_type 'qwen3'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
        ({"attention_bias": True}, "attention_bias True"),
    ],
)
def test_a_model_that_tunix_would_compute_wrongly_is_refused(change, named, tiny_model_dir):
    config = json.loads((tiny_model_dir / "config.json").read_text())
    with pytest.raises(ValueError, match=named):
        bench_tunix.read_config(config | change)


@pytest.mark.parametrize("wrong", [["--warmup", "0"], ["--batch", "8", "--micro-batches", "3"]])
def test_tunix_refuses_what_it_could_not_time(wrong, capsys):
    with pytest.raises(SystemExit):
        bench_tunix.parse(["--model", "m", "--data", "d", *wrong])
    assert "must be at least 1" in (said := capsys.readouterr().err) or "does not divide" in said


def test_the_peers_programs_need_no_package_to_be_read():
    for peer in bench.PEERS:
        importlib.import_module(f"benchmarks.bench_{peer}")
    assert "tunix" not in sys.modules


@pytest.mark.parametrize("module", start.STAGES)
def test_the_stages_of_a_start_are_functions_of_their_modules(module):
    assert all(callable(getattr(importlib.import_module(module), name)) for name in start.STAGES[module])


@pytest.mark.slow
def test_going_on_holds_one_state_and_an_export_none(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Arrays at their most, each part in a process of its own.

    On eight devices a state is 2.3 of 2.6 MB, so that a second one would make 1.9 times as many. The run that
    goes on exports as well, and the one that is stopped does not: so small a model then has 1.09 to 1.11.
    """
    options = argparse.Namespace(model=str(tiny_model_dir), length=512)
    first, then, export, _ = (peaks.ask(part, "full", str(tmp_path), options) for part in peaks.PARTS)
    assert first["arrays"] > 0
    assert then["arrays"] <= 1.25 * first["arrays"]
    assert export["arrays"] <= 0.1 * first["arrays"]
    assert min(each["host"] for each in (first, then, export)) > 0
