"""Settings survive being written and read, and a wrong one is named with its value and what is allowed."""

from __future__ import annotations

import ast
import inspect
import itertools
import os
import pwd
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from dpo import cli, config
from dpo.cli import read_train_settings
from dpo.command_line import load_config
from dpo.commands import report, sweep
from dpo.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
    save_config,
)
from dpo.config.commands import HeldoutConfig
from dpo.config.home import at_home
from dpo.limited import look

UNUSUAL = Config(
    run_dir="runs/ärger",
    model=ModelConfig(source="2026", reference="true"),  # strings that YAML would read as something else
    lora=LoraConfig(rank=8, target_modules=["q_proj", "v_proj"], base_dtype="int8"),
    data=DataConfig(eval=None, max_train=7, row_length=96, shuffle=False),
    objectives=[{"name": "dpo", "weight": 0.8}, {"name": "sft", "weight": 1e-30}],
    optimizer=OptimizerConfig(learning_rate=1e-7, max_grad_norm=None),
    training=TrainingConfig(steps=3, trackers=["tensorboard"]),
    mesh=MeshConfig(fsdp=8),
)


ONE_OBJECTIVE = Config(objective={"name": "dpo", "beta": 1e-6, "label_smoothing": 0.1})


@pytest.mark.parametrize("config", [Config(), UNUSUAL, ONE_OBJECTIVE], ids=["defaults", "unusual", "one"])
def test_a_saved_configuration_is_complete_and_reads_back_equal(tmp_path: Path, config: Config) -> None:
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == asdict(config)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.train.steps=3", r"data\.train\[0\] is \{'steps': '3'\}; allowed"),
        ("--data.train.rows=5", r"data\.train\[0\] is \{'rows': '5'\}; allowed"),
        ("--data.eval+={source: c.csv, rows: 2} --data.eval.rows=3", r"data\.eval"),
        ("--optimizer.schedule.x=3", r"optimizer\.schedule: Expected one of .* Got value: \{x: '3'\}"),
    ],
)
def test_an_option_below_a_setting_that_is_no_group_is_refused(option, message, capsys):
    with pytest.raises(SystemExit) as error:
        read_train_settings(re.split(r" (?=--)", option))
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert re.search(message, said), said
    assert "NestedArg" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {stepz: 5}",
            r"training\.stepz is not a setting; did you mean training\.steps\? allowed: .*seed",
        ),
        ("steps: 5", r"steps is not a setting; did you mean training\.steps\?"),
        ("training: {steps: five}", r"training\.steps: Expected an integer or null. Got value: five"),
        ("training: {steps: 0}", r"training\.steps is 0; allowed is at least 1"),
        ("training: 3", r"training: Expected a mapping of settings. Got value: 3"),
        ("model: {remat: some}", r"model\.remat: Expected one of 'none', 'dots', 'full'. Got value: some"),
        (
            "model: {attention: cudnn}",
            r"model\.attention is cudnn with model\.compute_dtype float32; allowed there: bfloat16",
        ),
        ("optimizer: {learning_rate: .nan}", r"optimizer\.learning_rate.*nan"),
        ("optimizer: {epsilon: 0.0}", r"optimizer\.epsilon is 0\.0; allowed is more than 0\.0"),
        ("optimizer: {beta2: 1.0}", r"optimizer\.beta2 is 1\.0; allowed is at least 0\.0 and less than 1\.0"),
        ("optimizer: {warmup_fraction: 1.5}", r"warmup_fraction is 1\.5; allowed is from 0\.0 to 1\.0"),
        (
            "training: {reference_alpha: 0}",
            r"reference_alpha is 0\.0; allowed is more than 0\.0 and at most 1\.0",
        ),
        (
            "training: {micro_batches: 16}",
            r"training\.micro_batches is 16 and training\.batch_size is 8; allowed",
        ),
        ("training: {eval_every: 5}", r"training\.eval_every is 5 and data\.eval is not set"),
        ("training: {eval_samples: 5}", r"training\.eval_samples is 5 and data\.eval is not set"),
        ("lora: {rank: 0}", r"lora\.rank is 0; allowed is at least 1"),
        ("lora: {alpha: 8}", r"lora\.alpha is 8\.0, but LoRA is off; allowed where lora\.rank is given"),
        (
            "lora: {base_dtype: int8}",
            r"lora\.base_dtype is 'int8', but LoRA is off; allowed where lora\.rank or lora\.init is given",
        ),
        (
            "lora: {init: a, use_dora: true}",
            r"lora\.use_dora is True, but the adapter in lora\.init has its own",
        ),
        ("lora: {rank: 4, init: a}", r"lora\.rank is 4 and lora\.init is 'a'; allowed is one of them"),
        ("lora: {rank: 4, target_modules: []}", r"lora\.target_modules is empty"),
        ("lora: {rank: 4, base_dtype: int4}", r"lora\.base_dtype: Expected one of .*int8"),
        ("mesh: {data: 0}", r"mesh\.data is 0; allowed is at least 1 or -1"),
        ("run_dir: null", r"run_dir: Expected a string. Got value: null"),
        ("training: {seed: null}", r"training\.seed: Expected an integer. Got value: null"),
        ("model: {remat: null}", r"model\.remat: Expected one of 'none', 'dots', 'full'. Got value: null"),
        ("data: {train: null}", r"data\.train: Expected a list or a string. Got value: null"),
        ("lora: {target_modules: null}", r"target_modules: Expected a list or a string. Got value: null"),
        ("objective: null", r"objective: Expected a mapping. Got value: null"),
        ("training: {steps: [1", "while parsing"),
        ("training: {steps: " + "9" * 5000 + "}", "Exceeds the limit"),
        ("a: &a [*a]", "more than 100000 values"),
        ("objectives: [{1: dpo}]", "the name of a value is 1"),
        (
            "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]\n"
            + "".join(
                f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in itertools.pairwise("abcdefghij")
            ),
            "more than 100000 values",
        ),
        ("objective: " + "[" * 20_000 + "]" * 20_000, r"config\.yaml: "),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml: there is no such file"):
        load_config(tmp_path / "config.yaml")


