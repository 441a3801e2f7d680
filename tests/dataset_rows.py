"""A few rows of each dataset that the recipes read, with all columns that are published and contents of our own."""

import csv
import json


def _tldr(i):
    return {
        "prompt": f"SUBREDDIT: r/pets\n\nTITLE: Cat number {i}\n\nPOST: My cat sat on mat {i}.\n\nTL;DR:",
        "completion": f" Cat {i} sat.",
    }


def _ultrafeedback(i):
    ask = {"role": "user", "content": f"Name {i} colours."}
    good, bad = ({"role": "assistant", "content": text} for text in (f"red {i}", f"table {i}"))
    return {
        "prompt": ask["content"],
        "prompt_id": f"{i:064x}",
        "chosen": [ask, good],
        "rejected": [ask, bad],
        "messages": [ask, good],
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def _hh(i):
    before = f"\n\nHuman: Hello {i}\n\nAssistant: Hi\n\nHuman: And {i}?\n\nAssistant:"
    return {"chosen": f"{before} Yes {i}", "rejected": f"{before} No {i}"}


def _shp(i):
    return {
        "post_id": f"qt{i}",
        "domain": "askculinary_train",
        "upvote_ratio": 0.98,
        "history": f"How long do I boil {i} eggs?",
        "c_root_id_A": f"a{i}",
        "c_root_id_B": f"b{i}",
        "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110,
        "score_A": 340,
        "score_B": 166,
        "human_ref_A": f"Six minutes {i}",
        "human_ref_B": f"An hour {i}",
        "labels": 1,
        "seconds_difference": 2.0,
        "score_ratio": 2.0481927711,
    }


def _jeopardy(i):
    return {
        "category": "HISTORY",
        "air_date": "2004-12-31",
        "question": f"'Clue number {i}'",
        "value": f"${200 * (i + 1)}",
        "answer": f"Answer {i}",
        "round": "Jeopardy!",
        "show_number": "4680",
        "wrong_answer": f"Mistake {i}",
    }


def _haiku(i):
    return {
        "__hf_index_id": i,
        "source": "twaiku",
        "text": f"Old pond number {i}.\nA frog jumps in.\nSound of water.",
        "text_phonemes": "ow|ld",
        "keywords": f"pond {i}",
        "keyword_phonemes": "paand",
        "gruen_score": 0.6,
        "text_punc": "--",
    }


def _webgpt(i):
    quotes = {"title": ["A page (a.org)"], "extract": [f"extract {i}"]}
    tokens = {"prefix": [1, 2, 3], "completion": [4, i]}
    return {
        "question": {"dataset": "eli5", "id": f"q{i}", "full_text": f"Why is the sky {i}?"},
        "quotes_0": quotes,
        "answer_0": f"Because {i} [1].",
        "tokens_0": tokens,
        "score_0": -0.5,
        "quotes_1": quotes,
        "answer_1": f"Scattering {i} [1].",
        "tokens_1": tokens,
        "score_1": 0.5,
    }


ROWS = {
    "tldr": _tldr,
    "ultrafeedback": _ultrafeedback,
    "hh": _hh,
    "shp": _shp,
    "jeopardy": _jeopardy,
    "haikus": _haiku,
    "webgpt": _webgpt,
}
"""Name -> row number i."""


def write_rows(path, name, count=24):
    """`count` rows as JSON lines, or a JSON list, CSV or Parquet where `path` ends so; returns the path as a text."""
    rows = [ROWS[name](i) for i in range(count)]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
