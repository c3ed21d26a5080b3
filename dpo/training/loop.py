"""The story of a run. Read this file first: `train` builds everything in order, then loops.

    settings → policy → data → reference log-probs → compiled step → (resume) → steps → evaluation → export

Step n is dispatched before the metrics of step n − 1 are read, so the device never waits for the host.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
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
from dpo.losses import Objective, make_objective, reward_scale
from dpo.models.pretrained import save_pretrained
from dpo.models.weights import read_json_object
from dpo.training.adapted import ADAPTER_DIRECTORY, export_adapters, open_policy, plain_model
from dpo.training.checkpoint import Checkpoints
from dpo.training.distributed import Deadline, agree, is_main, joined, on_main, on_this_host, shared_vote
from dpo.training.identity import Identity, reference_identity, run_identity, settings_fingerprint, take_probe
from dpo.training.interrupt import StopRequested, stop_requests, stoppable
from dpo.training.lock import exclusive
from dpo.training.memory import Fit, Parts, choose_memory, keep_choice, with_remat
from dpo.training.metrics import Metrics
from dpo.training.model_card import count_parameters, model_card
from dpo.training.on_policy import Observe, open_on_policy
from dpo.training.program import make_program
from dpo.training.reference import ReferenceStore, Score
from dpo.training.saving import Saver, find_resume
from dpo.training.setup import (
    Dataset,
    Policy,
    enable_compilation_cache,
    fit_to_objective,
    load_policy,
    make_loader,
    make_score,
    open_reference,
    read_dataset,
    require_preferences,
    scoring_loader,
)
from dpo.training.sharding import make_mesh, parameter_rules, place_batch
from dpo.training.step import (
    Params,
    Sums,
    TrainState,
    TrainStep,
    make_scores,
    move_reference,
)
from dpo.training.tracking import METRICS_FILE, Tracker, open_trackers, read_metrics, require_trackers
from dpo.training.validation import HELDOUT_FILE, Validation
from dpo.training.versions import versions
from dpo.training.watchdog import Watch

PREFLIGHT_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the first loss may be from the objective's value at log-ratio zero, relative to it."""


class RunResult(NamedTuple):
    """What a run leaves."""

    run_dir: Path
    status: str
    """finished, interrupted, or already finished (nothing was done)."""
    summary: dict[str, Any]
    """What summary.json holds."""


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
        summary = on_main(lambda: _summary_of(run_dir, settings))
        if summary is not None:
            return RunResult(run_dir, "already finished", summary)
        try:
            return _train(config, settings, stop_requested, observe)
        except StopRequested:
            return RunResult(run_dir, "interrupted", {"step": None})


def _train(
    config: Config, settings: str, stop_requested: Callable[[], bool], observe: Observe | None
) -> RunResult:
    started = time.monotonic()
    run = prepare(config)
    config = run.config
    stop_requested = shared_vote(stop_requested, run.mesh)
    with Checkpoints(run.run_dir / "checkpoints", keep=config.training.keep_checkpoints) as checkpoints:
        notes: list[str] = []
        resume = find_resume(
            checkpoints,
            run.identity,
            settings=config.training,
            run_dir=run.run_dir,
            num_steps=run.num_steps,
            log=notes.append,
        )
        if run.memory is not None and is_main():
            limit = config.training.memory_limit
            keep_choice(run.memory, run.run_dir, limit=limit, settings=settings)
        trackers = open_trackers(
            run.run_dir if is_main() else None,
            config.training.trackers,
            total_steps=run.num_steps,
            resume_step=resume.step,
            config=asdict(config),
        )
        with trackers as tracker, Deadline(config.distributed.step_timeout) as deadline:
            _describe(run, tracker)
            for note in notes:
                tracker.message(note)

            # Reference: from here on its log-probs are data.
            score_with = make_score(
                run.policy, run.mesh, chunk=config.model.log_prob_chunk, needs=run.objective.needs & {"head"}
            )
            reference, validation = _score_references(run, score_with, tracker, stop_requested)
            stores = {"train": reference, "eval": validation and validation.reference}
            known = reference_identity({name: store for name, store in stores.items() if store})
            resume.require_same(known, log=tracker.message)
            run = run._replace(identity=run.identity | known)
            observe = observe or open_on_policy(config, run.policy, run.heldout, run.mesh)

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
                record=_Record(
                    run,
                    tracker,
                    _StepClock(run.dataset, schedule, config.training.batch_size),
                    checkpoints,
                    earlier=[line for line in earlier if "loss" in line],
                ),
                stop_requested=stop_requested,
                deadline=deadline,
                evaluate=lambda state, step: _evaluate(
                    run,
                    validation,
                    stoppable(score_with(state.params), stop_requested),
                    tracker,
                    step,
                    _observed(observe, state, step),
                ),
            )

            # What it came to.
            if step < run.num_steps:
                checkpoints.wait()
                return RunResult(run.run_dir, "interrupted", {"step": step})
            saver.save(step, state)
            metrics = _evaluate(
                run,
                validation,
                stoppable(score_with(state.params), stop_requested),
                tracker,
                step,
                _observed(observe, state, step),
                path=run.run_dir / HELDOUT_FILE,
            )
            if stop_requested():
                raise StopRequested
            return _finish(run, state, metrics, settings=settings, started=started, best=saver.best)


