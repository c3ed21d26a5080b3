"""The commands. Settings are read and checked here, before anything heavy is imported or loaded.

Exit codes are those of `dpo.outcomes`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from dpo.command_line import Settings, SettingsParser, build, load_config, settings_parser
from dpo.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    EvaluateConfig,
    ExportConfig,
    FrontierConfig,
    GenerateConfig,
    IdentityKind,
    InspectConfig,
    PlanConfig,
    ReportConfig,
    WatchConfig,
    WinrateConfig,
    heldout_settings,
)
from dpo.data.control_characters import show_controls
from dpo.distribution import find_data, version
from dpo.outcomes import BUG, STOPPED, USER, UserError, describe, outcome_of

if TYPE_CHECKING:
    from dpo.evaluation.heldout import Heldout
    from dpo.training.datasets import Dataset

FAILED = 1
"""Exit code of a plan that does not fit; what was given is right."""
DATA_FILES = (".jsonl", ".json", ".jsonl.gz", ".parquet", ".csv", ".arrow")
"""Endings of data sources that can only be files; others may be directories or on the hub."""
FIRST_ROWS = 8
"""Rows of a file of preferences that are parsed before anything is loaded."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"dpo {version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        meant = "".join(f" did you mean {near}?" for near in get_close_matches(name, COMMANDS, n=1))
        allowed = ", ".join(COMMANDS)
        print(f"dpo: error: {name!r} is not a command;{meant} allowed: {allowed}", file=sys.stderr)
        return USER.code
    try:
        return COMMANDS[name]([_with_underscores(argument) for argument in rest])
    except (Exception, KeyboardInterrupt) as error:
        outcome = outcome_of(error)
        if outcome is BUG:
            raise
        print(show_controls(describe(f"dpo {name}", error)), file=sys.stderr)
        return outcome.code


def train(arguments: list[str]) -> int:
    """Fine-tune a policy on preferences, evaluate it, export it, and write a report."""
    parser = train_parser()
    values = parser.parse_args(arguments)
    config = build_train_settings(values, parser)
    check_settings(config)
    matched = None if values.winrate is None else check_winrate(config, values.winrate, arguments)
    from dpo.training.loop import train as run

    result = run(config)
    from dpo.parallel.distributed import is_alone, is_main

    if not is_main():
        return STOPPED.code if result.status == "interrupted" else 0
    if result.status == "interrupted":
        print_plain(f"{config.run_dir}: stopped as asked; the same command goes on from there")
        return STOPPED.code
    if result.status == "already finished":
        print_plain(f"{config.run_dir} is finished: nothing to do (another run_dir starts a new run)")
    print_result(result.run_dir, config)
    if matched is not None and is_alone():
        measure_winrate(matched, config)
    elif matched is not None:
        print_plain(
            f"several processes do not sample: dpo winrate --run {matched.run} --judge {matched.judge}"
        )
    return 0


def evaluate(arguments: list[str]) -> int:
    """Held-out accuracy of a policy against its reference, with intervals and baselines."""
    given = read_settings(EvaluateConfig, "evaluate", arguments)
    run = None if given.run is None else load_config(Path(given.run) / "config.yaml")
    config = heldout_settings(given, run)
    if config.data.eval is None:
        raise UserError("data is not given, and the run has no held-out data; allowed: --data SOURCE")
    if config.data.eval.endswith(DATA_FILES):
        _require_file("data", config.data.eval)
    from dpo.evaluation.heldout import score_heldout
    from dpo.pages.accuracy_text import figures_as_text
    from dpo.training.program import enable_compilation_cache

    enable_compilation_cache()
    heldout = score_heldout(config, log=print_plain)
    figures = describe_heldout(heldout, beta=given.beta or beta_of(config), seed=given.seed)
    print_plain(f"{config.model.source} against {config.model.reference} on {config.data.eval}")
    print_plain(figures_as_text(figures))
    output = given.output
    if given.run is not None and output is None:
        if replace(given, seed=0) == EvaluateConfig(run=given.run):
            output = str(Path(given.run) / "evaluation.json")
        else:
            print_plain(f"not the figures of {given.run} itself, so not kept there; --output FILE keeps them")
    if output is not None:
        write_json(output, figures)
        from dpo.evaluation.token_ratios import write_token_ratios

        tokens = Path(output).with_suffix(".tokens.json")
        write_token_ratios(tokens, config, heldout, beta=figures["beta"])
        print_plain(f"all figures: {output}; token by token, for a few pairs: {tokens}")
    return 0


def inspect(arguments: list[str]) -> int:
    """What the preferences hold, and what could be wrong with them; one example as it is scored."""
    parser = command_parser("inspect", Config, InspectConfig)
    values = parser.parse_args(arguments)
    config, given = build(Config, values, parser), build(InspectConfig, values, parser)
    check_settings(config)
    from dpo.data.inspection import render_example, render_report
    from dpo.huggingface.pretrained import load_tokenizer

    tokenizer = load_tokenizer(config.model.source)
    report, dataset = report_data(config, tokenizer, heldout=given.heldout)
    console = Console()
    console.print(render_report(report))
    if given.example is not None:
        if given.example >= len(dataset.tokens):
            raise UserError(f"example is {given.example}; allowed is 0 to {len(dataset.tokens) - 1}")
        console.print(render_example(dataset.tokens, given.example, tokenizer))
    if given.output is not None:
        write_json(given.output, report)
    return 0


def plan(arguments: list[str]) -> int:
    """Memory, traffic and time of a training step on devices that need not be there."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    parser = command_parser("plan", Config, PlanConfig)
    values = parser.parse_args(arguments)
    config, given = build(Config, values, parser), build(PlanConfig, values, parser)
    from dpo.planning.chips import parse_topology

    topology = parse_topology(given.topology or "cpu:1")
    prepare_compiler(topology.num_devices)
    from dpo.planning.plan_text import plan_as_numbers, plan_as_text
    from dpo.planning.planner import (
        choose_lengths,
        make_plan_within_limit,
        open_target,
        read_decoder,
        search_meshes,
    )

    lengths = choose_lengths(
        config, prompt=given.prompt_tokens, response=given.response_tokens, responses=given.num_responses
    )
    decoder, target = read_decoder(config.model.source), open_target(topology)
    print_plain(f"plan of {config.model.source}")
    if given.search:
        tried = search_meshes(config, target, decoder=decoder, lengths=lengths, log=print_plain)
        result = tried[0][1]
    else:
        result = make_plan_within_limit(config, target, decoder=decoder, lengths=lengths, log=print_plain)
    print_plain(plan_as_text(result, target, compute_dtype=config.model.compute_dtype))
    if given.output is not None:
        write_json(given.output, plan_as_numbers(result, target))
    return 0 if result.fits else FAILED


def export(arguments: list[str]) -> int:
    """Write a checkpoint of a run as a directory that `transformers` opens, or its adapters for `peft`."""
    given = read_settings(ExportConfig, "export", arguments)
    config = load_config(Path(given.run) / "config.yaml")
    from dpo.training.export import export_checkpoint
    from dpo.training.hub import check_hub_id, push_to_hub
    from dpo.training.program import enable_compilation_cache

    if given.hub_id is not None:
        check_hub_id(given.hub_id)
    enable_compilation_cache()
    path, step = export_checkpoint(given, config)
    print_plain(f"the policy after {step} steps: {path}")
    if given.hub_id is not None:
        message = f"The policy after {step} steps"
        print_plain(push_to_hub(path, given.hub_id, private=given.hub_private, message=message))
    return 0


def report(arguments: list[str]) -> int:
    """Write a run's report, or compare several runs: one HTML page without any outside reference."""
    parser = command_parser("report", ReportConfig)
    parser.add_argument("run", nargs="+", type=str, help="Run directory; several are compared.")
    values = parser.parse_args(arguments)
    given = build(ReportConfig, values, parser)
    runs = [(run, load_config(Path(run) / "config.yaml")) for run in dict.fromkeys(values.run)]
    if len(runs) == 1:
        from dpo.pages.report import write_report

        path = write_report(*runs[0], output=given.output)
    else:
        from dpo.pages.comparison import write_comparison

        path = write_comparison(runs, output=given.output)
    print_plain(f"report: {path}")
    return 0


def watch(arguments: list[str]) -> int:
    """Draw a run's curves in text while it goes on; ends when the run does."""
    given = read_settings(WatchConfig, "watch", arguments)
    config = load_config(Path(given.run) / "config.yaml")
    from dpo.pages.watch import watch as follow

    finished = follow(Path(given.run), config, interval=given.interval, once=given.once)
    return 0 if finished or given.once else STOPPED.code


def frontier(arguments: list[str]) -> int:
    """True reward against KL for several objectives and betas, and win-rates by temperature."""
    given = read_settings(FrontierConfig, "frontier", arguments)
    for name in ("train", "eval"):
        _require_file(name, getattr(given, name))
    from dpo.experiments.frontier import run
    from dpo.judging.functions import require_own_word
    from dpo.training.program import enable_compilation_cache

    if ":" in given.reward:
        require_own_word(given.reward, setting="reward", arguments=arguments)
    enable_compilation_cache()
    result = run(given, log=print_plain)
    if result is None:
        print_plain("stopped; the same command goes on from there")
        return STOPPED.code
    print_plain(f"figures, tables and frontier.json: {given.output}")
    return 0


def diffusion(arguments: list[str]) -> int:
    """Diffusion-DPO on data whose optimum is known: train, sample, compare."""
    config = read_settings(DiffusionConfig, "diffusion", arguments)
    from dpo.losses import make_objective

    make_objective(config.objective)
    from dpo.experiments.diffusion import run

    run(config, log=print_plain)
    print_plain(f"figures and results.json: {config.run_dir}")
    return 0


def winrate(arguments: list[str]) -> int:
    """How often a judge prefers the policy's responses over an opponent's, both orders judged."""
    given = read_settings(WinrateConfig, "winrate", arguments)
    from dpo.judging.kinds import require_word_for_code

    require_word_for_code(given.judge, setting="judge", arguments=arguments)
    measure_winrate(given, None if given.run is None else load_config(Path(given.run) / "config.yaml"))
    return 0


def measure_winrate(given: WinrateConfig, run: Config | None) -> None:
    """Sample, judge, print the figures, and add them to the run's report."""
    config = heldout_settings(as_evaluation(given), run)
    if config.data.eval is None:
        raise UserError("data is not given, and the run has no held-out data; allowed: --data SOURCE")
    if config.data.eval.endswith(DATA_FILES):
        _require_file("data", config.data.eval)
    from dpo.judging.match import RESULT_FILE, play
    from dpo.judging.winrate import figures_as_text, usage_as_text
    from dpo.training.program import enable_compilation_cache

    enable_compilation_cache()
    output = Path(given.output or Path(given.run or ".") / "winrate")
    result = play(given, config, output=output, log=print_plain)
    print_plain(
        f"{result['policy']} against {result['opponent']} on {result['data']}, "
        f"judge {result['settings']['judge']}"
    )
    for temperature, figures in result["temperatures"].items():
        print_plain(f"temperature {temperature}: {figures['prompts']} prompts, {figures['pairs']} pairs")
        print_plain(figures_as_text(figures))
    if "usage" in result:
        print_plain(usage_as_text(result["usage"]))
    print_plain(f"all figures: {output / RESULT_FILE}; every verdict: {output / 'verdicts.jsonl'}")
    if run is not None and given.run is not None and given.output is None:
        from dpo.pages.report import write_report

        print_plain(f"report: {write_report(given.run, run)}")


def generate(arguments: list[str]) -> int:
    """Answer a prompt, or chat, with the response printed as it is drawn."""
    parser = command_parser("generate", GenerateConfig)
    parser.add_argument("prompt", nargs="?", type=str, help="What to answer (not with --interactive).")
    parser.add_argument(
        "--interactive", action="store_true", help="Chat: each line is a message; Ctrl-D ends it."
    )
    values = parser.parse_args(arguments)
    given = build(GenerateConfig, values, parser)
    if (values.prompt is None) is not values.interactive:
        raise UserError("give either a prompt or --interactive: dpo generate MODEL PROMPT")
    import jax.numpy as jnp

    from dpo.huggingface.pretrained import load_pretrained
    from dpo.models.sampling import SamplingConfig
    from dpo.pages.chat import converse, respond
    from dpo.training.program import enable_compilation_cache

    enable_compilation_cache()
    names = [field.name for field in fields(SamplingConfig)]
    sampling = SamplingConfig(**{name: getattr(given, name) for name in names})
    pretrained = load_pretrained(given.model, compute_dtype=jnp.dtype(given.compute_dtype))

    def write(piece: str) -> None:
        print(show_controls(piece) if sys.stdout.isatty() else piece, end="", flush=True)

    if values.interactive:
        converse(
            pretrained,
            system=given.system,
            sampling=sampling,
            seed=given.seed,
            read=lambda: input("> "),
            write=write,
            template_kwargs=given.template_kwargs,
        )
        return 0
    prompt = values.prompt
    if given.system is not None:
        prompt = [{"role": "system", "content": given.system}, {"role": "user", "content": values.prompt}]
    how = {"sampling": sampling, "seed": given.seed, "template_kwargs": given.template_kwargs}
    for piece in respond(pretrained, prompt, **how):
        write(piece)
    write("\n")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate,
    "winrate": winrate,
    "generate": generate,
    "inspect": inspect,
    "plan": plan,
    "export": export,
    "report": report,
    "watch": watch,
    "frontier": frontier,
    "diffusion": diffusion,
}


