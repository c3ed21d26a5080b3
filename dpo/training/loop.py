"""The story of a run. Read this file first: `train` builds everything in order, then loops.

    settings → policy → data → reference log-probs → compiled step → (resume) → steps → evaluation → export

Step n is dispatched before the metrics of step n − 1 are read, so the device never waits for the host. What
happens after a step is a list of hooks (`dpo.training.hooks`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo.config import Config
from dpo.config.home import at_home
from dpo.data.batch import Batch
from dpo.parallel.deadline import Deadline
from dpo.parallel.distributed import is_main, on_main, on_this_host, shared_vote
from dpo.parallel.joining import joined
from dpo.runs import (
    ADAPTER_DIRECTORY,
    EXPORT_DIRECTORY,
    HELDOUT_FILE,
    METRICS_FILE,
    Identity,
    RunSummary,
    read_metrics,
    require_run_or_none,
)
from dpo.training import rounding
from dpo.training.announce import introduction
from dpo.training.assembly import (
    checkpoints_of,
    evaluate_of,
    probe_of,
    profiler_of,
    program_of,
    record_of,
    resume_of,
    saver_of,
    score_datasets,
    tracker_of,
    validation_of,
)
from dpo.training.checkpoint import Checkpoints
from dpo.training.directory import begin, contents_of, finish, may_stand, summary_of
from dpo.training.export import export_adapters, export_model
from dpo.training.hooks import Between, Done, Hook, before, every, halt_where_asked, is_due, once
from dpo.training.identity import reference_identity, settings_fingerprint
from dpo.training.interrupt import StopRequested, stop_requests, stops_at_once
from dpo.training.lock import exclusive, require_standing
from dpo.training.metrics import Metrics
from dpo.training.on_policy import Observe, open_on_policy
from dpo.training.placement import place_batch
from dpo.training.preflight import check_first_loss, expected_first_loss
from dpo.training.preparation import Run, prepare, with_beta_noted
from dpo.training.profile import STEP, Profiler
from dpo.training.program import Program
from dpo.training.progress import say
from dpo.training.record import Record
from dpo.training.reference import ReferenceStore, Score
from dpo.training.reference_model import Scoring, choose_reference, make_scoring
from dpo.training.requirements import (
    require_replaceable_exports,
    require_shared,
    require_what_comes_later,
)
from dpo.training.saving import Probe, Resume
from dpo.training.starts import counted_start, hung_before
from dpo.training.step import Params, Sums, TrainState, move_reference
from dpo.training.validation import Evaluate

ReferenceSums = Callable[[TrainState, Batch], Sums]
"""(state, batch) → the reference's sums over the batch's responses."""
Update = Callable[[int, TrainState, Batch], tuple[TrainState, Metrics]]
"""(step from 1, state, batch) → the state after it, and its metrics."""


Asked = Callable[[], bool]
"""Whether a stop is asked for."""


class RunResult(NamedTuple):
    """What a run leaves."""

    run_dir: Path
    status: str
    """finished, interrupted, or already finished (nothing was done)."""
    summary: Mapping[str, Any]
    """What `dpo.runs.RunSummary` says; of an interrupted run {"step": steps done, or None}."""
    stop_asked: bool = False
    """Whether a stop was asked for, of a finished run when nothing but its end was left to do."""


def train(config: Config, *, observe: Observe | None = None) -> RunResult:
    """Run a fine-tune from its settings to an exported policy, or go on with one that was interrupted.

    A stop that is asked for is answered at the next step, or between two batches where nothing is learnt.
    `observe` adds metrics to every held-out evaluation (training.eval_samples is then not looked at).

    Raises:
      ValueError: for what is wrong with settings, data, weights or stores, before the first update; and after
        `training.max_skipped` steps in a row that are not finite.
      OSError: when something can't be written; what was written before is whole.
    """
    config = with_beta_noted(at_home(config))
    try:
        return _train(config, observe)
    except StopRequested:
        return RunResult(Path(config.run_dir), "interrupted", {"step": None})


def _train(given: Config, observe: Observe | None) -> RunResult:
    """Take the run's directory, prepare what is trained, and train it unless it is finished already."""
    started = time.monotonic()
    settings = settings_fingerprint(given)
    with ExitStack() as stack:
        # What there is to lose yet is nothing: a stop ends this at once.
        with stops_at_once():
            stands = _enter(stack, given, settings)
            if stands is not None:
                return RunResult(Path(given.run_dir), "already finished", stands)
            run = prepare(given)
        asked = stack.enter_context(stop_requests())
        stop_requested = shared_vote(asked, run.mesh)
        result = _fit(stack, run, _Start(given, settings, started), stop_requested, observe)
    return result._replace(stop_asked=asked())