def prepare(config: Config) -> Run:
    """Check the settings, load the policy, read the data, plan the steps."""
    # What can be wrong with settings is found before anything is loaded.
    specification = config.objectives or config.objective
    objective, beta = make_objective(specification), reward_scale(specification)
    require_trackers(config.training.trackers)
    if config.training.reference_every is not None and config.model.reference is not None:
        raise ValueError(
            f"training.reference_every is {config.training.reference_every} and model.reference is "
            f"{config.model.reference!r}; a reference that moves starts as the policy: set one of the two"
        )
    if config.training.keep_best is not None and config.data.eval is None:
        raise ValueError(
            f"training.keep_best is {config.training.keep_best} and data.eval is not set; allowed: both, "
            "since the best checkpoint is the best on held-out data"
        )
    mesh = make_mesh(config.mesh)
    agree({"version of jax": jax.__version__, "settings": settings_fingerprint(config), "mesh": config.mesh})
    run_dir = Path(config.run_dir)
    if is_main():
        with writing("the settings", run_dir / "config.yaml"):  # what may differ is so for one start only
            start = replace(config, training=replace(config.training, allow_changed=[]))
            save_config(start, run_dir / "config.yaml")
    enable_compilation_cache()

    policy = open_policy(config, mesh)
    tokenizer = policy.pretrained.tokenizer
    names = [entry["name"] for entry in config.objectives or [config.objective]]
    dataset = fit_to_objective(read_dataset(config.data, tokenizer), objective, names=names)
    heldout = read_dataset(config.data, tokenizer, heldout=True) if config.data.eval else None
    if heldout is not None:
        require_preferences(heldout.tokens, name=str(config.data.eval))
    num_steps = count_steps(config, len(dataset.tokens))
    memory = None
    if config.training.memory_limit is not None:
        others = heldout and heldout.tokens
        parts = Parts(objective, beta, policy, dataset.tokens, others, mesh, num_steps)
        memory = choose_memory(config, parts, run_dir=run_dir)
        config, policy = memory.choice.apply(config), with_remat(policy, memory.choice.remat)
    loader = make_loader(config.data, config.training, dataset.tokens, mesh, num_steps=num_steps)
    identity = run_identity(
        config, policy=policy, dataset=dataset, heldout=heldout, mesh=mesh, num_steps=num_steps
    )
    agree({**identity, "shapes": [loader.shape(step) for step in range(num_steps)]})
    return Run(
        config, run_dir, mesh, objective, beta, policy, dataset, heldout, loader, num_steps, identity, memory
    )


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
    record: _Record,
    stop_requested: Callable[[], bool],
    deadline: Deadline,
    evaluate: Callable[[TrainState, int], Any],
) -> tuple[TrainState, int]:
    """Steps first_step … num_steps − 1, or until a stop is requested; the state and the steps done."""
    training, policy = run.config.training, run.policy
    expected = _expected_first_loss(run, lambda batch: reference(state, batch)) if first_step == 0 else None
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