def read_settings(settings: type[Settings], command: str, arguments: list[str]) -> Settings:
    """The settings of a command, or exit code 2 with what is wrong."""
    parser = command_parser(command, settings)
    return build(settings, parser.parse_args(arguments), parser)


def read_train_settings(arguments: list[str]) -> Config:
    """The settings of a run."""
    parser = train_parser()
    return build_train_settings(parser.parse_args(arguments), parser)


def train_parser() -> SettingsParser:
    """The settings of a run, and what is for one start only.

    `--allow-changed KIND …` adds to training.allow_changed; `--resume` is short for `--training.resume`.
    """
    parser = command_parser("train", Config)
    kinds = get_args(IdentityKind)
    parser.add_argument(
        "--allow-changed",
        nargs="+",
        choices=kinds,
        default=[],
        metavar="KIND",
        help=f"What may differ from the checkpoint that is continued: {', '.join(kinds)}.",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default=None,
        help="Go on from the newest checkpoint in run_dir (the default), or refuse a directory that has one.",
    )
    parser.add_argument(
        "--winrate",
        metavar="JUDGE",
        default=None,
        help="Measure the win-rate over the reference afterwards, as `dpo winrate --run RUN --judge JUDGE`, "
        "with answers of at most training.eval_max_new_tokens.",
    )
    return parser


