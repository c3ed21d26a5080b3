import dataclasses
import inspect
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import yaml
from tiny_model import byte_tokenizer, tiny_config

from dpo.config import Config, DataConfig, MeshConfig, ModelConfig, TrainingConfig, save_config
from dpo.config.marks import PLACE, marked
from dpo.data.packing import facts
from dpo.data.tokenized import make_dataset
from dpo.huggingface.text_models import read_config
from dpo.parallel.sharding import make_mesh
from dpo.training.directory import summary_of
from dpo.training.identity import (
    Probe,
    check_probe,
    decide_alike,
    differences,
    fingerprint_tokenizer,
    reference_identity,
    require_same,
    run_identity,
    settings_fingerprint,
    take_probe,
)

SAVED = {
    "settings": {"training.seed": 0, "optimizer.beta1": 0.9},
    "data": {"train": "a"},
    "tokens": {"train": "b"},
    "versions": {"jax": "1"},
    "devices": {"mesh": "data 1"},
}
OTHER_DATA = SAVED | {"data": {"train": "c"}, "tokens": {"train": "d"}}


def allow(now, *kinds):
    said: list[str] = []
    may_differ = require_same(SAVED, now, allowed=kinds, where="it", log=said.append)
    return may_differ, said


def test_the_same_is_the_same():
    assert differences(SAVED, SAVED) == {}
    assert allow(SAVED)[1] == []


def test_a_fingerprint_is_shown_with_its_place_and_a_place_alone_is_no_difference():
    """An earlier version's checkpoint has no places, and is compared all the same."""
    here = {"words": {"data": {"train": "old.jsonl, 1,000 rows"}, "weights": {"policy": "models/a"}}}
    there = {"words": {"data": {"train": "new.jsonl, 990 rows"}, "weights": {"policy": "models/b"}}}
    assert differences(SAVED | here, SAVED | there) == {}
    found = differences(SAVED | here, OTHER_DATA | there)
    assert found["data"] == ["train: old.jsonl, 1,000 rows (a) → new.jsonl, 990 rows (c)"]
    assert differences(SAVED, OTHER_DATA | there)["data"] == ['train: "a" → new.jsonl, 990 rows (c)']


def test_a_setting_that_an_earlier_version_did_not_have_is_at_its_default():
    """A checkpoint of before goes on with the same settings, and not where the new one is set."""
    later = {"settings": SAVED["settings"] | {"optimizer.first_moment": "float32", "data.row_layout": None}}
    assert differences(SAVED, later) == {}
    later["settings"] |= {"optimizer.first_moment": "bfloat16"}
    assert differences(SAVED, later) == {"settings": ['optimizer.first_moment: "float32" → "bfloat16"']}


def test_old_and_new_values_are_named():
    now = SAVED | {"settings": {"training.seed": 1, "optimizer.beta2": None, "gone": 2}}
    assert differences(SAVED, now) == {
        "settings": [
            "training.seed: 0 → 1",
            "optimizer.beta2: 0.999 → null",
            "gone: not set → 2",
        ]
    }
    with pytest.raises(
        ValueError, match=r"it belongs to a run with other settings:\n  settings: training.seed"
    ):
        allow(now)


def test_a_default_of_the_objective_is_named_and_is_no_difference_when_set():
    saved = {"settings": {"objective.name": "dpo"}}
    assert differences(saved, {"settings": {"objective.name": "dpo", "objective.beta": 0.1}}) == {}
    now = {"settings": {"objective.name": "dpo", "objective.beta": 0.2}}
    assert differences(saved, now) == {"settings": ["objective.beta: 0.1 → 0.2"]}
    of_own_code = {"settings": {"objective.name": "mine:loss"}}
    assert 'objective.name: "dpo" → "mine:loss"' in differences(saved, of_own_code)["settings"]


def test_a_kind_that_is_allowed_allows_what_follows_from_it():
    with pytest.raises(ValueError, match=r"(?s)other data, tokens.*--allow-changed data$") as caught:
        allow(OTHER_DATA)
    assert "--allow-changed tokens" not in str(caught.value)
    may_differ, said = allow(OTHER_DATA, "data")
    assert "reference" in may_differ
    assert said == [
        'changed since it: data (train: "a" → "c")',
        'changed since it: tokens (train: "b" → "d")',
    ]
    with pytest.raises(ValueError, match="--allow-changed data"):
        allow(OTHER_DATA, "settings")  # the settings are the same, so nothing follows from them


def test_tokens_that_differ_alone_are_refused_as_such():
    now = SAVED | {"tokens": {"train": "d"}}
    with pytest.raises(ValueError, match=r"--allow-changed tokens$"):
        allow(now, "data")
    allow(now, "tokens")


def test_versions_are_refused_and_devices_are_told():
    with pytest.raises(ValueError, match=r'versions: jax: "1" → "2"'):
        allow(SAVED | {"versions": {"jax": "2"}})
    _, said = allow(SAVED | {"devices": {"mesh": "data 8"}})
    assert said[-1] == "on other devices results agree to rounding, not to the bit"


