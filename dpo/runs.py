"""A run directory: what its files are called, what can be read there, and a run's settings in other forms.

RUN/
  config.yaml           the settings
  metrics.jsonl         a line of metrics a step and a held-out evaluation
  checkpoints/          what the run goes on from (dpo/training/checkpoint.py)
  reference/            its copy of the reference's log-probs
  memory.json           what training.memory_limit chose
  heldout.safetensors   log-probs of the last held-out evaluation
  export/, adapter/     the policy for Hugging Face, its adapters for peft
  summary.json          what the run came to, written last: a directory that has one is finished
  data.json             what the training data hold, for the report
  evaluation.json       held-out figures; evaluation.tokens.json: token by token, for a few pairs
  winrate/              what `dpo winrate` left
  report.html           the report
  profile/              what JAX's profiler traced (training.profiler_steps)
  tensorboard/, wandb/  of training.trackers; wandb.run, trackio.run: what these call the run
  starts.json           starts that were lost since something was last saved (dpo/training/starts.py)
  lock                  held by the process that writes here
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import yaml

from dpo.config import Config
from dpo.config.run import ObjectiveSettings
from dpo.files import CHECKSUMS_FILE, MAX_CHECKSUMS
from dpo.hub_names import note_named_by, note_own_word
from dpo.outcomes import UserError
from dpo.overwriting import require_own
from dpo.typed_json import MAX_BYTES, parse_typed, read_typed

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS_DIRECTORY = "checkpoints"
REFERENCE_DIRECTORY = "reference"
MEMORY_FILE = "memory.json"
HELDOUT_FILE = "heldout.safetensors"
EXPORT_DIRECTORY = "export"
ADAPTER_DIRECTORY = "adapter"
SUMMARY_FILE = "summary.json"
DATA_FILE = "data.json"
EVALUATION_FILE = "evaluation.json"
TOKENS_FILE = "evaluation.tokens.json"
"""Beside `EVALUATION_FILE`; for another output FILE.json it is FILE.tokens.json."""
MADE_FROM = "made_from"
"""In figures that are made of a run's files: the SHA-256 of these, by which they are known to be of them."""
WINRATE_DIRECTORY = "winrate"
REPORT_FILE = "report.html"
PROFILE_DIRECTORY = "profile"
TRACKED_AS_FILES = {"wandb": "wandb.run", "trackio": "trackio.run"}
"""What a tracker outside of it calls the run, by the tracker."""
STARTS_FILE = "starts.json"
LOCK_FILE = "lock"


Identity = dict[str, dict[str, Any]]
"""What numbers belong to: kind ("settings", "data", …) → name → value, all plain JSON."""
FlatSettings = dict[str, Any]
"""Settings by their dotted names."""


# ---- what a run left ----


def require_run_or_none(run_dir: Path) -> None:
    """Refuse a directory that is no run's and holds a file which a run would write over.

    Raises:
      UserError: naming the file, before anything is written; and as `require_files` does.
    """
    require_files(run_dir)
    is_own = (run_dir / LOCK_FILE).exists()
    require_own(run_dir, _WRITTEN, is_own=is_own, setting="run_dir", kind="run")


def require_files(run_dir: Path) -> None:
    """Refuse a run with a pipe, a socket or a device in it: reading one waits, or never ends.

    Raises:
      UserError: naming it.
    """
    for _ in _files_of(run_dir):
        pass


def require_readable(run_dir: Path) -> None:
    """Refuse a run as `require_files` does, and one with a file that is longer than a run leaves: of what is
    read whole a few lines are expected, and one that is mostly holes takes no room where it comes from.

    Raises:
      UserError: naming the file.
    """
    for path in _files_of(run_dir):
        most = _LARGEST.get(path.name) or _LARGEST.get(path.suffix)
        if most is not None and (size := path.stat().st_size) > most:
            raise UserError(f"{path} has {size} bytes; allowed in a run are {most}")


def _files_of(run_dir: Path) -> Iterator[Path]:
    """The files that are there, each of which can be read to its end."""
    for directory, _, names in os.walk(run_dir):
        for path in (Path(directory, name) for name in names):
            if not path.exists():
                continue
            if not path.is_file():
                raise UserError(f"{path} is no file; allowed in a run are files and directories")
            yield path


_LARGEST = {CONFIG_FILE: 1 << 24, CHECKSUMS_FILE: MAX_CHECKSUMS, ".json": MAX_BYTES, ".jsonl": 1 << 30}
"""Bytes of files that are read whole, by name or ending; of others their readers know more."""

_WRITTEN = (
    CONFIG_FILE,
    METRICS_FILE,
    CHECKPOINTS_DIRECTORY,
    REFERENCE_DIRECTORY,
    MEMORY_FILE,
    HELDOUT_FILE,
    EXPORT_DIRECTORY,
    ADAPTER_DIRECTORY,
    SUMMARY_FILE,
    DATA_FILE,
    EVALUATION_FILE,
    TOKENS_FILE,
    WINRATE_DIRECTORY,
    REPORT_FILE,
    PROFILE_DIRECTORY,
    *TRACKED_AS_FILES.values(),
    STARTS_FILE,
)
"""In a run directory, beside the lock, which is there first and never removed, and what trackers add to."""