def build_train_settings(values: Any, parser: SettingsParser) -> Config:
    """What `train_parser` has parsed, as settings."""
    config = build(Config, values, parser)
    allowed = list(dict.fromkeys([*config.training.allow_changed, *values.allow_changed]))
    training = replace(config.training, allow_changed=allowed)
    if values.resume is not None:
        training = replace(training, resume=values.resume)
    return replace(config, training=training)


def command_parser(command: str, *settings: type) -> SettingsParser:
    """The parser of one command."""
    text = (COMMANDS[command].__doc__ or "").strip()
    return settings_parser(*settings, prog=f"dpo {command}", description=text)


def check_winrate(config: Config, judge: str, arguments: Sequence[str]) -> WinrateConfig:
    """What `dpo train --winrate JUDGE` will measure, refused before anything is trained where it cannot be.

    Raises:
      ValueError: without held-out data, for an unknown judge, or one that more has to be said of.
    """
    from dpo.judging.kinds import open_judge, require_word_for_code

    if config.data.eval is None:
        raise UserError(f"winrate is {judge}, and data.eval is not set; allowed: both")
    require_word_for_code(judge, setting="winrate", arguments=arguments)
    given = WinrateConfig(run=config.run_dir, judge=judge, max_new_tokens=config.training.eval_max_new_tokens)
    open_judge(given, print_plain)
    return given


