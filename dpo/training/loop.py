"""The story of a run. Read this file first: `train` builds everything in order, then loops.

    settings → policy → data → reference log-probs → compiled step → (resume) → steps → evaluation → export

Step n is dispatched before the metrics of step n − 1 are read, so the device never waits for the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dpo.config import Config, save_config
from dpo.data.batch import Batch
from dpo.data.loader import Loader
from dpo.files import replace_text, writing
from dpo.huggingface.pretrained import save_pretrained
from dpo.losses import Objective, make_objective, reward_scale
from dpo.outcomes import UserError
from dpo.parallel.deadline import Deadline
from dpo.parallel.distributed import agree, is_main, on_main, on_this_host, shared_vote
from dpo.parallel.joining import joined
from dpo.parallel.sharding import make_mesh, parameter_rules
from dpo.runs import (
    ADAPTER_DIRECTORY,
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    EXPORT_DIRECTORY,
    HELDOUT_FILE,
    METRICS_FILE,
    REFERENCE_DIRECTORY,
    SUMMARY_FILE,
    read_metrics,
    read_summary,
    specification,
)
from dpo.training.adapted import export_adapters, open_policy, plain_model
from dpo.training.checkpoint import Checkpoints
from dpo.training.identity import Identity, reference_identity, run_identity, settings_fingerprint, take_probe
from dpo.training.interrupt import StopRequested, stop_requests, stoppable
from dpo.training.lock import exclusive
from dpo.training.memory import Fit, Parts, choose_memory, keep_choice, with_remat
from dpo.training.model_card import count_parameters, model_card
from dpo.training.on_policy import Observe, open_on_policy
from dpo.training.placement import place_batch
from dpo.training.preflight import check_first_loss, describe_reference, expected_first_loss
from dpo.training.program import count_steps, make_program
from dpo.training.record import Record
from dpo.training.reference import ReferenceStore, Score
from dpo.training.same_tokens import require_same_tokens
from dpo.training.saving import Saver, find_resume
from dpo.training.setup import (
    Dataset,
    Policy,
    all_processes,
    enable_compilation_cache,
    fit_to_objective,
    load_policy,
    make_loader,
    make_score,
    open_reference,
    read_dataset,
    require_embeddings,
    require_preferences,
    scoring_loader,
)
from dpo.training.starts import counted_start, hung_before
from dpo.training.step import Params, Sums, TrainState, TrainStep, move_reference
from dpo.training.talk import as_trained
from dpo.training.tracking import Tracker, open_trackers, require_trackers
from dpo.training.validation import Validation, make_mean_loss, why_no_loss
from dpo.training.versions import versions

Evaluate = Callable[..., dict[str, float] | None]
"""(state, steps done[, where to keep log-probs]) → held-out metrics, logged."""


class RunResult(NamedTuple):
    """What a run leaves."""

    run_dir: Path
    status: str
    """finished, interrupted, or already finished (nothing was done)."""
    summary: dict[str, Any]
    """What `SUMMARY_FILE` holds."""


class Run(NamedTuple):
    """All that a run is made of before the first number is computed."""

    config: Config
    run_dir: Path
    mesh: Mesh
    objective: Objective
    beta: float
    policy: Policy
    dataset: Dataset
    heldout: Dataset | None
    loader: Loader
    num_steps: int
    identity: Identity
    """What a checkpoint of this run belongs to."""
    memory: Fit | None
    """What training.memory_limit chose; it is in the config here."""


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
        if summary is not None:
            return RunResult(run_dir, "already finished", summary)
        try:
            return _train(config, settings, stop_requested, observe)
        except StopRequested:
            return RunResult(run_dir, "interrupted", {"step": None})


def _train(
    given: Config, settings: str, stop_requested: Callable[[], bool], observe: Observe | None
) -> RunResult:
    started = time.monotonic()
    run = prepare(given)
    config = run.config
    stop_requested = shared_vote(stop_requested, run.mesh)
    with Checkpoints(
        run.run_dir / CHECKPOINTS_DIRECTORY, keep=config.training.keep_checkpoints
    ) as checkpoints:
        notes: list[str] = []
        resume = find_resume(
            checkpoints,
            run.identity,
            settings=config.training,
            run_dir=run.run_dir,
            num_steps=run.num_steps,
            log=notes.append,
        )
        if is_main():
            _begin(run, given, settings)
        trackers = open_trackers(
            run.run_dir if is_main() else None,
            config.training.trackers,
            total_steps=run.num_steps,
            resume_step=resume.step,
            config=asdict(config),
        )
        fruitless = partial(hung_before, run.run_dir)
        with trackers as tracker, Deadline(config.distributed.step_timeout, fruitless=fruitless) as deadline:
            _describe(run, tracker)
            for note in notes:
                tracker.message(note)

            # Reference: from here on its log-probs are data.
            score_with = make_score(
                run.policy, run.mesh, chunk=config.model.log_prob_chunk, needs=run.objective.reference_sums
            )
            reference, validation = _score_references(run, score_with, tracker, stop_requested)
            stores = {"train": reference, "eval": validation and validation.reference}
            known = reference_identity({name: store for name, store in stores.items() if store})
            resume.require_same(known, log=tracker.message)
            run = run._replace(identity=run.identity | known)
            observe = observe or open_on_policy(config, run.policy, run.heldout, run.mesh)
            judge_with = score_with
            if run.objective.sums != run.objective.reference_sums:  # stored without those of the policy alone
                chunk = config.model.log_prob_chunk
                judge_with = make_score(run.policy, run.mesh, chunk=chunk, needs=run.objective.sums)
            evaluate = _make_evaluate(validation, run.beta, judge_with, observe, tracker, stop_requested)

            # Step: the policy's parameters become the state, which is donated from step to step.
            state, train_step, schedule = _make_state_and_step(run)
            run = run._replace(policy=run.policy._replace(params=None))
            earlier = on_main(lambda: read_metrics(run.run_dir / METRICS_FILE))
            saver = Saver(
                checkpoints,
                run.identity,
                settings=config.training,
                probe=_make_probe(run, score_with),
                share=lambda asked: shared_vote(asked, run.mesh),
                evaluations=[line for line in earlier if "loss" not in line],
            )
            if resume.step:
                state = checkpoints.restore(resume.step, state)
                found = resume.check_probe(lambda: saver.probe(state), run.identity)
                tracker.message(f"resumed after step {resume.step}: {found}")

            # Steps.
            state, step = _optimise(
                run,
                state,
                train_step,
                first_step=resume.step,
                reference=_reference_sums(run, reference, score_with),
                saver=saver,
                record=Record(
                    tracker,
                    run.dataset,
                    schedule,
                    checkpoints,
                    fill=run.loader.fill,
                    batch_size=config.training.batch_size,
                    beta=run.beta,
                    max_skipped=config.training.max_skipped,
                    earlier=[line for line in earlier if "loss" in line],
                ),
                stop_requested=stop_requested,
                deadline=deadline,
                evaluate=evaluate,
            )

            # What it came to.
            if step < run.num_steps:
                checkpoints.wait()
                return RunResult(run.run_dir, "interrupted", {"step": step})
            saver.save(step, state)
            metrics = evaluate(state, step, path=run.run_dir / HELDOUT_FILE)
            if stop_requested():
                raise StopRequested
            return _finish(run, state, metrics, settings=settings, started=started, best=saver.best)


def prepare(config: Config) -> Run:
    """Check the settings, load the policy, read the data, plan the steps."""
    # What can be wrong with settings is found before anything is loaded.
    objective, beta = make_objective(specification(config)), reward_scale(specification(config))
    require_trackers(config.training.trackers)
    if config.training.reference_every is not None and config.model.reference is not None:
        raise UserError(
            f"training.reference_every is {config.training.reference_every} and model.reference is "
            f"{config.model.reference!r}; a reference that moves starts as the policy: set one of the two"
        )
    mesh = make_mesh(config.mesh)
    agree({"version of jax": jax.__version__, "settings": settings_fingerprint(config), "mesh": config.mesh})
    enable_compilation_cache()

    policy = open_policy(config, mesh)
    policy = policy._replace(pretrained=as_trained(policy.pretrained, config.data))
    tokenizer = policy.pretrained.tokenizer
    peers = all_processes()
    dataset = read_dataset(config.data, tokenizer, peers=peers)
    dataset = fit_to_objective(dataset, objective, seed=config.training.seed)
    heldout = read_dataset(config.data, tokenizer, heldout=True, peers=peers) if config.data.eval else None
    require_embeddings(dataset, policy.pretrained.model.config, name="data.train")
    if heldout is not None:
        require_embeddings(heldout, policy.pretrained.model.config, name="data.eval")
        require_preferences(heldout.tokens, name=str(config.data.eval))
    if config.training.keep_best is not None and heldout is not None and heldout.tokens.max_responses < 2:
        raise UserError(
            f"training.keep_best is {config.training.keep_best}, but every prompt of data.eval "
            f"({config.data.eval}) has one response, and there is no pair; allowed there: no keep_best"
        )
    num_steps = count_steps(config.training, len(dataset.tokens))
    memory = None
    if config.training.memory_limit is not None:
        others = heldout and heldout.tokens
        parts = Parts(objective, beta, policy, dataset.tokens, others, mesh, num_steps)
        memory = choose_memory(config, parts, run_dir=Path(config.run_dir))
        config, policy = memory.choice.apply(config), with_remat(policy, memory.choice.remat)
    loader = make_loader(config.data, config.training, dataset.tokens, mesh, num_steps=num_steps)
    identity = run_identity(
        config, policy=policy, dataset=dataset, heldout=heldout, mesh=mesh, num_steps=num_steps
    )
    agree({**identity, "shapes": [loader.shape(step) for step in range(num_steps)]})
    return Run(
        config=config,
        run_dir=Path(config.run_dir),
        mesh=mesh,
        objective=objective,
        beta=beta,
        policy=policy,
        dataset=dataset,
        heldout=heldout,
        loader=loader,
        num_steps=num_steps,
        identity=identity,
        memory=memory,
    )


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


def _make_state_and_step(run: Run) -> tuple[TrainState, TrainStep, optax.Schedule]:
    """The state before the first update, placed on the mesh, and the compiled step that keeps it there."""
    program = make_program(
        run.config,
        run.objective,
        beta=run.beta,
        graphdef=run.policy.graphdef,
        params=run.policy.params,
        mesh=run.mesh,
        num_steps=run.num_steps,
    )
    state = jax.jit(program.init, donate_argnums=0, out_shardings=program.sharding)(run.policy.params)
    return state, program.step, program.schedule


def _optimise(
    run: Run,
    state: TrainState,
    train_step: TrainStep,
    *,
    first_step: int,
    reference: Callable[[TrainState, Batch], Sums],
    saver: Saver,
    record: Record,
    stop_requested: Callable[[], bool],
    deadline: Deadline,
    evaluate: Evaluate,
) -> tuple[TrainState, int]:
    """Steps first_step … num_steps − 1, or until a stop is requested; the state and the steps done."""
    training, policy = run.config.training, run.policy
    expected = None
    if first_step == 0:
        first = run.loader.batch(0)
        expected = expected_first_loss(run.config, run.objective, first, reference(state, first))
    move = jax.jit(move_reference, static_argnums=1, donate_argnums=0)
    step = first_step

    def evaluation_due() -> bool:
        return step < run.num_steps and _due(step, training.eval_every)

    if first_step and evaluation_due():  # the part before may have been stopped on the way to it
        saver.judge(step, evaluate(state, step))
        record.restart_clock()
    for step, batch in enumerate(run.loader.batches(first_step, run.num_steps), start=first_step + 1):
        deadline.step(batch.tokens.shape)
        sums = reference(state, batch)
        state, metrics = train_step(state, policy.frozen, place_batch(run.mesh, batch), sums)
        if _due(step, training.reference_every):
            state = move(state, training.reference_alpha)
        record.add(step - 1, batch, metrics)
        if step == 1 and expected is not None:
            check_first_loss(float(metrics["loss"]), expected, run.config.model.forward_dtype)
        if step == first_step + 1:
            record.flush()  # said at once, not when the next step is under way: somebody waits for it
        stopping = stop_requested()
        if evaluation_due() and not stopping:
            record.flush()
            deadline.pause()
            try:
                saver.judge(step, evaluate(state, step))
            except StopRequested:
                stopping = True
            record.restart_clock()
        if saver.due(step) or stopping:
            record.flush()  # a checkpoint's metrics are written before it is
            deadline.pause()
            saver.save(step, state)
        if stopping:
            break
    record.flush()
    deadline.pause()
    return state, step


def _make_evaluate(
    validation: Validation | None,
    beta: float,
    score_with: Callable[[Params], Score],
    observe: Observe | None,
    tracker: Tracker,
    stop_requested: Callable[[], bool],
) -> Evaluate:
    """How the policy does on held-out data; None where there are none."""

    def evaluate(state: TrainState, step: int, path: Path | None = None) -> dict[str, float] | None:
        if validation is None:
            return None
        observed = {} if observe is None else observe(step, state.params)
        score = stoppable(score_with(state.params), stop_requested)
        rows, metrics = validation.evaluate(score, beta, shift=jnp.asarray(np.asarray(state.shift.mean)))
        metrics |= observed
        tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        if path is not None and is_main():
            validation.save(path, rows)
        return metrics

    return evaluate


def _finish(
    run: Run,
    state: TrainState,
    metrics: dict[str, float] | None,
    *,
    settings: str,
    started: float,
    best: int | None,
) -> RunResult:
    """Export the policy and write the summary, last: a run that has one is finished."""
    pretrained, export = run.policy.pretrained, run.run_dir / EXPORT_DIRECTORY
    params, frozen = on_this_host((state.params, run.policy.frozen))
    if is_main():
        policy = run.policy._replace(frozen=frozen)
        model = plain_model(policy, params)
        save_pretrained(
            model,
            export,
            hf_config=pretrained.config,
            tokenizer=pretrained.tokenizer,
            generation_config=pretrained.generation_config,
            model_card=model_card(
                run.config,
                pretrained,
                num_steps=run.num_steps,
                num_parameters=count_parameters(model),
                dtype="float32",
                metrics=metrics,
            ),
        )
        if run.config.lora.is_on:
            directory = run.run_dir / ADAPTER_DIRECTORY
            export_adapters(policy, params, directory, source=run.config.model.source)
    summary = {
        "settings": settings,
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


def _reference_sums(
    run: Run, store: ReferenceStore | None, score_with: Callable[[Params], Score]
) -> Callable[[TrainState, Batch], Sums]:
    """Where a step's reference log-probs come from: the store, or a reference that moves, scored anew."""
    if store is None:
        return lambda state, batch: score_with(state.reference)(batch)
    return lambda _, batch: store.lookup(np.asarray(batch.index))


