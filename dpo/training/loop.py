"""The story of a run. Read this file first: `train` builds everything in order, then loops.

    settings → policy → data → reference log-probs → compiled step → (resume) → steps → evaluation → export

Step n is dispatched before the metrics of step n − 1 are read, so the device never waits for the host. What
happens after a step is a list of hooks (`dpo.training.hooks`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo.config import Config, save_config
from dpo.data.batch import Batch
from dpo.files import replace_text, writing
from dpo.parallel.deadline import Deadline
from dpo.parallel.distributed import is_main, on_main, on_this_host, shared_vote
from dpo.parallel.joining import joined
from dpo.runs import (
    ADAPTER_DIRECTORY,
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    EXPORT_DIRECTORY,
    HELDOUT_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    read_metrics,
    read_summary,
)
from dpo.training.adapted import export_adapters
from dpo.training.announce import introduction
from dpo.training.assembly import (
    probe_of,
    program_of,
    record_of,
    resume_of,
    saver_of,
    score_datasets,
    tracker_of,
    validation_of,
)
from dpo.training.checkpoint import Checkpoints
from dpo.training.export import export_model
from dpo.training.hooks import Between, Done, Hook, before, every, halt_where_asked, is_due, once
from dpo.training.identity import (
    Identity,
    differences,
    reference_identity,
    require_same,
    settings_fingerprint,
)
from dpo.training.interrupt import StopRequested, stop_requests
from dpo.training.lock import exclusive
from dpo.training.memory import keep_choice
from dpo.training.metrics import Metrics
from dpo.training.on_policy import Observe, open_on_policy
from dpo.training.placement import place_batch
from dpo.training.preflight import check_first_loss, expected_first_loss
from dpo.training.preparation import Run, prepare
from dpo.training.program import Program
from dpo.training.record import Record
from dpo.training.reference import ReferenceStore, Score
from dpo.training.reference_model import choose_reference, make_scoring
from dpo.training.saving import Resume
from dpo.training.starts import counted_start, hung_before
from dpo.training.step import Params, Sums, TrainState, move_reference
from dpo.training.tracking import say
from dpo.training.validation import make_evaluate
from dpo.training.versions import versions

ReferenceSums = Callable[[TrainState, Batch], Sums]
"""(state, batch) → the reference's sums over the batch's responses."""
Update = Callable[[int, TrainState, Batch], tuple[TrainState, Metrics]]
"""(step from 1, state, batch) → the state after it, and its metrics."""


class RunResult(NamedTuple):
    """What a run leaves."""

    run_dir: Path
    status: str
    """finished, interrupted, or already finished (nothing was done)."""
    summary: dict[str, Any]
    """What `SUMMARY_FILE` holds."""


def train(config: Config, *, observe: Observe | None = None) -> RunResult:
    """Run a fine-tune from its settings to an exported policy, or go on with one that was interrupted.

    A stop that is asked for is answered at the next step, or between two batches where nothing is learnt.
    `observe` adds metrics to every held-out evaluation (training.eval_samples is then not looked at).

    Raises:
      ValueError: for anything wrong with settings, data, weights or stores, before the first update.
      OSError: when something can't be written; what was written before is whole.
    """
    run_dir, settings = Path(config.run_dir), settings_fingerprint(config)
    with ExitStack() as stack:
        stack.enter_context(joined(config.distributed))
        on_main(lambda: stack.enter_context(exclusive(run_dir)))
        stop_requested = stack.enter_context(stop_requests())
        on_main(lambda: stack.enter_context(counted_start(run_dir)))
        summary = on_main(lambda: _summary_of(run_dir, settings))
        try:
            if summary is not None and _has_the_same_contents(config, summary):
                return RunResult(run_dir, "already finished", summary)
            return _train(config, settings, stop_requested, observe)
        except StopRequested:
            return RunResult(run_dir, "interrupted", {"step": None})


def _train(
    given: Config, settings: str, stop_requested: Callable[[], bool], observe: Observe | None
) -> RunResult:
    started = time.monotonic()
    run = prepare(given)
    stop_requested = shared_vote(stop_requested, run.mesh)
    with ExitStack() as stack:
        # Where the run goes on, if it was begun before.
        keep = run.config.training.keep_checkpoints
        checkpoints = stack.enter_context(Checkpoints(run.run_dir / CHECKPOINTS_DIRECTORY, keep=keep))
        resume = resume_of(run, checkpoints, log=say)
        for line in introduction(run):
            say(line)

        # The reference: from here on its log-probs are data.
        scoring = make_scoring(run.config, run.policy, run.objective, run.mesh)
        reference = choose_reference(run.config, run.policy, run.mesh)
        stores = score_datasets(run, reference, scoring, stop_requested, log=say)
        known = reference_identity(stores)
        resume.require_same(known, log=say)
        observe = observe or open_on_policy(run.config, run.policy, reference, run.heldout, run.mesh)
        validation = validation_of(run, stores, log=say)

        # The state, which takes the place of the policy's parameters and is donated from step to step.
        program, identity, probe = program_of(run), run.identity | known, probe_of(run, scoring)
        state = _first_state(run, program, resume, checkpoints)
        if resume.step:
            found = resume.check_probe(partial(probe, state), identity)
            say(f"resumed after step {resume.step}: {found}")

        # All is compared that could have refused: from here on the directory is this start's.
        if is_main():
            _begin(run, given, settings)
        tracker = stack.enter_context(tracker_of(run, resume))
        earlier = on_main(lambda: read_metrics(run.run_dir / METRICS_FILE))
        saver = saver_of(run, checkpoints, identity, probe, earlier)
        evaluate = make_evaluate(
            validation,
            beta=run.beta,
            score_with=scoring.heldout,
            observe=observe,
            tracker=tracker,
            stop_requested=stop_requested,
        )

        # The steps.
        record = record_of(run, tracker, program, checkpoints, earlier)
        deadline = stack.enter_context(_step_deadline(run))
        between = Between(record, deadline, saver, evaluate)
        sums = _reference_sums(stores.get("train"), scoring.trained)
        hooks = _make_hooks(run, record, between, stop_requested)
        if resume.step == 0:
            hooks = [_check_of_the_first_loss(run, state, sums), *hooks]
        update = _make_update(run, program, sums, deadline)
        state, step = _optimise(run, state, update, hooks, between, first_step=resume.step)

        # What it came to.
        if step < run.num_steps:
            checkpoints.wait()
            return RunResult(run.run_dir, "interrupted", {"step": step})
        saver.save(step, state)
        metrics = evaluate(state, step, path=run.run_dir / HELDOUT_FILE)
        if stop_requested():
            raise StopRequested
        export = _export(run, state, metrics)
        checkpoints.wait()  # a run that is said to be finished has its last checkpoint whole
        return _finish(run, metrics, export, settings=settings, started=started, best=saver.best)


def _first_state(run: Run, program: Program, resume: Resume, checkpoints: Checkpoints) -> TrainState:
    """Before the first update, or as it was saved. The policy's parameters give up their place either way, so
    that no more than one state is on a device."""
    if resume.step == 0:
        return jax.jit(program.init, donate_argnums=0, out_shardings=program.sharding)(run.policy.params)
    for leaf in jax.tree.leaves(run.policy.params):
        leaf.delete()
    return checkpoints.restore(resume.step, program.state)


def _step_deadline(run: Run) -> Deadline:
    return Deadline(run.config.distributed.step_timeout, fruitless=partial(hung_before, run.run_dir))


def _begin(run: Run, given: Config, settings: str) -> None:
    """Write down what a start that was accepted was given; a refused one leaves the directory as it was.

    A summary that is there is of other settings: the run is not finished any more.
    """
    with writing("the settings", run.run_dir / CONFIG_FILE):  # what may differ is so for one start only
        start = replace(given, training=replace(given.training, allow_changed=[]))
        save_config(start, run.run_dir / CONFIG_FILE)
        (run.run_dir / SUMMARY_FILE).unlink(missing_ok=True)
    if run.memory is not None:
        keep_choice(run.memory, run.run_dir, limit=given.training.memory_limit, settings=settings)


def _optimise(
    run: Run, state: TrainState, update: Update, hooks: Sequence[Hook], between: Between, *, first_step: int
) -> tuple[TrainState, int]:
    """Steps first_step … num_steps − 1, or until a stop is asked for; the state and the steps done."""
    step = first_step
    if 0 < step < run.num_steps and is_due(step, run.config.training.eval_every):
        between.judge(step, state)  # the part before may have been stopped on the way to it
    for step, batch in enumerate(run.loader.batches(first_step, run.num_steps), start=first_step + 1):
        state, metrics = update(step, state, batch)
        done = Done(step, batch, metrics, state)
        try:
            for hook in hooks:
                hook(done)
        except StopRequested:
            between.save_now(done)
            break
    between.settle()
    return state, step


def _make_update(run: Run, program: Program, reference: ReferenceSums, deadline: Deadline) -> Update:
    """One update: the reference's sums, the compiled step, and where it is due the reference's own move."""
    training, move = run.config.training, jax.jit(move_reference, static_argnums=1, donate_argnums=0)

    def update(step: int, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        deadline.step(batch.tokens.shape)
        sums = reference(state, batch)
        state, metrics = program.step(state, run.policy.frozen, place_batch(run.mesh, batch), sums)
        if is_due(step, training.reference_every):
            state = move(state, training.reference_alpha)
        return state, metrics

    return update


def _reference_sums(store: ReferenceStore | None, score_with: Callable[[Params], Score]) -> ReferenceSums:
    """Where a step's reference log-probs come from: the store, or a reference that moves, scored anew."""
    if store is None:
        return lambda state, batch: score_with(state.reference)(batch)
    return lambda _, batch: store.lookup(np.asarray(batch.index))


