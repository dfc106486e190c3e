"""The HTML page shows every trial, escapes what it shows, and fetches nothing."""

import html
import re

from tests.unit.nights import NIGHT
from tuner.report.page import html_page
from tuner.report.summary import summary


def test_the_page_is_self_contained_and_shows_every_trial() -> None:
    page = html_page(NIGHT, "night <1>", summary(NIGHT, "night", "Finished.", {}))
    assert "<title>night &lt;1&gt;</title>" in page
    assert page.count("Plotly.newPlot(") >= 2
    # plotly.js is there, once, and nothing is fetched.
    assert page.count("plotly.js v") == 1
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=", page)
    table = page[page.index("<h2>Every trial</h2>") :]
    assert table.count("<tr>") == len(NIGHT)
    assert html.escape("a <b>tag</b>") in table
    assert "<b>tag</b>" not in page


def test_a_page_without_a_measurement_has_no_plot() -> None:
    page = html_page([NIGHT[1]], "night", "Stopped.")
    assert "Plotly" not in page
    assert "rank 3 ran out of memory" in page
