"""Shapes are checked and warnings are errors under pytest only."""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# Bytecode is kept: without it every worker compiles the package and the tests anew, each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

CACHE = Path(os.environ.get("DPO_CACHE") or Path.home() / ".cache" / "dpo") / "compiled-for-tests"
"""Compiled programs, for all workers and the next run too: jax knows them by text, flags and version."""
CACHE_LIMIT = 2 << 30
"""Bytes above which the cache is begun anew."""

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("dpo", "checked.typechecked")

from dpo.__main__ import FEW_COLLECTIONS  # noqa: E402

gc.set_threshold(*FEW_COLLECTIONS)  # a twelfth of what tests cost, as of a start

import jax  # noqa: E402
import pytest  # noqa: E402
from compiling import compile_lightly  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rooms", action="store_true", help="print a table of tests and CPU seconds by directory"
    )
    parser.addoption(
        "--compile",
        choices=("lightly", "as-users"),
        help="lightly (the quick suite): with XLA's dear passes off; as-users (with -m slow): as for users",
    )


def pytest_configure(config: pytest.Config) -> None:
    from cpu_times import CpuTimes

    if how_to_compile(config) == "lightly":
        compile_lightly()
    config.pluginmanager.register(CpuTimes(bool(config.getoption("--rooms"))), "cpu_times")
    # A worker may find a program that another is still writing: it compiles it itself, and jax says so.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache entry")
    is_worker = hasattr(config, "workerinput")
    if not is_worker and sum(file.stat().st_size for file in CACHE.glob("*")) > CACHE_LIMIT:
        shutil.rmtree(CACHE, ignore_errors=True)


def how_to_compile(config: pytest.Config) -> str:
    """As asked; the quick suite lightly, and tests that were selected by a mark as users do."""
    is_quick = config.getoption("markexpr") == "not slow"
    return str(config.getoption("--compile") or ("lightly" if is_quick else "as-users"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """At the end, since `-q` leaves out the header."""
    terminalreporter.line(f"Programs were compiled {how_to_compile(config)} (--compile).")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `as_users` is of `ci`, and all that is slow: .ci/run runs it beside the quick suite."""
    for item in items:
        for marked, is_also in (("as_users", "ci"), ("ci", "slow")):
            if item.get_closest_marker(marked) is not None:
                item.add_marker(is_also)


SHARED = Path(os.environ.get("DPO_SHARED_DIR") or Path(__file__).parents[2] / "shared")
"""Preference data and oracle values that are not in the repository; tests that need them skip without."""


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Where the data outside the repository is; skips where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there (set DPO_SHARED_DIR)")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer, as a Hugging Face directory."""
    from tiny_model import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def compiled_quickly():
    """Most of XLA's dear passes are off, as-users too: for tests of what is done with programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session", autouse=True)
def token_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokens of tests are kept for a session, and apart from the user's."""
    from dpo.training import reading

    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "cache_directory", lambda: directory)
        yield directory / "tokens"