def _check_of_the_first_loss(run: Run, state: TrainState, reference: ReferenceSums) -> Hook:
    """Refuse to go on where the policy, which still is the reference, does not score like it."""
    batch, dtype = run.loader.batch(0), run.config.model.forward_dtype
    expected = expected_first_loss(run.config, run.objective, batch, reference(state, batch))
    if expected is None:
        return lambda _: None
    return once(lambda done: check_first_loss(float(done.metrics["loss"]), expected, dtype))


def _make_hooks(run: Run, record: Record, between: Between, stop_requested: Callable[[], bool]) -> list[Hook]:
    """What happens after each step, in this order: a checkpoint comes before the evaluation at its step."""
    return [
        lambda done: record.add(done.step - 1, done.batch, done.metrics),
        once(lambda _: record.flush()),  # said at once: somebody waits for it
        halt_where_asked(stop_requested),
        between.save,
        every(run.config.training.eval_every, before(run.num_steps, between.evaluate)),
    ]


def _export(run: Run, state: TrainState, metrics: dict[str, float] | None) -> Path:
    """The policy for Hugging Face, and where there are adapters, these for peft."""
    export = run.run_dir / EXPORT_DIRECTORY
    params, frozen = on_this_host((state.params, run.policy.frozen))
    if is_main():
        policy = run.policy._replace(frozen=frozen)
        export_model(run.config, policy, params, export, num_steps=run.num_steps, metrics=metrics)
        if run.config.lora.is_on:
            directory = run.run_dir / ADAPTER_DIRECTORY
            export_adapters(policy, params, directory, source=run.config.model.source)
    return export


