"""Whole runs: a random tiny model on disk, a few steps, everything that a run writes."""

import dataclasses
import gc
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from numpy.testing import assert_allclose, assert_array_equal
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stopping import stop_after
from tiny_model import write_tiny_model

from dpo.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
from dpo.data.preferences import digest, fingerprint, read_preferences
from dpo.files import write_checksums
from dpo.parallel.sharding import make_mesh
from dpo.training import checkpoint, loop, preparation, program
from dpo.training.checkpoint import Checkpoints
from dpo.training.loop import train
from dpo.training.validation import DATA_KEY

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Runs use one device, although tests see eight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        yield


def six_steps(directory, model):
    """On made-up rankings of two and three responses; plain attention is the quickest to trace."""
    train_file, eval_file = directory / "train.jsonl", directory / "eval.jsonl"
    for path, num_rows in ((train_file, 12), (eval_file, 5)):
        rows = [
            {
                "prompt": f"{path.stem} number {i}",
                "responses": ["yes, very good", "perhaps", "no"][: 2 + i % 2],
                "ranks": [1, 2, 3][: 2 + i % 2],
            }
            for i in range(num_rows)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        run_dir=str(directory / "run"),
        model=ModelConfig(source=str(model), reference_store=str(directory / "reference"), attention="plain"),
        data=DataConfig(train=str(train_file), eval=str(eval_file), max_length=128),
        objective={"name": "plackett_luce", "beta": 0.5},
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.0, schedule="constant"),
        training=TrainingConfig(batch_size=4, steps=6, eval_every=3),
    )


@pytest.fixture
def config(tmp_path, tiny_model_dir):
    """A run of this test's own, with the same rows and weights as those that tests share."""
    return six_steps(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir):
    """The configuration of a run that is finished. Tests read its directory, or go on in a copy."""
    config = six_steps(tmp_path_factory.mktemp("finished"), tiny_model_dir)
    assert train(config).status == "finished"
    return config


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, tiny_model_dir):
    """The same run, stopped after two steps."""
    config = six_steps(tmp_path_factory.mktemp("interrupted"), tiny_model_dir)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2, patch)
        assert train(config).status == "interrupted"
    return config


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, tiny_model_dir):
    """A run that is finished after two steps."""
    config = six_steps(tmp_path_factory.mktemp("two_steps"), tiny_model_dir)
    config = replace(config, training={"steps": 2})
    assert train(config).status == "finished"
    return config


def go_on_in_a_copy(config, shared):
    """What a shared run has left becomes what this test's run finds."""
    shutil.copytree(shared.run_dir, config.run_dir)
    shutil.copytree(shared.model.reference_store, config.model.reference_store)


def replace(config, **sections):
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(old, **value)
            if dataclasses.is_dataclass(old := getattr(config, name)) and not isinstance(old, type)
            else value
            for name, value in sections.items()
        },
    )


