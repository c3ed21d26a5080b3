"""Small faults planted at random, one at a time, and whether a module's own tests notice them.

    make mutants                                            every module, 60 faults each (hours)
    make mutants ARGS="losses/pairs.py --count 20 --seed 1"

A fault is one operator, comparison, constant, sign, `and`, `or`, `not`, or one of a pair of names such as
`min` and `max`, replaced by its neighbour. Each is tried in a process of its own, forked before JAX starts,
in which functions get their code from the changed text; files are never changed. What is not noticed so is
tried once more in one that imports the module from that text. What no test notices is printed with its line:
it needs a test, or is equal (nothing that can be seen depends on it).
"""

from __future__ import annotations

import argparse
import importlib
import importlib._bootstrap_external as bootstrap
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType

import pytest
from _pytest.main import pytest_runtestloop as run_all
from planted import Fault, possible_faults

ROOT = Path(__file__).resolve().parents[1]

TESTS = {
    "losses/bradley_terry.py": "bradley_terry",
    "losses/divergences.py": "divergences theory objectives",
    "losses/pairs.py": "pairs formulas golden weighting",
    "losses/pairwise.py": "formulas golden laws",
    "losses/listwise.py": "listwise formulas golden -k listwise|mle|plackett|softmax|all_pairs|lipo|infonca",
    "losses/plackett_luce.py": "plackett_luce golden laws -k plackett",
    "losses/unpaired.py": "unpaired formulas golden laws -k unpaired|kto|bco",
    "losses/whole_batch.py": "whole_batch pairs golden laws -k whole_batch|aot|sft",
    "losses/weighting.py": "weighting",
    "models/log_probs.py": "log_probs "
    "parallel/partition::test_log_probs_and_their_gradients_are_those_of_one_device",
    "models/quantized.py": "quantized",
    "models/rotary.py": "rotary",
    "models/sampling.py": "sampling huggingface/recurrent::test_prompts_of_different_lengths_decode_as_alone",
    "data/encoding.py": "tokenization turns",
    "data/mismatched.py": "mismatched",
    "data/packing.py": "packing shapes",
    "data/preferences.py": "preferences ties parts row_layouts",
    "data/answers.py": "row_layouts",
    "data/layouts.py": "row_layouts",
    "data/sources.py": "preferences parts row_layouts sources",
    "data/tokenization.py": "tokenization turns",
    "intervals.py": "intervals",
    "evaluation/statistics.py": "statistics",
    "judging/length_control.py": "length_control",
    "huggingface/adapters.py": "adapter_files models/lora",
    "huggingface/weight_names.py": "weight_names weights families",
    "training/checkpoint.py": "checkpoint",
    "training/identity.py": "identity",
}
"""The tests that are to notice a fault in a module; `pairs` is `test_pairs.py` in the room that mirrors.

`models/lora` is in another room, and `lora::test_x` that test alone; `-k a|b` leaves out tests without
either in their names.
"""

PREIMPORTED = ("numpy", "jax", "jax.numpy", "flax.linen", "flax.nnx", "optax", "transformers", "beartype")
PREIMPORTED += ("yaml", "pyarrow.parquet", "safetensors.numpy", "tokenizers", "jinja2", "scipy.stats")


def import_from_text(path: Path, text: str) -> None:
    """Let the next import of a file compile this text instead, whatever bytecode is stored."""
    get_code = bootstrap.SourceLoader.get_code

    def get_changed(self: bootstrap.SourceLoader, fullname: str) -> CodeType | None:
        if Path(self.get_filename(fullname)) == path:  # pyright: ignore[reportAttributeAccessIssue]
            return self.source_to_code(text.encode(), str(path))
        return get_code(self, fullname)

    bootstrap.SourceLoader.get_code = get_changed


class Planter:
    """Of pytest: once all tests are collected, one fork for each fault, in which functions get other code.

    Nothing is imported in such a fork, and the tests that took least without a fault run first, so that most
    faults are noticed at once. What is done when a module is imported stays as it was.
    """

    def __init__(self, module: Path, text: str, faults: Sequence[Fault], *, minutes: float) -> None:
        """No fault is planted so many minutes after the tests passed without one."""
        self._module, self._text, self._faults, self._minutes = module, text, faults, minutes
        self._took = defaultdict[str, float](float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] += report.duration

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None
        took, found = _beside("seconds"), _beside("found")
        began = time.monotonic()
        if not in_fork(lambda: self._run(session, None, keep=took), seconds=600):
            return True
        passed_at = time.monotonic()
        seconds = 30 + 5 * (passed_at - began)
        found.write_text(f"{seconds}\n", encoding="utf-8")
        kept = json.loads(took.read_text(encoding="utf-8"))
        session.items.sort(key=lambda item: kept.get(item.nodeid, 0.0))
        for fault in self._faults:
            if time.monotonic() - passed_at > 60 * self._minutes:
                break
            passed = has_started() or in_fork(partial(self._run, session, fault), seconds=seconds)
            with found.open("a", encoding="utf-8") as file:
                file.write(f"{int(not passed)}\n")
        return True

    def _run(self, session: pytest.Session, fault: Fault | None, *, keep: Path | None = None) -> bool:
        if fault is not None:
            exchange_code(self._module, fault.plant(self._text))
        run_all(session)
        if keep is not None:
            keep.write_text(json.dumps(self._took), encoding="utf-8")
        return not session.testsfailed


