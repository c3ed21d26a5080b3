"""Command lines and YAML files become settings, or a short error that names the key, the value and the rule.

jsonargparse does the work; this file sets it up safely (no import path in a file is ever followed) and says
what it says in the words of the settings.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings

from dpo.config import Config
from dpo.config.home import at_home
from dpo.distribution import find_settings, settings_names
from dpo.outcomes import USER, UserError
from dpo.regular_files import near_name, require_regular, why_no_file
from dpo.terminal import shortened, show_controls
from dpo.text_encoding import encoding_problem

MAX_YAML_VALUES = 100_000
"""Values of one file with its aliases written out: ten short lines of aliases to aliases make billions."""
MAX_YAML_DEPTH = 50

Settings = TypeVar("Settings")

set_parsing_settings(
    add_print_completion_argument=False,
    docstring_parse_attribute_docstrings=True,
    instantiate_subclass_spec_in_any=False,
    import_path_denylist=["*"],
)
_load_plain_yaml = get_loader("yaml")


def _load_yaml(text: str) -> Any:
    """As jsonargparse loads it, with every error one that it expects, and nothing too large to work with."""
    try:
        value = _load_plain_yaml(text)
        count, depth = _measure(value, {})
    except (ValueError, RecursionError) as error:  # such as an integer of 5,000 digits
        raise yaml.YAMLError(str(error)) from error
    if count > MAX_YAML_VALUES or depth > MAX_YAML_DEPTH:
        raise yaml.YAMLError(
            f"with its aliases it holds more than {MAX_YAML_VALUES} values, or more than {MAX_YAML_DEPTH} in "
            "each other"
        )
    return value


def _measure(value: Any, measured: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Values inside, each as often as it is there, and the depth; what holds itself is beyond any limit.

    Raises `ValueError` for a mapping whose names are no strings.
    """
    if not isinstance(value, (dict, list)):
        return 1, 0
    if id(value) not in measured:
        measured[id(value)] = MAX_YAML_VALUES + 1, MAX_YAML_DEPTH + 1
        if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
            raise UserError(f"the name of a value is {next(k for k in value if not isinstance(k, str))!r}")
        inner = value.values() if isinstance(value, dict) else value
        parts = [_measure(part, measured) for part in inner]
        depth = 1 + max((depth for _, depth in parts), default=0)
        measured[id(value)] = 1 + sum(count for count, _ in parts), depth
    return measured[id(value)]


set_loader("yaml", _load_yaml, exceptions=(yaml.YAMLError,))


_CONFIG_OPTION = re.compile(r"--config(=|$)")
_FILE_ERROR = re.compile(r"(Problems parsing config|Unexpected config): ")
_NO_FILE = re.compile(r"config: File does not exist: ")
_NOT_SETTINGS = ("help", "config", "print_config", "print_shtab")


