"""What the types of the settings can't say, looked at before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.command_line import load_config
from dpo.config import Config, DataConfig, EvaluateConfig, heldout_settings
from dpo.config.sources import spellings
from dpo.distribution import find_data
from dpo.hub_names import note_named_by, note_own_word
from dpo.outcomes import UserError
from dpo.own_code import require_own_word_for_objectives
from dpo.regular_files import why_no_file

if TYPE_CHECKING:
    from dpo.training.places import Place

FIRST_ROWS = 8
"""Rows of a file of preferences that are parsed before anything is loaded."""


def load_run(run: str) -> Config:
    """The settings that a run directory was made with; what they name on the hub is not the user's own word.

    Raises:
      ValueError: naming the file, when there is none, it is not a configuration, it has an objective that no
        command knows, or something in the directory is no file, or is longer than a run leaves it.
    """
    from dpo.losses import reward_scale
    from dpo.runs import objective_terms, require_readable

    require_readable(Path(run))
    path = Path(run) / "config.yaml"
    config = load_config(path)
    try:
        for term in objective_terms(config):
            reward_scale(term)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    data = [source for given in (config.data.train, config.data.eval) if given for source in spellings(given)]
    note_named_by(str(path), config.model.source, config.model.reference, config.lora.init, *data)
    return config


def check_settings(config: Config, arguments: Sequence[str]) -> None:
    """The objective, the trackers' packages, files that are named.

    An objective of the user's own has to be named by `arguments`, the command line.

    Of files of preferences the first rows are parsed, so that wrong columns are not found after the model is
    loaded.

    Raises:
      ValueError: naming the key, the value and what is allowed.
    """
    from dpo.losses import make_objective
    from dpo.runs import objective_terms, require_run_or_none, specification
    from dpo.training.places import places
    from dpo.training.trackers import require_trackers

    require_own_word_for_objectives(objective_terms(config), arguments=arguments)
    make_objective(specification(config))
    require_trackers(config.training.trackers)
    if config.lora.init is not None:
        require_file("lora.init", f"{config.lora.init}/adapter_config.json")
    if config.data.chat_template is not None:
        require_file("data.chat_template", config.data.chat_template)
    require_run_or_none(Path(config.run_dir))
    data = config.data
    for place in places(data, heldout=False):
        _check_place(place, data)
    for place in places(data, heldout=True) if data.eval is not None else ():
        _check_place(place, data)


def check_models_of(config: Config) -> None:
    """The same as `check_models` of what a run trains, and of the reference that it names."""
    check_models({"model.source": config.model.source, "model.reference": config.model.reference})


def check_models(named: Mapping[str, str | None]) -> None:
    """Refuse settings that name what is no model, before hours go into what comes first.

    Raises:
      ValueError: naming the setting, what stands there, and what is allowed.
    """
    from dpo.huggingface.model_names import require_model

    for setting, source in named.items():
        if source is not None:
            require_model(source, setting=setting)


def check_heldout(given: EvaluateConfig, run: Config | None) -> Config:
    """The settings of a comparison on held-out data that seem to be there; they are opened later.

    Raises:
      ValueError: without held-out data, or when these are a file that is not there.
    """
    from dpo.runs import model_of

    note_own_word(given.policy, given.reference, *(spellings(given.data) if given.data else ()))
    config = heldout_settings(given, run)
    if given.policy is None and given.run is not None and not Path(config.model.source).exists():
        model_of(given.run)  # says what the run lacks
    if config.data.eval is None:
        raise UserError("data is not given, and the run has no held-out data; allowed: --data SOURCE")
    for source in spellings(config.data.eval):
        require_source("data", source)
    return config


def require_source(key: str, source: str) -> None:
    """Refuse a source of data that can only be a file and is not there; others are found when opened."""
    from dpo.data.sources import is_file_name

    if is_file_name(source):
        require_file(key, source)


def require_file(key: str, path: str) -> None:
    """Refuse a setting that names a file which is neither there nor comes with the package."""
    if (problem := why_no_file(Path(find_data(path)))) is not None:
        raise UserError(f"{key} is {path!r}: {problem} (the working directory is {Path.cwd()})")


def _check_place(place: Place, data: DataConfig) -> None:
    require_source(place.setting, place.source)
    path = Path(find_data(place.source))
    if path.is_file() or (path.is_absolute() and not path.is_dir()):
        _check_first_rows(place, data)


def _check_first_rows(place: Place, data: DataConfig) -> None:
    """Where one of them is malformed and must not be, all rows are read, and the error is about all."""
    from dpo.data.preferences import read_part
    from dpo.data.settling import settle
    from dpo.data.sources import Part

    first = Part(rows=min(place.limit or FIRST_ROWS, FIRST_ROWS))
    settled = settle(place.source, place.split, place.reading)
    read = read_part(place.source, place.split, first, data.expand, settled)
    if not read.num_rows or (read.problems and data.on_error == "stop"):
        place.read(data)
