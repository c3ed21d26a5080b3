"""What is chosen under `training.memory_limit`, and that a run under one is the same run."""

import ctypes
import dataclasses
import gc
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from numpy.testing import assert_allclose
from stopping import stop_after

from dpo.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.data.tokenized import make_dataset
from dpo.losses import make_objective
from dpo.parallel.sharding import make_mesh
from dpo.training import memory, preparation
from dpo.training.device_memory import GIB, limit_bytes, limit_of, other_bytes
from dpo.training.loop import train
from dpo.training.memory import Parts, first_that_fits, least_step, sampling_bytes
from dpo.training.memory_choices import Choice, candidates
from dpo.training.policy import load_policy

LIMITLESS = 1e6


@pytest.fixture(autouse=True)
def one_device_that_holds_nothing_else(monkeypatch):
    """The programs alone decide, and the step's is the largest of them."""
    nothing_else_is_held(monkeypatch)


def nothing_else_is_held(monkeypatch):
    """One device, with no bytes beside the step's program."""
    monkeypatch.setattr(preparation, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(memory, "other_bytes", lambda mesh: 0.0)
    monkeypatch.setattr(memory, "scoring_bytes", lambda *_: 0.0)


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """A run of one test's own, with the same rows in every test."""
    return four_steps(tmp_path, tiny_model_dir)


def four_steps(directory, model, *, words=60):
    """Four steps of four pairs; activations of 60 words outweigh the state. Plain attention is quickest."""
    path = directory / "train.jsonl"
    rows = [
        {"prompt": f"number {i}", "chosen": "yes " * words, "rejected": "no " * (words + 20)}
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        run_dir=str(directory / "run"),
        model=ModelConfig(
            source=str(model),
            reference_store=str(directory / "reference"),
            remat="none",
            attention="plain",
        ),
        data=DataConfig(train=str(path), eval=None, max_length=512),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, schedule="constant"),
        training=TrainingConfig(batch_size=4, steps=4, save_every=2),
    )


def with_training(config, **training):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def losses(config):
    rows = [json.loads(line) for line in Path(config.run_dir, "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


# ---- the order ----


def order(*, remat: Any = "none", batch_size=8, micro_batches=1, chunk=1024, scored=100):
    config = Config(
        model=ModelConfig(remat=remat, log_prob_chunk=chunk),
        training=TrainingConfig(batch_size=batch_size, micro_batches=micro_batches),
    )
    return [tuple(choice) for choice in candidates(config, lambda count: scored)]


def test_remat_comes_before_micro_batches_and_these_before_chunks():
    assert order() == [
        ("none", 1, 1024),
        ("dots", 1, 1024),
        ("full", 1, 1024),
        ("full", 2, 1024),
        ("full", 4, 1024),
        ("full", 8, 1024),
        ("full", 8, 64),
        ("full", 8, 32),
    ]


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "expected"),
    [(6, 1, [2, 6]), (12, 3, [6, 12]), (60, 1, [2, 4, 10, 20, 60]), (7, 1, [7]), (1, 1, [])],
)
def test_micro_batches_divide_the_batch_and_double_at_least(batch_size, micro_batches, expected):
    choices = order(remat="full", batch_size=batch_size, micro_batches=micro_batches, scored=0)
    assert [count for _, count, _ in choices] == [micro_batches, *expected]


def test_what_is_asked_for_is_never_made_quicker():
    assert order(remat="full", batch_size=1, chunk=48, scored=1000) == [("full", 1, 48), ("full", 1, 32)]


# ---- the choice ----


def test_the_first_that_fits_is_taken_and_no_later_one_is_looked_at():
    sizes = {Choice("none", 1, 64): 9.0, Choice("dots", 1, 64): 7.0, Choice("full", 1, 64): 5.0}
    looked_at = []

    def peak(choice):
        looked_at.append(choice.remat)
        return sizes[choice] * GIB

    fit = first_that_fits(sizes, peak, limit=7 * GIB)
    assert looked_at == ["none", "dots"]
    assert (fit.choice.remat, fit.peak, fit.limit) == ("dots", 7 * GIB, 7 * GIB)
    assert fit.text == (
        "memory: remat dots, 1 micro-batch, 64 scored tokens at a time: 7.00 of 7.00 GiB a device "
        "(too much: remat none, 1 micro-batch, 64 scored tokens at a time: 9.00 GiB)"
    )


def test_where_nothing_fits_the_least_is_named_and_what_to_change():
    sizes = {
        Choice("dots", 1, 64): float("inf"),
        Choice("full", 2, 64): 4.0 * GIB,
        Choice("full", 4, 64): 4.5 * GIB,
    }
    refusal = r"limit is 3\.00 GiB .* 3 programs takes 4\.00 GiB \(remat full, 2 micro-b.*data\.max_length"
    with pytest.raises(ValueError, match=refusal):
        first_that_fits(sizes, lambda choice: sizes[choice], limit=3 * GIB)