class _Start(NamedTuple):
    """What a start of a run begins with."""

    given: Config
    """As it was asked for, before anything was chosen for this machine."""
    settings: str
    """The fingerprint of `given`."""
    began: float
    """Seconds of the monotonic clock."""


def _fit(
    stack: ExitStack, run: Run, start: _Start, stop_requested: Asked, observe: Observe | None
) -> RunResult:
    """From what is prepared to an exported policy; what `stack` holds ends with the run."""
    # Where the run goes on, if it was begun before.
    checkpoints = stack.enter_context(checkpoints_of(run))
    resume = resume_of(run, checkpoints, log=say)
    _introduce(run)
    program = program_of(run)
    require_what_comes_later(run, program, first_step=resume.step)

    # The reference: from here on its log-probs are data.
    scoring = make_scoring(run.config, run.policy, run.objective, run.mesh)
    reference = choose_reference(run.config, run.policy, run.mesh)
    stores = score_datasets(run, reference, scoring, stop_requested, log=say)
    known = reference_identity(stores)
    resume.require_same(known, log=say)
    observe = observe or open_on_policy(run.config, run.policy, reference, run.heldout, run.mesh)
    validation, contents = validation_of(run, stores, log=say), contents_of(run, reference)
    del reference  # another model's weights are needed no more, unless the policy's samples are

    # The state, which takes the place of the policy's parameters and is donated from step to step.
    identity, probe = run.identity | known, probe_of(run, scoring)
    state = _first_state(run, program, resume, checkpoints)
    _compare_restored(run, resume, partial(probe, state), identity)

    # All is compared that could have refused: from here on the directory is this start's.
    begin(run, start.given, start.settings)
    tracker = stack.enter_context(tracker_of(run, resume))
    earlier = on_main(lambda: read_metrics(run.run_dir / METRICS_FILE))
    saver = saver_of(run, checkpoints, identity, probe, earlier)
    evaluate = evaluate_of(run, validation, scoring, tracker, stop_requested, observe)

    # The steps.
    record = record_of(run, tracker, program, checkpoints, earlier)
    deadline = stack.enter_context(_step_deadline(run))
    between = Between(record, deadline, saver, evaluate)
    sums = _reference_sums(stores.get("train"), scoring.trained)
    profiler = stack.enter_context(profiler_of(run, resume, record, between, tracker))
    hooks = _make_hooks(run, record, between, profiler, stop_requested)
    first = _first_hooks(run, state, sums, scoring) if resume.step == 0 else []
    update = _make_update(run, program, sums, deadline)
    state, step = _optimise(run, state, update, [*first, *hooks], between, first_step=resume.step)

    # What it came to.
    if step < run.num_steps:
        checkpoints.wait()
        return RunResult(run.run_dir, "interrupted", {"step": step})
    saver.save(step, state)
    metrics = _evaluate_and_export(run, state, evaluate, stop_requested)
    saver.judge(run.num_steps, metrics)  # it is saved already, and may be the best
    checkpoints.wait()  # a run that is said to be finished has its last checkpoint whole
    summary = finish(run, contents, metrics, settings=start.settings, started=start.began, best=saver.best)
    return RunResult(run.run_dir, "finished", summary)


def _enter(stack: ExitStack, given: Config, settings: str) -> RunSummary | None:
    """Take the run's directory for this start; its summary where it is finished and that may stand."""
    run_dir = Path(given.run_dir)

    def enter(held: Callable[[Path], AbstractContextManager[None]]) -> None:
        stack.enter_context(held(run_dir))

    stack.enter_context(joined(given.distributed))
    on_main(lambda: require_run_or_none(run_dir))
    on_main(partial(enter, exclusive))
    require_shared(run_dir)
    on_main(partial(enter, counted_start))
    summary = on_main(lambda: summary_of(run_dir, given, settings))
    return summary if summary is not None and may_stand(given, summary, log=say) else None


def _introduce(run: Run) -> None:
    for line in introduction(run):
        say(line)


