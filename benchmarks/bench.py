"""Runs both sides in turn on the same preferences, several times, and writes a table with ratios.

    python -m benchmarks --rounds 3 --steps 6
    python -m benchmarks --only dpo_float32,trl_float32 --data rankings.jsonl
    python -m benchmarks --rounds 1 --steps 1 --only dpo_float32,dpo_rounded,tunix_float32
    python -m benchmarks --only dpo_float32,dpo_lora,dpo_lora_bfloat16_base,dpo_lora_int8_base

Only ratios within one round are compared: every round runs every contestant once, and a ratio is the median
over rounds with the least and the greatest beside it. A ranking is expanded to its pairs for the peers, TRL
and tunix: each has an environment of its own, made when it is first needed. Results go to
benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from dpo.__main__ import HUGE_PAGES, TUNABLES, wants_huge_pages

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("trl", "tunix")
"""Each has its benchmarks/bench_PEER.py, run in .venv-PEER, which is made of requirements-PEER.txt."""
PEER_MODEL = ROOT / ".cache" / "bench-model"
SHARED_PAIRS = Path(os.environ.get("DPO_SHARED_DIR", ROOT.parent / "shared")) / "data" / "hh_pairs_512.jsonl"
SHIPPED_PAIRS = ROOT / "data" / "sentiment_train.jsonl"

EPOCH_ROWS = 1024
"""Rows of a file that make an epoch."""


class Contestant(NamedTuple):
    """One way to train."""

    tool: str
    options: tuple[str, ...]
    one_micro_batch_a_pair: bool = False
    is_default: bool = True


CONTESTANTS = {
    "dpo_float32": Contestant("dpo", ("--dtype", "float32")),
    "dpo_float32_full": Contestant("dpo", ("--dtype", "float32", "--remat", "full")),
    "dpo_packed": Contestant("dpo", ("--layout", "packed"), is_default=False),
    "dpo_padded": Contestant("dpo", ("--layout", "padded"), is_default=False),
    "dpo_rounded_backward": Contestant("dpo", ("--round-products", "backward")),
    "dpo_rounded": Contestant("dpo", ("--round-products", "both", "--remat", "full")),
    "dpo_bfloat16": Contestant("dpo", ("--dtype", "bfloat16", "--remat", "full")),
    "dpo_lora": Contestant("dpo", ("--lora-rank", "16"), is_default=False),
    "dpo_lora_bfloat16_base": Contestant(
        "dpo", ("--lora-rank", "16", "--base-dtype", "bfloat16"), is_default=False
    ),
    "dpo_lora_int8_base": Contestant("dpo", ("--lora-rank", "16", "--base-dtype", "int8"), is_default=False),
    "dpo_lora_rounded": Contestant(
        "dpo",
        ("--lora-rank", "16", "--round-products", "both", "--remat", "full", "--base-dtype", "bfloat16"),
        is_default=False,
    ),
    "trl_float32": Contestant("trl", ("--dtype", "float32")),
    "trl_float32_precomputed": Contestant("trl", ("--dtype", "float32", "--precompute")),
    "trl_float32_micro": Contestant("trl", ("--dtype", "float32"), one_micro_batch_a_pair=True),
    "trl_bfloat16_micro": Contestant("trl", ("--dtype", "bfloat16"), one_micro_batch_a_pair=True),
    "trl_bfloat16_precomputed": Contestant("trl", ("--dtype", "bfloat16", "--precompute")),
    "trl_bfloat16_micro_precomputed": Contestant(
        "trl", ("--dtype", "bfloat16", "--precompute"), one_micro_batch_a_pair=True
    ),
    # Of eight pairs at once it would need more memory than most machines have.
    "tunix_float32": Contestant(
        "tunix", ("--dtype", "float32"), one_micro_batch_a_pair=True, is_default=False
    ),
}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = [name for name, one in CONTESTANTS.items() if one.is_default]
    names = names if options.only is None else options.only.split(",")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise SystemExit(f"--only names {', '.join(unknown)}; allowed: {', '.join(CONTESTANTS)}")
    with tempfile.TemporaryDirectory(prefix="bench_") as directory:
        files = write_data(options.data, (options.warmup + options.steps) * options.batch, Path(directory))
        for peer in PEERS:
            if any(CONTESTANTS[name].tool == peer for name in names):
                prepare_peer(peer, options.source)
        rounds = []
        for number in range(options.rounds):
            # Every other round runs backwards, so that a machine that slows down favours nobody.
            order = names if number % 2 == 0 else names[::-1]
            rounds.append({name: run(CONTESTANTS[name], files, options) for name in order})
    report = summarise(names, rounds, options)
    target = ROOT / "benchmarks" / "results"
    target.mkdir(exist_ok=True)
    (target / f"{options.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / f"{options.name}.md").write_text(table(report))
    print(table(report))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of one comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = SHARED_PAIRS if SHARED_PAIRS.exists() else SHIPPED_PAIRS
    parser.add_argument("--data", type=Path, default=default, help=f"preferences, JSONL (default {default})")
    parser.add_argument("--source", default="embedded:smollm2-135m-instruct", help="model of both sides")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every contestant")
    parser.add_argument("--only", default=None, help=f"comma-separated, of: {', '.join(CONTESTANTS)}")
    parser.add_argument("--dpo-options", default="", help="further options of benchmarks/bench_dpo.py")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--name", default="latest", help="file name of the results")
    return parser.parse_args(arguments)


class Files(NamedTuple):
    """The same preferences for both sides, and a peer's pairs of a prompt."""

    preferences: Path
    pairs: Path
    pairs_a_prompt: int


