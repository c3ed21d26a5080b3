"""docs/objectives.md and its figure, from the docstrings and the functions: `python -m
docs.make_objectives`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo.losses.objectives import LISTWISE, MODIFIERS, OBJECTIVES, PAIRWISE, UNPAIRED, make_objective
from dpo.losses.parameters import allowed_values, parameters_of
from dpo.losses.scores import Objective, Scores

DOCS = Path(__file__).parent

FIELDS = ("Formula", "Gradient weight", "Source", "Defaults", "Data", "Reported", "Use")
"""What a factory's docstring says after its first line, in this order."""

_INTRODUCTION = """# Objectives

Made by `python -m docs.make_objectives` from the docstrings in `dpo/losses`; a test keeps it up to date.

An objective is chosen in the settings, `objective: {name: dpo, beta: 0.1}`, or as a weighted sum,
`objectives: [{name: dpo, weight: 0.8}, {name: sft, weight: 1.0}]`. A hyper-parameter that an objective does
not use is an error. The loss of a step is the mean over its prompts. Rows whose responses are all tied have
no pair: they are left out and counted at the start (`no_pair`), unless a term of the sum learns from them
({from_ties}); the terms over pairs are 0 there. Prompts with one response are for {from_singles}.

Notation: s = log π(y|x) − log ρ(y|x) is the log-ratio of a response, w the chosen and l the rejected one, |y|
the number of scored tokens, δ = β (s_w − s_l), σ the logistic function. The gradient weight is −∂L/∂δ where
the loss is a function of δ: how hard a pair pulls.

## Which one

- Pairs, nothing special: **dpo**. Noisy labels: its `label_smoothing`, or **robust** at a known flip rate.
- More than two ranked responses: **plackett_luce**; only the best is known: **softmax_best**; the head
  matters most: **lipo_lambda** or **listmle**. Or an objective on pairs with
  `pairs: all | adjacent | best_worst`.
- Scores come with the data and are trusted: **reward_distillation**, **infonca**, **odpo**.
- Thumbs up or down: **kto**, **bco**.
- The chosen response becomes less likely, and should not: **dpop**, **nca**, **apo_zero**, or a sum with
  **sft**.
- Length wins in the data: **dpo_norm**, **simpo**, **r_dpo**, or `ld_alpha`.
- No reference wanted in the loss: **simpo**, **cpo**, **orpo**. It is scored once all the same, for
  `rewards/*` and the held-out figures.
"""

_MODIFIERS = """## Modifiers

Settings beside the objective's own, where its table row lists them.

- `divergence`: `forward_kl`, `jensen_shannon` or an α in [0, 1] instead of reverse KL. The implicit reward
  becomes β f′(π/ρ): 1 − exp(−s), log(2σ(s)), (exp((α − 1)s) − 1)/(α − 1). Wang et al. 2023, arXiv:2309.16240.
- `ld_alpha`: log-probs beyond the length of the prompt's shortest response count with this weight (LD-DPO).
  Liu et al. 2024, arXiv:2409.06411.
- `wpo`: each pair counts with w(y_w) w(y_l), w(y) = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), not
  differentiated. Zhou et al. 2024, arXiv:2406.11827, Eq. 2.

Not an objective but a setting of the run: a reference that moves (TR-DPO, Gorbatovski et al. 2024,
arXiv:2404.09656, §3). Every `training.reference_every` steps the reference becomes α policy + (1 − α)
reference, with α = `training.reference_alpha` (0.6, the paper's, which moves every 512 steps); 1 replaces it,
and is the only one with adapters. It works with every objective that has a reference. `docs/design.md` says
how it is kept.
"""

_GROUPS = {
    "Pairwise": (PAIRWISE, "![Loss and gradient weight of the pairwise objectives](objectives.svg)\n"),
    "Listwise": (LISTWISE, ""),
    "Unpaired": (UNPAIRED, ""),
}


def main() -> None:
    """Write both files."""
    DOCS.mkdir(exist_ok=True)
    (DOCS / "objectives.md").write_text(markdown())
    draw(DOCS / "objectives.svg")


def markdown() -> str:
    """The whole page."""
    introduction = _INTRODUCTION.replace(
        "{from_ties}", _names_where(lambda objective: objective.learns_from_ties)
    ).replace("{from_singles}", _names_where(lambda objective: objective.learns_from_single_responses))
    parts = [introduction, _overview(), _MODIFIERS]
    for title, (factories, figure) in _GROUPS.items():
        parts += [f"## {title}\n", *([figure] if figure else [])]
        parts += [_section(name, factory) for name, factory in factories.items()]
    return "\n".join(parts)


