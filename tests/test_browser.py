"""The pages in a browser: what its console says, sorting, narrow screens, and paper."""

import itertools
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from study_runs import write_evaluation, write_run

from medfast.evals.suite import cells
from medfast.report import AttentionExample, ContactExample, write_report
from medfast.study.folder import Record
from medfast.study.page import write_study_page
from medfast.study.plan import METHODS, Run, Study
from medfast.study.results import read_outcome, with_suite

PHONE = 360
# A4 without Chromium's own margins, in CSS pixels.
PAPER = 718


def _write_single(folder):
    """Write a run's report with all of its parts."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    weights = np.full((12, 4, 4), 1 / 16)
    metrics = {"image_to_text_R@1": 0.4, "text_to_image_R@1": 0.3, "median_rank": 7.0}
    history = [
        {"kind": "train", "step": step, "loss": 1 / step, "losses": {"clip": 1 / step}}
        for step in range(1, 50)
    ]
    history += [{"kind": "validation", "step": 49, "metrics": metrics}]
    results = [
        {
            **{"dataset": "phantom", "task": task, "name": name, "split": "test", "n": n},
            **{"metrics": own, "command": "python -m medfast.train " + 40 * "--seed 0 "},
            "ci95": {metric: [value - 0.05, value + 0.05] for metric, value in own.items()},
            "chance": dict.fromkeys(own, 0.1),
        }
        for task, name, n, own in (
            ("retrieval", "", 600, metrics),
            ("zero_shot", "finding", 600, {"accuracy": 0.34}),
            ("two_choice", "side", 1000, {"accuracy": 0.9}),
        )
    ]
    return write_report(
        folder / "report.html",
        name="a-run-with-quite-a-long-name-of-one-word-20260101-000000",
        params={"method": "local", "lr": 1e-3, "exclude": "a/long/path/" + "x" * 80},
        history=history,
        results=results,
        contact=[ContactExample(picture, "A caption. " * 30, 3)] * 3,
        attention=[AttentionExample(picture, [f"word{i}" for i in range(12)], weights)],
        note="A stand-in.",
    )


def _write_study(folder):
    """Write the page of a study of all methods, evaluated on the whole suite."""
    study = Study(tuple(METHODS), "quick", {}, folder / "study")
    runs = [Run(method, "general" if method == "lit" else "scratch") for method in METHODS]
    runs += [Run("clip", init, seed) for init in ("general", "frozen") for seed in range(3)]
    runs += [Run(method, "scratch", seed) for method in ("clip", "sparc") for seed in (1, 2)]
    draw = np.random.default_rng(0).uniform
    for run in runs:
        place = study.runs / run.name
        write_run(place, draw(), draw(0.1, 0.9), [("two_choice", "side", draw())])
        for key, task in cells():
            write_evaluation(place, key, task, draw(0.2, 1.0))
    outcomes = with_suite(study, [read_outcome(study, run) for run in runs])
    seconds = {run.name: draw(10, 99) for run in runs}
    record = Record(folder / "unused", {"seconds": seconds, "jobs": 2})
    return write_study_page(folder / "study.html", study, record, outcomes)


@pytest.fixture(scope="module", params=[_write_single, _write_study], ids=["run", "study"])
def page(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser without a window, its own profile, and nothing to fetch."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    browser = browser or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium (or Chrome) and chromedriver on the PATH")
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    opened = webdriver.Chrome(options=options, service=service)
    yield opened
    opened.quit()


@pytest.fixture
def show(chromium):
    """Open a page as on a screen or on paper; return the browser."""

    def opened(path, width=1280, media="screen"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
        chromium.get_log("browser")  # what an earlier page said
        chromium.get(path.as_uri())
        return chromium

    return opened


def _said(browser):
    return [entry["message"] for entry in browser.get_log("browser")]


def test_the_console_stays_silent(show, page):
    assert _said(show(page)) == []


def test_the_policy_stops_what_reaches_out_and_any_other_script(show, page, tmp_path):
    outward = tmp_path / "outward.html"
    added = '<img src="https://example.invalid/a.png" alt="outside"><script>var ran = 1</script>'
    source = page.read_text(encoding="utf-8")
    outward.write_text(source.replace("</main>", f"{added}</main>"), encoding="utf-8")
    browser = show(outward)
    image, script = _said(browser)
    assert "Content Security Policy" in image
    assert "Content Security Policy" in script
    assert browser.execute_script("return typeof ran") == "undefined"


# Presses the head of each column of each table twice, and tells what it says of itself then and
# what the cells of the column are sorted by: numbers, or words.
_SORTED = """
const key = (cell) => cell.dataset.sort ?? cell.textContent.trim();
return [...document.querySelectorAll("table")].map((table) => {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const press = (head, column) => {
    head.querySelector("button").click();
    const others = heads.filter((other) => other !== head);
    return {
      name: head.textContent,
      way: head.getAttribute("aria-sort"),
      others: others.map((other) => other.getAttribute("aria-sort")),
      values: [...table.tBodies[0].rows].map((row) => key(row.cells[column])),
    };
  };
  return heads.map((head, column) => [press(head, column), press(head, column)]);
});
"""


def _in_order(values, descending):
    """Return whether values that are there are in order, and those that are not come last.

    Python orders punctuation in its own way: words are to begin with letters or digits.
    """
    there = list(itertools.takewhile(lambda value: value != "", values))
    if any(value != "" for value in values[len(there) :]):
        return False
    keys = list(map(_number, there))
    if any(math.isnan(key) for key in keys):
        keys = [value.lower() for value in there]
    return keys == sorted(keys, reverse=descending)


def _number(value):
    try:
        return float(value)
    except ValueError:
        return math.nan


def test_every_table_is_sorted_by_every_column_both_ways(show, page):
    tables = show(page).execute_script(_SORTED)
    assert len(tables) >= 2
    for columns in tables:
        for column in columns:
            for pressed in column:
                assert _in_order(pressed["values"], pressed["way"] == "descending"), pressed
                assert set(pressed["others"]) == {"none"}
            assert sorted(pressed["way"] for pressed in column) == ["ascending", "descending"]
            assert sorted(column[0]["values"]) == sorted(column[1]["values"])


def test_heads_are_reached_and_pressed_by_the_keyboard(show, page):
    browser = show(page)
    region, head = browser.find_elements("css selector", ".scroll, .scroll th")[:2]
    region.send_keys("\t")
    button = browser.switch_to.active_element
    assert button == head.find_element("tag name", "button")
    button.send_keys(" ")
    assert head.get_attribute("aria-sort") == "ascending"


def test_every_picture_is_described(show, page):
    nameless = show(page).execute_script(
        "return [...document.querySelectorAll('img, svg')].filter(p => !p.ariaHidden && "
        "!(p.alt || p.ariaLabel)).length"
    )
    assert nameless == 0


def test_a_phone_scrolls_down_only_and_wide_tables_within_themselves(show, page):
    browser = show(page, width=PHONE)
    root = "document.documentElement"
    assert browser.execute_script(f"return {root}.clientWidth") == PHONE
    assert browser.execute_script(f"return {root}.scrollWidth") <= PHONE
    wide = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter("
        "region => region.scrollWidth > region.clientWidth).length"
    )
    assert wide >= 1


def test_paper_shows_everything(show, page):
    browser = show(page, width=PAPER, media="print")
    hidden = browser.execute_script(
        "const cut = (part) => part.scrollHeight > part.clientHeight + 1 &&"
        "  getComputedStyle(part).overflowY !== 'visible';"
        "return [...document.querySelectorAll('main > :not(nav) *')].filter("
        "(part) => !part.checkVisibility() || cut(part)).map((part) => part.outerHTML)"
    )
    assert hidden == []
    outside = browser.execute_script(
        "return [...document.querySelectorAll('table, svg, img, pre')].filter(part => "
        f"part.getBoundingClientRect().right > {PAPER}).map(part => part.outerHTML)"
    )
    assert outside == []


def test_colours_keep_their_contrast_in_the_dark(show, page):
    browser = show(page)
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        paper, ink = browser.execute_script(
            "const style = getComputedStyle(document.body);"
            "return [style.backgroundColor, style.color]"
        )
        light, dark = sorted((_luminance(paper), _luminance(ink)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 7
        assert (_luminance(paper) > 0.5) == (scheme == "light")


def _luminance(colour):
    """Return the relative luminance of an rgb() colour, as WCAG defines it."""
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
