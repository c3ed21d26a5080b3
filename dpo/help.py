"""The short help of a command: its own options first, then the settings that people use, in groups.

`--help-all` prints every setting as jsonargparse lists them; this is the page before it.
"""

from __future__ import annotations

import shutil
import textwrap
from argparse import Action
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

COMMON: Mapping[str, tuple[str, ...]] = {
    "model and run": ("model.source", "model.reference", "model.compute_dtype", "run_dir"),
    "data": ("data.train", "data.eval", "data.max_length", "data.expand"),
    "objective": ("objective",),
    "learning": ("optimizer.learning_rate", "optimizer.schedule", "training.epochs", "training.steps"),
    "batches and memory": ("training.batch_size", "training.memory_limit"),
    "adapters": ("lora.rank", "lora.base_dtype"),
    "on the way": ("training.eval_every", "training.save_every", "training.seed"),
}
"""The settings of a run that the short help shows, by group."""
WIDEST = 100


def short_help(prog: str, description: str, actions: Iterable[Action], groups: Mapping[str, Any]) -> str:
    """The page: usage, the command's own options, the common settings of a run, where the rest is.

    `groups` are names of sections of settings, which are no options of their own.
    """
    by_name = {action.dest: action for action in actions if action.dest not in ("help", "print_config")}
    common = {name for names in COMMON.values() for name in names}
    of_a_run = {name.partition(".")[0] for name in common} | {"objectives", "mesh", "distributed"}
    own = [name for name in by_name if name.partition(".")[0] not in of_a_run and name not in groups]
    width = min(WIDEST, shutil.get_terminal_size().columns)
    lines = [f"usage: {prog} [--config FILE] [--SETTING=VALUE ...]", "", *textwrap.wrap(description, width)]
    for title, names in {f"options of {prog}": own, **COMMON}.items():
        lines += ["", f"{title}:"]
        for name in names:
            lines += _entry(by_name[name], width)
    count = sum(name not in groups for name in by_name)
    lines += ["", f"{prog} --help-all shows all {count} settings."]
    return "\n".join(lines) + "\n"


def _entry(action: Action, width: int) -> list[str]:
    spelled = [option for option in action.option_strings if not option.endswith("+")]  # which appends
    option = spelled[-1] if spelled else action.dest
    default = (
        "" if action.default in (None, "", []) or action.dest == "config" else f" (default: {action.default})"
    )
    text = " ".join((action.help or "").split()).replace("%%", "%") + default
    head = f"  {option} {_value(action)}".rstrip()
    return [head, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _value(action: Action) -> str:
    """What stands behind an option: the choices where they are few words, else the kind of value."""
    hint: Any = getattr(action, "_typehint", None)
    if action.metavar:
        return str(action.metavar)
    if action.choices:
        return "{" + ",".join(map(str, action.choices)) + "}"
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    words = [str(word) for kind in [hint, *kinds] if get_origin(kind) is Literal for word in get_args(kind)]
    if words:
        return "|".join(["NUMBER", *words]) if float in kinds else "{" + ",".join(words) + "}"
    if get_origin(kinds[0]) is dict:
        return "MAPPING"
    names = {str: "TEXT", int: "N", float: "NUMBER", bool: "{true,false}"}
    return (
        "FILE" if action.dest == "config" else next((names[kind] for kind in kinds if kind in names), "VALUE")
    )
