"""Prompts out of files: everything good is read, everything bad is named before anything is started."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from dataset_rows import ROWS, write_rows
from random_policies import save_tokenizer

from rayalign.env import make_world
from rayalign.env.formats import FORMATS
from rayalign.env.prompts import Prompts
from rayalign.errors import ConfigError, DataError


@pytest.fixture(scope="module", autouse=True)
def cluster():
    own = not ray.is_initialized()
    if own:
        ray.init(num_cpus=2, include_dashboard=False)
    yield
    if own:
        ray.shutdown()


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(world):
    return sorted(prompt.text for prompt in [*world.check_prompts(), *world.heldout(10**6)])


PLAIN = [
    {"prompt": f"Tell me about {i}.", "reference": f"It is {i}.", "chosen": "yes", "rejected": "no", "other": [i]}
    for i in range(40)
]


def test_plain_prompts_carry_reference_and_pair(tmp_path):
    world = Prompts(jsonl(tmp_path / "p.jsonl", PLAIN), heldout=0)
    assert texts(world) == sorted(row["prompt"] for row in PLAIN)
    prompt = next(
        p
        for p in world.check_prompts()
        if "7." in p.text and "37" not in p.text and "17" not in p.text and "27" not in p.text
    )
    assert (prompt.reference, prompt.pair, prompt.token_ids, dict(prompt.meta)) == (
        "It is 7.",
        ("yes", "no"),
        (),
        {"preferred": 0},
    )
    assert not world.has_truth and world.default_policy() is None


@pytest.mark.parametrize("write", ["json", "parquet"])
def test_a_relative_path_is_read_wherever_ray_was_started(write, tmp_path, monkeypatch):
    jsonl(tmp_path / "p.json", PLAIN)
    pq.write_table(pa.Table.from_pylist(PLAIN), tmp_path / "p.parquet")
    monkeypatch.chdir(tmp_path)
    assert texts(Prompts(f"p.{write}", heldout=0)) == sorted(row["prompt"] for row in PLAIN)


def test_chat_prompts_keep_their_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"question": chat, "responses": ["a", "b"], "reference": [{"role": "assistant", "content": "Hello"}]},
        {"question": [{"role": "user", "content": "Bye", "name": "ann"}]},
    ]
    world = Prompts(jsonl(tmp_path / "p.jsonl", rows), heldout=0, prompt_column="question")
    first, second = sorted(world.check_prompts(), key=lambda p: len(p.text), reverse=True)
    assert first.meta["messages"] == chat and first.text == "system: Be brief.\nuser: Hi"
    assert (first.reference, first.pair) == ("Hello", ("a", "b"))
    assert second.text == "Bye" and second.pair is None and second.reference is None


def test_texts_that_look_like_dates_and_numbers_stay_texts(tmp_path):
    rows = [{"prompt": "2020-01-01"}, {"prompt": "12"}, {"prompt": "2020-01-01 10:00:00"}, {"prompt": "true"}]
    assert texts(Prompts(jsonl(tmp_path / "p.jsonl", rows), heldout=0)) == sorted(row["prompt"] for row in rows)


@pytest.mark.parametrize("kind", ["parquet", "parquet folder", "saved", "saved splits", "dataset"])
def test_every_format_gives_the_same_prompts(tmp_path, kind):
    source, settings = tmp_path / "p", {}
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "other"} for row in PLAIN])
    if kind == "parquet":
        source = tmp_path / "p.parquet"
        pq.write_table(table, source)
    elif kind == "parquet folder":
        source.mkdir()
        pq.write_table(table.slice(0, 15), source / "0.parquet")
        pq.write_table(table.slice(15), source / "1.parquet")
    else:
        datasets = pytest.importorskip("datasets")
        loaded = datasets.Dataset.from_list(PLAIN)
        if kind == "saved":
            loaded.save_to_disk(source)
        elif kind == "saved splits":
            datasets.DatasetDict({"mine": loaded}).save_to_disk(source)
            settings["split"] = "mine"
        else:
            source = loaded
    world = Prompts(source, **settings)
    same = Prompts(jsonl(tmp_path / "p.jsonl", PLAIN))
    assert world.heldout(100) == same.heldout(100)
    assert [world.prompt(i) for i in range(80)] == [same.prompt(i) for i in range(80)]


def test_stream_is_a_new_order_each_epoch_and_the_same_order_each_time(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PLAIN)
    world, again, other = Prompts(path), Prompts(path), Prompts(path, seed=1)
    n = len(world.check_prompts())
    first, second = ([world.prompt(i).id for i in range(start, start + n)] for start in (0, n))
    assert sorted(first) == sorted(second) and len(set(first)) == n and first != second
    assert first == [again.prompt(i).id for i in range(n)]  # asked in another order than above, too
    assert first != [other.prompt(i).id for i in range(n)]
    assert pickle.loads(pickle.dumps(world)).prompt(n + 3) == world.prompt(n + 3)


def test_heldout_share_is_kept_apart_and_survives_more_data(tmp_path):
    small = Prompts(jsonl(tmp_path / "s.jsonl", PLAIN), heldout=0.25)
    large = Prompts(jsonl(tmp_path / "l.jsonl", [*PLAIN, {"prompt": "one more"}, PLAIN[0]]), heldout=0.25)
    assert len(small.heldout(99)) == 10 and len(small.check_prompts()) == 30
    assert not {p.id for p in small.heldout(99)} & {p.id for p in small.check_prompts()}
    assert len({p.id for p in small.heldout(99)} - {p.id for p in large.heldout(99)}) <= 1
    assert small.heldout(3) == small.heldout(99)[:3]


def test_heldout_file_wins_over_training_prompts(tmp_path):
    world = Prompts(jsonl(tmp_path / "p.jsonl", PLAIN), heldout=str(jsonl(tmp_path / "h.jsonl", PLAIN[:5])))
    assert [p.text for p in world.heldout(99)] == [row["prompt"] for row in PLAIN[:5]]
    assert len(world.check_prompts()) == 35


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "is empty"),
        (["", "  "], "is empty"),
        ([{"prompt": "a"}, "{not json"], r"line 2 is not valid JSON"),
        ([{"prompt": "a"}, "", '["b"]'], r"line 3 is a JSON list"),
        ([{"prompt": "a"}, {"text": "b"}], r"line 2: field 'prompt' is missing"),
        ([{"prompt": "a"}, {"prompt": 5}], r"line 2: field 'prompt' is 5"),
        ([{"prompt": " "}], r"line 1: field 'prompt' is empty"),
        ([{"prompt": [{"role": "user"}]}], r"line 1: field 'prompt' has the message"),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}],
            r"line 2: field 'prompt' is a list, but in line 1",
        ),
        ([{"prompt": "a", "reference": 3}], r"line 1: field 'reference' is 3"),
        ([{"prompt": "a", "chosen": "b"}], r"line 1: field 'chosen' is there, but 'rejected' is missing"),
        ([{"prompt": "a", "responses": ["b"]}], r"line 1: field 'responses' is \['b'\]; it must be a list of two"),
        (['{"prompt": "\\ud800"}'], r"line 1: field 'prompt' is not valid Unicode"),
    ],
)
def test_bad_lines_are_named_when_the_world_is_made(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        Prompts(jsonl(tmp_path / "p.jsonl", rows))


def test_bad_sources_are_named_when_the_world_is_made(tmp_path):
    table = pa.table({"question": ["a"]})
    pq.write_table(table, tmp_path / "p.parquet")
    pq.write_table(table.slice(0, 0).rename_columns(["prompt"]), tmp_path / "empty.parquet")
    (tmp_path / "broken.parquet").write_text("no parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.tsv").write_text("prompt\na\n")
    (tmp_path / "p.csv").write_text("question\na\n")
    for source, message in {
        "missing.jsonl": "does not exist",
        "missing.parquet": "does not exist",
        "p.parquet": "no column 'prompt', but 'question'. Set env.prompt_column",
        "empty.parquet": "has no rows",
        "broken.parquet": "can't be read as Parquet",
        "folder": "neither Parquet files nor a saved dataset",
        "missing.csv": "does not exist",
        "missing.json": "does not exist",
        "p.csv": "no column 'prompt', but 'question'. Set env.prompt_column",
        "p.tsv": "ends in '.tsv'",
    }.items():
        with pytest.raises(DataError, match=message):
            Prompts(tmp_path / source)
    with pytest.raises(ConfigError, match=r"env\.path is not set"):
        make_world("rayalign/Prompts-v0")
    with pytest.raises(ConfigError, match=r"env\.heldout=1\.5"):
        Prompts("x.jsonl", heldout=1.5)
    with pytest.raises(ConfigError, match=r"env\.pth.*Did you mean 'path'"):
        make_world("rayalign/Prompts-v0", pth="x")


def test_a_bad_row_of_a_binary_format_is_named_by_its_number(tmp_path):
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"row 2: field 'prompt' is missing"):
        Prompts(tmp_path / "p.parquet").prompt(0)


def test_settings_typed_on_a_command_line_are_read_by_their_types(tmp_path):
    path = str(jsonl(tmp_path / "p.jsonl", PLAIN))
    typed = make_world("rayalign/Prompts-v0", path=path, heldout="0.25", limit="7", every_pair="false", seed="3")
    meant = Prompts(path, heldout=0.25, limit=7, seed=3)
    assert typed.heldout(99) == meant.heldout(99) and typed.check_prompts() == meant.check_prompts()
    assert make_world("rayalign/Prompts-v0", path=path, heldout=path).heldout_source.path == path
    with pytest.raises(ConfigError, match=r"env\.limit='some' must be int"):
        make_world("rayalign/Prompts-v0", path=path, limit="some")


def test_holding_out_everything_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no training prompt left"):
        Prompts(jsonl(tmp_path / "p.jsonl", PLAIN[:1])).prompt(0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_known_dataset_reads_the_same_out_of_every_kind_of_file(tmp_path, name):
    endings = ["jsonl", "json", "parquet"] + ["csv"] * (name != "webgpt")  # its question is an object
    lines, *others = (Prompts(write_rows(tmp_path / f"p.{end}", name), format=name) for end in endings)
    assert len(lines.check_prompts()) + len(lines.heldout(99)) == 24
    for other in others:
        assert lines.check_prompts() == other.check_prompts() and lines.heldout(99) == other.heldout(99)


def test_csv_keeps_line_breaks_quotes_and_what_looks_like_a_number_and_nothing_is_nothing(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('\ufeffprompt,other,reference\n"Two\nlines, ""quoted""",1,yes\n\n12,,\nNA,x,2020-01-01\n')
    found = {p.text: p.reference for p in Prompts(path, heldout=0).check_prompts()}
    assert found == {'Two\nlines, "quoted"': "yes", "12": None, "NA": "2020-01-01"}