def write_data(source: Path, num_prompts: int, directory: Path) -> Files:
    """The rows as they are, and the first `num_prompts` of them expanded to their pairs, in order.

    Our side plans its shapes over all rows, as it does for an epoch, and both take steps on the first.
    """
    with source.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, EPOCH_ROWS)]
    if len(rows) < num_prompts:
        raise SystemExit(f"{source} has {len(rows)} rows; {num_prompts} are needed for these steps")
    pairs = [pair for row in rows[:num_prompts] for pair in expand(row)]
    if len(pairs) % num_prompts:
        raise SystemExit(f"{source}: rows have different numbers of pairs; rank all responses, without ties")
    files = Files(directory / "preferences.jsonl", directory / "pairs.jsonl", len(pairs) // num_prompts)
    for path, entries in ((files.preferences, rows), (files.pairs, pairs)):
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return files


def expand(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Every (better, worse) pair of a row; peers want responses to messages as messages."""
    if "chosen" in row:
        return [{key: row[key] for key in ("prompt", "chosen", "rejected")}]
    responses = row["responses"]
    if isinstance(row["prompt"], list):
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    badness = row["ranks"] if "ranks" in row else [-score for score in row["scores"]]
    return [
        {"prompt": row["prompt"], "chosen": responses[i], "rejected": responses[j]}
        for i, j in itertools.permutations(range(len(badness)), 2)
        if badness[i] < badness[j]
    ]


def prepare_peer(peer: str, source: str) -> None:
    """A peer's environment and the model as a Hugging Face directory, made once."""
    environment = _peer_environment(peer)
    if not (environment / ".installed").exists():
        print(f"installing {peer} into {environment} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        requirements = ROOT / "benchmarks" / f"requirements-{peer}.txt"
        subprocess.run([environment / "bin" / "pip", "install", "-q", "-r", requirements], check=True)
        (environment / ".installed").touch()
    if not (_peer_model(source) / "config.json").exists():
        # In a process of its own, so that this one never holds a model.
        command = [sys.executable, "-m", "benchmarks.export_model", source, str(_peer_model(source))]
        subprocess.run(command, check=True, cwd=ROOT)


def run(contestant: Contestant, files: Files, options: argparse.Namespace) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = command_line(contestant, files, options)
    environment = dict(os.environ)
    if contestant.tool == "dpo" and wants_huge_pages():
        environment[TUNABLES] = HUGE_PAGES  # as `dpo` starts itself
    print("$", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


def command_line(contestant: Contestant, files: Files, options: argparse.Namespace) -> list[str]:
    """What runs one measurement."""
    common = ["--steps", str(options.steps), "--warmup", str(options.warmup), *contestant.options]
    if contestant.tool == "dpo":
        command = [sys.executable, "-m", "benchmarks.bench_dpo", "--data", str(files.preferences)]
        command += ["--source", options.source, "--batch", str(options.batch), "--device", options.device]
        return command + options.dpo_options.split() + common
    batch = options.batch * files.pairs_a_prompt
    micro_batches = batch if contestant.one_micro_batch_a_pair else 1
    command = [str(_peer_environment(contestant.tool) / "bin" / "python")]
    command += [str(ROOT / "benchmarks" / f"bench_{contestant.tool}.py")]
    command += ["--model", str(_peer_model(options.source)), "--data", str(files.pairs)]
    command += ["--batch", str(batch), "--device", options.device, "--micro-batches", str(micro_batches)]
    return command + common


def summarise(names: list[str], rounds: list[dict], options: argparse.Namespace) -> dict[str, Any]:
    """Medians and spreads of every contestant, and the ratios of ours to all, round by round."""
    ours = [name for name in names if CONTESTANTS[name].tool == "dpo"]
    columns = (
        "tokens_per_second_with_reference",
        "tokens_per_cpu_second_with_reference",
        "tokens_per_second",
        "seconds_per_step",
        "peak_rss_gib",
        "trained_parameters",
        "fill",
        "mfu",
        "mfu_with_reference",
    )
    contestants = {}
    for name in names:
        runs = [one[name] for one in rounds]
        entry: dict[str, Any] = {
            column: _spread([r[column] for r in runs if column in r]) for column in columns
        }
        entry["pairs_per_second"] = _spread([r["pairs_per_step"] / r["seconds_per_step"] for r in runs])
        entry["over_this"] = {
            our: {
                column: _spread([one[our][column] / one[name][column] for one in rounds])
                for column in (*columns[:3], "peak_rss_gib")
            }
            for our in ours
        }
        contestants[name] = entry
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {_cpu_name()}",
        "options": {key: str(value) for key, value in vars(options).items()},
        "ours": ours,
        "contestants": contestants,
        "rounds": rounds,
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head = (
        "| contestant | real tokens/s, reference included | a CPU-second | without reference | pairs/s "
        "| fill | peak RSS GiB | trained M | MFU |"
    )
    lines = [
        f"{report['date']}, {report['machine']}; {report['options']['rounds']} rounds of "
        f"{report['options']['steps']} steps of {report['options']['batch']} prompts. Median (least to "
        "greatest); a real token counts in every pair that it is in.",
        "",
        head,
        "|" + "---|" * head.count(" | ") + "---|",
    ]
    for name, entry in report["contestants"].items():
        cells = [
            _cell(entry["tokens_per_second_with_reference"], 1),
            _cell(entry["tokens_per_cpu_second_with_reference"], 1),
            _cell(entry["tokens_per_second"], 1),
            _cell(entry["pairs_per_second"], 3),
            _cell(entry["fill"], 2),
            _cell(entry["peak_rss_gib"], 2),
            _cell(_in_millions(entry["trained_parameters"]), 2),
            _cell(entry["mfu"], 2),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_ratios(report)]) + "\n"


def _ratios(report: dict[str, Any]) -> list[str]:
    """A line a peer (a contestant of ours where there are only those), a column for each of ours."""
    ours, contestants = report["ours"], report["contestants"]
    if not ours:
        return []
    head = "| against | " + " | ".join(f"{our}: tokens/s, RSS" for our in ours) + " |"
    lines = ["", head, "|" + "---|" * (len(ours) + 1)]
    for name in [name for name in contestants if name not in ours] or ours:
        pairs = [contestants[name]["over_this"][our] for our in ours]
        cells = [
            f"{_cell(pair['tokens_per_second_with_reference'], 2)}, {_cell(pair['peak_rss_gib'], 2)}"
            for pair in pairs
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def _in_millions(spread: dict[str, float] | None) -> dict[str, float] | None:
    return None if spread is None else {name: value / 1e6 for name, value in spread.items()}


def _cell(spread: dict[str, float] | None, digits: int) -> str:
    if spread is None:
        return "–"
    median, least, greatest = (f"{spread[key]:.{digits}f}" for key in ("median", "least", "greatest"))
    return f"{median} ({least} to {greatest})" if least != greatest else median


def _peer_environment(peer: str) -> Path:
    return ROOT / f".venv-{peer}"


def _peer_model(source: str) -> Path:
    return PEER_MODEL / source.replace("/", "_")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU"
    )


if __name__ == "__main__":
    main()