def check_settings(config: Config) -> None:
    """What the types of the settings can't say: the objective, the trackers' packages, files that are named.

    Of files of preferences the first rows are parsed, so that wrong columns are not found after the model is
    loaded.

    Raises:
      ValueError: naming the key, the value and what is allowed.
    """
    from dpo.losses import make_objective
    from dpo.runs import specification
    from dpo.training.tracking import require_trackers

    make_objective(specification(config))
    require_trackers(config.training.trackers)
    if config.lora.init is not None:
        _require_file("lora.init", f"{config.lora.init}/adapter_config.json")
    if config.data.chat_template is not None:
        _require_file("data.chat_template", config.data.chat_template)
    run_dir = Path(config.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir is {config.run_dir!r}, a file; allowed: a directory, there or not yet")
    data = config.data
    for key, source, split, limit in (
        ("data.train", data.train, data.train_split, data.max_train),
        ("data.eval", data.eval, data.eval_split, data.max_eval),
    ):
        if source is None:
            continue
        if source.endswith(DATA_FILES):
            _require_file(key, source)
        path = Path(find_data(source))
        if path.is_file() or (path.is_absolute() and not path.is_dir()):
            _check_first_rows(source, split, limit, data)


def _check_first_rows(source: str, split: str, limit: int | None, data: DataConfig) -> None:
    """Where one of them is malformed and must not be, all rows are read, and the error is about all."""
    from dpo.data.preferences import read_part, read_preferences
    from dpo.data.rows import row_reading
    from dpo.data.sources import Part

    reading = row_reading(data.row_layout, data.columns, data.ignore_columns)
    first = Part(rows=min(limit or FIRST_ROWS, FIRST_ROWS))
    read = read_part(source, split, first, data.expand, reading)
    if not read.num_rows or (read.problems and data.on_error == "stop"):
        read_preferences(
            source, split=split, on_error=data.on_error, limit=limit, expand=data.expand, reading=reading
        )


_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps the TPU's compiler from asking a metadata server which machine this is, and from complaining."""


def prepare_compiler(num_devices: int) -> None:
    """Let JAX, not yet started, see so many CPU devices and no others, and find the TPU's compiler."""
    from dpo.huggingface.embedded import cache_directory

    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={num_devices}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    library = cache_directory() / "libtpu" / "libtpu" / "libtpu.so"
    if library.is_file():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)


