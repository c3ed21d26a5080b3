"""Several sources in data.train and data.eval: as settings, as rows, and as the data set that they make."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from tiny_model import byte_tokenizer

from dpo.commands.inspect import report_data, with_rows
from dpo.commands.winrate import comparison
from dpo.config import Config, DataConfig, EvaluateConfig, WinrateConfig, heldout_settings
from dpo.data import sources
from dpo.data.parts import Peers
from dpo.data.sources import Part
from dpo.judging.prompts import read_prompts
from dpo.training.places import places
from dpo.training.reading import each_text, read_dataset, read_texts, read_texts_to_draw


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def files(tmp_path):
    """Three files in three layouts, of 30, 20 and 10 rows."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return str(path)

    return [
        write("pairs.jsonl", [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]),
        write(
            "orca.jsonl",
            [{"system": "s", "question": f"o{i}", "chosen": "aye", "rejected": "nay"} for i in range(20)],
        ),
        write(
            "ranked.jsonl",
            [{"query": f"r{i}", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]} for i in range(10)],
        ),
    ]


def mixture(files, **others):
    pairs, orca, ranked = files
    return DataConfig(
        train=[
            {"source": pairs, "weight": 3},
            {"source": orca, "weight": 1, "seed": 5},
            {"source": ranked, "rows": 4, "columns": {"prompt": "query"}},
        ],
        **others,
    )


def quiet(_):
    pass


def refuse(*given: object, **named: object) -> None:
    raise AssertionError(given)


def prompts_of(dataset, tokenizer):
    return [tokenizer.decode(dataset.tokens.prompt(row)) for row in range(len(dataset.tokens))]


def test_layouts_are_mixed_in_their_proportions_and_counted(files, tokenizer):
    dataset = read_dataset(mixture(files), tokenizer, log=quiet)
    assert [tuple(one) for one in dataset.mixture] == [
        ("pairs.jsonl", 30, 30, 30),
        ("orca.jsonl", 20, 20, 10),
        ("ranked.jsonl", 10, 10, 4),
    ]
    assert dataset.read.layouts == {"pair": 30, "orca": 20, "ranking": 10}
    assert dataset.tokens.max_responses == 3
    texts = list(each_text(mixture(files)))
    for row in range(len(dataset.tokens)):
        text = texts[dataset.tokens.origin[row]]
        assert dataset.location(row) == text.location
        said = text.prompt if isinstance(text.prompt, str) else text.prompt[-1]["content"]
        assert said in prompts_of(dataset, tokenizer)[row]
    assert {text.source for text in texts} == {"pairs.jsonl", "orca.jsonl", "ranked.jsonl"}


def test_a_second_reading_and_one_from_another_folder_are_the_same_to_the_bit(files, tokenizer, tmp_path):
    config = mixture(files)
    first = read_dataset(config, tokenizer, log=quiet)
    again = read_dataset(replace(config, token_store="off"), tokenizer, log=quiet)
    moved = []
    assert isinstance(config.train, list)
    for one in config.train:
        assert isinstance(one, dict)
        target = tmp_path / "moved" / one["source"].rpartition("/")[2]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(one["source"], target)
        moved.append({**one, "source": str(target)})
    elsewhere = read_dataset(replace(config, train=moved), tokenizer, log=quiet)
    for other in (again, elsewhere):
        assert other.tokens.fingerprint == first.tokens.fingerprint
        assert other.content == first.content
        assert (other.tokens.origin == first.tokens.origin).all()
        assert (other.tokens.prompt_tokens == first.tokens.prompt_tokens).all()