class ChosenMemory(TypedDict):
    """What `training.memory_limit` chose, in GiB a device."""

    remat: str
    micro_batches: int
    log_prob_chunk: int
    peak_gib: float
    limit_gib: float
    too_much_gib: dict[str, float | None]
    """Choices that were tried before, in words; None where more than fits, by those before too."""


class RunSummary(TypedDict):
    """What `SUMMARY_FILE` holds."""

    settings: str
    """Fingerprint of the settings that a number depends on."""
    contents: NotRequired[Identity]
    """Fingerprints of data, tokenizer, template, weights and own code; versions before did not keep them."""
    steps: int
    prompts: int
    eval: dict[str, float] | None
    """Held-out metrics after the last step."""
    best_checkpoint: int | None
    """Step of the checkpoint that is best by `training.keep_best`, the last one included."""
    export: str
    memory: ChosenMemory | None
    """What training.memory_limit chose."""
    seconds: float
    layout: Mapping[str, Any]
    """How prompts lie in rows (`Loader.report`)."""
    versions: dict[str, str]


def read_summary(run_dir: str | Path) -> RunSummary | None:
    """What a finished run came to; None for one that is not finished.

    Raises:
      ValueError: naming the file, when it is damaged.
    """
    path = Path(run_dir) / SUMMARY_FILE
    if not path.is_file():
        return None
    return read_typed(path, RunSummary, whole=False)


class Metrics(TypedDict):
    """What each line of `METRICS_FILE` has; the others are its numbers."""

    step: int


def read_metrics(path: str | Path) -> list[dict[str, int | float]]:
    """The lines of a metrics.jsonl, without a last line that was cut off in the middle of writing.

    Raises:
      ValueError: naming a line that is not what was written.
    """
    *complete, _ = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(complete, start=1):
        try:
            row: dict[str, Any] = dict(parse_typed(line, Metrics))
            rows.append({name: v if name == "step" else float(v) for name, v in row.items()})
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"{path}:{number} is damaged: {error}; delete the line to go on without it"
            ) from error
    return rows


def model_of(source: str) -> str:
    """A model's source: of a run directory its export, or its adapters on its model; else itself.

    Raises:
      ValueError: when the run has no export yet, or does not say what its adapters are on.
    """
    note_own_word(source)
    path = Path(source).expanduser()
    if not (path / CONFIG_FILE).is_file() or (path / "config.json").is_file():
        return source
    if not (path / EXPORT_DIRECTORY / "config.json").is_file():
        if (path / ADAPTER_DIRECTORY / "adapter_config.json").is_file():
            return _adapters_of(path)
        raise UserError(
            f"{source} is a run without {EXPORT_DIRECTORY}/: it is not finished, or its export was deleted; "
            f"allowed: wait for its end, or write the newest checkpoint as a model with dpo export {source}"
        )
    return str(path / EXPORT_DIRECTORY)


class _Adapters(TypedDict):
    """What is read of the file beside adapters."""

    base_model_name_or_path: str


def _adapters_of(run_dir: Path) -> str:
    """The adapters that a run left alone, on the model that it trained where their file names another."""
    require_readable(run_dir)
    adapter = run_dir / ADAPTER_DIRECTORY
    named = read_typed(adapter / "adapter_config.json", _Adapters)["base_model_name_or_path"]
    try:
        settings = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
        source = settings["model"]["source"]
        if not isinstance(source, str):
            raise TypeError(f"it is a {type(source).__name__}")
    except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir / CONFIG_FILE} does not say what model.source is: {error}") from error
    note_named_by(str(run_dir / CONFIG_FILE), source)
    is_named = named in (source, str(Path(source).expanduser().resolve()))
    return str(adapter) if is_named else f"{adapter} on {source}"


# ---- what a run was given ----


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> FlatSettings:
    """Settings by their dotted names: {"model": {"remat": "dots"}} is {"model.remat": "dots"}."""
    flat: FlatSettings = {}
    for name, value in settings.items():
        within = isinstance(value, Mapping)
        flat |= flat_settings(value, f"{prefix}{name}.") if within else {f"{prefix}{name}": value}
    return flat


def specification(config: Config) -> ObjectiveSettings | list[ObjectiveSettings]:
    """What `make_objective` and `reward_scale` take: one objective, or the terms of a sum."""
    return config.objectives or config.objective


def objective_terms(config: Config) -> list[ObjectiveSettings]:
    """The objectives of a run with their hyper-parameters: one, or those that its loss is a sum of."""
    return config.objectives or [config.objective]


def objective_title(config: Config) -> str:
    """A run's objectives as a reader sees them, such as "dpo (beta 0.1) + sft"."""
    return " + ".join(map(term_title, objective_terms(config)))


def trained_title(config: Config) -> str:
    """What of its model a run trains, such as "LoRA adapters of rank 8" or "all weights"."""
    lora = config.lora
    if not lora.is_on:
        return "all weights"
    if lora.init is not None:  # of which kind, its own configuration says
        return f"adapters starting as {Path(lora.init).name if Path(lora.init).exists() else lora.init}"
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    return f"{kind} adapters of rank {lora.rank}"


def term_title(term: Mapping[str, Any]) -> str:
    """One objective with its hyper-parameters."""
    settings = ", ".join(f"{key} {value}" for key, value in term.items() if key != "name")
    return f"{term['name']} ({settings})" if settings else str(term["name"])