def test_a_json_list_holds_chats_and_pairs_as_lines_do(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Hi {i}", "name": "ann"}], "responses": ["a", "b"], "extra": {"n": i}}
        for i in range(9)
    ]
    (tmp_path / "p.json").write_text("\n  " + json.dumps(rows, indent=2))
    lines, listed = Prompts(jsonl(tmp_path / "p.jsonl", rows), heldout=0), Prompts(tmp_path / "p.json", heldout=0)
    assert len(listed.check_prompts()) == 9 and listed.check_prompts() == lines.check_prompts()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", "is empty: its list has no rows"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": "b"]', r"begins like a list, but is not valid JSON: .*line 2"),
        ("p.json", '[{"prompt": "a"}, "b"]', r"row 2 is a JSON str, not an object"),
        ("p.json", '[{"prompt": "a"}, {"text": "b"}]', r"row 2: field 'prompt' is missing"),
        ("p.json", '[{"prompt": "a", "reference": 3}]', r"row 1: field 'reference' is 3"),
        ("p.csv", "", "is empty. Its first line names the columns"),
        ("p.csv", "prompt\n", "is empty: no row follows its header"),
        ("p.csv", "prompt,prompt\na,b\n", "has two columns 'prompt'"),
        ("p.csv", 'prompt,reference\n"a\nb",c\nd,e,f\n', r"line 4 has 3 fields, but the header names 2"),
        ("p.csv", "prompt,reference\na,b\n,c\n", r"line 3: field 'prompt' is missing"),
        ("p.csv", 'prompt\n"a\n', r"line 2 is not valid CSV"),
        ("p.csv", "prompt,responses\na,b\n", r"line 2: field 'responses' is 'b'; it must be a list of two"),
        ("p.csv", b"prompt\n\xff\n", "is not UTF-8"),
    ],
)
def test_bad_rows_of_lists_and_csv_are_named_when_the_world_is_made(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        Prompts(tmp_path / name)


def test_bad_fields_of_known_datasets_are_named_with_their_row(tmp_path):
    clue = ROWS["jeopardy"](0) | {"value": 200}
    (tmp_path / "p.json").write_text(json.dumps([ROWS["jeopardy"](1), clue]))
    with pytest.raises(
        DataError, match=r"row 2: field 'value' is 200; it must be a text. Its format is that of the 217"
    ):
        Prompts(tmp_path / "p.json", format="jeopardy")
    with pytest.raises(DataError, match=r"line 1: field 'value' is 200; it must be a text"):
        Prompts(jsonl(tmp_path / "p.jsonl", [clue]), format="jeopardy")
    path = Path(write_rows(tmp_path / "p.csv", "shp"))
    path.write_text(path.read_text().replace(",340,", ",many,", 1))
    with pytest.raises(DataError, match=r"line 2: field 'score_A' is 'many'; it must be a number"):
        Prompts(path, format="shp")


def test_a_known_dataset_reads_the_same_out_of_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([ROWS["webgpt"](i) for i in range(24)])
    assert Prompts(rows, format="webgpt").check_prompts() == (
        Prompts(write_rows(tmp_path / "p.jsonl", "webgpt"), format="webgpt").check_prompts()
    )


def test_held_out_prompts_may_be_another_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": PLAIN[:30], "test": PLAIN[25:]}
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    both.save_to_disk(tmp_path / "p")
    world = Prompts(tmp_path / "p", heldout_split="test")
    assert [p.text for p in world.heldout(99)] == [row["prompt"] for row in PLAIN[25:]]
    assert len(world.check_prompts()) == 25, "what is held out is no training prompt"
    with pytest.raises(DataError, match=r"has no split 'tset', but 'train', 'test'"):
        Prompts(tmp_path / "p", heldout_split="tset")


def test_only_the_first_prompts_are_taken_where_there_is_a_limit(tmp_path):
    world = Prompts(jsonl(tmp_path / "p.jsonl", PLAIN), heldout=0, limit=7)
    assert [p.text for p in world.check_prompts()] == [row["prompt"] for row in PLAIN[:7]]
    assert {world.prompt(i).text for i in range(50)} == {row["prompt"] for row in PLAIN[:7]}


def test_every_pair_of_a_prompt_is_a_training_prompt_if_asked_for(tmp_path):
    rows = [
        {"prompt": f"p{i}", "chosen": f"good {j}", "rejected": "bad"} for i in range(10) for j in (0, 1, 1)
    ]  # each prompt with two different pairs, one of them twice
    path = jsonl(tmp_path / "p.jsonl", rows)
    assert len(Prompts(path, heldout=0.2).check_prompts()) == 8
    world = Prompts(path, heldout=0.2, every_pair=True)
    training, heldout = world.check_prompts(), world.heldout(99)
    assert len(training) == 16 and len({p.id for p in training}) == 16 and len(heldout) == 2
    assert not {p.text for p in training} & {p.text for p in heldout}


def test_rows_with_too_many_tokens_are_left_out(tmp_path):
    save_tokenizer(tmp_path / "tokenizer")
    rows = [{"prompt": "w1 " * n, "chosen": "w2 " * m, "rejected": "w3"} for n in (1, 2, 3) for m in (1, 5)]
    settings = {"path": jsonl(tmp_path / "p.jsonl", rows), "heldout": 0, "every_pair": True}
    settings["tokenizer"] = str(tmp_path / "tokenizer")
    found = Prompts(**settings, max_prompt_tokens=2).check_prompts()
    assert [len(p.text.split()) for p in found] == [1, 1, 2, 2]
    found = Prompts(**settings, max_prompt_tokens=2, max_row_tokens=6).check_prompts()
    assert [(len(p.text.split()), len(p.pair[0].split())) for p in found] == [(1, 1), (1, 5), (2, 1)]
    with pytest.raises(ConfigError, match=r"count tokens of env\.tokenizer, which is not set"):
        Prompts(settings["path"], max_prompt_tokens=2)
    with pytest.raises(DataError, match=r"env\.tokenizer='.*nowhere' can't be loaded"):
        Prompts(**{**settings, "tokenizer": str(tmp_path / "nowhere")}, max_prompt_tokens=2).prompt(0)


def test_a_format_knows_its_columns_and_says_which_is_missing(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", PLAIN)
    with pytest.raises(ConfigError, match=r"env\.format='hh' knows its columns"):
        Prompts(path, format="hh", prompt_column="question")
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"has no column 'chosen', but 'prompt'\..*Anthropic/hh-rlhf"):
        Prompts(tmp_path / "p.parquet", format="hh")
    with pytest.raises(DataError, match=r"line 1: field 'score_A' is None.*stanfordnlp/SHP"):
        Prompts(path, format="shp")
