"""Reports are made of nothing but a run directory, show its numbers, and need nothing but themselves."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from written_runs import HOSTILE, write_run

from rayalign.errors import DataError
from rayalign.report.report import write_report
from rayalign.runs.logs import RunLog
from rayalign.runs.record import RunRecord, answers, group
from rayalign.serve.call_book import Answer, CallBook, Question


class Page(HTMLParser):
    """What a browser would load or look up, and what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "data", "poster", "action", "srcset"):
                self.links.append(str(value))

    def handle_data(self, data: str) -> None:
        self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "one")
    assert write_report([folder]) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    for seed in range(3):
        write_run(root / f"sea-{seed}", "sea", seed, last=0.9)
        write_run(root / f"passive-{seed}", "passive", seed, last=0.6)
    page = write_report(sorted(root.glob("*-?")))
    assert page == root / "comparison.html"
    return root


def test_the_page_shows_the_numbers_of_the_record(single: Path) -> None:
    text = Page((single / "report.html").read_text()).text
    assert "win rate before 0.400 [0.309, 0.498]" in text  # Wilson's interval of 40 wins in 100
    assert "win rate after 0.700" in text
    assert "labels spent 100 of a budget of 100" in text
    assert "labels to 0.60 67" in text  # two thirds of the way from 0.4 to 0.7
    assert "labels to 0.75 not reached" in text
    assert "labels for evaluation 300, counted apart" in text
    assert "seconds per batch 2.00" in text
    assert "loop.max_staleness 1" in text


@pytest.mark.parametrize("which", ["single", "several"])
def test_the_page_needs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    root = request.getfixturevalue(which)
    html = next(root.glob("*.html")).read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


@pytest.mark.parametrize("which", ["single", "several"])
def test_ids_are_unique_and_every_reference_inside_the_page_resolves(
    which: str, request: pytest.FixtureRequest
) -> None:
    html = next(request.getfixturevalue(which).glob("*.html")).read_text()
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {t.removeprefix("#") for t in [*page.links, *re.findall(r"url\(([^)]*)\)", html)]} <= set(page.ids)


def test_texts_of_models_are_shown_and_never_executed(single: Path) -> None:
    page = Page((single / "report.html").read_text())
    assert "script" not in page.tags
    assert f"answer 0 {HOSTILE}" in page.text
    assert f"answer 100 {HOSTILE}" in page.text
    assert "answer 50" not in page.text


def test_figures_follow_the_reader_s_colours_and_say_what_they_show(single: Path) -> None:
    html = (single / "report.html").read_text()
    labels = re.findall(r'<svg role="img" aria-label="([^"]*)"', html)
    assert len(labels) == html.count("<svg") == 6
    assert labels[0].startswith("Held-out win rate. Wins plus half the ties")
    assert "currentColor" in html
    assert "var(--rule)" in html


def test_every_figure_is_also_a_png_that_is_not_blank(single: Path) -> None:
    names = {"win_rate", "regret", "learning", "stages", "staleness", "timeline"}
    assert {path.stem for path in (single / "plots").glob("*.png")} == names
    for path in (single / "plots").glob("*.png"):
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[1] > 1000
        assert np.ptp(pixels[..., :3]) > 0.5


def test_the_comparison_s_tables_are_the_hand_computed_ones(several: Path) -> None:
    text = Page((several / "comparison.html").read_text()).text
    assert "passive 3 100 0.400 ± 0.000 0.600 ± 0.000 [0.600, 0.600]" in text
    # From 0.4 on, 0.5 is reached after 0.1 / 0.5 of 100 labels by sea and after 0.1 / 0.2 by passive, in every seed.
    assert "sea 20 [20, 20] 30 [30, 30] 40 [40, 40]" in text
    assert "passive 50 [50, 50] 75 [75, 75] 100 [100, 100] 0 of 3 runs reached it" in text
    assert "Labels saved against passive" in text
    assert "sea 2.50 [2.50, 2.50] (3 pairs) 2.50 [2.50, 2.50] (3 pairs)" in text


