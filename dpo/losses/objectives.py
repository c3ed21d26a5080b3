"""The dictionary of objectives, and objectives made from settings."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import jax
from jaxtyping import Float

from dpo.losses import listwise, pairwise, reference_free, unpaired, whole_batch
from dpo.losses.divergences import Divergence, with_divergence
from dpo.losses.parameters import NonNegative, Range, checked, require_types, suggestion
from dpo.losses.scores import Objective, Scores
from dpo.losses.weighting import with_policy_weights, with_tail_weight
from dpo.outcomes import UserError
from dpo.own_code import fingerprint_code, import_function

Modifier = Callable[[Scores], Scores]

PAIRWISE: dict[str, Callable[..., Objective]] = {
    "dpo": pairwise.dpo,
    "ipo": pairwise.ipo,
    "ipo_norm": pairwise.ipo_norm,
    "hinge": pairwise.hinge,
    "robust": pairwise.robust,
    "dpo_norm": pairwise.dpo_norm,
    "simpo": reference_free.simpo,
    "cpo": reference_free.cpo,
    "orpo": reference_free.orpo,
    "exo": pairwise.exo,
    "nca": pairwise.nca,
    "bco_pair": pairwise.bco_pair,
    "sppo_hard": pairwise.sppo_hard,
    "apo_zero": pairwise.apo_zero,
    "apo_down": pairwise.apo_down,
    "discopop": pairwise.discopop,
    "dpop": pairwise.dpop,
    "cal_dpo": pairwise.cal_dpo,
    "r_dpo": pairwise.r_dpo,
    "odpo": pairwise.odpo,
    "reward_distillation": pairwise.reward_distillation,
    "aot": whole_batch.aot,
    "aot_unpaired": whole_batch.aot_unpaired,
    "sft": whole_batch.sft,
}

LISTWISE: dict[str, Callable[..., Objective]] = {
    "plackett_luce": listwise.plackett_luce,
    "softmax_best": listwise.softmax_best,
    "listmle": listwise.listmle,
    "all_pairs": listwise.all_pairs,
    "lipo_lambda": listwise.lipo_lambda,
    "infonca": listwise.infonca,
}

UNPAIRED: dict[str, Callable[..., Objective]] = {"kto": unpaired.kto, "bco": unpaired.bco}

OBJECTIVES: dict[str, Callable[..., Objective]] = PAIRWISE | LISTWISE | UNPAIRED
_SHIPPED = frozenset(OBJECTIVES)


def _divergence(divergence: Divergence) -> Modifier:
    """Another f-divergence than reverse KL as the regulariser (`divergences`)."""
    return lambda scores: with_divergence(scores, divergence)


def _ld_alpha(ld_alpha: Annotated[float, Range(low=0.0, high=1.0)]) -> Modifier:
    """LD-DPO: what a response has beyond its prompt's shortest one counts with this weight (`weighting`)."""
    return lambda scores: with_tail_weight(scores, ld_alpha)


def _wpo(wpo: bool) -> Modifier:
    """WPO: pairs weighted by how likely the policy is to write them (`weighting`)."""
    return with_policy_weights if wpo else lambda scores: scores


MODIFIERS: dict[str, Callable[..., Modifier]] = {
    "wpo": _wpo,
    "ld_alpha": _ld_alpha,
    "divergence": _divergence,
}
"""Settings that change what an objective sees, in the order in which they apply. `Objective.admits` says
where."""

Specification = dict[str, Any]
"""An objective as settings give it: its name and hyper-parameters, in a sum its weight."""
_NEEDS = {"wpo": "log_collision", "ld_alpha": "head"}


def make_objective(spec: Specification | Sequence[Specification]) -> Objective:
    """The objective that {"name": "dpo", "beta": 0.1} describes; of a list, the weighted sum.

    Entries of a list have a `weight` (1 when not given). Raises ValueError that names the key, the value and
    what is allowed, for unknown names, hyper-parameters that the objective doesn't use, wrong types and
    values out of range.
    """
    if isinstance(spec, dict):
        return _make_one(spec, where=f"objective {spec.get('name', '')}".rstrip())
    if not spec:
        raise UserError("objectives is an empty list; allowed: at least one {name: ..., weight: ...}")
    return _weighted_sum([_make_weighted(entry, where=f"objectives[{i}]") for i, entry in enumerate(spec)])


def reward_scale(spec: Specification | Sequence[Specification]) -> float:
    """β of an objective, or of the first in a list that has one: the factor of rewards/* metrics.

    1 for objectives without β.

    Raises:
      UserError: for a name that is none of an objective, and a β that is no number above 0.
    """
    for entry in [spec] if isinstance(spec, dict) else spec:
        name = entry.get("name")
        beta = entry.get("beta", _default_beta(name))
        if beta is None:
            continue
        is_number = isinstance(beta, int | float) and not isinstance(beta, bool)
        if not is_number or not 0 < beta <= sys.float_info.max:
            raise UserError(f"objective {name}: beta is {beta!r:.200}; allowed: a number > 0")
        return float(beta)
    return 1.0