def _make_probe(
    run: Run, score_with: Callable[[Params], Score]
) -> Callable[[TrainState], dict[str, list[Any]]]:
    """The log-probs of the first rows under a state's parameters, to verify a restored checkpoint by."""
    loader = scoring_loader(run.config.data, run.dataset.tokens, run.mesh)
    return lambda state: take_probe(score_with(state.params), loader.batch(0))


def _score_references(
    run: Run,
    score_with: Callable[[Params], Score],
    tracker: Tracker,
    stop_requested: Callable[[], bool],
) -> tuple[ReferenceStore | None, Validation | None]:
    """Reference log-probs of the training and the held-out data, by the policy's start or another model.

    Under adapters that begin as nothing the other model is the frozen one without them, on the same arrays.

    A moving reference has no store for the training data: its log-probs hold for a few steps only. Held-out
    preferences are always measured against the reference as it was at the start.
    """
    config, needs = run.config, run.objective.reference_sums
    weights, score = run.policy.fingerprint, score_with(run.policy.params)
    other = None if config.lora.init is not None else run.policy.base
    if config.model.reference is not None:
        rules = parameter_rules(config.mesh.rules)
        other = load_policy(config.model, run.mesh, source=config.model.reference, rules=rules)
        datasets = {"data.train": run.dataset} | ({} if run.heldout is None else {"data.eval": run.heldout})
        named = run.policy.pretrained.source, run.policy.pretrained.tokenizer
        require_same_tokens(named, other.pretrained, config.data, datasets, peers=all_processes())
    tracker.message(f"reference: {describe_reference(config)}")
    if other is not None:
        chunk = config.model.log_prob_chunk
        weights = other.fingerprint
        score = make_score(other, run.mesh, chunk=chunk, needs=needs)(other.params)

    def store_of(dataset: Dataset) -> ReferenceStore:
        return open_reference(
            config.model,
            config.data,
            dataset,
            weights=weights,
            score=stoppable(score, stop_requested),
            mesh=run.mesh,
            needs=needs,
            log=tracker.message,
            copy_in=run.run_dir / REFERENCE_DIRECTORY,
        )

    # Rows that are too short for the held-out data are found before the training data are scored.
    loader = run.heldout and scoring_loader(config.data, run.heldout.tokens, run.mesh)
    moving = config.training.reference_every is not None
    reference = None if moving else store_of(run.dataset)
    if run.heldout is None or loader is None:
        return reference, None
    mean_loss = None
    lacking = why_no_loss(run.objective, run.heldout)
    if lacking is None:
        mean_loss = make_mean_loss(run.objective, run.heldout)
    else:
        tracker.message(f"no held-out loss: {lacking}")
    known = run.identity["data"]["eval"]
    return reference, Validation(run.heldout, loader, store_of(run.heldout), mean_loss, known)


