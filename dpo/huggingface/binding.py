"""A family's weight-name table applied to one decoder: which tensors make up which parameters, both ways."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpo.huggingface.families import Family
from dpo.huggingface.weight_names import FALCON_ENDS, SCORE_RULES, SPELLINGS, Rule, find_spelling
from dpo.models.decoder_config import DecoderConfig
from dpo.outcomes import UserError

Shapes = Mapping[str, tuple[int, ...]]


class Binding(NamedTuple):
    """Some of our parameters (several when fused) and the tensors that hold them, one for each layer."""

    rule: Rule
    config: DecoderConfig
    leaves: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    """Of each tensor, as Hugging Face stores it."""

    def to_ours(self, tensor: np.ndarray) -> Sequence[np.ndarray]:
        """One layer's parameters from one tensor."""
        tensor = tensor.T if self.is_transposed else tensor
        return (tensor,) if self.rule.fusion is None else self.rule.fusion.split(tensor, self.config)

    def to_theirs(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor from one layer's parameters."""
        tensor = parts[0] if self.rule.fusion is None else self.rule.fusion.join(parts, self.config)
        return np.ascontiguousarray(tensor.T if self.is_transposed else tensor)

    @property
    def key(self) -> str:
        """What no other binding of the model has: the rule, and the kind of its layers."""
        kind = find_kind(self.leaves[0], self.config)
        return self.rule.theirs if kind is None else f"{self.rule.theirs} of {kind}"

    @property
    def num_leading(self) -> int:
        """Leading axes of the parameters that count tensors: layers, and heads."""
        return self.rule.theirs.count("{")

    @property
    def is_transposed(self) -> bool:
        """Whether the file has [out, in] where we have [in, out]."""
        return self.rule.transposed and self.leaves[0].endswith(".kernel")


def bind(family: Family, config: DecoderConfig, shapes: Shapes) -> list[Binding]:
    """A binding for every parameter of a decoder, given their shapes by path."""
    bindings = [
        _bind_rule(rule, leaf, config, shapes)
        for rule in (*(family.rules(config) if callable(family.rules) else family.rules), *SCORE_RULES)
        for leaf in _LEAVES
        if f"{rule.ours[0]}.{leaf}" in shapes
    ]
    bound = {leaf for binding in bindings for leaf in binding.leaves}
    assert bound == set(shapes), f"parameters without a rule: {sorted(set(shapes) - bound)}"
    return bindings


def find_ends(family: Family) -> tuple[str, str]:
    """Names of the tensors that hold the embedding and the output head."""
    rules = FALCON_ENDS if callable(family.rules) else family.rules
    embedding, head = (
        next(rule.theirs for rule in rules if rule.ours == (name,)) for name in ("embed_tokens", "lm_head")
    )
    return f"{embedding}.weight", f"{head}.weight"


def canonical_names(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Each tensor's full name → its name in the file; some checkpoints leave the model's prefix out.

    Of a model that has more than text, the text model's tensors."""
    names = list(names)
    if family.is_part:
        return _names_of_text(family, names)
    if any(name.startswith(family.prefix) for name in names):
        return {name: name for name in names}
    return {name if name.startswith(_HEADS) else family.prefix + name: name for name in names}


def _names_of_text(family: Family, names: list[str]) -> dict[str, str]:
    """The text model's tensors in a model that has more, which is spelled in several ways; no others."""
    spelling = find_spelling(names) or SPELLINGS[0]
    full = {family.prefix: spelling.body, SPELLINGS[0].head: spelling.head}
    return {
        ours + name.removeprefix(theirs): name
        for ours, theirs in full.items()
        for name in names
        if name.startswith(theirs)
    }


def find_modules(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Each tensor's name → the name of transformers' module that holds it."""
    rules = () if callable(family.rules) else family.rules
    renamed = {
        re.compile(re.escape(rule.theirs).replace(r"\{layer\}", r"\d+") + r"\.weight"): rule
        for rule in rules
        if rule.module is not None
    }
    plain = Rule((), "")
    return {
        name: next((rule for is_of, rule in renamed.items() if is_of.fullmatch(name)), plain).module_of(name)
        for name in names
    }


def constants(family: Family, config: DecoderConfig) -> dict[str, float]:
    """The tensors that hold one number each and are no parameters, and the numbers."""
    return {
        name.format(layer=layer): value
        for layer in range(config.num_layers)
        for name, value in family.constants.items()
    }


def check_tensors(family: Family, bindings: Sequence[Binding], shapes: Shapes, source: str) -> None:
    """One `ValueError` with every tensor that is missing, left over or of the wrong shape."""
    expected = {name: binding.shape for binding in bindings for name in binding.names}
    if bindings:
        expected |= dict.fromkeys(constants(family, bindings[0].config), ())
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in shapes]
    problems += [
        f"wrong shape: {name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems += [
        f"left over: {name} {list(shape)}"
        for name, shape in shapes.items()
        if name not in expected and not _is_ignored(family, bindings, name)
    ]
    if problems:
        raise UserError(f"{source}: tensors do not fit the configuration:\n  " + "\n  ".join(problems))


def _bind_rule(rule: Rule, leaf: str, config: DecoderConfig, shapes: Shapes) -> Binding:
    leaves = tuple(f"{path}.{leaf}" for path in rule.ours)
    num_leading = rule.theirs.count("{")
    leading = shapes[leaves[0]][:num_leading]
    last = sum(shapes[path][-1] for path in leaves)
    shape = (*shapes[leaves[0]][num_leading:-1], last)
    if leaf == "kernel" and rule.transposed:
        shape = shape[::-1]
    numbers: list[Sequence[int]] = [range(size) for size in leading]
    kind = find_kind(leaves[0], config)
    if kind is not None:
        numbers[0] = config.layers_of(kind)
    names = tuple(
        rule.theirs.format(**dict(zip(("layer", "head"), index, strict=False))) + "." + _LEAVES[leaf]
        for index in itertools.product(*numbers)
    )
    assert len(names) == math.prod(leading)
    return Binding(rule, config, leaves, names, shape)


def find_kind(leaf: str, config: DecoderConfig) -> str | None:
    """The kind of layers that a parameter is of, where they are stacked by kind."""
    first, _, rest = leaf.partition(".")
    return rest.partition(".")[0] if first == "layers" and not config.is_uniform else None


def _is_ignored(family: Family, bindings: Sequence[Binding], name: str) -> bool:
    """Buffers, and an output head that is stored although it is tied."""
    if name == find_ends(family)[1]:
        return any(binding.config.tie_embeddings for binding in bindings)
    unread = family.unread(bindings[0].config) if bindings else ()
    return any(re.search(pattern, name) for pattern in (*family.ignored, *unread))


_OUTPUT_HEADS = ("lm_head.", "embed_out.")
_HEADS = (*_OUTPUT_HEADS, "score.")
"""Tensors outside the model's prefix."""
_LEAVES = {
    **dict.fromkeys(("kernel", "scale", "embedding"), "weight"),
    **{name: name for name in ("bias", "alpha_p", "alpha_n", "A_log", "dt_bias", "layer_scalar")},
    "taps": "weight",
}
"""Our parameter names → Hugging Face's."""