def test_limits_are_gib_or_the_device_s_own():
    assert limit_bytes(1.5, 8.0) == 1.5 * GIB
    assert limit_bytes("device", 8.0) == limit_bytes(None, 8.0) == 8.0
    with pytest.raises(
        ValueError, match=r"training\.memory_limit is 0\.0; allowed is more than 0\.0 or device"
    ):
        TrainingConfig(memory_limit=0.0)


def accelerator(stats):
    """A mesh of one GPU, as jax describes it."""
    device = Mock(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    device.memory_stats.return_value = stats
    return Mock(spec=Mesh, local_devices=[device])


def test_a_gpu_gives_out_what_its_allocator_reserves():
    """Three quarters of the card, unless XLA_CLIENT_MEM_FRACTION says another part."""
    mesh = accelerator({"bytes_limit": 60 * GIB, "bytes_in_use": 3 * GIB})
    assert limit_of("device", mesh) == limit_of(None, mesh) == 60 * GIB
    assert limit_of(48.0, mesh) == 48 * GIB
    assert other_bytes(mesh) == 3 * GIB
    refusal = (
        r"memory_limit is 70\.00 GiB and NVIDIA H100 80GB HBM3 gives out 60\.00 GiB; allowed: up to that"
    )
    with pytest.raises(ValueError, match=refusal):
        limit_of(70.0, mesh)


def test_a_gpu_whose_allocator_does_not_count_needs_a_number():
    mesh = accelerator(None)
    assert (limit_of(48.0, mesh), other_bytes(mesh)) == (48 * GIB, 0.0)
    for limit in ("device", None):
        with pytest.raises(
            ValueError, match=r"does not say .*ALLOCATOR=platform.*; allowed: a number of GiB"
        ):
            limit_of(limit, mesh)


def test_no_program_is_compiled_that_takes_too_much_by_those_before():
    """Ten beside the state with one micro-batch are five with two, or more; other remat says nothing."""
    compiled = {("none", 1, 64): 40.0, ("full", 1, 64): 12.0, ("full", 2, 64): 9.0, ("full", 3, 64): math.inf}
    assert least_step(compiled, Choice("full", 4, 64), state=2.0) == 2 + 7 * 2 / 4
    assert least_step(compiled, Choice("dots", 4, 64), state=2.0) == 0.0
    assert least_step(compiled, Choice("full", 4, 32), state=2.0) == 0.0


def test_the_search_passes_over_what_cannot_fit(config, monkeypatch):
    """40 GiB beside the state are 20 in two parts and 10 in four: what would take 22 is not compiled."""
    state = 2.0 * GIB
    sizes = {"none": 90.0, "dots": 60.0, "full": 42.0}
    looked_at = []

    def step_bytes(config, parts, choice):
        looked_at.append((choice.remat, choice.micro_batches))
        return state + (sizes[choice.remat] - 2.0) * GIB / choice.micro_batches

    monkeypatch.setattr(memory, "step_bytes", step_bytes)
    monkeypatch.setattr(memory, "device_bytes", lambda tree: state)
    monkeypatch.setattr(memory, "saving_bytes", lambda *_: 0.0)
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    tokens = make_dataset([[1, 2 + i] for i in range(8)], [[[3], [4]]] * 8)
    parts = Parts(
        make_objective({"name": "dpo"}), 0.1, load_policy(config.model, mesh), tokens, None, mesh, num_steps=4
    )
    fit = memory.find_fit(with_training(config, memory_limit=15.0), parts)
    assert looked_at == [("none", 1), ("dots", 1), ("full", 1), ("full", 4)]
    assert "2 micro-batches, 1024 scored tokens at a time: more than fits" in fit.text


def test_arrays_are_not_counted_beside_the_programs_that_hold_them():
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    gc.collect()
    if sys.platform == "linux":  # or the array takes pages that earlier tests freed and that stayed resident
        ctypes.CDLL(None).malloc_trim(0)
    before = other_bytes(mesh)
    array = jax.device_put(np.ones(2**26, np.uint8), jax.devices()[0])
    assert abs(other_bytes(mesh) - before) < array.nbytes / 2
    assert before > 2**26  # Python itself


# ---- runs ----


@pytest.fixture
def own_compilation_cache(tmp_path, monkeypatch):
    """A cache of one test's programs, however quickly they compile."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))  # the run leaves it alone
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    kept = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path / "compiled"), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.slow
@pytest.mark.usefixtures("own_compilation_cache")
def test_a_run_under_a_limit_trains_alike(config, tmp_path):
    """The largest program is refused for one byte; what is chosen compiles once and learns the same."""
    train(config)
    roomy = dataclasses.replace(
        with_training(config, memory_limit=LIMITLESS), run_dir=str(tmp_path / "roomy")
    )
    before = compiled_steps()
    chosen = train(roomy).summary["memory"]
    assert Choice(chosen["remat"], chosen["micro_batches"], chosen["log_prob_chunk"]) == Choice(
        "none", 1, 1024
    )
    assert compiled_steps() == before  # the one of the run without a limit

    limit = chosen["peak_gib"] * (1 - 1e-6)
    tight = dataclasses.replace(with_training(config, memory_limit=limit), run_dir=str(tmp_path / "tight"))
    result = train(tight)
    found = result.summary["memory"]
    assert found["remat"] != "none"
    assert found["peak_gib"] <= limit
    assert compiled_steps() - before == len(found["too_much_gib"])  # the first of these was there already
    assert_allclose(losses(tight), losses(config), rtol=1e-3)
    assert np.ptp(losses(config)) > 0.05


@pytest.mark.ci
@pytest.mark.usefixtures("own_compilation_cache")
def test_a_later_run_compiles_no_step_anew(tiny_model_dir, tmp_path):
    """A second run takes what a first one kept; what is new only opens the stored reference."""
    config = four_steps(tmp_path, tiny_model_dir, words=5)
    jax.clear_caches()  # what earlier tests compiled would not be kept
    train(config)
    before = kept_programs()
    jax.clear_caches()
    train(dataclasses.replace(config, run_dir=str(tmp_path / "later")))
    new = kept_programs() - before
    assert any(name.startswith("jit_train_step-") for name in before)
    assert {name.split("-")[0] for name in new} <= {"jit_convert_element_type"}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_model_dir):
    """The configuration of a run without any pressure that was stopped after two of its four steps."""
    config = with_training(
        four_steps(tmp_path_factory.mktemp("limited"), tiny_model_dir, words=5), memory_limit=LIMITLESS
    )
    with pytest.MonkeyPatch.context() as patch:
        nothing_else_is_held(patch)
        stop_after(2, patch)
        assert train(config).status == "interrupted"
    return config


@pytest.fixture
def copied(interrupted, tmp_path):
    """The same settings, data included, in a directory of one test's own."""
    copy = shutil.copytree(interrupted.run_dir, tmp_path / "copied")
    return dataclasses.replace(interrupted, run_dir=str(copy))


@pytest.mark.ci
def test_a_run_that_goes_on_keeps_its_choice(copied, monkeypatch):
    """Also where the process has grown in the meantime."""
    monkeypatch.setattr(memory, "other_bytes", lambda mesh: 2 * LIMITLESS * GIB)
    assert train(copied).summary["memory"]["remat"] == "none"


@pytest.mark.ci
def test_another_limit_is_another_choice_which_a_checkpoint_refuses(copied):
    kept = Path(copied.run_dir, memory.MEMORY_FILE).read_text()
    peak = json.loads(kept)["chosen"]["peak_gib"]
    smaller = with_training(copied, memory_limit=peak * (1 - 1e-6))
    with pytest.raises(ValueError, match=r'model\.remat: "none" → "(dots|full)"'):
        train(smaller)
    assert Path(copied.run_dir, memory.MEMORY_FILE).read_text() == kept
    assert train(with_training(copied, memory_limit=2 * LIMITLESS)).status == "finished"


def test_a_limit_below_the_state_is_refused_before_anything_is_compiled(config, monkeypatch):
    monkeypatch.setattr(memory, "step_bytes", lambda *_: pytest.fail("compiled"))
    refusal = r"limit is 0\.00 GiB a device; parameters .* a copy for checkpoints .* Allowed is a limit above"
    with pytest.raises(ValueError, match=refusal):
        train(with_training(config, memory_limit=1e-6))


@pytest.mark.as_users
def test_samples_of_the_policy_count_with_their_cache(tiny_model_dir):
    """At least keys and values of all rows that are drawn together, and nothing where none are drawn."""
    mesh = make_mesh(Config().mesh, jax.devices()[:1])
    policy = load_policy(ModelConfig(source=str(tiny_model_dir)), mesh)
    tokens = make_dataset([[1, 2 + i] for i in range(40)], [[[3]]] * 40)
    parts = Parts(make_objective({"name": "dpo"}), 0.1, policy, tokens, tokens, mesh, 1)
    cache = policy.merge(policy.params).init_cache(32, 32 + 512)  # 40 prompts are drawn 32 at a time
    found = {
        samples: sampling_bytes(
            with_training(Config(data=DataConfig(eval="x")), eval_samples=samples, eval_max_new_tokens=512),
            parts,
            64,
        )
        for samples in (0, 40)
    }
    assert found[0] == 0
    assert found[40] >= sum(array.nbytes for array in jax.tree.leaves(cache))


def compiled_steps():
    """Training steps in the persistent compilation cache."""
    return sum(name.startswith("jit_train_step-") for name in kept_programs())


def kept_programs():
    """Names of the programs in the persistent compilation cache."""
    return {path.name for path in Path(jax.config.values["jax_compilation_cache_dir"] or "").glob("*-cache")}
