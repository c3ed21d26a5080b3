"""When a run saves, what stays, and from which checkpoint a run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, cast

from dpo.config import TrainingConfig
from dpo.outcomes import UserError
from dpo.parallel.distributed import on_main
from dpo.runs import Identity
from dpo.training.checkpoint import Checkpoints
from dpo.training.identity import FOLLOWING, ROOTS, Probe, check_probe, differences, require_same
from dpo.training.step import TrainState


class Saver:
    """Decides after each step whether to save, and keeps the best checkpoint from being deleted."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        identity: Identity,
        *,
        settings: TrainingConfig,
        probe: Callable[[TrainState], Probe],
        evaluations: Iterable[Mapping[str, int | float]] = (),
        clock: Callable[[], float] = time.monotonic,
        share: Callable[[Callable[[], bool]], Callable[[], bool]] = lambda asked: asked,
    ):
        """`probe` scores a few rows with a state; `evaluations` are held-out lines of the parts before.

        `share` turns a question to this process into one to all of them, whose clocks differ.
        """
        self.probe = probe
        self._checkpoints, self._identity = checkpoints, identity
        self._settings, self._clock, self._saved_at = settings, clock, clock()
        self._minutes_are_over = share(self._minutes_are_over_here)
        self._best: tuple[float, int] | None = None
        self._is_best = False
        there = set(on_main(lambda: checkpoints.steps))
        for row in evaluations:
            if row["step"] in there:
                self.judge(int(row["step"]), row)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint that is best by `training.keep_best`, the earliest of equal ones."""
        return None if self._best is None else self._best[1]

    def judge(self, step: int, metrics: Mapping[str, int | float] | None) -> None:
        """Take note of the held-out metrics after `step` updates; a new best is due to be saved."""
        name = self._settings.keep_best
        value = math.nan if metrics is None or name is None else _heldout(metrics, name)
        self._is_best = math.isfinite(value) and (self._best is None or value > self._best[0])
        if self._is_best:
            self._best = value, step

    def due(self, step: int) -> bool:
        """Whether to save after `step` updates, by steps or by minutes."""
        every = self._settings.save_every
        by_time = self._settings.save_minutes is not None and self._minutes_are_over()
        by_steps = every is not None and step % every == 0
        return by_steps or by_time

    def is_best(self, step: int) -> bool:
        """Whether what `judge` was last told of are `step` updates, and the best so far."""
        return self._is_best and self.best == step

    def save(self, step: int, state: TrainState) -> None:
        """Save the state after `step` updates, unless it is saved already.

        Raises:
          WriteError: when this save, or the one before it, could not be written.
        """
        self._saved_at = self._clock()
        if self._checkpoints.is_saved(step):
            return
        identity = {**self._identity, "probe": self.probe(state)}
        protect = () if self.best is None else (self.best,)
        self._checkpoints.save(step, state, identity, protect=protect)

    def _minutes_are_over_here(self) -> bool:
        minutes = self._settings.save_minutes
        return minutes is not None and self._clock() - self._saved_at >= 60 * minutes


class Resume(NamedTuple):
    """Where a run starts, and what is known of the part before."""

    step: int
    """Updates that are done; 0 for a new run."""
    identity: Identity | None
    """Of the checkpoint."""
    may_differ: Collection[str]
    """Kinds of identity that may differ from the checkpoint's."""

    def require_same(self, now: Identity, *, log: Callable[[str], None]) -> None:
        """Refuse a part of the identity that became known later; see `identity.require_same`."""
        if self.identity is not None:
            require_same(self.identity, now, allowed=self.may_differ, where=self._where, log=log)

    def check_probe(self, probe: Callable[[], Probe], now: Identity, *, is_coarse: bool) -> str:
        """Whether the restored policy gives the log-probs that it was saved with, in words.

        `is_coarse` says that they go through bfloat16.

        Raises:
          ValueError: when it does not, although nothing changed on which they depend.
        """
        assert self.identity is not None
        changed = sorted(differences(self.identity, now).keys() & (ROOTS | FOLLOWING))
        if changed:
            return f"its log-probs were not compared with those at the time of saving: other {changed}"
        saved = cast("Probe", self.identity["probe"])
        return check_probe(saved, probe(), where=self._where, is_coarse=is_coarse)

    @property
    def _where(self) -> str:
        return f"the checkpoint of step {self.step}"


def find_resume(
    checkpoints: Checkpoints,
    identity: Identity,
    *,
    settings: TrainingConfig,
    run_dir: Path,
    num_steps: int,
    log: Callable[[str], None],
) -> Resume:
    """The newest checkpoint whose files are whole and which belongs to this run; damaged ones are set aside.

    Of several processes the main one looks.

    Raises:
      ValueError: when there is one and resume is "never", when all are damaged, or when it belongs to a run
        with other settings, data, tokenizer, template, weights or versions.
    """

    def find() -> tuple[int, Identity | None, list[str]]:
        if not checkpoints.steps:
            return 0, None, []
        advice = "give another run_dir, or delete the checkpoints"
        if settings.resume == "never":
            raise UserError(f"{run_dir} has checkpoints and training.resume is 'never'; {advice}")
        step, damage = checkpoints.newest_whole()
        listed = [f"step {damaged} ({'; '.join(problems[:3])})" for damaged, problems in damage.items()]
        if step is None:
            raise UserError(f"no checkpoint in {run_dir} is whole: {', '.join(listed)}; {advice}")
        saved = checkpoints.identity(step)
        where = f"the checkpoint of step {step} in {run_dir}"
        may_differ = require_same(saved, identity, allowed=settings.allow_changed, where=where, log=log)
        if step > num_steps:
            raise UserError(f"{where} is beyond the {num_steps} steps of this run; {advice}")
        for text, damaged in zip(listed, damage, strict=True):
            log(f"damaged checkpoint: {text}; kept as {checkpoints.set_aside(damaged)}, not used")
        if damage:
            log(f"going on from step {step}, the newest checkpoint that is whole")
        return step, saved, sorted(may_differ)

    step, saved, may_differ = on_main(find)
    checkpoints.go_on_from(step)
    return Resume(step, saved, may_differ)


def _heldout(metrics: Mapping[str, int | float], name: str) -> float:
    """A held-out metric by its name, with or without the eval/ that a line of metrics has."""
    return metrics[f"eval/{name}"] if f"eval/{name}" in metrics else metrics[name]