class SettingsParser(ArgumentParser):
    """A parser whose errors fit in a few lines and exit with code 2."""

    _files: tuple[str, ...] = ()
    """Values of `--config` on the command line."""

    settings_file: str = "a YAML file of settings"
    """What `--config` takes, in words: with the names of the shipped files that are of this command."""

    is_of_a_run: bool = False
    """The settings of a run are among its options: `--help` shows those that people use, in groups."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = explain(message, self.setting_names())
        if _FILE_ERROR.match(text) and self._files:  # the parser does not say in which
            text = f"{' or '.join(self._files)}: not a YAML file of settings: {_FILE_ERROR.sub('', text)}"
        if _NO_FILE.match(text):
            near = "".join(near_name(Path(file)) for file in self._files if not Path(file).exists())
            text += f"{near}; allowed: {self.settings_file}"
        print(show_controls(shortened(f"{self.prog}: error: {text}")), file=sys.stderr)
        print(f"(all settings: {self.prog} --help{'-all' if self.is_of_a_run else ''})", file=sys.stderr)
        raise SystemExit(USER.code)

    def parse_args(self, args: Any = None, *rest: Any, **kwargs: Any) -> Namespace:
        given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        if any(arg in ("-h", "--help", "--help_all") for arg in given):
            self._show_help(in_short=self.is_of_a_run and "--help_all" not in given)
        given = _with_shipped_settings(self._with_true(given))
        pairs = zip(given, [*given, ""][1:], strict=True)
        self._files = tuple(
            arg.partition("=")[2] or following for arg, following in pairs if _CONFIG_OPTION.match(arg)
        )
        for file in map(Path, self._files):  # a pipe nobody writes to is waited for without an end
            if file.exists() and (problem := why_no_file(file)) is not None:
                self.error(f"config: {file}: {problem}; allowed: a YAML file of settings")
            if file.exists() and (problem := encoding_problem(file.read_bytes()[:4])) is not None:
                self.error(f"config: {file}: {problem}")
        try:
            return super().parse_args(given, *rest, **kwargs)
        except UnicodeDecodeError as error:
            self.error(f"{' or '.join(self._files)}: not a YAML file of settings: {error}")
        except RecursionError:
            self.error(f"a value holds more than {MAX_YAML_DEPTH} lists or mappings in each other")

    def format_help(self) -> str:
        return super().format_help().replace(" \b[=", "[=")  # the parser's own option takes back a blank so

    def _show_help(self, *, in_short: bool) -> NoReturn:
        if not in_short:
            print(self.format_help(), end="")
            raise SystemExit(0)
        from dpo.help import short_help

        print(short_help(self.prog, self.description or "", self._actions, self.groups or {}), end="")
        raise SystemExit(0)

    def _with_true(self, given: list[str]) -> list[str]:
        """Arguments with true for a setting that is true or false and has no value: --heldout."""
        switches = {
            f"--{action.dest}" for action in self._actions if getattr(action, "_typehint", None) is bool
        }
        pairs = zip(given, [*given, "--"][1:], strict=True)
        bare = {place for place, (arg, after) in enumerate(pairs) if arg in switches and after[:2] == "--"}
        return [f"{arg}=true" if place in bare else arg for place, arg in enumerate(given)]

    def setting_names(self) -> list[str]:
        """Dotted names of all that can be set here; groups are not among them."""
        names = [action.dest for action in self._actions if action.dest not in _NOT_SETTINGS]
        return [name for name in names if not any(other.startswith(f"{name}.") for other in names)]


def _with_shipped_settings(arguments: list[str]) -> list[str]:
    """Arguments with the path of a shipped file of settings where `--config` gives its name."""
    found, follows = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if follows:
            argument = find_settings(argument)
        elif option == "--config" and equals:
            argument = f"--config={find_settings(value)}"
        follows = argument == "--config"
        found.append(argument)
    return found


def settings_parser(*settings: type, prog: str | None = None, description: str = "") -> SettingsParser:
    """A parser for `--config FILE`, required fields by position, and a dotted option for every other."""
    parser = SettingsParser(prog=prog, description=description)
    names = settings_names([field.name for kind in settings for field in fields(kind)])
    if names:
        parser.settings_file += f", or the name of one that comes with the package ({', '.join(names)})"
    parser.add_argument(
        "--config",
        action="config",
        help=f"{parser.settings_file.removeprefix('a ')}. Options that come after it override it.",
    )
    parser.is_of_a_run = Config in settings
    for kind in settings:
        parser.add_class_arguments(kind, nested_key=None, fail_untyped=True, as_positional=True)
    return parser


def build(settings: type[Settings], values: Namespace, parser: SettingsParser) -> Settings:
    """The dataclass from parsed values; a value out of range ends the command like any other error."""
    names = [field.name for field in fields(settings)]  # pyright: ignore[reportArgumentType]
    for name in parser.groups or {}:
        if name in names and not isinstance(values[name], Namespace):
            parser.error(f"{name}: Expected a mapping of settings. Got value: {values[name]}")
    for key, hint in _null_settings(settings, values):
        parser.error(f"{key}: Expected {hint}. Got value: null")
    try:
        made = parser.instantiate(expand_home(values))
        return settings(**{name: made[name] for name in names})
    except ValueError as error:
        parser.error(str(error))


def expand_home(values: Any) -> Any:
    """Parsed values with `~/` at the start of a text as the home directory, in files and options alike."""
    if isinstance(values, Namespace):
        return Namespace(**{name: expand_home(value) for name, value in vars(values).items()})
    return at_home(values)


def _null_settings(kind: type, values: Namespace, group: str = "") -> Iterator[tuple[str, str]]:
    """Settings that are null and may not be, with what they may be: the parser takes null for any."""
    hints = get_type_hints(kind)
    for field in fields(kind):  # pyright: ignore[reportArgumentType]
        hint, value = hints[field.name], values[field.name]
        if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Namespace):
            yield from _null_settings(hint, value, f"{group}{field.name}.")
        elif value is None and NoneType not in get_args(hint):
            kind_of: Any = get_origin(hint) or hint
            choices = f"one of {', '.join(map(repr, get_args(hint)))}"
            yield f"{group}{field.name}", choices if kind_of is Literal else _type_words(hint)


def _type_words(hint: Any) -> str:
    """A type in words, or several."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return " or ".join(_TYPE_WORDS[(get_origin(kind) or kind).__name__] for kind in kinds)