def has_started() -> bool:
    """Whether JAX has threads already, with which no fork may go on."""
    from jax._src import xla_bridge  # not before its environment variables are set

    return xla_bridge.backends_are_initialized()


def exchange_code(path: Path, text: str) -> None:
    """Give the functions of an imported module the code that they have in another text of it."""
    codes, left = dict[str, CodeType](), [compile(text, str(path), "exec")]
    while left:
        code = left.pop()
        codes[code.co_qualname] = code
        left += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for function in _functions_of(path):
        if function.__code__.co_qualname in codes:
            function.__code__ = codes[function.__code__.co_qualname]


def _functions_of(path: Path) -> Iterator[FunctionType]:
    """A module's functions and methods, out of what they are wrapped in."""
    module = sys.modules[".".join(path.relative_to(ROOT).with_suffix("").parts)]
    values = list(vars(module).values())
    values += [one for kind in values if isinstance(kind, type) for one in vars(kind).values()]
    for value in values:
        for wrapper in ("fget", "__func__", "func", "__wrapped__", "__wrapped__", "__wrapped__"):
            value = getattr(value, wrapper, None) or value
        if isinstance(value, FunctionType) and value.__code__.co_filename == str(path):
            yield value


def in_fork(function: Callable[[], bool], *, seconds: float) -> bool:
    """What a function says in a process of its own; one that does not end says no."""
    child = os.fork()
    if child == 0:
        os.setsid()
        said = False
        try:
            said = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(int(not said))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(tests: list[str], *plugins: object) -> bool:
    """Whether pytest ends well, in a fork: what it prints goes to a file."""
    out = os.open(_beside("log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what was imported before
    return pytest.main([*options, *tests], plugins=plugins) == 0


def _beside(name: str) -> Path:
    return Path(os.environ["MUTANTS_SCRATCH"]) / name


def passes(module: Path, text: str, tests: list[str], *, seconds: float) -> bool:
    """Whether the tests pass with a module of this text, all of which is imported in a fork."""

    def run() -> bool:
        import_from_text(module, text)
        return _run_tests(tests)

    return in_fork(run, seconds=seconds)


def try_module(name: str, *, count: int, minutes: float, seed: int) -> Iterator[tuple[Fault, bool]]:
    """Faults in the order in which a seed draws them, and whether each was noticed, for so many minutes.

    Raises:
      SystemExit: where the tests fail without any fault.
    """
    path = ROOT / "dpo" / name
    text = path.read_text(encoding="utf-8")
    named, _, words = TESTS[name].partition(" -k ")
    tests = [_path_of(test, Path(name).parent) for test in named.split()]
    if words:
        tests += ["-k", words.replace("|", " or ")]
    faults = possible_faults(text)
    drawn = random.Random(f"{seed} {name}").sample(faults, min(count, len(faults)))
    planter = Planter(path, text, drawn, minutes=minutes)
    _beside("found").unlink(missing_ok=True)
    in_fork(lambda: _run_tests(tests, planter), seconds=math.inf)
    if not _beside("found").exists():
        raise SystemExit(f"{name}: its tests fail without a fault: {_beside('log').read_text()[-1500:]}")
    seconds, *found = _beside("found").read_text(encoding="utf-8").split()
    for fault, noticed in zip(drawn, found, strict=False):
        yield fault, noticed == "1" or not passes(path, fault.plant(text), tests, seconds=60 + float(seconds))


def _path_of(test: str, room: Path) -> str:
    """What pytest is given for a test that `TESTS` names."""
    file, *case = test.split("::")
    place = room / file if "/" not in file else Path(file)
    return "::".join([str(ROOT / "tests" / place.with_name(f"test_{place.name}.py")), *case])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("module", nargs="*", help=f"below dpo/ (default: all): {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=60, help="faults in each module (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="for each module, from when its tests passed; what is begun ends (default: as many as it takes)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a file to add a line of JSON to for each module")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.module if name not in TESTS]
    if unknown:
        parser.error(f"no tests are named for {unknown[0]}; allowed: {', '.join(TESTS)}")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "MUTANTS_SCRATCH": scratch,
            "HYPOTHESIS_STORAGE_DIRECTORY": f"{scratch}/hypothesis",
            "JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        }
        sys.path.insert(0, str(ROOT / "tests"))
        for module in PREIMPORTED:
            importlib.import_module(module)
        for name in arguments.module or TESTS:
            tried = noticed = 0
            survivors = []
            text = (ROOT / "dpo" / name).read_text(encoding="utf-8")
            tries = try_module(name, count=arguments.count, minutes=arguments.minutes, seed=arguments.seed)
            for fault, was_noticed in tries:
                tried += 1
                noticed += was_noticed
                if not was_noticed:
                    survivors.append(fault.describe(text))
                    print(f"  dpo/{name} {survivors[-1]}", flush=True)
            print(f"dpo/{name}: {noticed} of {tried} noticed", flush=True)
            if arguments.out:
                record = {"module": name, "planted": tried, "noticed": noticed, "survivors": survivors}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