def test_who_counts_what_is_read_meets_every_preference_under_its_source(files, tokenizer):
    """Kept tokens are read nowhere: then there is nothing to meet."""
    config, met = mixture(files), []
    read_dataset(replace(config, token_store="off"), tokenizer, log=quiet, notice=met.append)
    assert met == list(each_text(config))
    read_dataset(config, tokenizer, log=quiet)
    read_dataset(config, tokenizer, log=quiet, notice=refuse)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_data_report_is_the_same_whether_tokens_are_made_for_it_or_kept(files, tokenizer, mixed):
    data = mixture(files, eval=files[0]) if mixed else DataConfig(train=files[0], eval=files[0])
    config = Config(data=data)
    away = replace(config, data=replace(data, token_store="off"))
    with pytest.MonkeyPatch.context() as patch:
        if not mixed:  # of a mixture not all are drawn
            patch.setattr("dpo.training.reading.each_text", refuse)
        made, _ = report_data(away, tokenizer)
    for _ in range(2):
        assert report_data(config, tokenizer)[0] == made
    drawn = {"pairs.jsonl": 30} | ({"orca.jsonl": 10, "ranked.jsonl": 4} if mixed else {})
    assert made["sources"] == drawn


@pytest.mark.parametrize("store", ["off", None])
def test_two_processes_draw_what_one_does(files, tokenizer, store, tmp_path):
    config = mixture(files, token_store=store or str(tmp_path / "store"))
    alone = read_dataset(config, tokenizer, log=quiet)
    barrier, said = threading.Barrier(2), {}

    def exchange(index, value):
        said[index] = value
        barrier.wait(30)
        both = [said[0], said[1]]
        barrier.wait(30)
        return both

    found = {}

    def run(index):
        peers = Peers(
            index,
            2,
            lambda function: exchange(index, function() if index == 0 else None)[0],
            lambda function: exchange(index, function()),
        )
        found[index] = read_dataset(config, tokenizer, peers=peers, log=quiet)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for dataset in (found[0], found[1]):
        assert dataset.tokens.fingerprint == alone.tokens.fingerprint
        assert dataset.content == alone.content
        assert dataset.mixture == alone.mixture
        assert np.array_equal(dataset.tokens.origin, alone.tokens.origin)


def test_what_is_drawn_is_part_of_what_a_checkpoint_belongs_to(files, tokenizer):
    config = mixture(files)
    contents = {read_dataset(config, tokenizer, log=quiet).content}
    assert isinstance(config.train, list)
    first, *others = config.train
    assert isinstance(first, dict)
    for change in ({"weight": 2}, {"seed": 1}):
        train = [{**first, **change}, *others]
        contents.add(read_dataset(replace(config, train=train), tokenizer, log=quiet).content)
    assert len(contents) == 3
    assert read_texts(config).content in contents


def test_a_malformed_row_is_placed_in_its_file(files, tokenizer):
    with open(files[1], "a", encoding="utf-8") as file:
        file.write('{"system": "s", "question": "q", "chosen": "", "rejected": "no"}\n')
    with pytest.raises(ValueError, match=r"orca\.jsonl:21: field 'chosen'"):
        read_dataset(mixture(files), tokenizer, log=quiet)


OWN, OF_ALL = r"data\.train\[1\]", r"data"
ROW = {"prompt": "p", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "own", "of_all", "message"),
    [
        (ROW, {"columns": {"prompt": "q"}}, {}, rf"{OWN}\.columns reads 'prompt' from it"),
        (ROW, {}, {"columns": {"prompt": "q"}}, rf"{OF_ALL}\.columns reads 'prompt' from it"),
        (
            {**ROW, "tool_list": "t", "context": "c"},
            {},
            {"columns": {"chosen": "chosen"}},
            rf"allowed: its place by {OWN}\.columns, or {OWN}\.ignore_columns \[context\]",
        ),
        ({"x": 1}, {}, {}, rf"or {OWN}\.columns to say which column"),
        ({**ROW, "responses": ["a", "b"], "ranks": [1, 2]}, {}, {}, rf"to name one by {OWN}\.layout"),
        ({"chosen": "aa", "rejected": "bb"}, {}, {}, rf"a prompt, by {OWN}\.columns under another name"),
        (
            {"chosen": "so a", "rejected": "so b", "prompt": None},
            {},
            {},
            rf"or {OWN}\.ignore_columns \[prompt\] where",
        ),
        (
            {"chosen": "so a", "rejected": "so b", "post": "other words"},
            {},
            {},
            rf"its place by {OWN}\.columns, or {OWN}\.ignore_columns \[post\]",
        ),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b", "winner": 1},
            {},
            {},
            rf"names that say it: {OWN}\.columns \{{response_0",
        ),
        (ROW, {}, {"row_layout": "orka"}, r"^data\.row_layout is 'orka'"),
        (ROW, {"columns": {}}, {"row_layout": "orka"}, r"^data\.row_layout is 'orka'"),
        (ROW, {"layout": "pair"}, {"columns": {"a": "x", "b": "x"}}, r"^data\.columns names 'x' twice"),
        (ROW, {"columns": {"a": "x", "b": "x"}}, {}, rf"^{OWN}\.columns names 'x' twice"),
    ],
)
def test_what_is_said_of_a_source_names_its_own_place(files, tokenizer, tmp_path, row, own, of_all, message):
    """The setting that the user gave where it is wrong, and the source's own one where one would help."""
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    names = of_all.get("columns", {})
    first.write_text(json.dumps({names.get(name, name): value for name, value in ROW.items()}) + "\n")
    second.write_text(json.dumps(row) + "\n")
    config = DataConfig(train=[str(first), {"source": str(second), **own}], **of_all)
    with pytest.raises(ValueError, match=message) as raised:
        read_dataset(config, tokenizer, log=quiet)
    assert "train[0]" not in str(raised.value)


