"""The page of a report with everything on it, in a real browser: 24 actors, deaths, three starts, errors that are HTML."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.report import to_json
from pipelines.report_page import to_html
from tests.browser import Browser, check_page, chromium
from tests.models import make_model
from tests.reports import EVIL, job


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("report")
    return job(directory, make_model(directory / "model"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def test_it_is_read_on_a_screen_and_on_a_phone(report: dict[str, Any], browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_bytes(to_html(report))
    check_page(browser, page, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"screen.png", "phone.png", "dark.png"}
    seen = browser.evaluate("document.body.innerText")
    assert seen.count(EVIL) >= 4  # in an event, a kind of errors, a file's name and the configuration: as text
    for part in (
        "of the roofline",
        "gpu hours",
        "prompt of 5121 tokens",
        "row 1,000",
        "new process (2)",
        "engine died (1)",
    ):
        assert part in seen.lower()
    lanes = browser.evaluate(
        "[...document.querySelectorAll('.lane .name')].map(one => one.textContent).filter(Boolean)"
    )
    assert lanes[:2] == ["starts", "shards"]
    assert {"a6", "a8", "a10"} < set(lanes)  # which died, though they are not the busiest
    assert len(lanes) == 22
    # Bars lie inside of their track, and those of the third start right of the first two.
    places = browser.evaluate(
        "[...document.querySelectorAll('.track b')].map(one => [one.className, one.offsetLeft, one.offsetWidth,"
        " one.parentElement.offsetWidth])"
    )
    assert all(left >= 0 and left + width <= track + 3 for _, left, width, track in places)
    begin = max(left + width for style, left, width, _ in places[:2])
    assert all(left >= begin - 2 for style, left, _, _ in places if style in ("load", "c1"))


def test_a_price_is_multiplied(report: dict[str, Any], browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_bytes(to_html(report))
    browser.open(page, 1280, 844)
    browser.evaluate(
        "(() => { const price = document.getElementById('price'); price.value = '2.5';"
        " price.dispatchEvent(new Event('input')); })()"
    )
    shown = browser.evaluate("document.getElementById('price-out').textContent")
    in_all, million = (float(part.split()[0]) for part in shown.split(", "))
    assert in_all == pytest.approx(2.5 * report["cost"]["hours"], rel=0.01)
    assert million == pytest.approx(2.5 * report["cost"]["hours_per_million_output_tokens"], rel=0.01)
    assert browser.errors == []


def test_nothing_of_the_user_is_markup(report: dict[str, Any]) -> None:
    page = to_html(report).decode()
    assert "<img" not in page
    assert page.count("<script>") == 1  # the page's own
    assert EVIL in json.dumps(report["failed_shards"], ensure_ascii=False).replace('\\"', '"')


def test_names_that_are_no_unicode_do_not_stop_it(report: dict[str, Any]) -> None:
    odd = {**report, "failed_shards": {"part-\udcff.parquet": "torn"}}
    assert b"part-?.parquet" in to_html(odd)
    assert json.loads(to_json(odd))["failed_shards"] == odd["failed_shards"]


def test_a_job_with_nothing_to_show(tmp_path: Path) -> None:
    """Seconds long, no actor heard of: every section says so."""
    report = job(tmp_path, make_model(tmp_path / "model"), actors=0, seconds=0, earlier=0)
    page = to_html(report).decode()
    assert page.count("Too short to plot.") >= 5
    assert "No roofline is known" in page
