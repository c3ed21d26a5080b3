"""What the pages say can be typed, opened and found: commands, options, targets, links, files."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from _pytest.mark.expression import Expression

from dpo import cli
from dpo.config import (
    Config,
    DiffusionConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    GenerateConfig,
    InspectConfig,
    PlanConfig,
    ReportConfig,
    WatchConfig,
    WinrateConfig,
)
from dpo.training.identity import resolved_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SETTINGS = (
    *(Config, InspectConfig, PlanConfig, EvaluateConfig, ExportConfig, ReportConfig, WatchConfig),
    *(WinrateConfig, FrontierConfig, GenerateConfig, DiffusionConfig),
)
OTHER_OPTIONS = {
    "help",
    "help_all",
    "config",
    "allow_changed",
    "resume",
    "winrate",
    "interactive",
    "over",
    "sweep_dir",
}
"""Options of `dpo` that are no settings."""
NEVER_RUN = r"pytest\.(mark\.(skip\b(?!if)|xfail)|skip\b)"
"""What keeps a test from running or failing everywhere; `skipif` does so where something is missing."""
MUTANTS = ROOT / "tests" / "mutants.py"
OTHER_PROGRAMS = ("pytest", "pip", "XLA_FLAGS", "--xla_", "srun", "sbatch", "kubectl", "gcloud")


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def fenced_blocks(text: str) -> list[str]:
    """The insides of ``` blocks, with continued lines joined."""
    blocks = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r" *\\\n *", " ", block) for block in blocks]


def commands() -> Iterator[Command]:
    """Every `dpo` command in a block that is no example of an error; loops stand for their first turn."""
    for page in PAGES:
        for block in fenced_blocks(page.read_text(encoding="utf-8")):
            loops = re.findall(r"for (\w+) in (\S+)", block)
            lines = [line.strip() for line in block.splitlines()]
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                text = line.removeprefix("$ ")
                if re.match(r"dpo [a-z]+( |$)", text) and not re.match(r"dpo \w+: error: ", following):
                    for name, first in loops:
                        text = text.replace(f"${name}", first)
                    yield Command(page.name, re.sub(r"\[(--[^\]]*)\]", r"\1", text))


def refusals() -> Iterator[tuple[str, str]]:
    """Commands that a page shows with the error that they end with."""
    for page in PAGES:
        for block in fenced_blocks(page.read_text(encoding="utf-8")):
            yield from re.findall(r"^\$ (dpo .*)\n(dpo \w+: error: .*)$", block, re.MULTILINE)


def visible(text: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^ *```[^\n]*\n.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader_directory(tmp_path: Path) -> Path:
    """A checkout's shipped files, and the file of settings that the README has its reader write."""
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my").mkdir()
    example = (ROOT / "README.md").read_text(encoding="utf-8").split("```yaml")[1].split("```")[0]
    (tmp_path / "my" / "run.yaml").write_text(example)
    return tmp_path