def _evaluate(
    run: Run,
    validation: Validation | None,
    score: Score,
    tracker: Tracker,
    step: int,
    observed: Mapping[str, float],
    *,
    path: Path | None = None,
) -> dict[str, float] | None:
    """Log the held-out metrics of the policy after `step` updates; keep its log-probs at `path`, if given."""
    if validation is None:
        return None
    rows, metrics = validation.evaluate(score, run.beta)
    metrics |= observed
    tracker.log(step, {f"eval/{name}": value for name, value in metrics.items()})
    if path is not None and is_main():
        validation.save(path, rows)
    return metrics


def _observed(observe: Observe | None, state: TrainState, step: int) -> Mapping[str, float]:
    return {} if observe is None else observe(step, state.params)


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
    pretrained, export = run.policy.pretrained, run.run_dir / "export"
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
        replace_text(run.run_dir / "summary.json", text, what="the summary")
    return RunResult(run.run_dir, "finished", summary)


def count_steps(config: Config, num_prompts: int) -> int:
    """Optimiser steps of a run: as set, or whole batches in so many epochs.

    Raises:
      ValueError: when there is not one whole batch.
    """
    training = config.training
    if training.steps is not None:
        return training.steps
    num_steps = int(training.epochs * num_prompts / training.batch_size)
    if num_steps == 0:
        raise ValueError(
            f"training.epochs {training.epochs} of {num_prompts} prompts is less than one step of "
            f"training.batch_size {training.batch_size}; allowed is at least one whole batch"
        )
    return num_steps


def check_first_loss(loss: float, expected: float, forward_dtype: str) -> None:
    """Refuse to go on when the policy, which still is the reference, does not score like it.

    Raises:
      ValueError: with the values and what usually causes it.
    """
    tolerance = PREFLIGHT_TOLERANCE[forward_dtype] * max(1.0, abs(expected))
    if not abs(loss - expected) <= tolerance:
        raise ValueError(
            f"the first loss is {loss:.6f}, but the policy still is the reference, so it must be "
            f"{expected:.6f} (± {tolerance:.1g}). The policy and the stored reference log-probs differ: look "
            "for non-finite values, or for a model.compute_dtype or model.round_products too coarse for this "
            "data (try float32 and neither)"
        )


def _expected_first_loss(run: Run, reference: Callable[[Batch], Sums]) -> float | None:
    """The objective at log-ratio zero on the first batch: ln 2 for dpo, log K! for plackett_luce.

    None where the reference's log-probs alone don't say: another reference, a start from an adapter, a
    reference-free objective, WPO's weights.
    """
    model, lora = run.config.model, run.config.lora
    if (model.reference, lora.init) != (None, None) or "log_collision" in run.objective.needs:
        return None
    batch = run.loader.batch(0)
    sums = reference(batch)
    losses = run.objective.expected_initial_loss(make_scores(sums, sums, batch, jnp.zeros(())))
    return None if losses is None else float(losses.mean())


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

    Under adapters the other model is the frozen one without them, on the same arrays.

    A moving reference has no store for the training data: its log-probs hold for a few steps only. Held-out
    preferences are always measured against the reference as it was at the start.
    """
    config, needs = run.config, run.objective.needs
    weights, score = run.policy.fingerprint, score_with(run.policy.params)
    other = run.policy.base
    if config.model.reference is not None:
        rules = parameter_rules(config.mesh.rules)
        other = load_policy(config.model, run.mesh, source=config.model.reference, rules=rules)
    if other is not None:
        chunk = config.model.log_prob_chunk
        weights = other.fingerprint
        score = make_score(other, run.mesh, chunk=chunk, needs=needs & {"head"})(other.params)

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
            copy_in=run.run_dir / "reference",
        )

    moving = config.training.reference_every is not None
    reference = None if moving else store_of(run.dataset)
    if run.heldout is None:
        return reference, None
    loader = scoring_loader(config.data, run.heldout.tokens, run.mesh)
    return reference, Validation(run.heldout, loader, store_of(run.heldout))


class _StepClock:
    """Turns a step's device metrics into its line: reading them waits for the step to end."""

    def __init__(self, dataset: Dataset, schedule: Callable, batch_size: int):
        tokens = dataset.tokens
        self._tokens = tokens.prompt_lengths * tokens.num_responses + tokens.response_lengths.sum(1)
        self._schedule = schedule
        self._epochs_a_step = batch_size / len(tokens)
        self.restart()

    def restart(self) -> None:
        """Leave out of the next step's time what happened since the last step."""
        self._last = time.perf_counter()

    def finish(self, step: int, batch: Batch, metrics: Metrics) -> dict[str, float]:
        """tokens/s counts real tokens with the prompt counted once a response, whatever the layout saves."""
        values = {name: float(value) for name, value in metrics.items()}
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return values | {
            "learning_rate": float(self._schedule(step)),
            "epoch": (step + 1) * self._epochs_a_step,
            "tokens/s": float(self._tokens[np.asarray(batch.index)].sum()) / seconds,
            "seconds": seconds,
            "fill": float((np.asarray(batch.group) > 0).mean()),
        }