def test_runs_are_one_group_if_only_seed_and_world_differ_and_settings_name_the_others(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / "a", "sea", 0, exploration="bai_ts"),
        write_run(tmp_path / "b", "sea", 1, exploration="bai_ts"),
        write_run(tmp_path / "c", "sea", 0, exploration="uncertainty"),
        write_run(tmp_path / "d", "passive", 0),
    ]
    groups = group([RunRecord.read(folder) for folder in folders])
    assert {name: len(runs) for name, runs in groups.items()} == {
        "sea, agent.exploration=bai_ts": 2,
        "sea, agent.exploration=uncertainty": 1,
        "passive": 1,
    }


def test_an_unfinished_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    for name in ("timeline.jsonl", "samples.jsonl"):
        (folder / name).unlink()
    text = Page(write_report([folder]).read_text()).text
    assert "Not finished: run." in text
    assert "labels spent 100" in text
    assert "Timeline" not in text
    assert not (folder / "plots" / "timeline.png").exists()


def test_a_run_that_has_only_just_started_makes_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("agent_name: sea\nenv: x\n")
    text = Page(write_report([tmp_path]).read_text()).text
    assert "win rate before –" in text
    assert "Figures" not in text


def test_the_page_goes_where_it_is_told_to(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    page = write_report([folder], tmp_path / "docs" / "tiny.html")
    assert page == tmp_path / "docs" / "tiny.html"
    assert (tmp_path / "docs" / "plots" / "win_rate.png").exists()
    assert not (folder / "report.html").exists()


def test_the_page_does_not_tell_how_the_machine_is_laid_out(single: Path, several: Path) -> None:
    for page in (single / "report.html", several / "comparison.html"):
        assert str(page.parent.parent) not in page.read_text()


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.* holds no run"):
        write_report([tmp_path / "nothing"])
    with pytest.raises(DataError, match="at least one run directory"):
        write_report([])


def test_answers_pair_the_first_with_the_last(tmp_path: Path) -> None:
    record = RunRecord.read(write_run(tmp_path / "run"))
    (row,) = answers(record)
    assert row["initial"].startswith("answer 0 ")
    assert row["final"].startswith("answer 100 ")
    assert row["reference"] == "theirs"


def test_a_report_shows_what_an_llm_judge_cost_and_how_it_leans(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "LLM judge" not in write_report([run]).read_text()
    book = CallBook(run / "oracle")
    for swapped, probability in ((False, 0.8), (True, 0.6)):
        book.answer(book.reserve("a", 0.25), Question("j", "a", swapped, 0), Answer(probability))
    book.waste(book.reserve("b", 0.25), "unreadable")
    page = write_report([run]).read_text()
    for shown in ("3: 2 read, 1 in vain, 0 free", "0.75, calls in vain", "100.0% of 1 duels asked", "+0.400"):
        assert shown in page, shown


@pytest.mark.parametrize("known", [True, False])
def test_a_report_shows_what_users_were_shown_and_makes_up_no_regret(tmp_path: Path, known: bool) -> None:
    run = write_run(tmp_path / "run")
    assert "Users" not in write_report([run]).read_text()
    assert not (run / "plots" / "online_regret.png").exists()
    log = RunLog(run)
    counts = {"questions": 1200, "offered": 130, "chosen": 100, "skipped": 20, "expired": 7, "open": 3}
    numbers = {**counts, "preferred_share": 0.75} | ({"known": 1000, "cumulative_regret": 512.5} if known else {})
    for batch in range(2):
        shares = {name: value * (batch + 1) / 2 for name, value in numbers.items()}
        log.metrics({"batch": batch, **{f"online/{name}": value for name, value in shares.items()}})
    log.close()
    (run / "result.json").write_text(json.dumps({"labels_spent": 100, "online": numbers}))
    text = Page(write_report([run]).read_text()).text
    shown = ["1,200 answered", "130 offered: 100 chosen, 20 skipped, 7 expired, 3 open", "75.0% of 100 choices"]
    shown.append("512.50 over 1,000 questions, 0.512 a question" if known else "not known")
    for words in shown:
        assert words in text, words
    assert (run / "plots" / "online_regret.png").exists()
