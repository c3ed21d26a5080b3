"""The parts that a prepared run is put together from, each made of what the run is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

from dpo.parallel.distributed import is_main, shared_vote
from dpo.runs import CHECKPOINTS_DIRECTORY, PROFILE_DIRECTORY, REFERENCE_DIRECTORY, Identity
from dpo.training.checkpoint import Checkpoints
from dpo.training.datasets import Arrangement, as_trained, in_order, scoring_loader
from dpo.training.hooks import Between
from dpo.training.identity import take_probe
from dpo.training.interrupt import stoppable
from dpo.training.on_policy import Observe, first_prompts
from dpo.training.optimizer import learning_rates
from dpo.training.policy import Policy
from dpo.training.preparation import Run
from dpo.training.profile import Profiler, first_profiled
from dpo.training.program import Program, make_program
from dpo.training.reading import all_processes
from dpo.training.record import Record
from dpo.training.reference import ReferenceStore, Score
from dpo.training.reference_model import Scoring, make_scoring, score_reference
from dpo.training.same_tokens import require_same_tokens, require_same_vocabulary
from dpo.training.saving import Probe, Resume, Saver, find_resume
from dpo.training.starts import note_progress
from dpo.training.step import TrainState
from dpo.training.tracking import Tracker, open_trackers
from dpo.training.validation import Evaluate, Validation, make_evaluate, open_validation
from dpo.training.watchdog import Line


def checkpoints_of(run: Run) -> Checkpoints:
    """What the run goes on from; a context that waits for what is being written."""
    return Checkpoints(run.run_dir / CHECKPOINTS_DIRECTORY, keep=run.config.training.keep_checkpoints)


def resume_of(run: Run, checkpoints: Checkpoints, *, log: Callable[[str], None]) -> Resume:
    """Where the run goes on, if it was begun before; see `find_resume`."""
    return find_resume(
        checkpoints,
        run.identity,
        settings=run.config.training,
        run_dir=run.run_dir,
        num_steps=run.num_steps,
        log=log,
    )


def tracker_of(run: Run, resume: Resume) -> AbstractContextManager[Tracker]:
    """Where the run's numbers go; only the main process writes."""
    return open_trackers(
        run.run_dir if is_main() else None,
        run.config.training.trackers,
        total_steps=run.num_steps,
        resume_step=resume.step,
        config=asdict(run.config),
    )


def score_datasets(
    run: Run,
    reference: Policy,
    scoring: Scoring,
    stop_requested: Callable[[], bool],
    *,
    log: Callable[[str], None],
) -> dict[str, ReferenceStore]:
    """The reference's log-probs of the training ("train") and the held-out data ("eval").

    A moving reference has no store for the training data: its log-probs hold for a few steps only. Held-out
    preferences are always measured against the reference as it was at the start.
    """
    moving = run.config.training.reference_every is not None
    datasets = {"train": None if moving else run.dataset, "eval": run.heldout}
    if run.config.model.reference is not None:
        named = {"data.train": run.dataset} | ({} if run.heldout is None else {"data.eval": run.heldout})
        policy = run.policy.pretrained.source, run.policy.pretrained.tokenizer
        require_same_tokens(policy, reference.pretrained, run.config.data, named, peers=all_processes())
        _require_known_samples(run, reference)
    of_policy = scoring
    if reference is not run.policy:
        scoring = make_scoring(run.config, reference, run.objective, run.mesh)

    def stores(
        names: Sequence[str], model: Policy, score: Score, arrangement: Arrangement | None = None
    ) -> dict[str, ReferenceStore]:
        return score_reference(
            run.config,
            {name: dataset for name in names if (dataset := datasets[name]) is not None},
            weights=model.fingerprint,
            score=stoppable(score, stop_requested),
            mesh=run.mesh,
            needs=run.objective.reference_sums,
            log=log,
            copy_in=run.run_dir / REFERENCE_DIRECTORY,
            arrangements={} if arrangement is None else {"train": arrangement},
            noted=partial(note_progress, run.run_dir),
        )

    config, tokens = run.config, run.dataset.tokens
    score = scoring.stored(reference.params)
    if config.model.forward_dtype == "float32":
        read = in_order(config.data, tokens, run.mesh, rows=run.loader.rows_read())
        return stores(("train", "eval"), reference, score, read)
    # New adapters change nothing, but round otherwise than the model without them: the policy itself scores.
    model, with_it = (run.policy, of_policy) if config.model.reference is None else (reference, scoring)
    arrangement = as_trained(config.training, tokens, run.loader)
    trained = stores(("train",), model, with_it.trained(model.params), arrangement)
    return trained | stores(("eval",), reference, score)