def lines(config):
    """Metric lines without what the clock decides."""
    with open(f"{config.run_dir}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in rows]


def weights(config):
    return load_file(f"{config.run_dir}/export/model.safetensors")


def test_a_run_learns_writes_everything_and_says_when_it_was_done(config, capsys):
    config = replace(config, model={"attention": "auto"}, training={"profiler_steps": 3, "profiler_skip": 2})
    result = train(config)
    assert result.status == "finished"
    profile = re.search(r"profile of steps 2 to 4: the device worked ([\d.]+)% of", capsys.readouterr().out)
    assert profile is not None
    assert 0 <= float(profile[1]) <= 100  # milliseconds of work, however long a busy machine takes between
    steps = [row for row in lines(config) if "loss" in row]
    expected = np.mean([np.log(2) if i % 2 == 0 else np.log(6) for i in range(12)])
    assert abs(steps[0]["loss"] - expected) < 0.4  # log K! of the four prompts of the first step
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert result.summary["eval"]["rewards/accuracies"] == 1.0
    heldout = load_file(result.run_dir / "heldout.safetensors")
    assert_array_equal(np.isfinite(heldout["policy"]), heldout["present"].astype(bool))
    with safe_open(result.run_dir / "heldout.safetensors", framework="np") as file:
        assert file.metadata()[DATA_KEY] == fingerprint(map(digest, read_preferences(config.data.eval)[0]))
    assert train(config).status == "already finished"
    summary = result.run_dir / "summary.json"
    summary.write_text(summary.read_text()[:-9])
    with pytest.raises(ValueError, match=r"summary\.json is damaged: not valid JSON"):
        train(config)


EVALUATED = [
    pytest.param([{"name": "dpo"}], id="dpo", marks=pytest.mark.slow),
    pytest.param([{"name": "dpo", "wpo": True}], id="wpo", marks=pytest.mark.slow),
    pytest.param(
        [{"name": "dpo", "ld_alpha": 0.5}, {"name": "sft", "weight": 0.1}],
        id="ld_alpha and sft",
        marks=pytest.mark.ci,
    ),
]


@pytest.mark.parametrize("specs", EVALUATED)
def test_the_held_out_loss_of_the_training_rows_is_the_next_steps_loss(config, specs):
    """Each step takes all 12 rows, so that the next one's loss is of the rows and weights just evaluated."""
    config = replace(config, data={"eval": config.data.train, "layout": "padded"})
    config = replace(config, objective={"name": "dpo"}, objectives=specs)
    config = replace(config, training={"batch_size": 12, "steps": 3, "eval_every": 1})
    summary = train(config).summary
    trained = [row["loss"] for row in lines(config) if "loss" in row]
    held = [row["eval/loss"] for row in lines(config) if "eval/loss" in row]
    assert len(held) == 3
    assert_allclose(held[:2], trained[1:], rtol=1e-5)
    assert summary["eval"]["loss"] == held[2]


@pytest.mark.ci
def test_evaluations_sample_the_policy_where_asked_for(config):
    """The reference is kept although training donates its parameters, so that KL grows from 0."""
    config = replace(config, training={"eval_samples": 3, "eval_max_new_tokens": 8})
    result = train(config)
    held = [row for row in lines(config) if "eval/samples/kl" in row]
    assert [row["step"] for row in held] == [3, 6]
    assert 0 < abs(held[0]["eval/samples/kl"]) < abs(held[1]["eval/samples/kl"])
    assert 1 <= held[1]["eval/samples/length"] <= 8
    assert result.summary["eval"]["samples/kl"] == held[1]["eval/samples/kl"]


@pytest.mark.slow
def test_the_first_loss_is_the_log_of_the_number_of_orders(config):
    training = {"batch_size": 1, "steps": 1, "eval_every": None}
    config = replace(config, data={"max_train": 1, "eval": None}, training=training)
    train(config)
    assert_allclose(lines(config)[0]["loss"], np.log(2), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_layouts_train_alike(config, finished, layout):
    other = replace(config, data={"layout": layout})
    train(other)
    for ours, theirs in zip(lines(finished), lines(other), strict=True):
        for name in ours.keys() - {"fill", "rewards/accuracies"}:  # the first δ are 0 up to rounding
            assert_allclose(theirs[name], ours[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_meshes_train_alike(config, sizes, tmp_path, monkeypatch):
    """data, fsdp, tensor: eight virtual devices against one."""
    config = replace(config, model={"attention": "auto"})
    train(config)
    monkeypatch.setattr(preparation, "make_mesh", make_mesh)
    other = replace(
        config,
        run_dir=str(tmp_path / "other"),
        mesh=dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)),
    )
    train(other)
    for ours, theirs in zip(lines(config), lines(other), strict=True):
        for name in ours.keys() - {"fill", "rewards/accuracies"}:  # the first δ are 0 up to rounding
            assert_allclose(theirs[name], ours[name], rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_micro_batches_train_alike(config, finished):
    other = replace(config, training={"micro_batches": 2})
    train(other)
    for name, ours in weights(finished).items():
        assert_allclose(weights(other)[name], ours, atol=2e-3, err_msg=name)


def test_an_interrupted_run_goes_on_to_the_same_bits(config, finished, interrupted):
    go_on_in_a_copy(config, interrupted)
    assert train(config).status == "finished"
    assert lines(config) == lines(finished)
    for name, array in weights(finished).items():
        assert_array_equal(weights(config)[name], array, err_msg=name)


@pytest.mark.ci
def test_a_checkpoint_of_other_settings_is_refused_unless_that_is_allowed(config, two_steps):
    go_on_in_a_copy(config, two_steps)
    files = [Path(config.run_dir) / name for name in ("config.yaml", "summary.json", "metrics.jsonl")]
    before = [file.read_text() for file in files]
    refusal = (
        r"step 2 in .* belongs to a run with other settings, steps:\n  settings: training\.steps: 2 → 6\n"
    )
    with pytest.raises(ValueError, match=refusal):
        train(config)
    assert [file.read_text() for file in files] == before
    result = train(replace(config, training={"allow_changed": ["settings"]}))
    assert result.status == "finished"
    assert [row["step"] for row in lines(config) if "loss" in row] == list(range(6))


def test_a_refusal_over_the_reference_changes_nothing(config, two_steps, tmp_path):
    """What the reference scores is known late; the directory stays as it was until then."""
    from tiny_model import write_tiny_model

    go_on_in_a_copy(config, two_steps)
    config = replace(config, training={"steps": 2})
    files = [Path(config.run_dir) / name for name in ("config.yaml", "summary.json", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    other = write_tiny_model(tmp_path / "reference_model", seed=1)
    with pytest.raises(ValueError, match="belongs to a run with other reference"):
        train(replace(config, model={"reference": str(other)}))
    assert [file.read_bytes() for file in files] == before


def test_a_finished_run_is_not_finished_for_other_data(config, tmp_path, monkeypatch):
    """Flipped labels, or another loss under its name, in the same file leave the settings as they were."""
    monkeypatch.syspath_prepend(tmp_path)
    code = tmp_path / "loss_of_a_finished_run.py"
    code.write_text("from dpo.losses.pairwise import dpo\ndef loss(beta: float = 0.5): return dpo(beta)\n")
    config = replace(
        config,
        data={"eval": None},
        training={"steps": 1, "eval_every": None},
        objective={"name": "loss_of_a_finished_run:loss"},
    )
    train(config)
    assert train(config).status == "already finished"
    with pytest.raises(ValueError, match=r"is a finished run and training.resume is 'never'"):
        train(replace(config, training={"resume": "never"}))
    before = code.read_text()
    code.write_text(before.replace("dpo(beta)", "dpo(2 * beta)"))
    with pytest.raises(ValueError, match=r"(?s)other settings:\n  settings: code of loss_of_a_finished_run:"):
        train(config)
    code.write_text(before)
    path = Path(config.data.train)
    rows = path.read_text().splitlines()
    flipped = [row.replace('"ranks": [1, 2]', '"ranks": [2, 1]') for row in rows[1:]]
    path.write_text("\n".join(flipped) + "\n")
    shown = [rf"{re.escape(str(path))}, {count} rows \(" for count in (len(rows), len(flipped))]
    with pytest.raises(
        ValueError, match=rf"(?s)the finished run in .* other data:.*{'.* → '.join(shown)}"
    ) as no:
        train(config)
    assert str(no.value).endswith("--allow-changed data")
    assert (Path(config.run_dir) / "summary.json").exists()


@pytest.mark.ci
def test_a_finished_run_is_not_finished_for_another_reference(config, tmp_path):
    """Other weights in the directory that model.reference names, as in the policy's own."""
    reference = write_tiny_model(tmp_path / "reference")
    training = {"steps": 1, "eval_every": None}
    config = replace(config, data={"eval": None}, training=training, model={"reference": str(reference)})
    train(config)
    assert train(config).status == "already finished"
    (reference / "SHA256SUMS").unlink(missing_ok=True)
    of_model = reference / "config.json"
    before = of_model.read_text()
    of_model.write_text(before.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.01'))
    with pytest.raises(ValueError, match=r"weights: architecture.reference.norm_eps: 1e-05 → 0.01"):
        train(config)
    of_model.write_text(before)
    (path,) = reference.glob("*.safetensors")
    tensors = load_file(path)
    save_file({name: tensor + 0.5 for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"(?s)the finished run in .* other weights:\n  weights: reference"):
        train(config)


@pytest.mark.ci
def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(config, monkeypatch):
    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    with pytest.raises(OSError, match=r"checkpoint of step 1 could not be written .*No space left"):
        train(replace(config, data={"eval": None}, training={"steps": 1, "eval_every": None}))
    assert not (Path(config.run_dir) / "summary.json").exists()


@pytest.mark.ci
def test_a_resumed_run_holds_no_second_state(config, monkeypatch):
    """The policy's parameters have given up their place when the state is read into it."""
    held, restore = [], Checkpoints.restore

    def measure(self, step, like):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return restore(self, step, like)

    monkeypatch.setattr(Checkpoints, "restore", measure)
    stop_after(1, monkeypatch)
    config = replace(config, data={"eval": None}, training={"steps": 2, "eval_every": None})
    assert train(config).status == "interrupted"
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    assert train(config).status == "finished"
    params = sum(array.nbytes for array in weights(config).values())
    assert held[0] - before < params / 4


@pytest.mark.ci
def test_another_model_gives_its_place_back_when_it_has_scored(config, tmp_path, monkeypatch):
    """Steps hold the state alone: the memory that a run is planned for has no other model in it."""
    held = []

    def measure(*_):
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        raise KeyError("enough")

    monkeypatch.setattr(loop, "begin", measure)
    config = replace(config, data={"eval": None}, training={"steps": 1, "eval_every": None})
    other = str(write_tiny_model(tmp_path / "reference", seed=1))
    for reference in (None, other):
        gc.collect()
        before = sum(array.nbytes for array in jax.live_arrays())
        with pytest.raises(KeyError, match="enough"):
            train(replace(config, model={"reference": reference}))
        held[-1] -= before
    params = sum(path.stat().st_size for path in Path(other).glob("*.safetensors"))
    assert held[0] > 2 * params
    assert held[1] - held[0] < params / 4


def test_a_run_that_goes_on_is_not_finished_any_more(config, two_steps, monkeypatch):
    go_on_in_a_copy(config, two_steps)
    of_the_policy = ["summary.json", "heldout.safetensors", "evaluation.json", "evaluation.tokens.json"]
    for name in of_the_policy[2:]:  # which `dpo train` leaves
        (Path(config.run_dir) / name).write_text("{}")
    assert all((Path(config.run_dir) / name).is_file() for name in of_the_policy)
    stop_after(1, monkeypatch)
    assert train(replace(config, training={"allow_changed": ["settings"]})).status == "interrupted"
    assert not [name for name in of_the_policy if (Path(config.run_dir) / name).exists()]


def test_rows_too_short_for_held_out_data_are_found_before_anything_is_scored(config, tmp_path):
    row = {"prompt": "long " * 30, "chosen": "yes", "rejected": "no"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n")
    data = {"eval": str(tmp_path / "long.jsonl"), "row_length": 128, "max_length": 512}
    with pytest.raises(ValueError, match=r"data\.row_length is 128; allowed is at least \d+"):
        train(replace(config, data=data))
    assert not (tmp_path / "reference").exists()


def test_fewer_steps_than_were_done_are_refused(config, two_steps):
    go_on_in_a_copy(config, two_steps)
    with pytest.raises(ValueError, match=r"step 2 in .* is beyond the 1 steps of this run"):
        train(replace(config, training={"steps": 1, "allow_changed": ["settings"]}))


@pytest.mark.ci
def test_data_may_move_but_not_change(config, interrupted, tmp_path):
    go_on_in_a_copy(config, interrupted)
    moved = (tmp_path / "train.jsonl").rename(tmp_path / "moved.jsonl")
    whole = moved.read_text()
    moved.write_text(whole.replace("perhaps", "rather"))
    config = replace(config, data={"train": str(moved)})
    read = r"train: /.*/train\.jsonl, 12 rows \([0-9a-f]{12}\) → /.*/moved\.jsonl, 12 rows \([0-9a-f]{12}\)"
    digests = r'train: "[0-9a-f]{64}" → "[0-9a-f]{64}"'
    with pytest.raises(ValueError, match=rf"other data, tokens:\n  data: {read}\n  tokens: {digests}\n"):
        train(config)
    moved.write_text(whole)
    assert train(config).status == "finished"
    shutil.rmtree(Path(config.run_dir) / "checkpoints")  # without which it would be trained in anew
    again = moved.rename(tmp_path / "moved_again.jsonl")
    config = replace(config, data={"train": str(again)})
    assert train(config).status == "already finished"
    again.write_text(whole.replace("perhaps", "rather"))
    with pytest.raises(
        ValueError, match=r"the finished run in .* other data:\n  data: train: .*moved\.jsonl"
    ):
        train(config)


@pytest.mark.ci
def test_another_version_of_a_package_is_refused_unless_allowed(config, interrupted, monkeypatch):
    from dpo.training import identity

    go_on_in_a_copy(config, interrupted)
    monkeypatch.setattr(identity, "package_versions", lambda: {"jax": "9"})
    with pytest.raises(ValueError, match=r'(?s)versions: jax: ".*" → "9".*--allow-changed versions$'):
        train(config)
    assert train(replace(config, training={"allow_changed": ["versions"]})).status == "finished"
    monkeypatch.setattr(identity, "package_versions", lambda: {"jax": "10"})
    assert train(config).status == "already finished", "nothing is computed any more"


def test_a_restored_policy_that_scores_differently_is_refused(config, interrupted):
    go_on_in_a_copy(config, interrupted)
    path = Path(config.run_dir) / "checkpoints" / "2"
    identity = json.loads((path / "identity.json").read_text())
    identity["probe"]["logps"][3][1] -= 1.0
    (path / "identity.json").write_text(json.dumps(identity))
    write_checksums(path)
    with pytest.raises(ValueError, match=r"step 2 does not give the log-probs .* row 3, response 1 had"):
        train(config)


@pytest.mark.ci
def test_a_run_goes_on_elsewhere_without_the_stores_it_began_with(config, tmp_path, monkeypatch):
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    stop_after(2, monkeypatch)
    train(config)
    moved = Path(config.run_dir).rename(tmp_path / "moved")
    config = replace(config, run_dir=str(moved), model={"reference_store": str(tmp_path / "other")})
    train(config)
    assert lines(config) == lines(whole)
    assert not (tmp_path / "other").exists()


def test_resume_never_refuses_a_used_directory(config, two_steps):
    go_on_in_a_copy(config, two_steps)
    with pytest.raises(ValueError, match="resume is 'never'"):
        train(replace(config, training={"resume": "never"}))


def test_a_foreign_reference_starts_off_the_initial_loss(config, tmp_path):
    other = write_tiny_model(tmp_path / "reference_model", seed=1)
    config = replace(config, data={"eval": None}, training={"steps": 1, "eval_every": None})
    train(replace(config, model={"reference": str(other)}))
    assert lines(config)[0]["rewards/chosen"] != 0


@pytest.mark.ci
def test_a_reference_that_is_replaced_each_step_keeps_the_loss_at_its_start(config):
    """TR-DPO with α = 1 and period 1: the policy is its own reference whenever a step begins."""
    training = {"reference_every": 1, "reference_alpha": 1.0, "batch_size": 12, "eval_every": None}
    train(replace(config, data={"eval": None}, training=training))
    losses = [row["loss"] for row in lines(config) if "loss" in row]
    assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.ci
def test_a_moving_reference_resumes_to_the_same_bits(config, tmp_path, monkeypatch):
    config = replace(config, data={"eval": None}, training={"reference_every": 2, "eval_every": None})
    whole = replace(config, run_dir=str(tmp_path / "whole"))
    train(whole)
    stop_after(3, monkeypatch)
    assert train(config).status == "interrupted"
    train(config)
    assert lines(config) == lines(whole)


def test_steps_that_are_not_finite_change_nothing_and_end_the_run_by_name(config, monkeypatch):
    """An absurd learning rate breaks the second step's log-probs; the third would be the third in a row."""
    training = {"max_skipped": 2, "eval_every": None}
    config = replace(config, data={"eval": None}, optimizer={"learning_rate": 1e30}, training=training)
    refusal = r"2 steps in a row were not finite \(the last: 2, rows .*jsonl:\d+.*checkpoint: none was saved"
    with pytest.raises(ValueError, match=refusal):
        train(config)
    assert [row["skipped"] for row in lines(config)] == [0, 1, 1]


@pytest.mark.ci
def test_skipped_steps_are_counted_over_interruptions_and_the_checkpoint_is_named(config, monkeypatch):
    training = {"max_skipped": 3, "eval_every": None}
    config = replace(config, data={"eval": None}, optimizer={"learning_rate": 1e30}, training=training)
    stop_after(2, monkeypatch)
    assert train(config).status == "interrupted"
    with pytest.raises(ValueError, match=r"3 steps in a row .*good checkpoint: .*checkpoints/2\. Lower"):
        train(config)
    assert [row["skipped"] for row in lines(config)] == [0, 1, 1, 1]


@pytest.mark.ci
def test_the_evaluation_after_the_last_step_may_be_the_best(config):
    result = train(replace(config, training={"keep_best": "rewards/margins"}))
    margins = {row["step"]: row["eval/rewards/margins"] for row in lines(config) if "loss" not in row}
    assert max(margins, key=margins.__getitem__) == 6, margins
    assert result.summary["best_checkpoint"] == 6


UNPAIRED_SPECS = [
    pytest.param({"name": "kto"}, id="kto"),
    pytest.param({"name": "bco"}, id="bco", marks=pytest.mark.slow),
]
MODIFIED = [
    pytest.param({"name": "dpo", "ld_alpha": 0.5}, 1, id="ld_alpha, 1", marks=pytest.mark.slow),
    pytest.param({"name": "dpo", "ld_alpha": 0.5}, 2, id="ld_alpha, 2", marks=pytest.mark.slow),
    pytest.param({"name": "dpo", "wpo": True}, 1, id="wpo, 1", marks=pytest.mark.slow),
    pytest.param({"name": "dpo", "wpo": True}, 2, id="wpo, 2", marks=pytest.mark.slow),
]
"""The held-out loss of ld_alpha is held against training above."""


@pytest.mark.parametrize("spec", UNPAIRED_SPECS)
def test_single_labelled_responses_are_learnt_from(config, tmp_path, spec):
    path = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": f"p{i}", "completion": "good" if i % 2 else "bad!", "label": bool(i % 2)} for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, objective=spec, data={"train": str(path), "eval": str(path)})
    result = train(config)
    first, last = [row for row in lines(config) if "loss" in row][::5]
    assert last["loss"] < first["loss"]
    assert result.summary["eval"]["rewards/chosen"] > result.summary["eval"]["rewards/rejected"]
    assert not any("accuracies" in name for row in lines(config) for name in row)  # there is no pair
    with pytest.raises(ValueError, match=r"keep_best is rewards/margins, but every prompt of data\.eval"):
        train(replace(config, training={"keep_best": "rewards/margins", "seed": 1}))


@pytest.mark.parametrize(("spec", "micro_batches"), MODIFIED)
def test_modifiers_get_what_they_need(config, spec, micro_batches):
    train(replace(config, objective=spec, training={"micro_batches": micro_batches}))
    first, last = [row for row in lines(config) if "loss" in row][::5]
    assert last["loss"] < first["loss"]


def test_an_objective_over_pairs_refuses_single_responses(config, tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"prompt": "p", "completion": "c", "label": True}) + "\n")
    with pytest.raises(ValueError, match="plackett_luce compares responses"):
        train(replace(config, data={"train": str(path)}))


def ties_alone(directory):
    """Preferences that prefer nothing."""
    path = directory / "tied.jsonl"
    path.write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1]}) + "\n")
    return path


def test_training_data_of_ties_alone_are_refused(config, tmp_path):
    path = ties_alone(tmp_path)
    with pytest.raises(
        ValueError, match=r"plackett_luce compares responses of different rank, but all 1 rows"
    ):
        train(replace(config, data={"train": str(path)}))


@pytest.mark.ci
def test_rows_without_a_pair_weigh_nothing_but_teach_where_something_learns_from_them(config, tmp_path):
    """With two ties among 12 pairs a step of all rows has DPO's loss at its start, not 12/14 of it."""
    rows = [{"prompt": f"p{i}", "responses": ["a", "b"], "ranks": [1, 1 + (i < 12)]} for i in range(14)]
    path = tmp_path / "some_tied.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, data={"train": str(path), "eval": str(path)}, objective={"name": "dpo"})
    config = replace(config, training={"batch_size": 12, "steps": 1})
    assert train(config).summary["prompts"] == 12
    assert_allclose(lines(config)[0]["loss"], np.log(2), rtol=1e-5)
    both = replace(config, objectives=[{"name": "dpo"}, {"name": "bco"}], run_dir=str(tmp_path / "both"))
    assert train(both).summary["prompts"] == 14


def test_held_out_data_without_a_preference_is_refused_before_training(config, tmp_path):
    path = ties_alone(tmp_path)
    with pytest.raises(
        ValueError, match=r"data.eval is .*tied\.jsonl: none of its 1 rows has two responses of"
    ):
        train(replace(config, data={"eval": str(path)}))
    assert not (Path(config.run_dir) / "checkpoints").exists()


def test_an_objective_that_needs_scores_names_the_row_without(config):
    with pytest.raises(ValueError, match=r"odpo needs scores; .*train\.jsonl:1 has none"):
        train(replace(config, objective={"name": "odpo"}))


def test_one_program_is_compiled_for_each_shape_that_was_announced(config, monkeypatch):
    made, make_train_step = [], program.make_train_step

    def remember(*args, **kwargs):
        made.append(make_train_step(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(program, "make_train_step", remember)
    result = train(config)
    assert made[0]._cache_size() == len(result.summary["layout"]["shapes"])


def test_the_host_reads_one_step_while_the_next_is_under_way(config, monkeypatch):
    """A step is sent, the metrics of the one before are read in one go, and nothing else is.

    The first step is waited for: its loss is checked, and its line is shown. A step's state takes the place
    of the one before: every array of that is given up.
    """
    events, sent, kept, fetch, value = [], [], [], jax.device_get, ArrayImpl._value
    make_train_step, wait = program.make_train_step, ArrayImpl.block_until_ready

    def read(array):
        events.append("array")
        return value.fget(array)

    def waited(array):
        events.append("wait")
        return wait(array)

    def fetch_all(tree):
        before = len(events)
        fetched = fetch(tree)
        numbers = [number for number, metrics in sent if metrics is tree]
        events[before:] = [f"metrics of {number}" for number in numbers] or ["arrays"]
        return fetched

    def remember(*args, **kwargs):
        step = make_train_step(*args, **kwargs)

        def call(*inputs):
            state, metrics = step(*inputs)
            sent.append((len(sent), metrics))
            kept.extend(leaf.shape for leaf in jax.tree.leaves(inputs[0]) if not leaf.is_deleted())
            events.append("sent")
            return state, metrics

        return call

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(ArrayImpl, "block_until_ready", waited)
    monkeypatch.setattr(jax, "device_get", fetch_all)
    monkeypatch.setattr(program, "make_train_step", remember)
    train(replace(config, data={"eval": None}, training={"eval_every": None}))
    _, *between, _ = ",".join(events).split("sent")
    read_between = [[event for event in part.split(",") if event] for part in between]
    later = [[f"metrics of {number}"] for number in range(1, 4)]
    assert read_between == [["array", "metrics of 0"], [], *later]
    assert kept == []


@pytest.mark.slow
def test_ten_steps_follow_trls_trajectory(shared_dir, tmp_path):
    """TRL 1.16 in float32 on real human pairs, step by step (SmolLM2-135M-Instruct, AdamW, β = 0.1)."""
    golden = json.loads((shared_dir / "golden" / "trl_trajectory.json").read_text())
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=ModelConfig(reference_store=str(tmp_path / "reference")),
        data=DataConfig(
            train=str(shared_dir / "data" / "hh_pairs_512.jsonl"), eval=None, max_train=40, shuffle=False
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_fraction=0.0),
        training=TrainingConfig(batch_size=4, steps=10),
    )
    result = train(config)
    for ours, trl in zip(lines(config), golden["steps"], strict=True):
        assert_allclose(ours["loss"], trl["loss"], atol=2e-4)
        assert_allclose(ours["grad_norm"], trl["grad_norm"], rtol=1e-3)
    for name in ("logps/chosen", "logps/rejected"):
        assert_allclose(lines(config)[0][name], golden["steps"][0][name], rtol=1e-3)
    (store,) = (tmp_path / "reference").iterdir()
    reference = load_file(store / "sums.safetensors")["logps"]
    stored = [[row["ref_chosen_logp"], row["ref_rejected_logp"]] for row in golden["examples"]]
    assert_allclose(reference, stored, rtol=1e-3)
    _check_movement(result, golden["final_param_delta_l2"])


def _check_movement(result, golden):
    """Norms of (trained − initial), tensor by tensor, within 1%."""
    from dpo.huggingface.pretrained import load_pretrained
    from dpo.huggingface.saving import save_pretrained

    start = load_pretrained("embedded:smollm2-135m-instruct")
    before = save_pretrained(start.model, result.run_dir / "start", hf_config=start.config, tokenizer=None)
    old, new = (load_file(path / "model.safetensors") for path in (before, result.run_dir / "export"))
    for name, expected in golden.items():
        if name in new:
            moved = np.linalg.norm(new[name].astype(np.float64) - old[name].astype(np.float64))
            assert_allclose(moved, expected, rtol=1e-2, err_msg=name)
