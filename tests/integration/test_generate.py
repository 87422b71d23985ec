"""The job end to end on a real local Ray: every row once and in order, killed or not, whatever the format."""

from __future__ import annotations

import csv
import json
import os
import socket
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.browser import check_page, chromium
from tests.integration.jobs import (
    SLOW,
    journalled_rows,
    kill_everything,
    leases,
    parts,
    report,
    run,
    start,
    suspend_when,
    table_of,
    write_prompts,
)

ROWS = 240


def test_every_row_once_in_order_with_its_columns(undisturbed: Path, dataset: Path) -> None:
    result, source = table_of(undisturbed), pq.read_table(dataset)
    assert result.select(source.column_names).equals(source)
    assert result.schema.names == [
        *source.column_names,
        "generated_text",
        "finish_reason",
        "num_input_tokens",
        "num_generated_tokens",
        "error",
    ]
    errors = result["error"].to_pylist()
    assert {number: error for number, error in enumerate(errors) if error} == {
        7: "prompt is null",
        8: "prompt is empty",
    }
    assert result["num_generated_tokens"].to_pylist() == [0 if error else 24 for error in errors]
    assert [text is None for text in result["generated_text"].to_pylist()] == [error is not None for error in errors]
    schemas = [pq.read_schema(path) for path in sorted(undisturbed.glob("part-*.parquet"))]
    assert len(schemas) > 5
    assert all(schema.equals(schemas[0], check_metadata=True) for schema in schemas)


