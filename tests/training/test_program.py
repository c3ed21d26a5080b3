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


def test_programs_are_kept_between_runs_unless_the_environment_says_where(monkeypatch):
    said = {}
    monkeypatch.setattr(jax.config, "update", said.__setitem__)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    enable_compilation_cache()
    assert said == {}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    enable_compilation_cache()
    assert said["jax_compilation_cache_dir"] == str(cache_directory() / "compiled")
