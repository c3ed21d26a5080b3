"""Numbers that the pages say (limits, defaults, times, counts) are those of the code.

A row is a page, what it says with {} for each number, and the numbers. Spaces and line ends count alike.
"""

from __future__ import annotations

import ast
import errno
import re
from dataclasses import asdict
from pathlib import Path

import cpu_times
import pytest

from dpo import files, hidden, limited, runs, terminal
from dpo import help as short_help
from dpo.config import Config, DistributedConfig, EndpointConfig, FrontierConfig
from dpo.data import (
    cards,
    chunks,
    gzip_bytes,
    preferences,
    remaining,
    rows,
    sources,
    table_worker,
    templates,
    token_processes,
)
from dpo.data.layouts import LAYOUTS
from dpo.data.table_worker import BASE, FACTOR
from dpo.evaluation import accuracy, statistics
from dpo.huggingface import config_rules, foreign_json, licences, tokenizer_files, tokenizer_worker, weights
from dpo.huggingface.pre_tokenizers import PRE_TOKENIZERS
from dpo.judging import prompts, replies, server, winrate
from dpo.losses import OBJECTIVES, plackett_luce
from dpo.models import attention_blocked, attention_tiles
from dpo.models.rotary import ROPE_TYPES
from dpo.outcomes import STOPPED, STOPPED_AT_ONCE
from dpo.parallel import deadline
from dpo.planning import chips
from dpo.runs import flat_settings
from dpo.training import (
    interrupt,
    metrics,
    on_policy,
    pieces,
    preflight,
    progress,
    starts,
    trackers,
    watchdog,
)

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = Config()
PATIENCE = EndpointConfig().patience
NUM_COMMON = sum(map(len, short_help.COMMON.values()))
WORDS = dict(
    enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
)
WORDS |= {20: "twenty"}