def test_another_cpu_is_told_but_not_where_an_earlier_version_did_not_say_which():
    """Its cores split sums: a run on one of two cores had another gradient norm after six steps."""
    saved, now = ({"devices": {"mesh": "data 1", "processor": f"A, {n} cores"}} for n in (2, 4))
    assert differences(saved, now) == {"devices": ['processor: "A, 2 cores" → "A, 4 cores"']}
    assert differences(SAVED, {"devices": SAVED["devices"] | now["devices"]}) == {}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"run_dir": "elsewhere"}, True),
        ({"mesh": MeshConfig(data=2)}, True),
        ({"training": TrainingConfig(save_every=3, save_minutes=1.5, keep_checkpoints=7)}, True),
        ({"training": TrainingConfig(seed=1)}, False),
        ({"model": ModelConfig(reference_store="elsewhere")}, True),
        ({"model": ModelConfig(compute_dtype="bfloat16")}, False),
        ({"objective": {"name": "dpo", "beta": 0.2}}, False),
    ],
)
def test_the_fingerprint_of_settings_sees_what_decides_numbers(changes, same):
    before, after = Config(), dataclasses.replace(Config(), **changes)
    assert (settings_fingerprint(before) == settings_fingerprint(after)) is same


def test_a_probe_tells_rounding_from_another_policy():
    saved: Probe = {"rows": [0, 1], "logps": [[-100.0, -50.0], [-7.0, 0.0]]}
    near: Probe = {"rows": [0, 1], "logps": (np.asarray(saved["logps"]) * (1 + 1e-5)).tolist()}
    assert check_probe(saved, saved, where="it").endswith("as they were (largest difference 0)")
    assert check_probe(saved, near, where="it").endswith("as they were (largest difference 0.001)")
    for wrong in (-7.5, float("nan")):
        far: Probe = {"rows": [0, 1], "logps": [[-100.0, -50.0], [wrong, 0.0]]}
        with pytest.raises(ValueError, match=r"row 1, response 0 had -7\.0000 and has"):
            check_probe(saved, far, where="it")
    assert "not compared" in check_probe(saved, {"rows": [5], "logps": [[0.0]]}, where="it")
    assert "not compared" in check_probe(saved, {**saved, "rows": [5, -1]}, where="it")


def test_on_another_mesh_the_rows_are_compared_that_both_probes_have():
    """A batch of more devices has more rows; a padding prompt has none."""
    few: Probe = {"rows": [0, 1], "logps": [[-100.0, -50.0], [-7.0, 0.0]]}
    more: Probe = {"rows": [0, 1, 2, -1], "logps": [*few["logps"], [-3.0, -4.0], [0.0, 0.0]]}
    assert check_probe(few, more, where="it").startswith("its log-probs of 2 rows are as they were")
    assert check_probe(more, few, where="it").startswith("its log-probs of 2 rows are as they were")
    assert "not compared" in check_probe(few, more, where="it", is_coarse=True)
    assert "as they were" in check_probe(few, few, where="it", is_coarse=True)
    moved: Probe = {**more, "logps": [[-100.0, -50.0], [-7.5, 0.0], *more["logps"][2:]]}
    with pytest.raises(ValueError, match=r"row 1, response 0 had -7\.0000 and has"):
        check_probe(few, moved, where="it")


@pytest.mark.parametrize(
    ("logp", "near", "far"), [(0.0, 0.0099, 0.0101), (-1.0, 0.0109, 0.0111), (-100.0, 0.1099, 0.1101)]
)
def test_rounding_is_a_hundredth_of_a_nat_and_a_thousandth_of_what_was_there(logp, near, far):
    saved: Probe = {"rows": [3], "logps": [[logp]]}
    if logp == 0:
        check_probe(saved, {"rows": [3], "logps": [[0.01]]}, where="it")
    for sign in (1, -1):
        check_probe(saved, {"rows": [3], "logps": [[logp + sign * near]]}, where="it")
        with pytest.raises(ValueError, match="row 3, response 0"):
            check_probe(saved, {"rows": [3], "logps": [[logp + sign * far]]}, where="it")


def test_what_a_kept_file_lacks_and_no_default_has_is_a_difference():
    assert decide_alike({}, Config())
    assert not decide_alike({}, Config(objective={"name": "ipo", "beta": 0.1}))


def test_places_may_be_others_where_both_name_one():
    moved = marked(Config, PLACE)
    kept = dataclasses.asdict(Config())
    elsewhere = Config(data=DataConfig(train="elsewhere.jsonl"), model=ModelConfig(source="elsewhere"))
    assert decide_alike(kept, elsewhere, moved=moved)
    assert not decide_alike(kept, elsewhere)
    assert not decide_alike(kept, Config(data=DataConfig(eval="heldout.jsonl")), moved=moved)
    assert not decide_alike(kept, dataclasses.replace(elsewhere, objective={"name": "ipo"}), moved=moved)


