"""What a checkpoint belongs to: settings, data, tokenizer, template, weights, reference, versions, devices.

Going on with other ones would not be the same run. A resumed run therefore compares them with its own and
refuses, naming each difference with its old and its new value, unless `training.allow_changed` names its
kind. Devices are the exception: a run may move, and is told that bits may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, TypedDict

import jax
import numpy as np
from jax.sharding import Mesh

from dpo.config import Config
from dpo.config.marks import BESIDE, OWN, PLACE, Mark, marked
from dpo.config.sources import show_source
from dpo.data.batch import Batch
from dpo.losses import default_values, own_code_of
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError
from dpo.runs import FlatSettings, Identity, flat_settings, objective_terms
from dpo.training.policy import Policy
from dpo.training.reading import Dataset, given_chat_template
from dpo.training.reference import ReferenceStore, Rows, Score
from dpo.training.versions import PACKAGES, processor, versions


class Probe(TypedDict):
    """Log-probs of a few rows, by which a policy is known again."""

    rows: list[int]
    logps: list[list[float]]
    """By row and response; 0 where there is none."""


ROOTS = frozenset({"settings", "data", "tokenizer", "template", "weights"})
FOLLOWING = frozenset({"tokens", "steps", "reference"})
"""Kinds that follow from `ROOTS`: where one of those may differ and does, these may too."""
ARCHITECTURE = "architecture."
"""Begins names of a model's configuration; those that an earlier version did not keep are not compared."""
CODE = "code of "
"""Begins the name of an objective that is the user's own function, beside the settings."""
TOLD_ONLY = "devices"
"""The kind that may differ without leave."""
PROCESSOR = "processor"
"""Its name of a CPU; not compared either where an earlier version did not keep it."""
WORDS = "words"
"""Beside the kinds, and never compared: where what a fingerprint stands for was read, for people."""

PROBE_RELATIVE, PROBE_ABSOLUTE = 1e-3, 1e-2


def run_identity(
    config: Config,
    *,
    policy: Policy,
    dataset: Dataset,
    heldout: Dataset | None,
    mesh: Mesh,
    num_steps: int,
) -> Identity:
    """All that is known before the reference was scored."""
    tokenizer = policy.pretrained.tokenizer
    given = given_chat_template(config.data)
    template = tokenizer.chat_template if given is None else given
    read = {"train": dataset} if heldout is None else {"train": dataset, "eval": heldout}
    return {
        "settings": without(resolved_settings(config), PLACE)
        | {f"{CODE}{name}": code for name, code in own_code_of(objective_terms(config)).items()},
        "data": {name: one.content for name, one in read.items()},
        "tokenizer": {"fingerprint": fingerprint_tokenizer(tokenizer)},
        "template": {"sha256": None if template is None else _sha256(json.dumps(template))},
        "tokens": {name: one.tokens.fingerprint for name, one in read.items()},
        "weights": identity_of_weights("policy", policy.fingerprint, policy.pretrained.model.config),
        "versions": package_versions(),
        "steps": {"total": num_steps},
        WORDS: _in_words(config, {name: one.read.num_rows for name, one in read.items()}),
        TOLD_ONLY: {
            "mesh": " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
            "kind": mesh.devices.flat[0].device_kind,
            "processes": jax.process_count(),
        }
        | _on_one_cpu(mesh),
    }


def _on_one_cpu(mesh: Mesh) -> dict[str, str]:
    """Which CPU computes; several processes need not have the same one."""
    is_one = mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    return {PROCESSOR: processor()} if is_one else {}