def _finish(
    run: Run,
    metrics: dict[str, float] | None,
    export: Path,
    *,
    settings: str,
    started: float,
    best: int | None,
) -> RunResult:
    """Write the summary, last: a run that has one is finished."""
    summary = {
        "settings": settings,
        "contents": _contents(run),
        "steps": run.num_steps,
        "prompts": len(run.dataset.tokens),
        "eval": metrics,
        "best_checkpoint": best,
        "export": str(export),
        "memory": run.memory and run.memory.as_numbers(),
        "seconds": round(time.monotonic() - started, 1),
        "layout": run.loader.report(),
        "versions": versions(),
    }
    if is_main():
        text = json.dumps(summary, indent=1, sort_keys=True)
        replace_text(run.run_dir / SUMMARY_FILE, text, what="the summary")
    return RunResult(run.run_dir, "finished", summary)


def _has_the_same_contents(config: Config, summary: dict[str, Any]) -> bool:
    """Whether data, tokenizer, template and weights are those that a finished run was made from.

    Raises:
      ValueError: where one is not, and training.allow_changed does not name it.
    """
    if "contents" not in summary:  # of an earlier version, which did not say
        return True
    now = _contents(prepare(config))
    where = f"the finished run in {config.run_dir}"
    require_same(summary["contents"], now, allowed=config.training.allow_changed, where=where, log=say)
    return not differences(summary["contents"], now)


def _contents(run: Run) -> Identity:
    return {kind: run.identity[kind] for kind in ("data", "tokenizer", "template", "weights")}


def _summary_of(run_dir: Path, settings: str) -> dict[str, Any] | None:
    """What a finished run with these settings came to.

    Raises:
      ValueError: naming the file, when it is damaged.
    """
    summary = read_summary(run_dir)
    return summary if summary is not None and summary.get("settings") == settings else None