def _default_beta(name: Any) -> float | None:
    """β of an objective that is asked for without; None where it has none, or its run would have noted it.

    The module of an objective `module:function` is not imported for that: `with_own_beta` has noted the β.
    """
    if not isinstance(name, str):
        raise UserError(f"objective: name is {name!r:.200}; allowed: {', '.join(OBJECTIVES)}")
    if name not in OBJECTIVES:
        if ":" in name:
            return None
        raise UserError(
            f"objective {name!r} is none of this project's, and nothing has put it into OBJECTIVES; "
            "allowed: import the module that does before (in Python), or name it module:function in "
            "objective.name, so that its runs can be opened by every command"
        )
    beta = inspect.signature(OBJECTIVES[name]).parameters.get("beta")
    return None if beta is None else beta.default


def with_own_beta(spec: Specification) -> Specification:
    """An objective's settings; of one of the user's own with its default β, so that no code is needed."""
    name = spec.get("name")
    if name in _SHIPPED or "beta" in spec or not isinstance(name, str):
        return spec
    beta = inspect.signature(_find_factory(name, where=f"objective {name}")).parameters.get("beta")
    return spec if beta is None or beta.default is beta.empty else {**spec, "beta": beta.default}


def own_code_of(specs: Sequence[Specification]) -> dict[str, str]:
    """The fingerprint of the code of each objective that is the user's own, by its name."""
    names = [str(spec.get("name")) for spec in specs]
    return {
        name: fingerprint_code(_find_factory(name, where=f"objective {name}"))
        for name in names
        if name not in _SHIPPED
    }


def default_values(name: str) -> Mapping[str, Any]:
    """What a shipped objective's own settings are where a run does not name them; nothing of other ones."""
    if name not in _SHIPPED:
        return {}
    parameters = inspect.signature(OBJECTIVES[name]).parameters
    return {key: parameter.default for key, parameter in parameters.items()}


def names_that_learn_from_single_responses() -> list[str]:
    """The objectives for data with one response a prompt, sorted."""
    return sorted(name for name, make in OBJECTIVES.items() if make().learns_from_single_responses)


def _make_one(spec: Specification, *, where: str) -> Objective:
    if "name" not in spec:
        raise UserError(f"{where}: name is missing; allowed: {', '.join(OBJECTIVES)}")
    name = spec["name"]
    factory = _find_factory(name, where=where)
    admits = _defaults(factory, name).admits
    admitted = {key: modifier for key, modifier in MODIFIERS.items() if key in admits}
    values = checked(
        [factory, *admitted.values()], {k: v for k, v in spec.items() if k != "name"}, where=where
    )
    objective = factory(**{key: value for key, value in values.items() if key not in admitted})
    objective = replace(objective, name=name)
    return _modified(objective, {key: values[key] for key in admitted if values.get(key, False) is not False})


def _find_factory(name: Any, *, where: str) -> Callable[..., Objective]:
    """The function that makes an objective: a shipped one, or that which `module:function` names."""
    if isinstance(name, str) and name in OBJECTIVES:
        return OBJECTIVES[name]
    if isinstance(name, str) and re.fullmatch(r"[\w.]+:\w+", name):
        return import_function(name, setting="objective.name", allowed="a function that returns an Objective")
    meant = suggestion(str(name), OBJECTIVES)
    raise UserError(
        f"{where}: name is {name!r}; {meant}allowed: {', '.join(OBJECTIVES)}, or module:function of your own"
    )


def _defaults(factory: Callable[..., Objective], name: str) -> Objective:
    """The objective with its default hyper-parameters."""
    needed = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.default is parameter.empty
    ]
    if needed:
        raise UserError(
            f"objective {name}: {', '.join(needed)} has no default value; every argument needs one"
        )
    if name not in _SHIPPED:
        require_types(factory, where=f"objective {name}")
    made = factory()
    if not isinstance(made, Objective):
        raise UserError(f"objective {name}: it returns {type(made).__name__}; allowed: dpo.losses.Objective")
    return made


def _modified(objective: Objective, settings: Mapping[str, Any]) -> Objective:
    if not settings:
        return objective
    modifiers = [MODIFIERS[key](value) for key, value in settings.items()]

    def loss(scores: Scores) -> Float[jax.Array, " P"]:
        for modifier in modifiers:
            scores = modifier(scores)
        return objective(scores)

    needs = objective.needs | {_NEEDS[key] for key in settings if key in _NEEDS}
    return replace(objective, loss=loss, needs=needs)


def _make_weighted(spec: Specification, *, where: str) -> tuple[float, Objective]:
    weight = (
        checked([_weight], {"weight": spec["weight"]}, where=where)["weight"] if "weight" in spec else 1.0
    )
    rest = {key: value for key, value in spec.items() if key != "weight"}
    return weight, _make_one(rest, where=where)


def _weight(weight: NonNegative) -> float:
    return weight


def _weighted_sum(terms: list[tuple[float, Objective]]) -> Objective:
    def loss(scores: Scores) -> Float[jax.Array, " P"]:
        weighted = [weight * objective(scores) for weight, objective in terms]
        return sum(weighted[1:], start=weighted[0])

    objectives = [objective for _, objective in terms]
    return Objective(
        loss,
        needs=frozenset().union(*(objective.needs for objective in objectives)),
        whole_batch=any(objective.whole_batch for objective in objectives),
        reference_free=all(objective.reference_free for objective in objectives),
        learns_from_ties=any(objective.learns_from_ties for objective in objectives),
        learns_from_single_responses=all(objective.learns_from_single_responses for objective in objectives),
        name=" + ".join(objective.name for objective in objectives),
        terms=tuple(objectives),
    )