def _summary_of(run_dir: Path, settings: str) -> dict[str, Any] | None:
    """What a finished run with these settings came to.

    Raises:
      ValueError: naming the file, when it is damaged.
    """
    summary = read_summary(run_dir)
    return summary if summary is not None and summary.get("settings") == settings else None


def _describe(run: Run, tracker: Tracker) -> None:
    """Say what is about to happen, in a few lines."""
    config, report = run.config, run.loader.report()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(run.policy.params))
    num_frozen = sum(leaf.size for leaf in jax.tree.leaves(run.policy.frozen))
    tracker.message(
        f"policy: {run.policy.pretrained.source}, {num_params / 1e6:.1f} M trained parameters"
        + (f" on {num_frozen / 1e6:.1f} M in {config.lora.base_dtype}" if num_frozen else "")
    )
    tracker.message(f"data: {_counts(run.dataset)} from {config.data.train}")
    if run.heldout is not None:
        tracker.message(f"held out: {_counts(run.heldout)} from {config.data.eval}")
    shapes = ", ".join(f"{shape.rows}x{shape.row_length}" for shape in run.loader.shapes)
    tracker.message(
        f"layout {report['layout']}: rows x tokens {shapes}; {report['fill']:.0%} filled; "
        f"{report['saving_versus_padded']:.1f}x fewer positions than padded; "
        f"{len(report['shapes'])} programs to compile"
    )
    if run.memory is not None:
        tracker.message(run.memory.text)
    tracker.message(
        f"training: {run.num_steps} steps of {config.training.batch_size} prompts into {config.run_dir}"
    )


def _counts(dataset: Dataset) -> str:
    """How many prompts and responses there are, what was left out, and what was cut."""
    tokens = dataset.tokens
    left_out = [f"{n} {reason}" for reason, n in {**dataset.read.skipped, **tokens.dropped}.items()]
    return (
        f"{len(tokens)} prompts, {int(tokens.num_responses.sum())} responses"
        + (f" (left out: {', '.join(left_out)})" if left_out else "")
        + (f" ({tokens.num_truncated} truncated)" if tokens.num_truncated else "")
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