def as_evaluation(given: WinrateConfig) -> EvaluateConfig:
    """The part of a win-rate's settings that says what is compared on which data."""
    return EvaluateConfig(
        run=given.run,
        policy=given.policy,
        reference=given.opponent,
        data=given.data,
        split=given.split,
        limit=given.limit,
    )


def _with_underscores(argument: str) -> str:
    """Settings have underscores; `--hub-id` is understood too."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}" if re.fullmatch(r"[a-z][\w.-]*", name) else argument


def _require_file(key: str, path: str) -> None:
    if not Path(find_data(path)).is_file():
        raise UserError(f"{key} is {path!r}: there is no such file (the working directory is {Path.cwd()})")


def beta_of(config: Config) -> float:
    """The β that turns log-ratios into rewards for a configuration's objective."""
    from dpo.losses import reward_scale
    from dpo.runs import specification

    return reward_scale(specification(config))


def describe_heldout(heldout: Heldout, *, beta: float, seed: int) -> dict[str, Any]:
    """All figures, and what was left out of them."""
    from dpo.evaluation.accuracy import describe

    return describe(heldout.rows, beta=beta, seed=seed) | {"left_out": heldout.left_out}


def report_data(config: Config, tokenizer: Any, *, heldout: bool = False) -> tuple[dict[str, Any], Dataset]:
    """The data report of the training (or held-out) preferences, and the data set itself."""
    from dpo.data.inspection import inspect_dataset
    from dpo.data.preferences import read_preferences
    from dpo.data.rows import row_reading
    from dpo.training.datasets import read_dataset

    data, dataset = config.data, read_dataset(config.data, tokenizer, heldout=heldout)
    others = None
    if data.eval is not None and not heldout:
        others = read_preferences(
            data.eval,
            split=data.eval_split,
            on_error=data.on_error,
            limit=data.max_eval,
            reading=row_reading(data.row_layout, data.columns, data.ignore_columns),
        ).preferences
    return inspect_dataset(dataset.read, dataset.tokens, heldout=others), dataset