def test_a_limit_is_of_each_source(files):
    read = places(mixture(files, max_train=5), heldout=False)
    assert [place.limit for place in read] == [5, 5, 5]
    assert len(list(each_text(mixture(files, max_train=5)))) == 15
    assert Part(rows=5).rows == 5


def test_sources_of_one_name_keep_their_folders(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").touch()
    names = [str(tmp_path / folder / "train.jsonl") for folder in ("a", "b")]
    config = DataConfig(train=[*names, {"source": "owner/name", "split": "x"}])
    assert [place.share and place.share.name for place in places(config, heldout=False)] == [
        *names,
        "owner/name (x)",
    ]
    twice = DataConfig(train=["owner/name", {"source": "owner/name", "seed": 1}])
    assert [place.share and place.share.name for place in places(twice, heldout=False)] == [
        "owner/name [0]",
        "owner/name [1]",
    ]


def test_a_subset_and_a_revision_are_where_hub_data_are_opened():
    config = DataConfig(
        train=[{"source": "owner/name", "subset": "s", "revision": "v2", "split": "train_prefs"}],
        columns={"prompt": "question"},
    )
    (place,) = places(config, heldout=False)
    assert (place.source, place.split) == ("owner/name:s@v2", "train_prefs")
    assert place.reading.columns == (("prompt", "question"),)
    own = DataConfig(train=[{"source": "owner/name", "columns": {}}], columns={"prompt": "question"})
    assert places(own, heldout=False)[0].reading.columns == ()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], r"data\.train is \[\]; allowed is one source or more"),
        ([3], r"data\.train\[0\] is 3; allowed is a source, or a mapping of source, subset"),
        ([{"weight": 1}], r"data\.train\[0\] is \{'weight': 1\}; allowed is a source"),
        (["a", {"source": "b", "wieght": 1}], r"data\.train\[1\]\.wieght is not a setting; allowed: source"),
        ([{"source": "a", "weight": 0}], r"data\.train\[0\]\.weight is 0"),
        ([{"source": "a", "weight": 10**400}], r"data\.train\[0\]\.weight is 1000.*allowed"),
        ([{"source": "a", "weight": float("inf")}], r"data\.train\[0\]\.weight is inf"),
        ([{"source": "a", "weight": float("nan")}], r"data\.train\[0\]\.weight is nan"),
        ([{"source": "a", "rows": 0}], r"data\.train\[0\]\.rows is 0"),
        ([{"source": "a", "rows": 1.5}], r"data\.train\[0\]\.rows is 1\.5; allowed is an integer"),
        ([{"source": "a", "rows": True}], r"data\.train\[0\]\.rows is True; allowed is an integer"),
        ([{"source": "a", "seed": -1}], r"data\.train\[0\]\.seed is -1"),
        ([{"source": "a", "rows": 1, "weight": 1}], r"data\.train\[0\] has rows 1 and weight 1"),
        ([{"source": "a", "columns": {"prompt": 3}}], r"data\.train\[0\]\.columns is .* of names"),
    ],
)
def test_a_wrong_list_is_refused_with_the_place_in_it(train, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(train=train)


def test_an_unknown_layout_is_refused_with_the_place_in_the_list(files):
    config = DataConfig(train=[files[0], {"source": files[1], "layout": "orka"}])
    with pytest.raises(ValueError, match=r"data\.train\[1\]\.layout is 'orka'; allowed are pair"):
        places(config, heldout=False)


def test_a_run_directory_is_named_after_its_sources(files):
    config = DataConfig(train=[{"source": "owner/one:subset@v2", "weight": 1}, *files[1:]])
    assert Config(data=config).run_dir == "runs/one_subset_v2-orca-ranked-dpo"


def test_the_home_directory_may_be_written_short_in_a_list(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = DataConfig(train=["~/a.jsonl", {"source": "~/b.jsonl"}])
    assert [place.source for place in places(config, heldout=False)] == [
        f"{tmp_path}/a.jsonl",
        f"{tmp_path}/b.jsonl",
    ]


def test_a_win_rate_asks_what_is_drawn_for_the_other_figures(files, tokenizer):
    config = replace(mixture(files), train="unused", eval=mixture(files).train)
    prompts = read_prompts(Config(data=config), quiet)
    dataset = read_dataset(config, tokenizer, heldout=True, log=quiet)
    assert [prompt.location for prompt in prompts] == [
        dataset.location(row) for row in range(len(dataset.tokens))
    ]
    assert [prompt.source for prompt in prompts].count("ranked.jsonl") == 4


@pytest.mark.parametrize("row", [{"prompt": "p"}, {"prompt": "p", "chosen": "c", "rejected": "r"}])
def test_rows_of_a_win_rate_are_in_memory_up_to_a_limit(row, tmp_path, monkeypatch):
    """A small gzip file may hold any number of them."""
    line = json.dumps(row).encode() + b"\n"
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(line * 100))
    monkeypatch.setattr(sources, "MAX_WHOLE_BYTES", 50 * len(line))
    config = DataConfig(eval=str(tmp_path / "rows.jsonl.gz"))
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz: more than \d+ bytes of rows.*data\.max_eval"):
        read_prompts(Config(data=config), quiet)
    assert len(read_prompts(Config(data=replace(config, max_eval=50)), quiet)) == 1


@pytest.mark.parametrize("expand", ["all_pairs", "best_worst"])
@pytest.mark.parametrize("share", [{"rows": 7}, {"weight": 1}])
def test_a_win_rate_counts_rows_as_the_run_does(files, tokenizer, expand, share):
    """Seven of the pairs that rankings make, or as many as others leave: their prompts are asked."""
    pairs, _, ranked = files
    share = share if expand == "all_pairs" else {name: min(value, 5) for name, value in share.items()}
    given = [{"source": pairs, "weight": 2}, {"source": ranked, "columns": {"prompt": "query"}, **share}]
    config = DataConfig(train="unused", eval=given, expand=expand)
    prompts = read_prompts(Config(data=config), quiet)
    dataset = read_dataset(config, tokenizer, heldout=True, log=quiet)
    asked = {prompt.location for prompt in prompts}
    assert asked == {dataset.location(row) for row in range(len(dataset.tokens))}
    assert all(len(prompt.responses) == 3 for prompt in prompts if "ranked" in prompt.location)


SIDES = {
    "row_layout": "pair",
    "columns": {"chosen": "good", "rejected": "bad"},
    "ignore_columns": ["context"],
}


@pytest.mark.parametrize("run", [None, Config(data=DataConfig(eval="other.jsonl", columns={"prompt": "q"}))])
def test_evaluation_reads_rows_of_any_columns_with_or_without_a_run(tmp_path, tokenizer, run):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "p", "good": "yes", "bad": "no", "context": "c"}) + "\n")
    given = EvaluateConfig(policy="one", reference="other", data=str(path), **SIDES)
    dataset = read_dataset(heldout_settings(given, run).data, tokenizer, heldout=True, log=quiet)
    assert tokenizer.decode(dataset.tokens.responses(0)[0]).startswith("yes")


