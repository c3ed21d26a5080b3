"""Inputs that are well-formed and wrong in what they say, where mutated bytes seldom come."""

import contextlib
import json
import struct
from collections.abc import Callable

import yaml
from fuzz_run import is_own_value_error
from fuzz_targets import VARIABLES, UsageError, folder, overrides
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.command_line import load_config, settings_parser
from dpo.config import Config
from dpo.data.templates import Limits, SandboxedTemplate
from dpo.huggingface.weights import read_safetensors_header
from dpo.outcomes import UserError

quick = settings(max_examples=60, deadline=None)
NAMES = settings_parser(Config).setting_names()

texts = st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def refusal(read: Callable[[], object]) -> Exception | None:
    """The error with which something is refused."""
    try:
        read()
    except (ValueError, UsageError) as error:
        return error
    return None


@quick
@given(
    st.sampled_from(NAMES),
    st.one_of(texts, values.map(str), st.sampled_from(["", "-1", "1e999", "nan", "{}"])),
)
def test_any_value_of_a_setting_is_taken_or_refused_by_the_settings_name(name, value):
    error = refusal(
        lambda: overrides(f"--{name}={value}".replace("\n", " ").encode("utf-8", "surrogateescape"))
    )
    if error is not None:
        said = str(error)
        assert said.startswith("dpo train: error: ")
        assert name.partition(".")[0] in said
        assert "Traceback" not in said


def nested(name, value):
    group, _, last = name.rpartition(".")
    return {group: {last: value}} if group else {last: value}


@quick
@given(st.sampled_from(NAMES), values)
def test_any_yaml_value_of_a_setting_is_taken_or_refused(name, value):
    path = folder("properties") / "config.yaml"
    path.write_text(
        yaml.safe_dump(nested(name, value), allow_unicode=True), encoding="utf-8", errors="replace"
    )
    error = refusal(lambda: load_config(path))
    assert error is None or (is_own_value_error(error) and str(error).startswith(str(path)))


sizes = st.one_of(st.integers(-2, 9), st.integers(), st.sampled_from([2**31, 2**63 - 1, 2**64]), values)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "x", "", None]) | values,
        "shape": st.lists(sizes, max_size=4) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
        "more": values,
    },
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(texts | st.just("__metadata__"), entries | values, max_size=3), st.binary(max_size=24))
def test_any_header_of_safetensors_is_consistent_or_refused(header, data):
    text = json.dumps(header, default=str).encode()
    path = folder("properties") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    error = refusal(lambda: read_safetensors_header(path))
    assert error is None or is_own_value_error(error)
    if error is None:
        found = read_safetensors_header(path).values()
        assert sum(entry.end - entry.begin for entry in found) == len(data)


names = st.sampled_from(
    ["messages", "bos_token", "ns", "x", "range", "dict", "namespace", "lipsum", "nothing"]
)
numbers = st.sampled_from(
    ["0", "-1", "3", "99999", "10 ** 9", "2.5", "''", "'ab'", "none", "true", "[]", "{}"]
)
filters = st.sampled_from(
    "tojson length join upper trim list sum sort map string int center indent replace round format".split()  # noqa: SIM905
)


def combine(inner):
    two = st.tuples(inner, st.sampled_from(["+", "*", "~", "==", "in", "and", "//", "%", "**"]), inner)
    return st.one_of(
        two.map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(inner, filters).map(lambda parts: f"({parts[0]} | {parts[1]})"),
        st.tuples(inner, filters, inner).map(lambda parts: f"({parts[0]} | {parts[1]}({parts[2]}))"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        st.tuples(inner, inner).map(lambda parts: f"{parts[0]}[{parts[1]}]"),
        st.tuples(inner, st.sampled_from(["append", "items", "format", "__class__", "join"])).map(".".join),
        st.tuples(inner, inner).map(lambda parts: f"[{', '.join(parts)}]"),
    )


expressions = st.recursive(names | numbers, combine, max_leaves=8)
FRAMES = [
    "{{ E }}",
    "{% for x in E %}{{ x }}{% endfor %}",
    "{% set ns = namespace(x=E) %}{{ ns.x }}",
    "{% if E %}1{% endif %}",
]


@quick
@given(st.sampled_from(FRAMES), expressions)
def test_any_expression_in_a_template_is_rendered_or_refused(frame, expression):
    """A constant that cannot be written is refused when it is compiled, all else when it is rendered."""
    limits = Limits(seconds=0.3, characters=10_000)
    with contextlib.suppress(UserError):
        template = SandboxedTemplate(frame.replace("E", expression), name="t", limits=limits)
        assert len(template.render(VARIABLES)) <= 10_000