class _Record:
    """Writes the metrics of a step when the next one is under way, and stops a run of skipped steps."""

    def __init__(
        self,
        run: Run,
        tracker: Tracker,
        clock: _StepClock,
        checkpoints: Checkpoints,
        *,
        earlier: list[dict[str, int | float]],
    ):
        """`earlier`: the training lines of the parts of the run before this one."""
        self._run, self._tracker, self._clock, self._checkpoints = run, tracker, clock, checkpoints
        self._watch = Watch(run.beta, earlier)
        self._pending: tuple[int, Batch, Metrics] | None = None
        self._skipped = [
            int(line["step"]) for line in _last_while(earlier, lambda line: bool(line["skipped"]))
        ]

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of the next one's time."""
        self._clock.restart()

    def add(self, step: int, batch: Batch, metrics: Metrics) -> None:
        """Write the step before this one; this one is still being computed."""
        self.flush()
        self._pending = step, batch, metrics

    def flush(self) -> None:
        """Wait for the last step and write it.

        Raises:
          ValueError: after `training.max_skipped` steps in a row that were not finite, with their rows.
        """
        if self._pending is None:
            return
        step, batch, _ = self._pending
        values = self._clock.finish(*self._pending)
        self._pending = None
        self._tracker.log(step, values)
        for warning in self._watch.add(step, values):
            self._tracker.message(warning)
        self._skipped = [*self._skipped, step] if values["skipped"] else []
        if not self._skipped:
            return
        dataset = self._run.dataset
        rows = [
            dataset.read.preferences[dataset.tokens.origin[row]].location for row in np.asarray(batch.index)
        ]
        self._tracker.message(f"step {step}: loss or gradient is not finite, skipped; rows {', '.join(rows)}")
        if len(self._skipped) >= self._run.config.training.max_skipped:
            latest = self._checkpoints.latest
            good = "none was saved" if latest is None else str(self._checkpoints.path(latest))
            raise ValueError(
                f"{len(self._skipped)} steps in a row were not finite (the last: {step}, rows {rows}); the "
                f"last good checkpoint: {good}. Lower optimizer.learning_rate, or look at these rows "
                "(docs/troubleshooting.md#not-finite)"
            )


def _summary_of(run_dir: Path, settings: str) -> dict[str, Any] | None:
    """What a finished run with these settings came to.

    Raises:
      ValueError: naming the file, when it is damaged.
    """
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    summary = read_json_object(path, path.read_bytes())
    return summary if summary.get("settings") == settings else None


def _describe(run: Run, tracker: Tracker) -> None:
    """Say what is about to happen, in a few lines."""
    config, tokens, report = run.config, run.dataset.tokens, run.loader.report()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(run.policy.params))
    num_frozen = sum(leaf.size for leaf in jax.tree.leaves(run.policy.frozen))
    tracker.message(
        f"policy: {run.policy.pretrained.source}, {num_params / 1e6:.1f} M trained parameters"
        + (f" on {num_frozen / 1e6:.1f} M in {config.lora.base_dtype}" if num_frozen else "")
    )
    left_out = {**run.dataset.read.skipped, **tokens.dropped}
    tracker.message(
        f"data: {len(tokens)} prompts, {int(tokens.num_responses.sum())} responses from {config.data.train}"
        + (f"; left out: {', '.join(f'{n} {reason}' for reason, n in left_out.items())}" if left_out else "")
    )
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


def _last_while(items: list[dict], holds: Callable[[dict], bool]) -> list[dict]:
    """The longest end of a list of which a condition holds."""
    return list(itertools.takewhile(holds, reversed(items)))[::-1]


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