def test_a_win_rate_takes_the_same_settings():
    given = WinrateConfig(
        policy="one",
        opponent="other",
        data="own.jsonl",
        output="there",
        chat_template="own.jinja",
        template_kwargs={"enable_thinking": False},
        **SIDES,
    )
    data = heldout_settings(comparison(given), None).data
    assert (data.row_layout, data.columns, data.ignore_columns) == tuple(SIDES.values())
    assert (data.chat_template, data.template_kwargs) == ("own.jinja", {"enable_thinking": False})


def test_what_is_not_given_is_the_runs():
    run = Config(data=DataConfig(eval="e.jsonl", template_kwargs={"a": 1}, **SIDES))
    data = heldout_settings(EvaluateConfig(run="run"), run).data
    assert data == run.data
    reset = heldout_settings(EvaluateConfig(run="run", columns={}, template_kwargs={}), run).data
    assert (reset.columns, reset.template_kwargs) == ({}, {})


@pytest.mark.parametrize("kind", [EvaluateConfig, WinrateConfig])
def test_arguments_that_the_data_give_are_refused(kind):
    with pytest.raises(ValueError, match=r"^template_kwargs has 'messages'; allowed"):
        kind(run="run", template_kwargs={"messages": []})


def test_a_sample_is_of_each_sources_first_rows_and_draws_none_by_number(files, tokenizer):
    config = with_rows(mixture(files, max_eval=3), 6)
    dataset = read_dataset(config, tokenizer, log=quiet)
    assert [(one.kept, one.drawn) for one in dataset.mixture] == [(6, 6), (6, 2), (6, 6)]
    assert (config.max_train, config.max_eval) == (6, 3)