def test_report_and_success(undisturbed: Path) -> None:
    summary = report(undisturbed)
    result = table_of(undisturbed)
    assert summary["status"] == "finished"
    assert (summary["rows"], summary["planned_rows"], summary["error_rows"]) == (ROWS, ROWS, 2)
    assert summary["errors"] == {"prompt is null": 1, "prompt is empty": 1}
    assert summary["generated_tokens"] == sum(result["num_generated_tokens"].to_pylist()) == 238 * 24
    assert summary["input_tokens"] == sum(result["num_input_tokens"].to_pylist())
    assert summary["config"]["sampling"]["max_tokens"] == 24
    assert {"python", "ray", "torch", "nanovllm"} <= set(summary["versions"])
    assert summary["this_start"]["samples"]
    assert [(e["file"], e["row"], e["message"]) for e in summary["error_samples"]] == [
        ("a.parquet", 7, "prompt is null"),
        ("a.parquet", 8, "prompt is empty"),
    ]
    # All that engines did is told, also what they did after their last report.
    assert sum(actor["generated_tokens"] for actor in summary["this_start"]["actors"]) == 238 * 24
    assert summary["this_start"]["generated_tokens"] == 238 * 24
    assert (
        0 < summary["cost"]["loading_hours"] < summary["cost"]["engine_hours"] < summary["this_start"]["seconds"] / 3600
    )
    assert {"begin", "actor", "end"} <= {event["kind"] for event in summary["events"]}
    assert "CPU" in summary["roofline"]["reason"]
    page = (undisturbed / "_run" / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert json.loads((undisturbed / "_SUCCESS").read_text()) == {"rows": ROWS, "files": len(parts(undisturbed))}
    assert sorted(path.name for path in (undisturbed / "_run").iterdir()) == [
        "config.yaml",
        "history",
        "input.parquet",
        "job.json",
        "ledger",
        "plan.parquet",
        "report.html",
        "report.json",
        "schema.parquet",
    ]


def test_the_page_in_a_browser(undisturbed: Path, tmp_path: Path) -> None:
    with chromium() as browser:
        check_page(browser, undisturbed / "_run" / "report.html", tmp_path)
        seen = browser.evaluate("document.body.innerText")
        assert "a.parquet row 8: prompt is empty" in seen
        assert "engine ready" in seen


def test_a_second_start_says_so(undisturbed: Path, workplace: Path) -> None:
    began = time.monotonic()
    before = parts(undisturbed)
    done = run(["--config", str(undisturbed / "_run" / "config.yaml"), "run.replicas=3"], workplace)
    assert done.returncode == 0
    assert done.stdout.startswith("already finished: 240 rows")
    assert time.monotonic() - began < 15
    assert parts(undisturbed) == before


def test_killed_it_ends_the_same(undisturbed: Path, workplace: Path, dataset: Path, chat_model_dir: Path) -> None:
    output = workplace / "killed"
    arguments = ["--model", str(chat_model_dir), "--input", str(dataset), "--output", str(output), *SLOW]
    process = start(arguments, workplace)
    suspend_when(lambda: len(parts(output)) >= 2 and journalled_rows(output) >= 5, process)
    kill_everything(process)
    assert leases(output)
    assert not (output / "_SUCCESS").exists()
    assert len(parts(output)) < len(parts(undisturbed))
    journalled = journalled_rows(output)
    assert journalled > 0

    done = run([*arguments, "run.replicas=2"], workplace)
    assert done.returncode == 0
    assert "resuming:" in done.stdout
    assert f"taking over from host {socket.gethostname()}, pid {process.pid}, since" in done.stdout
    assert parts(output) == parts(undisturbed)
    summary = report(output)
    now = summary["this_start"]
    assert now["resumed_rows"] > 0
    assert now["reused_rows"] == journalled
    # What this start generated is what was neither committed nor journalled.
    assert now["generated_tokens"] <= (ROWS - now["resumed_rows"] - now["reused_rows"]) * 24
    assert [start["status"] for start in summary["starts"]] == ["running", "finished"]  # the first without a word
    assert [event["start"] for event in summary["events"] if event["kind"] == "begin"] == [0, 1]
    whole = report(undisturbed)
    for figure in (
        "rows",
        "error_rows",
        "input_tokens",
        "generated_tokens",
        "errors",
        "finish_reasons",
        "input_lengths",
        "error_samples",
    ):
        assert summary[figure] == whole[figure]


def test_a_bad_shard_fails_alone_and_is_tried_again(workplace: Path, chat_model_dir: Path) -> None:
    source, output = workplace / "torn", workplace / "torn-out"
    rows = write_prompts(source, {"a.parquet": 40, "b.parquet": 40, "c.parquet": 40}, compression="none")
    victim = source / "b.parquet"
    good, stamp = victim.read_bytes(), victim.stat().st_mtime_ns
    victim.write_bytes(good[:4] + bytes(600) + good[604:])  # the footer stays readable, the pages do not
    os.utime(victim, ns=(stamp, stamp))
    arguments = ["--model", str(chat_model_dir), "--input", str(source), "--output", str(output)]
    arguments += ["sampling.max_tokens=4", "engine.max_num_seqs=40", "run.shards_in_flight=2"]
    done = run(arguments, workplace)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "shards failed" in last
    assert "b.parquet" in last
    assert not (output / "_SUCCESS").exists()
    finished = set(table_of(output)["id"].to_pylist())
    assert finished >= {*range(40), *range(80, 120)}
    assert len(finished) < rows
    assert report(output)["status"] == "failed"
    before = parts(output)

    victim.write_bytes(good)
    os.utime(victim, ns=(stamp, stamp))
    done = run(arguments, workplace)
    assert done.returncode == 0
    assert table_of(output)["id"].to_pylist() == list(range(rows))
    assert {name: data for name, data in parts(output).items() if name in before} == before
    assert report(output)["this_start"]["resumed_rows"] == len(finished)


def test_a_damaged_row_group_among_hive_directories(workplace: Path, chat_model_dir: Path) -> None:
    source, output = workplace / "hive", workplace / "hive-out"
    table = pa.table({"id": range(60), "prompt": [f"row {n}" for n in range(60)]})
    for day in ("1", "02"):
        for text in ("say%20hello", "__HIVE_DEFAULT_PARTITION__"):
            (source / f"day={day}" / f"text={text}").mkdir(parents=True)
            pq.write_table(table, source / f"day={day}" / f"text={text}" / "ü 1.parquet", row_group_size=20)
    victim = source / "day=1" / "text=say%20hello" / "ü 1.parquet"
    chunk = pq.read_metadata(victim).row_group(1).column(0)
    data = bytearray(victim.read_bytes())
    data[chunk.dictionary_page_offset : chunk.dictionary_page_offset + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    victim.write_bytes(data)
    arguments = ["--model", str(chat_model_dir), "--input", str(source), "--output", str(output)]
    arguments += ["prompt.column=text", "sampling.max_tokens=2", "run.shard_rows=20", "engine.max_num_seqs=80"]
    done = run(arguments, workplace)
    assert done.returncode == 1
    assert "1 of 12 shards failed, first day=1/text=say%20hello/ü 1.parquet rows 20 to 39: " in done.stderr
    result = table_of(output)
    assert result.schema.names[:4] == ["id", "prompt", "day", "text"]
    assert result.schema.types[2:4] == [pa.int64(), pa.string()]
    expected = [
        (number, day, text)
        for day, text in ((2, None), (2, "say hello"), (1, None), (1, "say hello"))
        for number in range(60)
        if (day, text) != (1, "say hello") or not 20 <= number < 40
    ]
    assert list(zip(*(result[name].to_pylist() for name in ("id", "day", "text")), strict=True)) == expected
    assert [error for _, _, text in expected for error in [None if text else "prompt is null"]] == result[
        "error"
    ].to_pylist()

    pq.write_table(table, victim, row_group_size=20)  # good again, but another file than the job was begun with
    done = run(arguments, workplace)
    assert done.returncode == 2
    assert "belongs to another job: input file 'day=1/text=say%20hello/ü 1.parquet' has changed since" in done.stderr


def test_dry_run_shows_prompts_and_writes_nothing(workplace: Path, chat_model_dir: Path) -> None:
    source, output = workplace / "in.csv", workplace / "out-csv"
    with source.open("w", newline="") as stream:
        csv.writer(stream).writerows([["n", "text"], ["1", 'first "row"'], ["2", ""], ["3", "third\nrow"]])
    done = run(
        [
            "--model",
            str(chat_model_dir),
            "--input",
            str(source),
            "--output",
            str(output),
            "prompt.column=text",
            "--dry-run",
        ],
        workplace,
    )
    assert done.returncode == 0
    assert "3 rows in 1 csv files" in done.stdout
    assert "columns  n string, text string, generated_text string, finish_reason string" in done.stdout
    assert "tokens: 'first \"row\"'" in done.stdout
    assert "an error row: prompt is empty" in done.stdout
    assert "tokens: 'third\\nrow'" in done.stdout
    assert done.stderr == ""
    assert not output.exists()
