"""The kit for an accelerator, rehearsed: what it makes, what it runs, and what is kept when it is cut off."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from benchmarks import accelerator, accelerator_inputs, bench_dpo, check_attention, profile_loop
from benchmarks.work import count_work
from dpo.huggingface.text_models import read_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    accelerator_inputs.make_inputs(directory, accelerator_inputs.REHEARSED, rows=24)
    return directory


@pytest.mark.parametrize("name", accelerator_inputs.SHAPES)
def test_every_model_of_the_kit_has_the_tokenizer_that_was_made_for_it(tmp_path, name):
    """transformers takes another for some types of models, which made all responses the same."""
    (tmp_path / "config.json").write_text(json.dumps(accelerator_inputs.configuration(name)))
    accelerator_inputs.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("user w0 w1999 <end>")["input_ids"] == [3, 5, 2004, 2]


def rehearse(inputs: Path, out: Path, cell: str, *more: str) -> None:
    accelerator.main(["--inputs", str(inputs), "--out", str(out), "--rehearse", "--only", cell, *more])


def parse(inputs: Path, out: Path, *more: str):
    return accelerator.parse(["--inputs", str(inputs), "--out", str(out), "--rehearse", *more])


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]


def test_pairs_have_the_lengths_that_are_asked_for(inputs):
    """A prompt and two responses of `fixed1024` fill a row to the last token."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tiny")
    row = json.loads((inputs / "fixed1024.jsonl").read_text().splitlines()[0])
    template = tokenizer.apply_chat_template
    prompt = template(row["prompt"], add_generation_prompt=True, return_dict=False)
    both = [template(row["prompt"] + row[side], return_dict=False) for side in ("chosen", "rejected")]
    assert len(prompt) == 512
    assert [len(ids) - len(prompt) for ids in both] == [256, 256]
    assert all(ids[: len(prompt)] == prompt for ids in both)


@pytest.mark.parametrize("name", ["hh", "ultrafeedback"])
def test_counted_lengths_are_those_of_the_pairs_that_are_made(inputs, name):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tiny")
    rows = (inputs / f"{name}.jsonl").read_text().splitlines()
    for line, expected in zip(rows, accelerator_inputs.COUNTED[name], strict=False):
        row = json.loads(line)
        words = [sum(len(turn["content"].split()) for turn in row[side]) for side in row]
        assert [words[0] + 5, words[1] + 1, words[2] + 1] == expected
    asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    assert len(asked) == words[0] + 5


def test_work_of_a_hybrid_counts_attention_in_its_attention_layers():
    config = read_config(accelerator_inputs.TINY_LFM2)[1]
    dense = read_config(accelerator_inputs.TINY_LFM2 | {"layer_types": ["full_attention"] * 16})[1]
    ones = np.ones((1, 8), np.int32)
    batch = Mock(group=ones, positions=np.arange(8)[None], branch=0 * ones, lengths=np.asarray([[4]]))
    work, all_attention = count_work(config, batch), count_work(dense, batch)
    assert work.attention == all_attention.attention * 6 / 16
    mixing = 10 * 4 * 32 * 32 - 10 * (2 * 32 * 32 + 2 * 32 * 16)
    assert work.body - all_attention.body == 2 * 8 * mixing