def load_config(path: str | Path) -> Config:
    """The settings in a file that `save_config` wrote.

    Raises:
      ValueError: when the file is not there, or is not a configuration.
    """
    parser = _config_parser()
    require_regular(Path(path))
    try:
        return build(Config, parser.parse_path(str(path)), parser)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


class _RaisingParser(SettingsParser):
    """The same for a file that no command line names: errors are the caller's to place."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(explain(message, self.setting_names()))


@cache
def _config_parser() -> _RaisingParser:
    parser = _RaisingParser()
    parser.add_class_arguments(Config, nested_key=None, fail_untyped=True)
    return parser


def explain(message: str, names: list[str]) -> str:
    """Rewrite a parser's message: dotted key first, plain words for types, near names for unknown keys."""
    bare = re.fullmatch(r"unrecognized arguments: ([\w.]+)(=\S*)?", message.strip())
    if bare and bare[1] in names:
        return (
            f"{bare[0].rpartition(' ')[2]}: settings begin with two dashes: --{bare[1]}{bare[2] or '=VALUE'}"
        )
    unknown = _unknown_key(message)
    if unknown in names:  # a setting that is required has its place on the command line, and no option
        return f"{unknown} is given by its place, without a name: VALUE, not --{unknown}=VALUE"
    if unknown:
        return f"{unknown} is not a setting{_suggestion(unknown, names)}"
    message = re.sub(
        r"Importing (.*) is not allowed, denied by .*",
        r"Expected a mapping of settings; a file of them is given by --config. Got value: \1",
        message,
        flags=re.DOTALL,
    )
    message = re.sub(r"(?:a )?<class '(\w+)'>", lambda found: _TYPE_WORDS.get(found[1], found[1]), message)
    message = re.sub(r"(?:a )?typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"NestedArg\(key='([^']*)', val=(.*)\)", r"{\1: \2}", message)
    message = re.sub(r'Parser key "([^"]+)":\s*', r"\1: ", message)
    union = re.search(
        r"(\S+): Does not validate against any of the Union subtypes\s+"
        r"Subtypes: \[(.*?)\]\n.*Given value: (.*)",
        message,
        re.DOTALL,
    )
    if union:
        allowed = union[2].replace(", null", " or null")
        return f"{union[1]}: Expected {allowed}. Got value: {union[3]}"
    return message.strip()


_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "dict": "a mapping",
    "list": "a list",
    "NoneType": "null",
}


def _unknown_key(message: str) -> str | None:
    for pattern, name in (
        (r"unrecognized arguments: --([^\s=]+)", "{0}"),
        (r"Group '([^']+)' does not accept option '([^']+)'", "{0}.{1}"),
        (r"Option '([^']+)' is not accepted", "{0}"),
        (r"[Kk]ey '([^']+)' is not expected", "{0}"),
    ):
        found = re.search(pattern, message)
        if found:
            return name.format(*found.groups())
    return None


def _suggestion(unknown: str, names: list[str]) -> str:
    """The setting that was probably meant, and all that may stand in its place."""
    group, _, last = unknown.rpartition(".")
    same_end = [name for name in names if name.rpartition(".")[2] == last]
    near = same_end or difflib.get_close_matches(unknown, names, n=1, cutoff=0.75)
    siblings = [name for name in names if group and name.startswith(f"{group}.")]
    allowed = siblings or list(dict.fromkeys(name.partition(".")[0] for name in names))
    return (f"; did you mean {near[0]}?" if near else ";") + f" allowed: {', '.join(allowed)}"
