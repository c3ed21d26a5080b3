"""A pipe, a device or a socket where a command line names a file: refused at once, unopened, by its name."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo.cli import main
from dpo.config import Config, save_config

SECONDS = 60
"""Within which a command ends; one that opened a pipe would wait for ever."""
RUN = ["--model.source=model", "--data.train=rows.jsonl", "--run_dir=run", "--training.batch_size=2"]
TRAIN = ["train", *RUN, "--data.max_train=2", "--training.steps=1"]
MATCH = ["winrate", "--policy=model", "--opponent=data:worst", "--data=rows.jsonl", "--judge=longer"]
MATCH += ["--output=out"]
HELDOUT = ["evaluate", "--policy=model", "--reference=model", "--data=rows.jsonl"]
PLACES = {
    "config": ("x.yaml", ["train", "--config=x.yaml"]),
    "config of a match": ("x.yaml", ["winrate", "--config", "x.yaml"]),
    "model.source": ("x.gguf", [*TRAIN, "--model.source=x.gguf"]),
    "model.source on the hub": ("x", [*TRAIN, "--model.source=x"]),
    "model.reference": ("x.gguf", [*TRAIN, "--model.reference=x.gguf"]),
    "lora.init": ("x/adapter_config.json", [*TRAIN, "--lora.init=x"]),
    "data.train": ("x.jsonl", [*TRAIN, "--data.train=x.jsonl"]),
    "data.train compressed": ("x.jsonl.gz", [*TRAIN, "--data.train=x.jsonl.gz"]),
    "data.train on the hub": ("x", [*TRAIN, "--data.train=x"]),
    "data.train of several": ("x.csv", [*TRAIN, "--data.train=[rows.jsonl, x.csv]"]),
    "data.eval": ("x.parquet", [*TRAIN, "--data.eval=x.parquet"]),
    "data.chat_template": ("x.jinja", [*TRAIN, "--data.chat_template=x.jinja"]),
    "the licence": ("model/README.md", TRAIN),
    "checksums": ("model/SHA256SUMS", TRAIN),
    "weights": ("model/model.safetensors", TRAIN),
    "the index of weights": ("model/model.safetensors.index.json", TRAIN),
    "a file of the run": ("run/metrics.jsonl", TRAIN),
    "policy": ("x.gguf", [*MATCH, "--policy=x.gguf"]),
    "opponent": ("x.gguf", [*MATCH, "--opponent=x.gguf"]),
    "data of a match": ("x.json", [*MATCH, "--data=x.json"]),
    "a judge": ("x.gguf", [*MATCH, "--judge=local:x.gguf"]),
    "a reward model": ("x", [*MATCH, "--judge=reward_model:x"]),
    "a judge's template": ("x.jinja", [*MATCH, "--judge=local:model", "--template=x.jinja"]),
    "samples": ("out/samples.jsonl", [*MATCH]),
    "reference": ("x.gguf", [*HELDOUT, "--reference=x.gguf"]),
    "chat_template": ("x.jinja", [*HELDOUT, "--chat_template=x.jinja"]),
    "a model to ask": ("x.gguf", ["generate", "x.gguf", "hello"]),
    "a run's settings": ("kept/config.yaml", ["export", "kept"]),
    "a run's figures": ("kept/evaluation.json", ["report", "kept"]),
}
"""Where a file stands in a working directory, and the command that would open it."""
KINDS = ("pipe", "device", "socket")


def put(kind: str, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))


@pytest.fixture
def working_directory(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """With a model, data and a run; a command in it that hangs is ended."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"no end within {SECONDS} seconds")

    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_dir, "model")
    Path("rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    Path("kept").mkdir()
    save_config(Config(), "kept/config.yaml")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_regular_file_is_refused_by_name(
    place: str, working_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, command = PLACES[place]
    kind = KINDS[len(place) % len(KINDS)]
    put(kind, working_directory / name)
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert Path(name).name in said, said
    assert f"is a {kind}" in said or "is no file" in said, said
    assert not Path("run/checkpoints").exists()