def _require_known_samples(run: Run, reference: Policy) -> None:
    """Samples of the policy hold any token, and the reference has to know each (`training.eval_samples`)."""
    training, heldout = run.config.training, run.heldout
    if training.eval_samples and heldout is not None:
        prompts = first_prompts(heldout.tokens, training.eval_samples)
        longest = max(map(len, prompts)) + training.eval_max_new_tokens
        require_same_vocabulary(run.policy.pretrained, reference.pretrained, longest=longest)


def validation_of(
    run: Run, stores: Mapping[str, ReferenceStore], *, log: Callable[[str], None]
) -> Validation | None:
    """The held-out data and what is known of them; None where there are none."""
    if run.heldout is None:
        return None
    return open_validation(
        run.objective,
        run.heldout,
        stores["eval"],
        loader=scoring_loader(run.config.data, run.heldout.tokens, run.mesh),
        fingerprint=run.identity["data"]["eval"],
        log=log,
    )


def evaluate_of(
    run: Run,
    validation: Validation | None,
    scoring: Scoring,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
    observe: Observe | None,
) -> Evaluate:
    """The held-out evaluation of a state; see `make_evaluate`."""
    return make_evaluate(
        validation,
        beta=run.beta,
        score_with=scoring.heldout,
        observe=observe,
        tracker=tracker,
        stop_requested=stop_requested,
    )


def probe_of(run: Run, scoring: Scoring) -> Callable[[TrainState], Probe]:
    """The log-probs of the first rows under a state's parameters, to verify a restored checkpoint by."""
    loader = scoring_loader(run.config.data, run.dataset.tokens, run.mesh)
    return lambda state: take_probe(scoring.stored(state.params), loader.batch(0))


def program_of(run: Run) -> Program:
    """The training program."""
    return make_program(
        run.config,
        run.objective,
        beta=run.beta,
        graphdef=run.policy.graphdef,
        params=run.policy.params,
        mesh=run.mesh,
        num_steps=run.num_steps,
    )


def saver_of(
    run: Run,
    checkpoints: Checkpoints,
    identity: Identity,
    probe: Callable[[TrainState], Probe],
    earlier: Sequence[Line],
) -> Saver:
    """When the run saves; `earlier` are the lines of the parts of the run before this one."""
    return Saver(
        checkpoints,
        identity,
        settings=run.config.training,
        probe=probe,
        share=lambda asked: shared_vote(asked, run.mesh),
        evaluations=[line for line in earlier if "loss" not in line],
    )


def record_of(
    run: Run, tracker: Tracker, program: Program, checkpoints: Checkpoints, earlier: Sequence[Line]
) -> Record:
    """What the steps say; `earlier` are the lines of the parts of the run before this one."""
    return Record(
        tracker,
        run.dataset,
        learning_rates(program.schedule, run.num_steps),
        checkpoints,
        fill=run.loader.fill,
        batch_size=run.config.training.batch_size,
        beta=run.beta,
        max_skipped=run.config.training.max_skipped,
        earlier=[line for line in earlier if "loss" in line],
    )


def profiler_of(run: Run, resume: Resume, record: Record, between: Between, tracker: Tracker) -> Profiler:
    """What traces some steps, where that is asked for; of several processes the main one's device."""
    training = run.config.training
    begin = first_profiled(training, resume.step, run.num_steps)
    return Profiler(
        run.run_dir / PROFILE_DIRECTORY,
        begin=begin if is_main() else None,
        steps=training.profiler_steps or 0,
        settle=between.settle,
        go_on=record.restart_clock,
        log=tracker.message,
    )
