import warnings

import jax
import pytest

from dpo.config import TrainingConfig
from dpo.huggingface.embedded import cache_directory
from dpo.training.program import count_steps, enable_compilation_cache


@pytest.mark.parametrize(
    ("epochs", "prompts", "batch_size", "expected"),
    [(1.0, 333, 8, 41), (2.0, 333, 8, 83), (0.29, 100, 1, 29), (1.1, 30, 3, 11)],
)
def test_steps_are_whole_batches(epochs, prompts, batch_size, expected):
    """0.29 x 100 is 28.999999999999996 in floating point."""
    assert count_steps(TrainingConfig(epochs=epochs, batch_size=batch_size), prompts) == expected


def test_less_than_one_batch_is_refused():
    with pytest.raises(ValueError, match="less than one step"):
        count_steps(TrainingConfig(epochs=0.5, batch_size=100), 12)


def test_programs_are_kept_between_runs_unless_the_environment_says_where(monkeypatch, tmp_path):
    said = {}
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    enable_compilation_cache()
    assert said == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    enable_compilation_cache()
    assert said["jax_compilation_cache_dir"] == str(cache_directory() / "compiled")


def test_a_cache_of_programs_that_cannot_be_written_is_said_once(monkeypatch, tmp_path):
    """By place, cause and remedy; JAX would warn of every program."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        enable_compilation_cache()
        for done in ("reading", "writing"):
            warnings.warn(f"Error {done} persistent compilation cache entry for 'jit_f': E", stacklevel=1)
    (warning,) = said
    assert f"{tmp_path / 'file' / 'cache'} (Not a directory)" in str(warning.message)
    assert "DPO_CACHE or JAX_COMPILATION_CACHE_DIR may name" in str(warning.message)


@pytest.mark.parametrize("directory", ["", "gs://bucket/cache"])
def test_a_cache_that_is_off_or_in_a_bucket_is_left_to_jax(directory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", directory)
    enable_compilation_cache()
    assert list(tmp_path.iterdir()) == []