def _first_state(run: Run, program: Program, resume: Resume, checkpoints: Checkpoints) -> TrainState:
    """Before the first update, or as it was saved. The policy's parameters give up their place either way, so
    that no more than one state is on a device."""
    if resume.step == 0:
        return jax.jit(program.init, donate_argnums=0, out_shardings=program.sharding)(run.policy.params)
    for leaf in jax.tree.leaves(run.policy.params):
        leaf.delete()
    return checkpoints.restore(resume.step, program.state)


def _compare_restored(run: Run, resume: Resume, probe: Callable[[], Probe], identity: Identity) -> None:
    """A restored policy must score as it did when it was saved; a first start has nothing to compare."""
    if resume.step:
        is_coarse = run.config.model.forward_dtype == "bfloat16"
        found = resume.check_probe(probe, identity, is_coarse=is_coarse)
        say(f"resumed after step {resume.step}: {found}")


def _step_deadline(run: Run) -> Deadline:
    return Deadline(run.config.distributed.step_timeout, fruitless=partial(hung_before, run.run_dir))


def _optimise(
    run: Run, state: TrainState, update: Update, hooks: Sequence[Hook], between: Between, *, first_step: int
) -> tuple[TrainState, int]:
    """Steps first_step … num_steps − 1, or until a stop is asked for; the state and the steps done."""
    step = first_step
    if 0 < step < run.num_steps and is_due(step, run.config.training.eval_every):
        between.judge(step, state)  # the part before may have been stopped on the way to it
    for step, batch in enumerate(run.loader.batches(first_step, run.num_steps), start=first_step + 1):
        with jax.profiler.StepTraceAnnotation(STEP, step_num=step - 1):
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


def _first_hooks(run: Run, state: TrainState, reference: ReferenceSums, scoring: Scoring) -> list[Hook]:
    """What only a run's own beginning can tell: the first loss, and in bfloat16 how far rounding reaches."""
    hooks = [_check_of_the_first_loss(run, state, reference)]
    if run.config.model.forward_dtype == "bfloat16" and run.num_steps >= rounding.STEPS:
        rate = run.config.optimizer.learning_rate
        batch = run.loader.batch(0)
        hooks.append(rounding.say_rounding(state.params, batch, scoring.trained, learning_rate=rate, log=say))
    return hooks


def _check_of_the_first_loss(run: Run, state: TrainState, reference: ReferenceSums) -> Hook:
    """Refuse to go on where the policy, which still is the reference, does not score like it."""
    batch, dtype = run.loader.batch(0), run.config.model.forward_dtype
    expected = expected_first_loss(run.config, run.objective, batch, reference(state, batch))
    if expected is None:
        return lambda _: None
    return once(lambda done: check_first_loss(float(done.metrics["loss"]), expected, dtype))


def _make_hooks(
    run: Run, record: Record, between: Between, profiler: Profiler, stop_requested: Asked
) -> list[Hook]:
    """What happens after each step, in this order: a checkpoint comes before the evaluation at its step."""
    return [
        lambda done: record.add(done.step - 1, done.batch, done.metrics),
        once(lambda _: record.flush()),  # said at once: somebody waits for it
        profiler.after,
        halt_where_asked(stop_requested),
        between.save,
        every(run.config.training.eval_every, before(run.num_steps, between.evaluate)),
    ]


def _evaluate_and_export(
    run: Run, state: TrainState, evaluate: Evaluate, stop_requested: Asked
) -> dict[str, float] | None:
    """Held-out metrics of the last state, which is then exported unless a stop was asked for meanwhile."""
    metrics = evaluate(state, run.num_steps, path=run.run_dir / HELDOUT_FILE)
    if stop_requested():
        raise StopRequested
    _export(run, state, metrics)
    return metrics


def _export(run: Run, state: TrainState, metrics: dict[str, float] | None) -> None:
    """The policy for Hugging Face, and where there are adapters, these for peft."""
    params, frozen = on_this_host((state.params, run.policy.frozen))
    if is_main():
        require_standing(run.run_dir)
        require_replaceable_exports(run.run_dir)
        policy, config = run.policy._replace(frozen=frozen), run.config
        if not config.lora.is_all_there_is:
            export = run.run_dir / EXPORT_DIRECTORY
            export_model(config, policy, params, export, num_steps=run.num_steps, metrics=metrics)
        if config.lora.is_on:
            adapter = run.run_dir / ADAPTER_DIRECTORY
            export_adapters(config, policy, params, adapter, num_steps=run.num_steps, metrics=metrics)