@pytest.mark.parametrize("command", list(commands()), ids=str)
def test_commands_parse(command: Command, reader_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the settings, whose types and ranges are checked; nothing is read or run."""
    _, name, *arguments = shlex.split(command.text, comments=True)

    class Parsed(Exception):  # noqa: N818
        pass

    build = cli.build

    def stop(settings, values, parser):
        made = build(settings, values, parser)
        if settings is Config and name not in ("train", "sweep"):
            return made  # these have settings of their own besides
        raise Parsed

    monkeypatch.chdir(reader_directory)
    monkeypatch.setattr(cli, "build", stop)
    with pytest.raises(Parsed):
        cli.main([name, *arguments])


def test_there_are_commands_to_parse() -> None:
    assert len(list(commands())) > 25
    assert len(list(refusals())) >= 3


@pytest.mark.parametrize(("command", "error"), list(refusals()))
def test_errors_are_as_shown(command: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(shlex.split(command)[1:])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert capsys.readouterr().err.startswith(error.removesuffix("…").rstrip())


def trainings(page: Path) -> Iterator[tuple[str, list[str]]]:
    """What a page has its reader type to train, by `dpo train` or `make train`, and its arguments."""
    for block in fenced_blocks(page.read_text(encoding="utf-8")):
        for found in re.finditer(r"^make train(?: +CONFIG=(\S+))?", block, re.MULTILINE):
            yield found[0], ["--config", found[1] or "configs/sentiment_pairs.yaml"]
    for command in commands():
        _, name, *arguments = shlex.split(command.text, comments=True)
        if command.page == page.name and name == "train":
            yield command.text, arguments


def test_the_runs_of_a_page_have_directories_of_their_own(
    reader_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who types one after the other is refused where a directory holds a run with other settings."""
    monkeypatch.chdir(reader_directory)
    parser, count = cli.train_parser(), 0
    for page in PAGES:
        found: dict[str, tuple[str, dict[str, object]]] = {}
        for text, arguments in trainings(page):
            config = cli.read_train_settings(arguments, parser=parser)
            settings, count = resolved_settings(config), count + 1
            earlier, known = found.setdefault(config.run_dir, (text, settings))
            assert known == settings, f"{page.name}: both in {config.run_dir}: {earlier} | {text}"
    assert count >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    known = {name for kind in SETTINGS for name in cli.command_parser("train", kind).setting_names()}
    known |= OTHER_OPTIONS
    programs = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests" / "fuzz").glob("*.py")]
    for program in (*programs, MUTANTS, ROOT / "tests" / "conftest.py"):
        known |= {name.replace("-", "_") for name in re.findall(r'"--([\w-]+)"', program.read_text())}
    unknown = []
    for code in re.findall(r"`([^`\n]*)`", visible(page.read_text(encoding="utf-8"))):
        if any(program in code for program in OTHER_PROGRAMS):
            continue
        for option in re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", code):
            name = option.rstrip(".").replace("-", "_")
            if name not in known and name.split(".")[0] != "objective":
                unknown.append(f"--{option}")
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", text))
    named |= {
        target
        for block in fenced_blocks(text)
        for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)
    }
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", visible(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.is_file() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.-])((?:dpo|tests|docs|configs|data|benchmarks|launch)/[\w./-]+\.\w+)", text)
    assert not sorted({name for name in named if not (ROOT / name).is_file()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_finds_elsewhere_is_there(page: Path) -> None:
    """Names that it says a file has, and sections of its own that stand above or below."""
    text = page.read_text(encoding="utf-8")
    for name, file in re.findall(r"`(\w+)`\s+in\s+`((?:dpo|tests|benchmarks|docs)/[\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), f"{file} has no {name}"
    for found in re.finditer(r"[\"“]([^\"”]+)[\"”],?\s+(above|below)\b", text):
        section = re.search(rf"^#+ {re.escape(found[1])}$", text, re.MULTILINE)
        if section is not None:
            assert (section.start() < found.start()) == (found[2] == "above"), found[0]


def anchors(path: Path) -> set[str]:
    """What a link into a page can name: explicit ids, and headings as GitHub turns them into ids."""
    text = visible(path.read_text(encoding="utf-8"))
    headings = [re.sub(r"<[^>]*>", "", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    slugs = {re.sub(r"[^\w\- ]", "", line.strip().lower()).replace(" ", "-") for line in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def test_the_design_says_what_every_dependency_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    needed += project["optional-dependencies"]["oracle"] + project["optional-dependencies"]["docs"]
    table = (ROOT / "docs" / "design.md").read_text(encoding="utf-8").split("## Dependencies")[1]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    named = {name for row in rows for name in row.split(", ")}
    assert {re.split(r"[\[<>=]", one)[0] for one in needed} <= named


@cache
def body_of(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


@pytest.mark.parametrize("page", ["design.md", "reliability.md", "security.md"])
def test_every_promise_names_a_test_that_exists_and_is_not_skipped(page: str) -> None:
    """In the first table of the page; a test that is skipped only where something is missing counts."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = re.search(r"^\| promise .*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    header, *rows = table[0].strip().splitlines()
    column = [cell.strip() for cell in header.split("|")].index("test")
    for row in rows[1:]:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.split("|")[column])
        assert named, f"no test is named: {row}"
        for file, name in named:
            body = body_of(ROOT / "tests" / file.removeprefix("tests/"))
            tests = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
            of_all = [ast.unparse(node) for node in body if isinstance(node, ast.Assign | ast.Expr)]
            assert name in tests, f"{page}: {file} has no {name}"
            marks = [ast.unparse(mark) for mark in tests[name].decorator_list]
            assert not [mark for mark in marks if re.match(NEVER_RUN, mark)]
            assert not [line for line in of_all if re.search(NEVER_RUN, line)], f"{file} is skipped whole"


class Selection(NamedTuple):
    """What a pytest command on a page asks for."""

    page: str
    marker: str
    files: tuple[str, ...]
    keyword: str

    def __str__(self) -> str:
        return f"{self.page}: -m {self.marker!r} {' '.join(self.files)} -k {self.keyword!r}"


def selections() -> Iterator[Selection]:
    """Every `pytest … FILE` of a page, over a line's end too."""
    for page in PAGES:
        text = re.sub(r"\s+", " ", re.sub(r" +#[^\n]*", " ", page.read_text(encoding="utf-8")))
        for options, files, keyword in re.findall(
            r"pytest ((?:-\w (?:\"[^\"]*\" |\w+ )?)*)((?:tests/[\w/]+\.py ?)+)(?:-k (\w+|\"[^\"]*\"))?", text
        ):
            marker = re.search(r"-m (\w+|\"[^\"]*\")", options)
            asked = "not slow" if marker is None else marker[1].strip('"')
            yield Selection(page.name, asked, tuple(files.split()), keyword.strip('"'))


@pytest.mark.parametrize("selection", list(selections()), ids=str)
def test_pytest_commands_select_tests_of_every_file(selection: Selection) -> None:
    """Marks and names are read off the source; a keyword may also be in what a test is parametrised by."""
    marker, keyword = Expression.compile(selection.marker), Expression.compile(selection.keyword or "test")
    for file in selection.files:
        body = body_of(ROOT / file)
        module = [ast.unparse(node) for node in body if isinstance(node, ast.Assign)]
        of_all = [line for line in module if line.startswith("pytestmark")]
        found = []
        for test in body:
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                marks = " ".join([*map(ast.unparse, test.decorator_list), *of_all])
                slow = bool(re.search(r"pytest\.mark\.(slow|ci|as_users)\b", marks))
                words = f"{test.name} {marks}"
                if marker.evaluate(lambda mark, slow=slow, **_: slow and mark == "slow") and keyword.evaluate(
                    lambda word, words=words, **_: word in words
                ):
                    found.append(test.name)
        assert found, f"{file} has no such test"


def test_there_are_pytest_commands() -> None:
    assert len(list(selections())) >= 15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    known = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert not set(re.findall(r"\btest_\w+", page.read_text(encoding="utf-8"))) - known


def programs() -> Iterator[Command]:
    """Every `python -m benchmarks…` and the like of a page, up to a line's end, in marks over it."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"`[^`\n]*\n[^`\n]*`", lambda marked: marked[0].replace("\n", " "), text)
        yield from (
            Command(page.name, found.split("#")[0].strip())
            for found in re.findall(r"python -m ((?:benchmarks|tests|docs|data)\b[^`\n|;]*)", text)
        )


@pytest.mark.parametrize("command", list(programs()), ids=str)
def test_programs_and_their_options_exist(command: Command) -> None:
    name, *words = command.text.split()
    path = ROOT / name.replace(".", "/")
    sources = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else [path / "__main__.py"]
    sources += sorted((ROOT / "benchmarks").glob("bench*.py")) if name == "benchmarks" else []
    known = set(re.findall(r'"(--[\w-]+)"', "".join(source.read_text() for source in sources)))
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert not given - known
    needed = re.findall(r'add_argument\(\s*"(--[\w-]+)"[^()]*required=True', sources[0].read_text())
    assert not given or not set(needed) - given, "as it stands it ends with an error"
