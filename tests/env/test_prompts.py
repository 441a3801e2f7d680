"""Prompts out of files: everything good is read, everything bad is named before anything is started."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from rayalign.env import make_world
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
    (tmp_path / "p.csv").write_text("prompt\na\n")
    for source, message in {
        "missing.jsonl": "does not exist",
        "missing.parquet": "does not exist",
        "p.parquet": "no column 'prompt', but 'question'. Set env.prompt_column",
        "empty.parquet": "has no rows",
        "broken.parquet": "can't be read as Parquet",
        "folder": "neither Parquet files nor a saved dataset",
        "p.csv": "ends in '.csv'",
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


def test_holding_out_everything_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no training prompt left"):
        Prompts(jsonl(tmp_path / "p.jsonl", PLAIN[:1])).prompt(0)
