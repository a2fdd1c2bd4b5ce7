"""The report without a browser: reading, thinning, wording and refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Callback, GradientAccumulationScheduler, Trainer
from engine.report import NotARunError, page, read
from engine.report.__main__ import main
from engine.report.facts import duration, facts, history, status, time_split
from engine.report.page import medians, thin
from tests.kit import ROOT
from tests.kit.killed import Full
from tests.kit.processes import run
from tests.kit.run_files import record, write

# Thinning


def test_a_spike_in_100_000_updates_is_kept() -> None:
    values = np.full(100_000, 2.0)
    values[61_803], values[27_182], values[500:600] = 1e6, -1e6, np.nan
    kept = thin(values)
    assert len(kept) <= 2002
    assert {0, 27_182, 61_803, 99_999} <= set(kept.tolist())


@given(st.lists(st.floats(-1e9, 1e9) | st.just(float("nan")), min_size=1, max_size=300), st.integers(1, 20))
def test_thinned_points_have_the_extremes_of_all(values: list[float], bins: int) -> None:
    column = np.array(values)
    kept = thin(column, bins)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) <= max(2 * bins + 2, min(len(values), 2 * bins))
    finite, left = column[~np.isnan(column)], column[kept][~np.isnan(column[kept])]
    if len(finite):
        assert (left.min(), left.max()) == (finite.min(), finite.max())
    places, middle = medians(column, min(bins, len(values)))
    assert len(places) == len(middle) == min(bins, len(values))
    assert np.nanmax(middle, initial=-np.inf) <= finite.max(initial=-np.inf)


# Reading


class Stops(Callback):
    """Asks for an end, or fails, at an update."""

    def __init__(self, update: int, number: int) -> None:
        self.update, self.number = update, number

    def on_update_end(self, trainer: Trainer) -> None:
        if trainer.update == self.update:
            if not self.number:
                raise RuntimeError("the disk is on <fire>")
            os.kill(os.getpid(), self.number)


def fit(folder: str, number: int) -> None:
    stops = Stops(7 if number else 9, number)  # a hook comes before the loggers: update 9 has no record
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2})
    options = {"max_epochs": 2, "validate_every_n_updates": 3, "run_dir": folder}
    Trainer("ddp", micro_batch_size=2, callbacks=[scheduler, stops], **options).fit(Full())


def test_a_run_tells_what_happened_to_it(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    run(2, fit, folder, signal.SIGTERM)
    assert status(read(folder)) == "at update 7: interrupted by SIGTERM, and saved"
    with pytest.raises(Exception, match="the disk is on <fire>"):
        run(2, fit, folder, 0)
    assert status(read(folder)) == "at update 9: failed: RuntimeError: the disk is on <fire>"
    run(2, fit, folder, signal.SIGTERM)  # it is past update 7 by now
    told = read(folder)
    assert [(place, what.split(":")[0]) for _, place, what in history(told)] == [
        ("update 0", "started on 2 processes"),
        ("update 7", "interrupted by SIGTERM, and saved"),
        ("update 7", "resumed on 2 processes"),
        ("update 9", "failed"),
        ("update 7", "resumed on 2 processes"),
        ("update 9", "finished"),
    ]
    assert history(told)[4][2].endswith("; repeats 1 update made after the checkpoint")
    assert told.updates["update"].tolist() == list(range(1, told.length + 1))
    assert told.validations["update"].tolist()[:2] == [3, 6]
    assert told.validations["samples"].tolist()[:2] == told.updates["samples"][[2, 5]].tolist()
    assert facts(told)["Micro-batches, K"] == "1, 2"
    split, last = time_split(told), told.events[-1]["seconds"]
    assert set(split) >= {"validation", "saving, while training waited"}
    assert sum(split.values()) == pytest.approx(max(last, sum(split.values()) - split["other"]))


def test_what_a_resume_undid_is_not_counted_twice(tmp_path: Path) -> None:
    at = {"epoch": 0, "samples": 0, "time": "now"}
    events = [
        {"event": "start", "update": 0, "seconds": 0.0, **at},
        {"event": "validation", "update": 2, "seconds": 5.0, "took": 1.0, **at},
        {"event": "validation", "update": 4, "seconds": 9.0, "took": 1.0, **at},
        {"event": "resume", "update": 2, "seconds": 5.0, **at},
        {"event": "validation", "update": 4, "seconds": 9.5, "took": 1.5, **at},
        {"event": "end", "update": 4, "seconds": 12.0, **at},
    ]
    split = time_split(read(write(tmp_path / "run", [record(n) for n in range(1, 5)], events)))
    assert list(split.values()) == [8.0, 2.5, 1.5]


def test_within_updates_the_saves_of_each_start_have_told(tmp_path: Path) -> None:
    at = {"epoch": 0, "samples": 0, "time": "now"}
    events = [
        {"event": "start", "update": 0, "seconds": 0.0, **at},
        {"event": "save", "update": 1, "seconds": 2.0, "spent": {"waiting for data": 1.0, "step": 1.0}, **at},
        {"event": "save", "update": 2, "seconds": 4.0, "spent": {"waiting for data": 1.0, "step": 3.0}, **at},
        {"event": "save", "update": 3, "seconds": 5.0, "spent": {"waiting for data": 9.0, "step": 9.0}, **at},
        {"event": "resume", "update": 2, "seconds": 4.0, **at},
        {"event": "save", "update": 4, "seconds": 9.0, "spent": {"waiting for data": 3.0, "step": 1.0}, **at},
        {"event": "end", "update": 4, "seconds": 12.0, **at},
    ]
    split = time_split(read(write(tmp_path / "run", [record(n) for n in range(1, 5)], events)))
    assert split == {"updates: waiting for data": 4.0, "updates: step": 4.0, "other": 4.0}


@pytest.mark.parametrize(
    "damage",
    ['{"update": 4, "loss": 0.', "\0\0\0\n", "[1, 2]\n", '{"update": "4", "loss": 1}\n', "[" * 100_000 + "\n"],
    ids=["half a line", "zeros", "a list", "no number", "depth"],
)
def test_a_damaged_line_is_left_out_and_told(tmp_path: Path, damage: str) -> None:
    folder = write(tmp_path / "run", [record(1), record(2), record(3)])
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write(damage)
    told = read(folder)
    assert told.updates["update"].tolist() == [1, 2, 3]
    assert told.notes == ["metrics.jsonl: 1 of 4 lines could not be read and are left out."]
    assert told.notes[0] in page([told])


def test_numbers_that_no_plot_can_show_are_gaps(tmp_path: Path) -> None:
    records = [record(1, loss=None), record(2, loss=float("nan")), record(3, loss=10**400), record(4, note="hm")]
    told = read(write(tmp_path / "run", records))
    assert np.isnan(told.updates["loss"]).tolist() == [True, True, True, False]
    assert "note" not in told.updates
    assert "NaN" not in page([told]).partition('id="data">')[2].partition("</script>")[0]


@pytest.mark.parametrize("odd", [10**400, 1e308, float("nan"), float("-inf"), "caf\udce9", [10**400]])
def test_odd_numbers_and_texts_anywhere_make_a_page(tmp_path: Path, odd: Any) -> None:
    names = ("undone", "processes", "strategy", "took", "seconds", "spent", "reason", "time")
    events = [{"event": kind, "update": 1, **dict.fromkeys(names, odd)} for kind in ("start", "save", "fail")]
    records = [record(1), {**record(2), "effective_batch": odd, "samples_per_second": 5e-324}]
    folder = write(tmp_path / "run", records, events, micro_batch_size=odd)
    assert main([str(folder)]) == 0
    assert "</html>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", None], ids=["empty", "half", "a list", "missing"])
def test_a_run_without_a_configuration_or_an_update(tmp_path: Path, content: str | None) -> None:
    folder = write(tmp_path / "run", [])
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    html = page([read(folder)])
    assert "No update is on record yet." in html
    assert "config.json could not be read." in html


def test_a_folder_that_is_not_of_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotARunError, match=r"nowhere' is not a folder: name the folder of a run"):
        read(tmp_path / "nowhere")
    with pytest.raises(NotARunError, match=r"has no metrics.jsonl; name a folder that a run has written"):
        read(tmp_path)
    write(tmp_path / "runs" / "1", [])
    with pytest.raises(NotARunError, match=r"has no metrics.jsonl; the newest in it: .*runs/1\.$"):
        read(tmp_path / "runs")


# The page


def test_runs_of_different_shapes_are_compared(tmp_path: Path) -> None:
    validated = {"update": 3, "epoch": 0, "validation/<b>accuracy": 0.5}
    first = write(tmp_path / "a" / "run", [record(n) for n in (1, 2, 3)] + [validated], seed=0, shuffle=True)
    second = write(tmp_path / "b" / "run", [record(1, temperature=300.0, skipped=1)], seed=1, shuffle=True)
    empty = write(tmp_path / "none", [])
    runs = [read(folder) for folder in (first, second, empty)]
    html = page(runs)
    data = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert [run["name"] for run in data["runs"]] == [str(first), str(second), "none"]  # two have the same name
    names = [plot["name"] for plot in data["plots"]]
    assert names[:2] == ["loss", "validation/<b>accuracy"]
    assert names[-1] == "skipped"
    assert "weight" not in names  # it is the effective batch
    assert data["runs"][0]["series"]["validation/<b>accuracy"] == {"y": [0.5], "update": [3], "samples": [24]}
    assert data["runs"][1]["marks"][0]["text"] == ["update 1 skipped"]
    assert data["end"] == {"update": 3, "samples": 24}
    shown = html.partition("Settings that differ")[2].partition("<details>")[0]
    assert re.findall("<tr><th>(.*?)</th>", shown) == ["seed", "shuffle"]


def drawn(*folders: Path) -> list[str]:
    data = page([read(folder) for folder in folders]).partition('id="data">')[2].partition("</script>")[0]
    return [plot["name"] for plot in json.loads(data, parse_constant=pytest.fail)["plots"]]


def test_what_never_changes_is_a_figure_and_no_plot(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [record(n, lr=0.003, grad_norm=n) for n in (1, 2, 3)])
    other = write(tmp_path / "other", [record(n, lr=0.004, grad_norm=n) for n in (1, 2, 3)])
    assert drawn(one) == ["loss", "grad_norm"]
    assert facts(read(one))["Learning rate"] == "0.003"
    assert "Gradient norm before clipping" not in facts(read(one))
    assert drawn(one, other) == ["loss", "lr", "grad_norm"]  # it differs between them


def test_a_loss_that_never_changes_is_still_a_plot(tmp_path: Path) -> None:
    records = [record(n, loss=0.5) for n in (1, 2)] + [{"update": 2, "epoch": 0, "validation/loss": 0.25}]
    assert drawn(write(tmp_path / "run", records)) == ["loss", "validation/loss"]


def test_the_processes_are_those_of_the_updates(tmp_path: Path) -> None:
    resumed = {"event": "resume", "update": 2, "processes": 4, "strategy": "ddp: 4 x cpu, gloo"}
    events = [{"event": "start", "update": 0, "processes": 2, "strategy": "ddp: 2 x cpu, gloo"}, resumed]
    wide = {"effective_batch": 128, "accumulate_grad_batches": 2}
    records = [record(1, **wide), record(2, **wide)]
    told = facts(read(write(tmp_path / "resumed", records, events, micro_batch_size=32)))
    assert (told["Processes, P"], told["Micro-batches, K"], told["Effective batch"]) == ("2", "2", "128")
    records += [record(3, effective_batch=128, accumulate_grad_batches=1)]
    told = facts(read(write(tmp_path / "continued", records, events, micro_batch_size=32)))
    assert (told["Processes, P"], told["Micro-batches, K"], told["Effective batch"]) == ("2, 4", "2, 1", "128")


def test_what_took_no_time_has_no_row(tmp_path: Path) -> None:
    events = [
        {"event": "start", "update": 0, "seconds": 0.0},
        {"event": "validation", "update": 1, "seconds": 2.0, "took": 1e-5},
        {"event": "end", "update": 1, "seconds": 4.0, "took": 0.0},
    ]
    html = page([read(write(tmp_path / "run", [record(1)], events))])
    assert "<td>0.0 %</td>" not in html
    assert html.count("<td>50.0 %</td>") == 2


@pytest.mark.parametrize("odd", ["9" * 400, "NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "[]", "null"])
def test_odd_numbers_and_text_end_no_report(tmp_path: Path, odd: str) -> None:
    folder = write(tmp_path / "run", [record(1)])
    names = [*record(1), "note", "validation/loss", "\\ud800"]
    lines = [json.dumps(record(2)).replace("}", f', "{name}": {odd}}}') for name in names]
    (folder / "metrics.jsonl").write_text("\n".join(["", *lines, json.dumps(record(3)), ""]))
    fields = ("undone", "samples", "seconds", "took", "processes", "strategy", "reason", "time", "spent", "update")
    kinds = ("start", "resume", "interrupt", "fail", "validation", "save", "end")
    events = [f'{{"event": "{kind}", "update": 1, "{field}": {odd}}}\n' for kind in kinds for field in fields]
    (folder / "events.jsonl").write_text("".join(events))
    for name in ("summary.json", "config.json"):
        others = ("seconds", "versions", "bytes_reduced_per_update", "micro_batch_size", "task")
        (folder / name).write_text(json.dumps(dict.fromkeys(others, 0)).replace("0", odd))
    assert main([str(folder)]) == 0
    assert "update 1" in (folder / "report.html").read_text()
    assert "loss" in drawn(folder)  # as JSON, which has no Infinity


def test_names_are_text_and_never_html(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    events = [{"event": "fail", "update": 1, "reason": evil}, {"event": "start", "update": 1, "strategy": evil}]
    folder = write(
        tmp_path / "<img src=x onerror=alert(3)>", [record(1, **{evil: 1.0})], events, task=evil, **{evil: evil}
    )
    evil_run, other = read(folder), read(write(tmp_path / "other", [record(1)]))
    for html in (page([evil_run]), page([evil_run, other])):
        assert "<script>alert" not in html
        assert "<img" not in html


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.1234, 59, 90, 3599.9, 5400)] == [
        "0.123 s",
        "59 s",
        "1.5 min",
        "1 h 0 min",
        "1 h 30 min",
    ]


# The command line


def test_the_command_line_writes_the_page_into_the_run_s_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [record(1)])
    done = subprocess.run(
        [sys.executable, "-m", "engine.report", str(folder)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{folder / 'report.html'}\n", "")
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "metrics.jsonl", "report.html"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is not a folder"),
        (["run", "run"], "say where the page goes with --output FILE"),
        (["run", "--output", "no/where.html"], "the page could not be written"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", [record(1)])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_plotly_is_asked_for_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    folder = write(tmp_path / "run", [record(1)])
    with pytest.raises(SystemExit):
        main([str(folder)])
    assert "pip install 'tally-engine[report]'" in capsys.readouterr().err
    assert not (folder / "report.html").exists()