def test_small_numbers_in_yaml_are_numbers(tmp_path: Path) -> None:
    """yaml.safe_load reads 1e-6 as a string; here it is a float, in fields and in the objective alike."""
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {learning_rate: 1e-6}\nobjective: {name: dpo, beta: 1e-6}\n")
    config = load_config(path)
    assert config.optimizer.learning_rate == 1e-6
    assert config.objective["beta"] == 1e-6
    assert isinstance(config.objective["beta"], float)


def test_a_class_path_in_a_file_is_never_followed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "objective: {name: dpo, beta: {class_path: pathlib.Path, init_args: {args: [/]}}}\n"
        "model: {source: {class_path: pathlib.Path}}\n"
    )
    with pytest.raises(ValueError, match=r"model\.source"):
        load_config(path)
    path.write_text("objective: {name: dpo, beta: {class_path: pathlib.PurePath}}\n")
    assert load_config(path).objective["beta"] == {"class_path": "pathlib.PurePath"}


def settings_of(kind: type) -> list[tuple[type, str]]:
    found = []
    for field in fields(kind):
        default = getattr(Config(), field.name, None) if kind is Config else None
        found += settings_of(type(default)) if is_dataclass(default) else [(kind, field.name)]
    return found


def text_below(kind: type, name: str) -> str:
    """What stands below a field of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    after = {
        node.target.id: following
        for node, following in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    text = after[name]
    assert isinstance(text, ast.Expr), f"{kind.__name__}.{name} has no docstring below it"
    assert isinstance(text.value, ast.Constant)
    return str(text.value.value)


@pytest.mark.parametrize(("kind", "name"), settings_of(Config), ids=lambda part: str(part))
def test_every_setting_has_a_line_of_text(kind: type, name: str) -> None:
    assert text_below(kind, name)


@pytest.mark.parametrize("kind", [HeldoutConfig, EvaluateConfig])
def test_what_a_run_stands_in_for_says_so(kind: type) -> None:
    """Of the commands that measure a run whatever is not given is its own (`heldout_settings`)."""
    own = [name for name in inspect.get_annotations(kind) if name not in ("run", "output", "rows", "seed")]
    assert [name for name in own if not re.search("run's|RUN/", text_below(kind, name))] == []


def test_the_home_directory_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In options, in files, and inside of groups and lists; a `~` elsewhere is what it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "settings.yaml"
    file.write_text("run_dir: ~/run\ndata: {train: ~/train.jsonl}\nmodel: {source: a~/b}\n")
    config = read_train_settings([f"--config={file}", "--data.eval=~/eval.jsonl"])
    assert config.run_dir == f"{tmp_path}/run"
    assert (config.data.train, config.data.eval) == (f"{tmp_path}/train.jsonl", f"{tmp_path}/eval.jsonl")
    assert config.model.source == "a~/b"


def test_the_home_directory_is_found_in_settings_made_in_python(monkeypatch, tmp_path):
    """`train` takes them so: in groups and in lists too, and a `~` elsewhere is what it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    given = Config(run_dir="~/run", data=DataConfig(train="~/a.jsonl"), model=ModelConfig(source="a~/b"))
    found = at_home(given)
    assert (found.run_dir, found.data.train) == (f"{tmp_path}/run", f"{tmp_path}/a.jsonl")
    assert found.model.source == "a~/b"
    assert at_home(["~/x", ("~/y", 1), None]) == [f"{tmp_path}/x", (f"{tmp_path}/y", 1), None]
    assert at_home(found) == found
    assert at_home(["~", "~x", "~~/x"]) == [str(tmp_path), "~x", "~~/x"], "no directory is called ~"
    me = pwd.getpwuid(os.getuid())
    assert at_home([f"~{me.pw_name}/x", "~nobody-is-called-so/x"]) == [
        f"{me.pw_dir}/x",
        "~nobody-is-called-so/x",
    ]