def described(factory: Callable[..., Objective]) -> tuple[str, dict[str, str]]:
    """First line and labelled fields of a factory's docstring; an assertion fails where one is missing."""
    summary, _, rest = (inspect.getdoc(factory) or "").partition("\n\n")
    label = "|".join(FIELDS)
    parts = re.split(rf"^({label}): ", rest, flags=re.MULTILINE)
    fields = {key: " ".join(text.split()) for key, text in zip(parts[1::2], parts[2::2], strict=True)}
    assert tuple(fields) == FIELDS, f"{factory.__name__}: docstring has {list(fields)}, wanted {list(FIELDS)}"
    return summary, fields


def draw(path: Path) -> None:
    """Loss and gradient weight of every pairwise objective against δ, one panel each."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    names = [name for name in PAIRWISE if name != "sft"]
    columns = 4
    rows = math.ceil(len(names) / columns)
    with plt.rc_context({"svg.hashsalt": "objectives", "svg.fonttype": "none", "font.size": 8}):
        figure, panels = plt.subplots(rows, columns, figsize=(10, 1.9 * rows), sharex=True)
        for name, axes in zip(names, panels.flat, strict=False):
            deltas, losses, weights = curve(name)
            axes.plot(deltas, losses, color="#1f77b4")
            axes.set_title(name, fontsize=9)
            axes.tick_params(axis="y", labelcolor="#1f77b4", labelsize=6)
            right = axes.twinx()
            right.plot(deltas, weights, color="#d62728", linestyle="--")
            right.axhline(0.0, color="#d62728", linewidth=0.3)
            right.tick_params(axis="y", labelcolor="#d62728", labelsize=6)
        for axes in panels.flat[len(names) :]:
            axes.axis("off")
        figure.supxlabel("δ, both responses moving apart from the reference by δ/2")
        figure.suptitle("loss (solid, left) and gradient weight −dL/dδ (dashed, right), at the defaults")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def curve(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """δ, loss and −dL/dδ for a pair of one-token responses whose scores, if read, differ by one."""
    objective = make_objective({"name": name})
    beta = inspect.signature(PAIRWISE[name]).parameters["beta"].default
    beta = 1.0 if name in ("orpo", "cal_dpo") else beta  # it does not scale their log-ratios
    reference = -60.0 / min(beta, 1.0)

    def loss(delta: jax.Array) -> jax.Array:
        half = delta / (2.0 * beta)
        pair = jnp.stack([half, -half])[None]
        return objective(
            Scores(
                policy=reference + pair,
                reference=jnp.full((1, 2), reference),
                lengths=jnp.ones((1, 2), jnp.int32),
                present=jnp.ones((1, 2), bool),
                ranks=jnp.arange(2)[None],
                scores=jnp.array([[1.0, 0.0]]),
            )
        )[0]

    deltas = jnp.linspace(-6.0, 6.0, 61)
    losses, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(deltas)
    return np.asarray(deltas), np.asarray(losses), -np.asarray(slopes)


def _names_where(condition: Callable[[Objective], bool]) -> str:
    return ", ".join(f"**{name}**" for name, make in OBJECTIVES.items() if condition(make()))


def _overview() -> str:
    lines = [
        "## Overview\n",
        "| name | | needs beyond log-probs | whole batch | reference | modifiers |",
        "|---|---|---|---|---|---|",
    ]
    for factories, _ in _GROUPS.values():
        for name, factory in factories.items():
            objective = factory()
            cells = [
                f"[{name}](#{name})",
                described(factory)[0].partition(":")[0].rstrip("."),
                ", ".join(sorted(objective.needs)) or "",
                "yes" if objective.whole_batch else "",
                "" if objective.reference_free else "yes",
                ", ".join(f"`{key}`" for key in MODIFIERS if key in objective.admits),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("\nWhole batch: computed once on all prompts of a step, whatever it is split into.\n")
    return "\n".join(lines)


def _section(name: str, factory: Callable[..., Objective]) -> str:
    summary, fields = described(factory)
    lines = [f"### {name}\n", f"{summary}\n", f"    {fields['Formula']}\n"]
    lines += [f"- **{label}**: {fields[label]}" for label in FIELDS[1:]]
    parameters = inspect.signature(factory).parameters
    lines += [
        f"- `{key}`: {allowed_values(hint)}; default {_shown(parameters[key].default)}"
        for key, hint in parameters_of(factory).items()
    ]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