def test_every_cell_runs_a_program_with_options_that_it_has(inputs, tmp_path):
    options = parse(inputs, tmp_path)
    programs = {"benchmarks.bench_dpo": bench_dpo, "benchmarks.profile_loop": profile_loop}
    for cell in accelerator.CELLS:
        arguments = [part.replace("{inputs}", str(options.inputs)) for part in cell.arguments]
        if arguments[1] in programs:
            parsed = programs[arguments[1]].parse(accelerator.rehearsed(arguments)[2:])
            assert parsed.data.is_file()
            assert Path(parsed.source).name in accelerator_inputs.REHEARSED
            assert (parsed.batch, vars(parsed).get("attention", "auto")) == (2, "auto")


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        pytest.param("ours", "ours smollm2 135m hh", marks=pytest.mark.ci),
        pytest.param("LoRA", "ours llama 1b helpsteer3 LoRA", marks=pytest.mark.slow),
        pytest.param("hybrid", "ours lfm2 350m ultrafeedback", marks=pytest.mark.slow),
        pytest.param("delta rule", "ours qwen3.5 0.8b ultrafeedback", marks=pytest.mark.slow),
        pytest.param("cudnn", "ours llama 1b fixed1024 cudnn", marks=pytest.mark.slow),
        pytest.param("attention", "attention: ranges", marks=pytest.mark.slow),
        pytest.param("loop", "loop llama 0.5b ultrafeedback", marks=pytest.mark.slow),
        pytest.param("K", "ours llama 1b helpsteer3 K=4", marks=pytest.mark.slow),
        pytest.param("long", "ours llama 1b long4096", marks=pytest.mark.slow),
    ],
)
def test_a_cell_is_measured_and_kept(name, cell, inputs, tmp_path):
    rehearse(inputs, tmp_path, cell, "--minutes", "9")
    facts, *measured = lines(tmp_path)
    assert facts["versions"]["jax"]
    assert len(measured) == 1
    assert not measured[0].get("failed"), measured[0]
    if name == "loop":
        assert 0 < measured[0]["device's share of the loop"] <= 1
    elif name == "attention":
        assert (measured[0]["disagree"], measured[0]["failed"]) == ([], []), measured[0]
    else:
        assert measured[0]["pairs/s"] > 0
        assert measured[0]["tokens/s, computed once"] > 0
        assert measured[0]["forecast GiB"] > 0


def test_a_program_that_fails_or_takes_too_long_is_a_line_and_not_the_end(inputs, tmp_path):
    options = parse(inputs, tmp_path)
    broken = accelerator.Cell("broken", ("-c", "raise SystemExit('no such card')"), 60)
    endless = accelerator.Cell("endless", ("-c", "import time; time.sleep(60)"), 0.2)
    sound = accelerator.Cell("sound", ("-c", """print('said before\\n{"found": 1}')"""), 60)
    silent = accelerator.Cell("silent", ("-c", "print('no figures')"), 60)
    for cell in (broken, endless, sound, silent):
        accelerator.record(tmp_path, accelerator.run(cell, options, cell.seconds))
    failed, cut, measured, without = lines(tmp_path)
    assert (without["failed"], without["last"]) == ("no result", ["no figures"])
    assert measured["all"] == {"found": 1}
    assert failed["failed"] == 1
    assert failed["last"][-1].endswith("no such card")
    assert cut["failed"] == "time"
    assert "no such card" in (tmp_path / "logs.txt").read_text()


def test_a_program_that_is_ended_leaves_what_it_said_and_no_process(inputs, tmp_path):
    """One that it started would keep its output open, and the kit waiting."""
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    text = f"{child}; print('{{\"found\": 1}}', flush=True); import time; time.sleep(60)"
    began = time.monotonic()
    line = accelerator.run(accelerator.Cell("cut", ("-c", text), 9), parse(inputs, tmp_path), 0.5)
    assert time.monotonic() - began < 40
    assert (line["failed"], line["all"]) == ("time", {"found": 1})


def test_a_check_that_fails_or_disagrees_is_found_and_the_others_go_on(monkeypatch):
    def computed(name, kind, layout, q, k, v, out):
        if name == "blocked" and kind.softcap:
            raise KeyError("no kernel")
        wrong = 0.1 if name == "blocked" and kind.window else 0.0
        return [x.astype(jnp.float32) + wrong for x in (q, k, v, out)]

    monkeypatch.setattr(check_attention, "_value_and_gradients", computed)
    monkeypatch.setattr(check_attention, "ON_PLATFORM", {"cpu": ("blocked", "plain", "cudnn")})
    first, *_, last = [json.loads(json.dumps(x)) for x in check_attention.check(16, (2, 1, 16), repeats=1)]
    assert first["blocked bfloat16 causal"]["agrees"]
    assert last["disagree"] == [f"blocked {dtype} window" for dtype in ("bfloat16", "float32")]
    assert last["failed"][:2] == ["blocked bfloat16 soft-cap", "blocked bfloat16 window and soft-cap"]
    assert last["blocked float32 soft-cap"] == {"failed": "KeyError: 'no kernel'"}
    assert last["plain float32 soft-cap"]["agrees"]
    assert "needs a gpu" in last["cudnn float32 causal"]["left out"]