def test_the_home_directory_is_found_in_what_is_no_setting_of_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = []
    monkeypatch.setattr(sweep, "sweep_over", lambda over, directory, *_: given.append(directory) or True)
    monkeypatch.setattr(report, "report_runs", lambda _, runs: given.append(runs))
    assert cli.main(["sweep", "--over=objective.beta=[0.1]", "--sweep_dir=~/sweep"]) == 0
    assert cli.main(["report", "~/run", "other"]) == 0
    assert given == [f"{tmp_path}/sweep", [f"{tmp_path}/run", "other"]]


def test_a_limited_process_has_the_place_for_temporary_files(tmp_path: Path, monkeypatch) -> None:
    """Where /tmp cannot be written, libraries that want one would not be imported there."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script = tmp_path / "says.py"
    script.write_text("import json, os\nprint(json.dumps({'place': os.environ.get('TMPDIR')}))\n")
    assert look(script, {}, size=0) == {"place": str(tmp_path)}


def is_no_token(value: ast.expr) -> bool:
    """What `token_for` gives is no token for a name that is not the user's, and else nothing."""
    return isinstance(value, ast.Call) and ast.unparse(value.func) == "token_for"


def test_nothing_overrides_what_the_environment_says():
    """HF_HOME, HF_ENDPOINT, HF_TOKEN and their like are the hub client's to read, TMPDIR is tempfile's."""
    theirs = {"cache_dir", "token", "endpoint", "use_auth_token", "local_files_only"}
    own = {"_State", "state._replace"}  # fields of ours with such a name
    ours = {
        ("snapshot_download", "local_files_only"),  # for an adapter here nothing is fetched
        ("getattr(module, READERS[reader])", "cache_dir"),  # the caller's own, told to a limited process
    }
    for path in (Path(__file__).parents[1] / "dpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) not in own:
                keywords = [keyword for keyword in node.keywords if not is_no_token(keyword.value)]
                given = theirs.intersection(keyword.arg or "" for keyword in keywords)
                given -= {name for function, name in ours if ast.unparse(node.func) == function}
                assert not given, (path, node.lineno, given)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"/(var/)?tmp\b", node.value), (path, node.lineno)


@pytest.mark.parametrize("name", sorted(name for name in vars(config) if name.endswith("Config")))
def test_the_help_of_a_section_is_a_whole_sentence(name: str) -> None:
    """`--help-all` shows the first line of what a class says of itself, and no more."""
    first, *rest = (inspect.getdoc(getattr(config, name)) or "").splitlines()
    assert first.endswith(".")
    assert not rest or rest[0] == ""


@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_null_among_the_data_is_no_source_of_that_name(name, capsys):
    if name == "eval":
        assert read_train_settings(["--config=sentiment_pairs", "--data.eval=null"]).data.eval is None
        return
    with pytest.raises(SystemExit):
        read_train_settings(["--data.train=null"])
    assert "data.train is null" in capsys.readouterr().err