FRONTIER = FrontierConfig()
LIMITED: list[tuple[str, tuple[object, ...]]] = [
    (
        "and four times the file's size of memory, {} s and one for each {} MB; rows",
        (limited.SECONDS, limited.BYTES_A_SECOND // 10**6),
    ),
    (
        "| {} GiB of addresses and four times the files' size, without their holes; {} s of CPU time "
        "and one for each {} MB |",
        (limited.MEMORY >> 30, limited.SECONDS, limited.BYTES_A_SECOND // 10**6),
    ),
    (
        "where neighbours may be one preference, or for a win-rate | {} MiB; {} MiB; {} GiB |",
        (sources.MAX_ROW_BYTES >> 20, sources.MAX_PART_BYTES >> 20, sources.MAX_WHOLE_BYTES >> 30),
    ),
    (
        "blank lines behind each other, of JSON lines and CSV; their bytes | {:,}; {} MiB |",
        (sources.MAX_BLANK_LINES, sources.MAX_BLANK_BYTES >> 20),
    ),
    ("of a gzip file behind each other that hold no text | {} MiB |", (gzip_bytes.MOST_SILENT >> 20,)),
    ("responses to one prompt, in a row or in neighbouring rows | {:,} |", (rows.MOST_RESPONSES,)),
    (
        "{} MiB and {:,} times the file's size; {} MiB each {:,} rows",
        (BASE >> 20, FACTOR, table_worker.BATCH >> 20, table_worker.ROWS),
    ),
    (
        "| {:,} characters and twice those of its messages; {:g} s |",
        (templates.LIMITS.characters, templates.LIMITS.seconds),
    ),
    (
        "| {:g} s, {:g} ms a text and 1 s for each {:,} characters",
        (templates.LIMITS.seconds, 1000 * templates.SECONDS_A_TEXT, templates.CHARACTERS_A_SECOND),
    ),
    ("all texts of a chunk | {} times as many", (templates.LIMITS.texts,)),
    ("a tokenizer's rules may make a text | {} times |", (tokenizer_worker.MOST_GROWTH,)),
    (
        "`tokenizer.json`; its README | {} MiB, {} lists deep; {} MiB; {} MiB |",
        (
            foreign_json.MAX_JSON_BYTES >> 20,
            foreign_json.MAX_DEPTH,
            tokenizer_files._LARGEST["tokenizer.json"] >> 20,
            licences.MAX_README_BYTES >> 20,
        ),
    ),
    (
        "of a run, `config.yaml`; other JSON; lines of JSON | {} MiB; {} MiB; {} GiB |",
        (
            runs._LARGEST[runs.CONFIG_FILE] >> 20,
            runs._LARGEST[".json"] >> 20,
            runs._LARGEST[".jsonl"] >> 30,
        ),
    ),
    (
        "layers; width; header of safetensors | {:,}; 131,072; {} MB |",
        (config_rules.MAX_LAYERS, weights.MAX_HEADER_BYTES // 10**6),
    ),
    ("a judge's reply | {} MiB,", (replies.MAX_BYTES >> 20,)),
    (
        "an error on the terminal | {} lines of {:,} characters |",
        (terminal.MOST_LINES, terminal.LONGEST_LINE),
    ),
]
"""Of docs/security.md, the table of limits above all."""
SAID: list[tuple[str, str, tuple[object, ...]]] = [
    (
        "README.md",
        "shows the {} settings that people use",
        (WORDS[NUM_COMMON],),
    ),
    ("docs/using.md", "the {} that are there", (len(OBJECTIVES),)),
    ("docs/using.md", "ends with exit code {}; the same command then goes on", (STOPPED.code,)),
    ("CHANGELOG.md", "are read: {} layouts", (len(LAYOUTS),)),
    ("docs/data.md", "in chunks of {:,}", (chunks.CHUNK_ROWS,)),
    ("docs/data.md", "from {} chunks on", (WORDS[token_processes.PARALLEL_FROM],)),
    ("docs/data.md", "there are cores ({} at most)", (token_processes.MOST,)),
    ("docs/scaling.md", "many cores as its host has ({} at most)", (token_processes.MOST,)),
    ("docs/security.md", "JSON list {:,} rows are a part", (chunks.CHUNK_ROWS,)),
    ("docs/data.md", "Above `data.token_store_limit` gigabytes ({:g})", (DEFAULT.data.token_store_limit,)),
    *(("docs/data.md", "`{}`", (reason,)) for reason in remaining._SETTINGS if reason.endswith("_shown")),
    ("docs/security.md", "a line is at most {} MiB", (sources.MAX_ROW_BYTES // 2**20,)),
    ("docs/security.md", "{} MiB and {:,} times the file's size;", (BASE >> 20, FACTOR)),
    *(("docs/security.md", *row) for row in LIMITED),
    ("docs/models.md", "lists the {})", (len(PRE_TOKENIZERS),)),
    ("docs/models.md", "Rope scaling: {}.", (", ".join(ROPE_TYPES),)),
    ("docs/security.md", "{:,} characters and twice those", (DEFAULT.data.template_characters,)),
    ("docs/data.md", "`data.template_characters` ({:,})", (DEFAULT.data.template_characters,)),
    ("docs/security.md", "header at most {} MB", (weights.MAX_HEADER_BYTES // 10**6,)),
    ("docs/security.md", "{:g} s of CPU time", (templates.LIMITS.seconds,)),
    ("docs/security.md", "{} GiB of memory", (templates.MEMORY // 2**30,)),
    ("docs/security.md", "{} MiB, compressed or not, and one time limit", (replies.MAX_BYTES // 2**20,)),
    ("docs/security.md", "(from {} characters on: shorter ones", (hidden.SHORTEST_SECRET,)),
    ("docs/security.md", "proxies (from {} characters on)", (hidden.SHORTEST_EVERYWHERE,)),
    ("docs/winrate.md", "from {} characters on, is cut out", (WORDS[hidden.SHORTEST_SECRET],)),
    ("docs/winrate.md", "A reply may have {} MiB", (replies.MAX_BYTES // 2**20,)),
    (
        "docs/winrate.md",
        "`--endpoint.patience` seconds ({} minutes)",
        (WORDS[int(PATIENCE // 60)],),
    ),
    ("docs/winrate.md", "{} in a row stop the command with the server's own", (WORDS[server.REFUSALS],)),
    ("docs/winrate.md", "{} questions in a row without an answer", (WORDS[server.GIVE_UP_AFTER],)),
    ("docs/winrate.md", "that double, to a minute at most", (server.LONGEST_PAUSE / 60,)),
    ("docs/winrate.md", "answers the first {} held-out prompts", (FRONTIER.prompts,)),
    ("docs/winrate.md", "of the same {} samples a prompt", (FRONTIER.best_of,)),
    ("docs/winrate.md", "at β ∈ {{{:g}, {:g}, {:g}, {:g}}}", tuple(FRONTIER.betas)),
    (
        "docs/results.md",
        "{} steps of {} rankings at a learning rate of 6e-5",
        (FRONTIER.steps, FRONTIER.batch_size),
    ),
    ("docs/winrate.md", "says, up to an hour", (server.LONGEST_WAIT // 3600,)),
    ("docs/winrate.md", "with a warning above {:.0f}%", (100 * winrate.MOST_CUT,)),
    ("docs/winrate.md", "({:.0f}% of them are no longer", (100 * prompts.COVERED,)),
    (
        "docs/winrate.md",
        "rounded up to a multiple of {}; {} where",
        (prompts.STEP, prompts.WITHOUT_RESPONSES),
    ),
    ("docs/winrate.md", "below {}, intervals that draw prompts", (WORDS[statistics.FEW],)),
    ("docs/winrate.md", "beyond {} by the normal approximation", (statistics._EXACT_UP_TO,)),
    ("docs/winrate.md", "in {} bins from ½ to 1", (WORDS[accuracy.NUM_BINS],)),
    ("docs/scaling.md", "`distributed.heartbeat_timeout` ({:g} s)", (DistributedConfig().heartbeat_timeout,)),
    ("docs/scaling.md", "half an hour more, to be compiled", (deadline.COMPILE_SECONDS / 3600,)),
    ("docs/reliability.md", "reach the disk every minute", (pieces.PIECE_SECONDS / 60,)),
    ("docs/reliability.md", "Signals within {:g} s of the first", (interrupt.SAME_REQUEST,)),
    ("docs/reliability.md", "second one, {:g} s or more later", (interrupt.SAME_REQUEST,)),
    ("docs/reliability.md", "{:g} s later all the same where a compilation", (interrupt.SOON,)),
    ("docs/reliability.md", "or the eleventh after {} that were killed", (WORDS[starts.MOST_STARTS],)),
    ("docs/reliability.md", "where a compilation lets nothing through | {} |", (STOPPED_AT_ONCE.code,)),
    (
        "CONTRIBUTING.md",
        "names the {} dearest tests over {:g} CPU seconds",
        (cpu_times.NAMED, cpu_times.BUDGET),
    ),
    ("docs/design.md", "the dearest {} tests over {:g} CPU seconds", (cpu_times.NAMED, cpu_times.BUDGET)),
    ("docs/design.md", "checked to 1e-4", (preflight.PREFLIGHT_TOLERANCE["bfloat16"],)),
    ("docs/performance.md", "with {}-slot blocks", (attention_blocked.BLOCK,)),
    ("docs/performance.md", "a step of the loop computes {} tiles", (WORDS[attention_tiles.TILES],)),
    ("docs/troubleshooting.md", "JAX reserves three quarters of the memory", (chips.FRACTION,)),
    ("docs/troubleshooting.md", "{} says another part", (chips.FRACTIONS[0],)),
    ("docs/troubleshooting.md", "({} rows a device at a time)", (on_policy.ROWS,)),
    ("docs/troubleshooting.md", "has fallen by a nat a token", (watchdog.COLLAPSE_NATS,)),
    ("docs/watching.md", "every {} seconds", (WORDS[int(progress.PLAIN_INTERVAL)],)),
    *(("docs/watching.md", "`{}`", (variable,)) for variable in trackers._WANDB.values()),
    ("docs/troubleshooting.md", "by {:g} times their spread", (watchdog.SPIKE_SPREADS,)),
    ("docs/troubleshooting.md", "After {} steps the loss is still", (watchdog.STUCK_AFTER,)),
    ("docs/troubleshooting.md", "{} steps in a row had no gradient", (WORDS[watchdog.ZERO_STEPS].title(),)),
    ("docs/troubleshooting.md", "the last {0} steps are half as long again as those of the first {0}", (50,)),
    ("docs/from_trl.md", "within {} roundings of the pair's log-probs", (metrics.RESOLUTION,)),
    ("docs/from_trl.md", "`training.epochs` (**{:g}**)", (DEFAULT.training.epochs,)),
    ("docs/from_trl.md", "`data.max_length` (**{}**)", (DEFAULT.data.max_length,)),
    ("docs/from_trl.md", "`data.truncation` (**{}**", (DEFAULT.data.truncation,)),
    ("docs/from_trl.md", "`optimizer.warmup_fraction` (**{}**)", (DEFAULT.optimizer.warmup_fraction,)),
    ("docs/from_trl.md", "`model.compute_dtype` (**{}**)", (DEFAULT.model.compute_dtype,)),
    ("docs/from_trl.md", "`model.remat` (`{}`)", (DEFAULT.model.remat,)),
    ("docs/lora.md", "`optimizer.warmup_fraction` ({} by default)", (DEFAULT.optimizer.warmup_fraction,)),
    ("docs/objectives.md", "exactly up to {} members", (plackett_luce.EXACT_TIES,)),
]
EXACT = {
    "says, up to an hour": 1,
    "half an hour more, to be compiled": 0.5,
    "checked to 1e-4": 1e-4,
    "that double, to a minute at most": 1,
    "reach the disk every minute": 1,
    "JAX reserves three quarters of the memory": 0.75,
    "has fallen by a nat a token": 1,
}
"""What rows say whose number is in words; the others are formatted."""


@pytest.mark.parametrize(
    ("page", "text", "numbers"), SAID, ids=[f"{p} {t} {n}" if t == "`{}`" else f"{p} {t}" for p, t, n in SAID]
)
def test_a_number_is_what_the_page_says(page: str, text: str, numbers: tuple[object, ...]) -> None:
    if text in EXACT:
        assert numbers == (EXACT[text],)
    written = re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8"))
    assert text.format(*numbers) in written


def test_the_steps_that_lengths_are_compared_over() -> None:
    assert watchdog.DRIFT_STEPS == 50
    assert watchdog.DRIFT_RATIO == 1.5
    assert preferences.MAX_PROBLEMS == 20
    assert licences.MAX_README_BYTES == cards.MAX_CARD, "of a model and of a folder of data"


def test_the_page_says_how_many_cases_train_on_meshes() -> None:
    body = ast.parse((ROOT / "tests" / "training" / "test_mesh.py").read_text(encoding="utf-8")).body
    tables = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    cases, meshes = tables["CASES"], tables["MESHES"]
    assert isinstance(cases, ast.Dict)
    assert isinstance(meshes, ast.DictComp)
    sizes = ast.literal_eval(meshes.generators[0].iter)
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"has {len(cases.keys)} cases x {len(sizes)} meshes of 8 virtual CPU devices" in page
    assert ", ".join(map(str, sizes)) in page


def test_the_page_names_what_a_file_system_without_locks_answers() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"A file system without locks \(([A-Z, ]+)\)", page)
    assert tuple(getattr(errno, name) for name in named.split(", ")) == files.NO_LOCKS


IN_BRACKETS = re.compile(r"`(?:--)?([a-z]\w*(?:\.\w+)+)` \(\W*((?:an? )?[\w.,]+)")
"""A setting by its whole name, and what stands in brackets behind it: "(50)", "(a million)"."""
IN_WORDS = {"a hundred": "100", "a thousand": "1000", "a million": "1000000"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_a_number_in_brackets_behind_a_setting_is_its_default(page: Path) -> None:
    defaults = flat_settings(asdict(DEFAULT))
    for name, said in IN_BRACKETS.findall(re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))):
        number = IN_WORDS[said] if said in IN_WORDS else said.strip(".,").replace(",", "")
        if name in defaults and re.fullmatch(r"\d+(\.\d+)?|\d\w*e-?\d+", number):
            assert defaults[name] == float(number), f"{name} ({said})"
