"""The same readers under atheris, whose mutations are guided by the lines that they reach.

`pip install atheris` (it is no dependency: its wheels are for Linux only), then
`python tests/fuzz/fuzz_atheris.py READER -runs=50000`; further options are libFuzzer's. It ends with an
error, and leaves the input, where a reader does what it may not.
"""

import sys
import tempfile
from pathlib import Path

import atheris  # pyright: ignore[reportMissingImports, reportMissingModuleSource]

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
    include=["dpo"], enable_loader_override=False
):
    import dpo.cli
    import dpo.command_line
    import dpo.data.preferences
    import dpo.data.sources
    import dpo.data.templates
    import dpo.huggingface.gguf_files
    import dpo.huggingface.weights  # noqa: F401

from fuzz_run import Target, ignoring_warnings  # noqa: E402
from fuzz_targets import targets  # noqa: E402


def main() -> None:
    """Fuzz one reader until the runs are done."""
    name, *options = sys.argv[1:] or [""]
    if name not in targets():
        raise SystemExit(f"reader is {name!r}; allowed: {', '.join(targets())}")
    target = targets()[name]
    with tempfile.TemporaryDirectory(prefix="dpo-fuzz-") as folder, ignoring_warnings():
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(seed)
        words = Path(folder) / "words"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
        arguments = [sys.argv[0], str(corpus), f"-dict={words}", "-max_len=4096", "-timeout=20", *options]
        atheris.Setup(arguments, lambda data: read(target, data))
        atheris.Fuzz()


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def read(target: Target, data: bytes) -> None:
    """One input; what is refused as declared is fine."""
    try:
        target.read(data)
    except (Exception, SystemExit) as error:
        if not target.refuses(error):
            raise


if __name__ == "__main__":
    main()
