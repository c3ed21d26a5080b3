"""What a run writes of itself at its beginning and at its end: the settings, the summary, and what they say.

A run directory with a summary is finished. The same command there trains nothing, unless settings or contents
(data, tokenizer, template, weights) are others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from dpo.config import Config, save_config
from dpo.config.marks import PLACE, marked
from dpo.files import replace_text, writing
from dpo.outcomes import UserError
from dpo.parallel.distributed import is_main
from dpo.runs import (
    CONFIG_FILE,
    EVALUATION_FILE,
    HELDOUT_FILE,
    SUMMARY_FILE,
    TOKENS_FILE,
    Identity,
    RunSummary,
    read_summary,
)
from dpo.training.identity import CODE, WORDS, decide_alike, differences, identity_of_weights, require_same
from dpo.training.lock import require_standing
from dpo.training.memory import keep_choice
from dpo.training.policy import Policy
from dpo.training.preparation import Run, prepare
from dpo.training.reference_model import choose_reference
from dpo.training.versions import versions


def begin(run: Run, given: Config, settings: str) -> None:
    """Write down what a start that was accepted was given; a refused one leaves the directory as it was.

    A summary that is there is of other settings: the run is not finished any more, and held-out figures are
    of a policy that it no longer has. Of several processes the main one writes.
    """
    if not is_main():
        return
    require_standing(run.run_dir)
    with writing("the settings", run.run_dir / CONFIG_FILE):  # what may differ is so for one start only
        for name in (SUMMARY_FILE, HELDOUT_FILE, EVALUATION_FILE, TOKENS_FILE):  # the first says of all
            (run.run_dir / name).unlink(missing_ok=True)
        start = replace(given, training=replace(given.training, allow_changed=[]))
        save_config(start, run.run_dir / CONFIG_FILE)
    if run.memory is not None:
        keep_choice(run.memory, run.run_dir, limit=given.training.memory_limit, settings=settings)


def finish(
    run: Run,
    contents: Identity,
    metrics: dict[str, float] | None,
    *,
    settings: str,
    started: float,
    best: int | None,
) -> RunSummary:
    """Write the summary, last: a run that has one is finished. `contents` are `contents_of` the run,
    `started` is of the monotonic clock."""
    summary: RunSummary = {
        "settings": settings,
        "contents": contents,
        "steps": run.num_steps,
        "prompts": len(run.dataset.tokens),
        "eval": metrics,
        "best_checkpoint": best,
        "export": str(run.run_dir / run.config.policy_name),
        "memory": run.memory and run.memory.as_numbers(),
        "seconds": round(time.monotonic() - started, 1),
        "layout": run.loader.report(),
        "versions": versions(),
    }
    if is_main():
        require_standing(run.run_dir)
        text = json.dumps(summary, indent=1, sort_keys=True)
        replace_text(run.run_dir / SUMMARY_FILE, text, what="the summary")
    return summary


def summary_of(run_dir: Path, given: Config, settings: str) -> RunSummary | None:
    """What a finished run with these settings, whose fingerprint is given too, came to; None without one.

    A run of an earlier version had fewer settings, and so another fingerprint, as has one whose data or
    models have moved: its file of settings is compared. Places may be others where the summary has the
    contents, by which `may_stand` knows what was there.

    Raises:
      ValueError: naming the file, when it is damaged.
    """
    summary = read_summary(run_dir)
    if summary is None or summary.get("settings") == settings:
        return summary
    try:
        kept = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError, yaml.YAMLError):
        return None
    moved = marked(Config, PLACE) if "contents" in summary else ()
    return summary if isinstance(kept, dict) and decide_alike(kept, given, moved=moved) else None


def may_stand(config: Config, summary: RunSummary, *, log: Callable[[str], None]) -> bool:
    """Whether a finished run was made from the data, tokenizer, template and weights of these settings.

    Raises:
      ValueError: where one is another, and training.allow_changed does not name it; where the settings want a
        run from its first step.
    """
    if config.training.resume == "never":
        raise UserError(
            f"{config.run_dir} is a finished run and training.resume is 'never'; give another run_dir, or "
            "delete this one"
        )
    if "contents" not in summary:  # of an earlier version, which did not say
        return True
    run = prepare(config)
    now = contents_of(run, choose_reference(run.config, run.policy, run.mesh))
    where = f"the finished run in {config.run_dir}"
    require_same(summary["contents"], now, allowed=config.training.allow_changed, where=where, log=log)
    return not differences(summary["contents"], now)


def contents_of(run: Run, reference: Policy) -> Identity:
    """What a finished run was made from: data, tokenizer, template, weights and own code."""
    found = {kind: run.identity[kind] for kind in ("data", "tokenizer", "template", "weights", WORDS)}
    code = {name: value for name, value in run.identity["settings"].items() if name.startswith(CODE)}
    found |= {"settings": code} if code else {}
    if run.config.model.reference is not None:
        of_reference = reference.fingerprint, reference.pretrained.model.config
        found["weights"] = found["weights"] | identity_of_weights("reference", *of_reference)
    return found