def _in_words(config: Config, rows: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """By kind and name: the place, and of data how many rows were read there."""
    model, data = config.model, config.data
    sources = {"train": data.train, "eval": data.eval}
    return {
        "data": {name: f"{show_source(sources[name])}, {count:,} rows" for name, count in rows.items()},
        "tokenizer": {"fingerprint": model.source},
        "template": {"sha256": data.chat_template or f"of {model.source}"},
        "weights": {"policy": model.source, "reference": model.reference or model.source},
    }


def identity_of_weights(name: str, fingerprint: str, config: DecoderConfig) -> FlatSettings:
    """The fingerprint of a model's weights, and all that its configuration makes of them."""
    values = {
        f"{ARCHITECTURE}{name}.{field}": _sha256(json.dumps(value)) if isinstance(value, tuple) else value
        for field, value in flat_settings(asdict(config)).items()
    }
    return {name: fingerprint} | values


def reference_identity(stores: Mapping[str, ReferenceStore]) -> Identity:
    """What the reference's log-probs are, by data set ("train", "eval"), to the bit."""
    return {"reference": {name: _fingerprint_rows(store.rows) for name, store in stores.items()}}


def resolved_settings(config: Config) -> FlatSettings:
    """Every setting that decides what a run computes, by its dotted name."""
    return without(flat_settings(asdict(config)), BESIDE)


def shared_settings(config: Config) -> FlatSettings:
    """Every setting that all processes of a run must have the same of, by its dotted name."""
    return without(flat_settings(asdict(config)), OWN)


def without(flat: FlatSettings, mark: Mark) -> FlatSettings:
    """Flat settings but for those that have a mark, themselves or as a section."""
    names = marked(Config, mark)
    return {
        name: value
        for name, value in flat.items()
        if not any(name == other or name.startswith(f"{other}.") for other in names)
    }


def settings_fingerprint(config: Config) -> str:
    """SHA-256 of the settings that decide what a run computes."""
    return _sha256(json.dumps(resolved_settings(config), sort_keys=True))


def decide_alike(kept: Mapping[str, Any], config: Config, *, moved: Collection[str] = ()) -> bool:
    """Whether settings as a file has them decide the same numbers as a configuration.

    Those that they lack, as an earlier version's do, count as their defaults. Of `moved`, which name places,
    those may be others that both name: what is there is for the caller to compare.
    """
    usual, now = resolved_settings(Config()), resolved_settings(config)
    then = without(flat_settings(kept), BESIDE)
    then |= {name: usual[name] for name in usual.keys() & now if name not in then}
    named_by_both = {name for name in moved if None not in (then.get(name), now.get(name))}
    return all(
        name in then and name in now and then[name] == now[name]
        for name in (then.keys() | now) - named_by_both
    )


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = versions()
    return {name: found[name] for name in ("python", *PACKAGES)}


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary, the rules and the special tokens of a tokenizer."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _sha256(json.dumps([rules, special], sort_keys=True))


def differences(saved: Identity, now: Identity) -> dict[str, list[str]]:
    """Of each kind that is in `now`, what differs, as "name: old → new".

    A fingerprint is shown with the place that it was read at, where that was kept.
    """
    found = {}
    for kind, values in now.items():
        if kind == WORDS:
            continue
        old = saved.get(kind, {})
        if kind == "settings":
            old, values = _with_defaults(old), _with_defaults(values)
        before, after = (one.get(WORDS, {}).get(kind, {}) for one in (saved, now))
        lines = [
            f"{name}: {_show(old, name, before)} → {_show(values, name, after)}"
            for name in dict.fromkeys([*old, *values])
            if _show(old, name) != _show(values, name)
            and not (name.startswith((ARCHITECTURE, PROCESSOR)) and name not in old)
        ]
        if lines:
            found[kind] = lines
    return found


def _with_defaults(values: Mapping[str, Any]) -> FlatSettings:
    """Settings, and those at their defaults that are not named or that an earlier version did not have."""
    own = default_values(str(values.get("objective.name")))
    usual = without(resolved_settings(Config()), PLACE)
    usual |= {f"objective.{name}": value for name, value in own.items()}
    return dict(values) | {name: value for name, value in usual.items() if name not in values}


def require_same(
    saved: Identity, now: Identity, *, allowed: Collection[str], where: str, log: Callable[[str], None]
) -> set[str]:
    """Refuse to go on with a checkpoint that belongs to another run; say what may differ and does.

    Returns the kinds that may differ from here on: the allowed ones, and with one of `ROOTS` that does
    differ, what follows from it.

    Raises:
      ValueError: naming each kind that differs, its old and new values, and how to allow it.
    """
    changed = differences(saved, now)
    may_differ = {*allowed, TOLD_ONLY}
    if changed.keys() & may_differ & ROOTS:
        may_differ |= FOLLOWING
    for kind in [kind for kind in changed if kind in may_differ]:
        log(f"changed since {where}: {kind} ({'; '.join(changed[kind])})")
    if TOLD_ONLY in changed:
        log("on other devices results agree to rounding, not to the bit")
    refused = {kind: lines for kind, lines in changed.items() if kind not in may_differ}
    if not refused:
        return may_differ
    listed = "".join(f"\n  {kind}: {line}" for kind, lines in refused.items() for line in lines)
    to_allow = [kind for kind in refused if kind not in FOLLOWING] or list(refused)
    raise UserError(
        f"{where} belongs to a run with other {', '.join(refused)}:{listed}\n"
        "give another run_dir, delete the checkpoints, or go on all the same with "
        + " ".join(f"--allow-changed {kind}" for kind in to_allow)
    )


def take_probe(score: Score, batch: Batch) -> Probe:
    """Log-probs of the first few rows, to be found again when the parameters are restored."""
    index = np.asarray(batch.index)
    logps = np.where(np.asarray(batch.present), np.asarray(score(batch)["logps"], np.float32), 0)
    return {"rows": index.tolist(), "logps": logps.tolist()}


def check_probe(saved: Probe, now: Probe, *, where: str, is_coarse: bool = False) -> str:
    """Compare the restored policy's log-probs with those at the time of saving; returns what was found.

    On another mesh the first batch holds more rows, or fewer: those that are in both are compared, but where
    log-probs are `is_coarse`, of bfloat16, and differ from batch to batch by more than rounding in float32.

    Raises:
      ValueError: when one differs by more than rounding.
    """
    known, here = (dict(zip(probe["rows"], probe["logps"], strict=True)) for probe in (saved, now))
    is_comparable = saved["rows"] == now["rows"] or not is_coarse
    rows = [row for row in known if row >= 0 and row in here and is_comparable]
    then, again = np.asarray([known[row] for row in rows]), np.asarray([here[row] for row in rows])
    if not rows or then.shape != again.shape:
        return "the probe's batch is not the same one now: log-probs of the restored policy were not compared"
    difference = np.abs(again - then)
    if not (difference <= PROBE_ABSOLUTE + PROBE_RELATIVE * np.abs(then)).all():
        p, k = np.unravel_index(np.nanargmax(np.where(np.isnan(difference), np.inf, difference)), then.shape)
        raise UserError(
            f"{where} does not give the log-probs that it was saved with: row {rows[p]}, response "
            f"{k} had {then[p, k]:.4f} and has {again[p, k]:.4f} now; the model's code or its frozen parts "
            "are not what they were"
        )
    return f"its log-probs of {len(then)} rows are as they were (largest difference {difference.max():.1g})"


def _fingerprint_rows(rows: Rows) -> str:
    digest = hashlib.sha256()
    for name, values in sorted(rows.items()):
        digest.update(f"{name} {values.shape}".encode() + np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def _show(values: Mapping[str, Any], name: str, words: Mapping[str, str] | None = None) -> str:
    shown = json.dumps(values[name]) if name in values else "not set"
    if not words or name not in words or name not in values:
        return shown
    return f"{words[name]} ({shown if values[name] is None else values[name][:12]})"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