def test_what_is_said_of_a_mixtures_texts_is_of_what_is_drawn(files, tokenizer, tmp_path):
    """Copies, sizes and prompts shared with held-out data: rows that are not trained on count in none."""
    repeated = [*([{"prompt": "o1", "chosen": "same", "rejected": "same"}] * 2)]
    repeated += [{"prompt": f"p{i % 20}", "chosen": "yes", "rejected": "no"} for i in range(40)]
    pairs, orca, _ = files
    copies = tmp_path / "copies.jsonl"
    copies.write_text("".join(f"{json.dumps(row)}\n" for row in repeated))
    heldout = [{"source": pairs, "rows": 9}]
    config = DataConfig(train=[{"source": str(copies), "rows": 3}, {"source": orca, "rows": 5}], eval=heldout)
    report, dataset = report_data(Config(data=config), tokenizer)
    assert dataset.not_drawn is not None
    drawn = {dataset.location(row) for row in range(len(dataset.tokens))}
    left = {dataset.locations[place] for place in dataset.not_drawn}
    dropped = {f"{copies}:1", f"{copies}:2"}
    assert drawn | left | dropped == set(dataset.locations)
    assert not drawn & left
    assert not dropped & left
    assert report["dropped"] == {"identical_responses": 2, "not_drawn": 37 + 15}
    assert (report["preferences"], report["kept"]) == (10, 8)
    assert (report["sources"], report["identical_responses"]) == ({"copies.jsonl": 5, "orca.jsonl": 5}, 2)
    assert report["mixture"]["copies.jsonl"] == {"read": 42, "kept": 40, "drawn": 3}
    texts = {text.location: text.prompt for text in each_text(config)}
    held = {text.prompt for text in read_texts_to_draw(config, heldout=True)}
    prompts = {texts[place] for place in drawn if place.startswith(str(copies))}
    assert (report["overlap"]["heldout"], report["overlap"]["same_prompt"]) == (9, len(prompts & held))
    assert len(held) == 9
    assert held == {text.prompt for text in read_prompts(Config(data=config), quiet)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"enable-thinking": False}, "'enable-thinking'; allowed are names"),
        ({"not": 1}, "'not'; allowed are names"),
        ({"x": [float("inf")]}, "allowed is what JSON can say"),
        ({"day": date(2024, 1, 1)}, "allowed is what JSON can say"),
    ],
)
def test_arguments_that_no_exported_template_can_have_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        DataConfig(template_kwargs=arguments)