def print_result(run_dir: Path, config: Config) -> None:
    """The held-out verdict and where everything is."""
    from dpo.huggingface.pretrained import load_tokenizer
    from dpo.pages.report import write_report
    from dpo.runs import HELDOUT_FILE, TOKENS_FILE

    if not _is_newer(run_dir / "data.json", run_dir / "config.yaml"):  # that of another start
        write_json(run_dir / "data.json", report_data(config, load_tokenizer(run_dir / "export"))[0])
    if (run_dir / HELDOUT_FILE).is_file():
        from dpo.evaluation.heldout import load_heldout
        from dpo.evaluation.token_ratios import write_token_ratios
        from dpo.pages.accuracy_text import figures_as_text

        heldout, beta = load_heldout(run_dir, config), beta_of(config)
        figures = describe_heldout(heldout, beta=beta, seed=0)
        write_json(run_dir / "evaluation.json", figures)
        tokens = run_dir / TOKENS_FILE
        if not _is_newer(tokens, run_dir / HELDOUT_FILE):
            settings = heldout_settings(EvaluateConfig(run=str(run_dir)), config)
            write_token_ratios(tokens, settings, heldout, beta=beta)
        print_plain(figures_as_text(figures))
    write_report(run_dir, config)
    for name, what in RESULTS.items():
        if (run_dir / name).exists():
            print_plain(f"{what:<12}{run_dir / name}")


def _is_newer(path: Path, other: Path) -> bool:
    return path.is_file() and path.stat().st_mtime_ns >= other.stat().st_mtime_ns


RESULTS = {
    "export": "policy",
    "adapter": "adapters",
    "report.html": "report",
    "evaluation.json": "figures",
    "metrics.jsonl": "metrics",
    "checkpoints": "checkpoints",
    "config.yaml": "settings",
}


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Plain numbers and texts as an indented file, whole or not at all."""
    from dpo.files import replace_text

    replace_text(Path(path), json.dumps(content, indent=1, ensure_ascii=False) + "\n", what="figures")


def print_plain(text: str) -> None:
    """Lines to standard output as they are, without markup; control characters show as symbols.

    A reader that has gone (`dpo report RUN | head`) is no error.
    """
    from dpo.training.tracking import printed

    printed(lambda: Console().print(show_controls(text), markup=False, highlight=False, soft_wrap=True))


def _overview() -> str:
    lines = [f"  {name:<10}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpo COMMAND [--config FILE] [--SETTING=VALUE ...]",
            "",
            "Preference optimisation of small language models.",
            "",
            *lines,
            "",
            "dpo COMMAND --help lists every setting with its type, default and meaning; dpo --version.",
        ]
    )