RUN_TWO_CELLS = """
import sys
ENDLESS = "import os, time; kit = os.getppid()\\nwhile os.getppid() == kit: time.sleep(0.1)"
from benchmarks import accelerator
if __name__ == "__main__":
    accelerator.prepare_inputs = lambda options: None
    accelerator.CELLS = tuple(
        accelerator.Cell(name, ("-c", f"{text}; print('{{}}')"), 60)
        for name, text in (("done", "pass"), ("endless", ENDLESS))
    )
    accelerator.check_steps = lambda options, stop: []
    accelerator.main(sys.argv[1:])
"""


def test_what_was_measured_stands_where_the_kit_is_killed(tmp_path):
    command = [sys.executable, "-c", RUN_TWO_CELLS, "--out", str(tmp_path), "--rehearse"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=accelerator.ROOT) as kit:
        assert kit.stdout is not None
        said = [json.loads(kit.stdout.readline()) for _ in range(2)]
        kit.kill()
    facts, measured = lines(tmp_path)
    assert facts["versions"]["jax"] == said[0]["versions"]["jax"]
    assert measured["cell"] == said[1]["cell"] == "done"


def test_what_is_missing_is_said_at_the_start(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(accelerator, "_version", lambda package: None if package == "peft" else "1")
    monkeypatch.setattr(accelerator, "card", lambda: accelerator.NO_CARD)
    with pytest.raises(SystemExit, match="names no card; --rehearse"):
        accelerator.main(["--inputs", str(inputs), "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out)["missing"] == ["peft"]
    assert accelerator.needed(accelerator.CELLS[1]) == accelerator.requirements()
    assert {"jax", "grain", "jsonargparse", "vaderSentiment"} <= set(accelerator.requirements())
    rehearse(inputs, tmp_path, "trl llama 1b helpsteer3 LoRA")
    assert lines(tmp_path)[-1] == {
        "cell": "trl llama 1b helpsteer3 LoRA",
        "left out": "not installed: peft",
    }


def test_cells_without_time_are_said_to_be_left_out(inputs, tmp_path):
    rehearse(inputs, tmp_path, "ours llama,steps", "--minutes", "0")
    _, *rest = lines(tmp_path)
    assert rest[0] == {"check": "steps cpu", "left out": "no time"}
    assert len(rest) > 1
    assert all(line["left out"] == "no time" for line in rest)


@pytest.mark.parametrize("only", ["no such cell", "ours llama,", "ours llama,hepsteer3"])
def test_cells_that_do_not_exist_are_refused_with_those_that_do(only, inputs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        rehearse(inputs, tmp_path, only)
    said = capsys.readouterr().err
    assert f"--only has {only.partition(',')[2] or ('' if ',' in only else only)!r}; allowed are" in said
    assert "steps, attention: ranges, cudnn and plain, ours llama 1b helpsteer3" in said


def test_results_that_can_not_be_kept_are_said_before_anything_is_computed(inputs, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"--out is .*file: .*; allowed: a directory that can be written"):
        rehearse(inputs, tmp_path / "file", "ours llama")


def test_steps_of_an_earlier_run_are_not_compared(inputs, tmp_path, monkeypatch):
    (tmp_path / "steps_cpu").mkdir()
    monkeypatch.setattr(accelerator, "_python", lambda *_: ("time", "", ""))
    [line] = accelerator.check_steps(parse(inputs, tmp_path), accelerator.time.monotonic() + 99)
    assert line["failed"] == "time"
    assert not (tmp_path / "steps_cpu").exists()


def test_a_ranking_is_all_its_pairs_for_the_peer(inputs):
    rankings, pairs = (
        [json.loads(line) for line in (inputs / f"{name}.jsonl").read_text().splitlines()]
        for name in ("helpsteer3_k4", "helpsteer3_k4_pairs")
    )
    assert len(pairs) == 6 * len(rankings)
    assert [pairs[5][side] for side in ("chosen", "rejected")] == rankings[0]["responses"][2:]
    assert all(row["ranks"] == [1, 2, 3, 4] for row in rankings)


def test_the_forecast_is_of_the_card_and_of_attention_in_kernels():
    """A product-free program whose attention is a kernel's: an L40S takes its own rate, not an L4's."""
    traced = jax.jit(lambda x: x + 1).trace(1.0)
    card = Mock(device_kind="NVIDIA L40S")
    seconds = bench_dpo._forecast(traced, traced.lower().compile(), "bfloat16", [card], 3.62e14)
    assert seconds == pytest.approx(1)
    assert accelerator.peak_flops("NVIDIA L40S, 550.54") == 3.62e14
