"""`python -m tests.fuzz --inputs 50000`: mutated inputs for every reader; what came of them as a table."""

from __future__ import annotations

import argparse
import faulthandler
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from jaxtyping import install_import_hook

install_import_hook("dpo", "beartype.beartype")  # a value of the wrong type inside is a crash, too

from fuzz_run import run  # noqa: E402
from fuzz_targets import folder, targets  # noqa: E402


def main() -> int:
    """Run; 1 where an input did what none may."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=50_000, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", choices=list(targets()), help="only these readers")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz_failures"), help="where failing inputs go"
    )
    given = parser.parse_args()
    print("| reader | inputs | read | refused | ways | crashes | seconds | slowest |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = 0
    given.failures.mkdir(exist_ok=True)
    print(f"the input that is being read: {folder('last') / 'input'}", file=sys.stderr, flush=True)
    faulthandler.enable()
    for name in given.reader or targets():
        outcome = run(targets()[name], given.inputs, seed=given.seed, last=folder("last") / "input")
        counts = (outcome.inputs, outcome.accepted, outcome.refused, outcome.ways, len(outcome.failures))
        cells = [
            name,
            *(f"{count:,}" for count in counts),
            f"{outcome.seconds:.0f}",
            f"{outcome.slowest:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        for number, failure in enumerate(outcome.failures):
            path = given.failures / f"{name.replace(' ', '_')}.{given.seed}.{number}"
            path.write_bytes(failure.data)
            print(f"\n{path}\n{failure.what}", file=sys.stderr)
        failed += len(outcome.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
