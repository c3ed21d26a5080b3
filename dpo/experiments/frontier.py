"""`dpo frontier`: true reward against KL, the DPO paper's controlled sentiment (Rafailov et al. 2023, 6.1).

Every objective is trained at every β on the same sampled rankings, whose true reward is known. Now and then
each policy answers the held-out prompts at temperature 1; a point is the mean reward of its answers and the
mean of log π/ρ over them, which estimates KL(π‖ρ) of whole responses. Best-of-n of the reference's own
samples is the line to reach. Then win-rates over a fixed opponent, by sampling temperature.

Everything is kept as it is made (points.jsonl, reference_samples.jsonl, one run directory a policy), under
keys of all that it depends on: the same command goes on where it was stopped. A finished run's checkpoint,
which is three times its weights, is deleted; its export stays.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from math import comb, log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jaxtyping import Float

from dpo.config import (
    Config,
    DataConfig,
    FrontierConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from dpo.data.tokenizer_calls import decode_ids
from dpo.distribution import is_shipped
from dpo.evaluation.statistics import cluster_bootstrap
from dpo.experiments.frontier_figures import draw_frontier, draw_temperatures, frontier_as_markdown
from dpo.experiments.frontier_results import BestOf, Drawn, FrontierResult, Point
from dpo.experiments.frontier_temperatures import win_rates_by_temperature
from dpo.files import replace_text
from dpo.huggingface.pretrained import load_pretrained, stop_tokens
from dpo.judging.journal import Journal
from dpo.judging.judges import RewardJudge, reward_judge
from dpo.judging.prompts import SHIPPED_JUDGE, read_prompts
from dpo.judging.rewards import Prompt
from dpo.judging.samples import Player, Request, model_identity, sample_responses
from dpo.losses import make_objective
from dpo.models.drawing import SamplingConfig
from dpo.outcomes import UserError
from dpo.parallel.sharding import make_mesh
from dpo.runs import CHECKPOINTS_DIRECTORY, CONFIG_FILE, flat_settings, read_summary
from dpo.training.identity import resolved_settings, settings_fingerprint
from dpo.training.loop import train
from dpo.training.on_policy import OnPolicy, prompt_ids
from dpo.training.policy import Policy, load_policy
from dpo.training.reference import fingerprint_parameters
from dpo.training.step import Params

RESULT_FILE = "frontier.json"
SAMPLED_TOGETHER = 96
"""Responses that are sampled together at most; a batch is padded to this number."""
Log = Callable[[str], None]


def run(given: FrontierConfig, *, log: Log) -> FrontierResult | None:
    """Train, sample and judge all that is missing; write figures, tables and frontier.json.

    None where a signal asked to stop: everything is saved, and the same settings go on from there.
    """
    given = replace(given, reward=_choose_reward(given))
    output = Path(given.output)
    configs = run_configs(given)
    for config in configs.values():
        _require_same_settings(config)
    assert given.reward is not None, "it was chosen"
    reward = reward_judge(given.reward, setting="reward")
    prompts = [row.prompt for row in read_prompts(next(iter(configs.values())), log)]
    with Journal(output / "points.jsonl") as points:
        observers = _Observers(given, prompts, reward, points)
        for number, ((name, beta), config) in enumerate(configs.items(), start=1):
            log(f"run {number} of {len(configs)}: {name}, beta {beta:g} ({config.run_dir})")
            result = train(config, observe=observers.of(name, beta, config))
            if result.status == "interrupted":
                return None
            shutil.rmtree(Path(config.run_dir) / CHECKPOINTS_DIRECTORY, ignore_errors=True)
            if result.stop_asked:  # while it was exported, which was finished
                return None
            jax.clear_caches()
        lines = {key: observers.line(*key, config) for key, config in configs.items()}
    del observers
    figures: FrontierResult = {
        "settings": asdict(given),
        "reward": reward.identity,
        "prompts": len(prompts),
        "best_of_n": best_of_n(given, prompts, reward, output, log),
        "lines": [
            {"objective": name, "beta": beta, "points": points} for (name, beta), points in lines.items()
        ],
        "temperatures": win_rates_by_temperature(
            given, configs, output, batch_size=min(SAMPLED_TOGETHER, len(prompts)), log=log
        ),
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
    replace_text(output / RESULT_FILE, text, what="the figures")
    draw_frontier(output / "frontier.svg", figures)
    draw_temperatures(output / "temperatures.svg", figures)
    replace_text(output / "frontier.md", frontier_as_markdown(figures), what="the tables")
    return figures


def _choose_reward(given: FrontierConfig) -> str:
    """The reward that is named; without one, that of the data which come with the package.

    Raises:
      ValueError: for other data: their true reward is not known.
    """
    if given.reward is not None:
        return given.reward
    for source in (given.train, given.eval):
        if not is_shipped(source):
            raise UserError(
                f"reward is not given, and {source} is none of the shipped data; allowed: the reward that "
                f"ranked them, {SHIPPED_JUDGE} or module:function"
            )
    return SHIPPED_JUDGE


def run_configs(given: FrontierConfig) -> dict[tuple[str, float], Config]:
    """Settings of all runs, by objective and β, in the order in which they are trained."""
    every = {f"{name}:{beta:g}": (name, beta) for name in given.objectives for beta in given.betas}
    wanted = [every[name] for name in given.only] if given.only else list(every.values())
    return {(name, beta): run_config(given, name, beta) for name, beta in wanted}


def run_config(given: FrontierConfig, name: str, beta: float) -> Config:
    """Settings of one policy's run."""
    config = Config(
        run_dir=str(Path(given.output) / f"{name}_beta{beta:g}"),
        model=ModelConfig(source=given.model),
        data=DataConfig(
            train=given.train, eval=given.eval, max_eval=given.prompts, max_length=given.max_length
        ),
        objective={"name": name, "beta": beta},
        optimizer=OptimizerConfig(learning_rate=given.learning_rate, schedule="linear", warmup_fraction=0.1),
        training=TrainingConfig(
            seed=given.seed, batch_size=given.batch_size, steps=given.steps, eval_every=given.eval_every
        ),
    )
    make_objective(config.objective)
    return config