def test_the_rows_of_a_reference_are_told_apart_by_name_shape_and_values():
    rows = {"logps": np.arange(6.0)[None], "other": np.zeros((1, 2))}

    def found(**changes):
        store = SimpleNamespace(rows=rows | changes)
        return inspect.unwrap(reference_identity)({"train": store})["reference"]["train"]

    assert found() == found(logps=np.arange(12.0)[None, :6])
    others = [{"logps": np.arange(6.0).reshape(2, 3)}, {"logps": np.ones((1, 6))}, {"a": np.zeros((1, 2))}]
    assert len({found(), *(found(**changes) for changes in others)}) == 4


def test_a_probe_has_zero_where_there_is_no_response():
    rows = make_dataset([[1], [2]], [[[3], [4]], [[5]]])
    logps = np.array([[-1.0, -2.0], [-3.0, np.nan]], np.float32)
    assert take_probe(lambda _: {"logps": logps}, facts(rows)) == {
        "rows": [0, 1],
        "logps": [[-1.0, -2.0], [-3.0, 0.0]],
    }


def test_fingerprints_do_not_see_the_order_of_names():
    one, other = (
        settings_fingerprint(Config(objective=dict(items)))
        for items in ([("name", "dpo"), ("beta", 0.2)], [("beta", 0.2), ("name", "dpo")])
    )
    assert one == other
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    slow = [
        SimpleNamespace(is_fast=False, get_vocab=lambda: {"a": 0}, special_tokens_map=dict(items))
        for items in (special.items(), reversed(special.items()))
    ]
    assert fingerprint_tokenizer(slow[0]) == fingerprint_tokenizer(slow[1])
    slow[1].special_tokens_map["bos_token"] = "<b>"
    assert fingerprint_tokenizer(slow[0]) != fingerprint_tokenizer(slow[1])


@pytest.mark.parametrize(("given", "expected"), [(None, None), ("{{ messages }}", 64)])
def test_what_a_run_is_on_one_device_without_held_out_data(given, expected, tmp_path):
    if given is not None:
        (tmp_path / "template.jinja").write_text(given)
        given = str(tmp_path / "template.jinja")
    tokenizer = SimpleNamespace(
        is_fast=False, get_vocab=lambda: {"a": 0}, special_tokens_map={}, chat_template=None
    )
    _, model = read_config(tiny_config(byte_tokenizer()))
    pretrained = SimpleNamespace(tokenizer=tokenizer, model=SimpleNamespace(config=model))
    policy = SimpleNamespace(pretrained=pretrained, fingerprint="w")
    rows = SimpleNamespace(
        content="c", tokens=SimpleNamespace(fingerprint="t"), read=SimpleNamespace(num_rows=1200)
    )
    found = inspect.unwrap(run_identity)(
        Config(data=dataclasses.replace(Config().data, chat_template=given)),
        policy=policy,
        dataset=rows,
        heldout=None,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        num_steps=7,
    )
    assert (found["data"], found["tokens"]) == ({"train": "c"}, {"train": "t"})
    assert found["words"]["data"] == {"train": f"{Config().data.train}, 1,200 rows"}
    weights = found["weights"]
    assert (weights["policy"], weights["architecture.policy.hidden_size"]) == ("w", 32)
    assert differences({"weights": {"policy": "w"}}, {"weights": weights}) == {}, "of an earlier version"
    turned = weights | {"architecture.policy.ropes": "another"}
    assert differences({"weights": turned}, {"weights": weights}).keys() == {"weights"}
    template = found["template"]["sha256"]
    assert (template and len(template), found["steps"]) == (expected, {"total": 7})
    assert found["devices"]["mesh"] == "data 1 x fsdp 1 x tensor 1"
    assert re.fullmatch(r".+, \d+ cores?", found["devices"]["processor"])
    assert "run_dir" not in found["settings"]
    assert found["settings"]["training.seed"] == 0


@pytest.mark.parametrize("fingerprint", ["as now", "of an earlier version"])
def test_a_finished_run_of_a_version_without_a_setting_is_finished(tmp_path, fingerprint):
    """Its fingerprint is another one, and what it lacks is at its default."""
    config = Config(run_dir=str(tmp_path), objective={"name": "dpo", "beta": 0.1})
    save_config(config, tmp_path / "config.yaml")
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del settings["optimizer"]["beta2"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    now = settings_fingerprint(config)
    summary = {"steps": 1, "prompts": 1, "eval": None, "best_checkpoint": None, "export": "", "memory": None}
    summary |= {"seconds": 1.0, "layout": {}, "versions": {}}
    summary |= {"settings": now if fingerprint == "as now" else fingerprint}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert summary_of(tmp_path, config, now) is not None
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, beta2=0.9))
    assert summary_of(tmp_path, other, settings_fingerprint(other)) is None
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, beta1=0.8))
    assert summary_of(tmp_path, other, settings_fingerprint(other)) is None
    moved = dataclasses.replace(config, data=DataConfig(train="elsewhere.jsonl"))
    assert summary_of(tmp_path, moved, settings_fingerprint(moved)) is None, "nothing tells what was there"
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"contents": {}}))
    assert summary_of(tmp_path, moved, settings_fingerprint(moved)) is not None
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").unlink()
    assert (summary_of(tmp_path, config, now) is None) == (fingerprint != "as now")
