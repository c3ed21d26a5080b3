"""Data sets of a hub on loopback: fetched here, made into tables by a process without token and hub."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import config
from hub_server import TOKEN, Hub, point_to, running_hub
from huggingface_hub import constants

from dpo import limited
from dpo.data import cards, table_checks
from dpo.data.data_sets import open_data_set
from dpo.data.preferences import read_preferences

NAME = "someone/pairs"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The hub, with both clients pointed at it and empty caches."""
    with running_hub() as hub:
        point_to(hub, tmp_path / "hub", monkeypatch)
        monkeypatch.setattr(config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(config, "USE_PARQUET_EXPORT", False)
        yield hub


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)


def lines(*words: str) -> bytes:
    rows = [{"prompt": "Hi", "chosen": word, "rejected": "no"} for word in words]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chosen(source: str, split: str = "train") -> list[str]:
    return [str(row.responses[0]) for row in read_preferences(source, split=split).preferences]


CARD = """---
configs:
- config_name: first
  data_files:
  - {split: train, path: 'first/train-*.jsonl'}
  - {split: test, path: first/test.jsonl.gz}
- config_name: second
  data_files: second.jsonl
---
"""


@pytest.mark.ci
def test_subset_split_and_revision_are_those_that_are_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private.add(f"datasets/{NAME}")
    files = {"README.md": CARD.encode(), "second.jsonl": lines("other")}
    older = hub.put(
        f"datasets/{NAME}",
        files | {"first/train-0.jsonl": lines("old"), "first/test.jsonl.gz": b""},
        tag="v1",
    )
    parts = {"first/train-1.jsonl": lines("c"), "first/train-0.jsonl": lines("a", "b")}
    hub.put(f"datasets/{NAME}", files | parts | {"first/test.jsonl.gz": gzip.compress(lines("t"))})
    seen = {}

    def look(script: Path, request: dict, **sizes: int) -> dict:
        """The process that reads the files, with what it can see written down."""
        said = limited.look(script, request, **sizes)
        seen.update(request)
        return said

    monkeypatch.setattr(table_checks, "look", look)
    assert chosen(f"{NAME}:first") == ["a", "b", "c"]
    assert TOKEN not in json.dumps(seen)
    assert {path for paths in seen["files"].values() for path in paths} == {
        str(path) for path in (tmp_path / "hub").rglob("first/*") if "snapshots" in path.parts
    }
    assert not [path for _, path, _ in hub.asked if "second.jsonl" in path and "resolve" in path]
    seen.clear()
    assert chosen(f"{NAME}:first", "test") == ["t"]
    go_offline(monkeypatch)
    asked = len(hub.asked)
    assert chosen(f"{NAME}:first") == ["a", "b", "c"]
    assert len(hub.asked) == asked
    assert not seen, "what was made once is opened"
    for revision in ("v1", older):
        with pytest.raises(ValueError, match=rf"the hub is not asked, .*allowed: {NAME}@"):
            open_data_set(f"{NAME}:first@{revision}", "train")
    with pytest.raises(ValueError, match=f"kept here is the subset 'first', .*allowed: {NAME}:first"):
        open_data_set(NAME, "train")
    next((tmp_path / "hub").rglob("refs/main")).unlink()  # as where another revision alone was fetched
    with pytest.raises(ValueError, match=rf"the hub is not asked, .* not revision 'main'; allowed: {NAME}@"):
        open_data_set(f"{NAME}:first", "train")


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (None, {"default"}),
        ("[{config_name: only}]", {"default", "only"}),
        ("[{config_name: one}, {config_name: two}]", {"default"}),
        ("[{config_name: one}, {config_name: two, default: true}]", {"two"}),
    ],
)
def test_a_subset_is_meant_without_a_name_where_the_card_says_so(
    configs: str | None, expected: set[str], tmp_path: Path
) -> None:
    """As `datasets` reads the card where it can ask the hub."""
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n" if configs else "no card")
    assert cards.unnamed_subsets(tmp_path) == expected


def parquet(columns: dict) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="zstd")
    return file.getvalue()


@pytest.mark.slow
def test_a_small_parquet_file_that_is_gigabytes_of_rows_ends_in_the_limited_process(hub: Hub) -> None:
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1024, pyarrow.int32()), ["x" * (1 << 22)])
    hub.put(
        f"datasets/{NAME}", {"train.parquet": parquet({"prompt": texts, "chosen": texts, "rejected": texts})}
    )
    with pytest.raises(ValueError, match=rf"{NAME}: could not be read: .*MiB of memory"):
        read_preferences(NAME)
    with pytest.raises(ValueError, match=rf"{NAME}: could not be read: "):
        read_preferences(NAME)


def test_a_process_that_looks_at_files_has_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys; json.load(sys.stdin); print(json.dumps(dict(os.environ)))")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "MY_SECRET"):
        monkeypatch.setenv(name, TOKEN)
    seen = limited.look(script, {}, size=0)
    assert TOKEN not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == seen["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.txt": b"a"}, "would be read as text; allowed are csv, json, parquet, arrow"),
        ({"pairs.py": b"", "train.jsonl": lines("a")}, "Dataset scripts are no longer supported, but found"),
        ({"train.jsonl.zip": b"PK"}, "is an archive; allowed are tables"),
        (
            {"README.md": CARD.replace("second.jsonl", "hf://datasets/someone/else/a.jsonl").encode()},
            "name 'hf://datasets/someone/else/a.jsonl'; allowed are files of",
        ),
    ],
    ids=lambda given: given[:20] if isinstance(given, str) else None,
)  # fmt: skip
def test_what_is_no_table_of_its_own_is_refused_unfetched(hub: Hub, files: dict, message: str) -> None:
    hub.put(f"datasets/{NAME}", files)
    with pytest.raises(ValueError, match=message):
        open_data_set(NAME, "train")
    data = {name for name in files if name not in ("README.md", "pairs.py")}
    assert not [path for _, path, _ in hub.asked if "resolve" in path and path.rpartition("/")[2] in data]


def test_a_card_that_could_not_be_fetched_is_not_passed_over(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(f"datasets/{NAME}", {"train.jsonl": lines("a")})

    def fail(*_: object, **__: object) -> str:
        raise OSError("429 Client Error")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match=f"{NAME}: its card could not be fetched: 429 Client Error"):
        open_data_set(NAME, "train")


def test_a_commit_between_card_and_files_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(f"datasets/{NAME}", {"README.md": b"", "train.jsonl": lines("a")})
    opened = datasets.load_dataset_builder

    def later(*given: Any, **named: Any) -> Any:
        hub.put(f"datasets/{NAME}", {"README.md": b"", "train.jsonl": lines("b")})
        return opened(*given, **named)

    monkeypatch.setattr(datasets, "load_dataset_builder", later)
    with pytest.raises(ValueError, match="it was changed while it was opened; start again"):
        open_data_set(NAME, "train")