def _require_same_settings(config: Config) -> None:
    """Raise `ValueError` for a run that was finished with other settings, which would be trained over.

    Its checkpoint, by which training itself would refuse, is deleted.
    """
    run_dir = Path(config.run_dir)
    summary = read_summary(run_dir)
    if summary is None or summary["settings"] == settings_fingerprint(config):
        return
    then = flat_settings(yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8")))
    now = flat_settings(asdict(config))
    differing = [
        f"{name} is {now[name]}, was {then.get(name, 'not there')}"
        for name in resolved_settings(config)
        if now.get(name) != then.get(name)
    ]
    raise UserError(
        f"{run_dir} is finished with other settings ({', '.join(differing)}); give another output, or delete "
        "the run to train it anew"
    )


class _Observers:
    """What a run is asked for at each evaluation: answers to the held-out prompts, kept in a journal."""

    def __init__(
        self, given: FrontierConfig, prompts: Sequence[Prompt], reward: RewardJudge, points: Journal
    ) -> None:
        self._given, self._prompts, self._reward, self._points = given, prompts, reward, points
        self._loaded: tuple[Policy, OnPolicy] | None = None

    def of(self, name: str, beta: float, config: Config) -> Callable[[int, Params], Mapping[str, float]]:
        """The observer of one run; answers that another policy gave under its key are drawn anew."""

        def observe(step: int, params: Params) -> Mapping[str, float]:
            key, policy = self._key(name, beta, config, step), fingerprint_parameters(params)
            if self._points.lines.get(key, {}).get("policy") != policy:
                about = {"key": key, "objective": name, "beta": beta, "step": step, "policy": policy}
                self._points.append({**about, **self._draw(params)})
            line = self._points.lines[key]
            return {
                "samples/reward": float(np.mean(self._rewards(line))),
                "samples/kl": float(np.mean(line["log_ratio"])),
                "samples/length": float(np.mean(line["length"])),
            }

        return observe

    def line(self, name: str, beta: float, config: Config) -> list[Point]:
        """The points of a finished run: reward and KL with their intervals.

        Raises:
          ValueError: where a finished run was not asked for these answers.
        """
        every, steps = self._given.eval_every, self._given.steps
        keys = [
            self._key(name, beta, config, step)
            for step in dict.fromkeys([*range(every, steps + 1, every), steps])
        ]
        if not self._points.lines.keys() >= set(keys):
            raise UserError(
                f"{config.run_dir} is finished, but {self._points.path} lacks some of its answers: prompts, "
                "max_new_tokens or eval_every are others now; give another output, or delete the run"
            )
        lines = [self._points.lines[key] for key in keys]
        names = np.array([json.dumps(prompt) for prompt in self._prompts])
        return [
            {
                "step": line["step"],
                "reward": list(cluster_bootstrap(self._rewards(line), names, seed=self._given.seed)),
                "kl": list(cluster_bootstrap(np.array(line["log_ratio"]), names, seed=self._given.seed)),
                "length": float(np.mean(line["length"])),
            }
            for line in lines
        ]

    def _key(self, name: str, beta: float, config: Config, step: int) -> str:
        sampling = (self._given.max_new_tokens, list(map(repr, self._prompts)))
        digest = hashlib.sha256(repr((settings_fingerprint(config), sampling)).encode()).hexdigest()
        return f"{name} {beta:g} {step} {digest[:16]}"

    def _rewards(self, line: Mapping[str, Any]) -> Float[np.ndarray, " n"]:
        return finite_rewards(self._reward, zip(self._prompts, line["texts"], strict=True))

    def _draw(self, params: Params) -> Drawn:
        policy, on_policy = self._open()
        drawn = on_policy.draw(params)
        tokenizer = policy.pretrained.tokenizer
        texts = [decode_ids(tokenizer, ids, skip_special_tokens=True).strip() for ids in drawn.responses]
        return {
            "log_ratio": drawn.log_ratio.round(4).tolist(),
            "length": [len(response) for response in drawn.responses],
            "texts": texts,
        }

    def _open(self) -> tuple[Policy, OnPolicy]:
        """The reference, loaded with the first draw and kept for all runs."""
        if self._loaded is None:
            config = run_config(self._given, self._given.objectives[0], self._given.betas[0])
            mesh = make_mesh(config.mesh)
            reference = load_policy(config.model, mesh)
            on_policy = OnPolicy(
                reference,
                prompt_ids(config, self._prompts, reference, None),
                mesh=mesh,
                max_new_tokens=self._given.max_new_tokens,
                stop_tokens=stop_tokens(reference.pretrained),
                chunk=config.model.log_prob_chunk,
                seed=self._given.seed,
            )
            self._loaded = reference, on_policy
        return self._loaded


def best_of_n(
    given: FrontierConfig, prompts: Sequence[Prompt], reward: RewardJudge, output: Path, log: Log
) -> list[BestOf]:
    """Mean reward of the best of n of the reference's samples, n = 1, 2, 4, … up to `best_of`, and its KL."""
    sampling = SamplingConfig(max_new_tokens=given.max_new_tokens)
    requests = [Request(prompt, number, sampling) for prompt in prompts for number in range(given.best_of)]
    with Journal(output / "reference_samples.jsonl") as journal:
        samples = sample_responses(
            Player("reference", given.model, f"{model_identity(given.model)} float32"),
            requests,
            journal=journal,
            load=lambda: load_pretrained(given.model, compute_dtype=jnp.dtype("float32")),
            seed=given.seed,
            batch_size=min(SAMPLED_TOGETHER, len(requests)),
            log=log,
        )
    answers = ((request.prompt, sample.text) for request, sample in zip(requests, samples, strict=True))
    rewards = finite_rewards(reward, answers).reshape(len(prompts), given.best_of)
    counts = [n for n in (2**k for k in range(given.best_of.bit_length())) if n <= given.best_of]
    names = np.arange(len(prompts))
    return [
        {
            "n": n,
            "reward": list(cluster_bootstrap(expected_best(rewards, n), names, seed=given.seed)),
            "kl": best_of_n_kl(n),
        }
        for n in dict.fromkeys([*counts, given.best_of])
    ]


def finite_rewards(judge: RewardJudge, answers: Iterable[tuple[Prompt, str]]) -> Float[np.ndarray, " n"]:
    """The reward of every answer.

    Raises:
      ValueError: for one that is not finite: no mean could be taken.
    """
    rewards = []
    for prompt, text in answers:
        rewards.append(judge.score(prompt, text))
        if not np.isfinite(rewards[-1]):
            raise UserError(
                f"reward {judge.name} is {rewards[-1]} for the response {text[:80]!r}; allowed is a finite "
                "number"
            )
    return np.array(rewards, np.float64)


def expected_best(rewards: Float[np.ndarray, "P m"], n: int) -> Float[np.ndarray, " P"]:
    """Mean of the best reward over all subsets of n of each prompt's m samples: unbiased for best-of-n.

    The i-th smallest is the best of C(i − 1, n − 1) of the C(m, n) subsets.
    """
    m = rewards.shape[1]
    weights = np.array([comb(i, n - 1) / comb(m, n) for i in range(m)])
    return np.sort(rewards, axis=1) @ weights


def best_of_n_kl(n: int) -> float:
    """log n − (n − 1)/n: KL of best-of-n from what it draws from; an upper bound where rewards tie.

    (Beirami et al. 2024, arXiv:2401.01879, who show that the usual formula is a bound.)
    """
    return log(n) - (n - 1) / n
