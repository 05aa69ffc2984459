"""The report's page in a browser: what it draws, what it sorts and shows, and that it asks nobody."""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from page_studies import FINDINGS, QUICK, TABLE, cell, large_study, role, small_study

from jaxgrad.report.comparisons import compare_all
from jaxgrad.report.findings import Finding
from jaxgrad.report.page import LIMIT, write_page
from jaxgrad.report.tables import Column, Table

CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
)
HOSTILE = "</script><img src=x onerror=alert(1)>{{7*7}}\u202eabc\u202c\x00<b>bold</b>\ud800&lt;"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def study():
    return small_study()


@pytest.fixture(scope="module")
def small_page(folder, study):
    write_page(study, [TABLE], FINDINGS, folder / "small.html")
    return folder / "small.html"


def new_browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(DRIVER))


@pytest.fixture(scope="module")
def chromium():
    pytest.importorskip("selenium", reason="selenium is not installed")
    for program in (CHROMIUM, DRIVER):
        if not shutil.which(program):
            pytest.skip(f"{program} is not there: the page's tests in a browser need it")


@pytest.fixture(scope="module")
def browser(chromium):
    driver = new_browser()
    yield driver
    driver.quit()


def wait_for(driver, script, *arguments, seconds=30):
    """The first true value that a script returns."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = driver.execute_script(script, *arguments)
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {script}")


def open_page(driver, path):
    driver.get_log("browser")
    driver.get(path.as_uri())
    wait_for(driver, "const d = document.documentElement.dataset; return d.ready || d.failed")
    assert driver.execute_script("return document.documentElement.dataset.failed ?? null") is None


@pytest.fixture
def page(browser, small_page):
    open_page(browser, small_page)
    return browser


def names_of_traces(driver, panel=0):
    return driver.execute_script(
        "return document.querySelectorAll('#panels .plot')[arguments[0]].data.map((t) => t.uid)",
        panel,
    )


def settle(driver, script):
    """Runs a script, then waits until no plot is being drawn."""
    driver.execute_script(script)
    driver.execute_async_script("setTimeout(arguments[0], 400)")


def errors(driver):
    return [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_it_opens_without_a_complaint_and_draws(page):
    assert page.execute_script("return document.querySelectorAll('#panels .panel').length") == 6
    paths = "return document.querySelectorAll('#panels .scatterlayer path.js-line').length"
    # Four projections, each with a curve and a band.
    assert page.execute_script(paths) == 6 * 8
    assert page.execute_script("return document.getElementById('no-curves').hidden")
    assert errors(page) == []


def test_no_request_leaves_the_page(page):
    entries = page.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert all(name.startswith(("data:", "blob:")) for name in entries)
    sent = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    addresses = [
        item["params"]["request"]["url"]
        for item in sent
        if item["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:", "blob:")) for url in addresses)
    # And could not: the policy stops a script that tries.
    blocked = page.execute_async_script(
        "fetch('https://example.org/').then(() => arguments[0](false), () => arguments[0](true))"
    )
    assert blocked
    assert "Content Security Policy" in errors(page)[0]["message"]


def test_a_projection_is_switched_off_and_on(page):
    everything = ["q-band", "k-band", "v-band", "o-band", "q", "k", "v", "o"]
    assert names_of_traces(page) == everything
    settle(page, "document.getElementById('projection-v').click()")
    assert names_of_traces(page) == [name for name in everything if name[0] != "v"]
    settle(page, "document.getElementById('bands').click()")
    assert names_of_traces(page) == ["q", "k", "o"]
    settle(page, "for (const id of ['projection-v', 'bands']) document.getElementById(id).click()")
    assert names_of_traces(page) == everything


def test_a_setting_and_a_response_are_switched_off(page):
    titles = "return [...document.querySelectorAll('#panels h3')].map((h) => h.textContent)"
    settle(page, "document.getElementById('setting-1').click()")
    settle(page, "document.getElementById('response-1').click()")
    assert page.execute_script(titles) == ["none", "detailed"]
    settle(page, "document.getElementById('layout-projection').click()")
    assert page.execute_script(titles) == ["Q", "K", "V", "O"]
    assert names_of_traces(page) == ["cell-0-band", "cell-2-band", "cell-0", "cell-2"]


def choose(driver, name, value):
    settle(
        driver,
        f"const s = document.getElementById('{name}'); s.value = '{value}';"
        "s.dispatchEvent(new Event('change'))",
    )


@pytest.mark.parametrize("statistic", ["nuclear_norm", "sigma_ratio", "sum_loss_norm"])
def test_the_curves_and_the_hover_are_the_analysis_numbers(page, study, statistic):
    choose(page, "statistic", statistic)
    found = study.curves[1].descriptions[statistic].curve_LP
    plot = page.execute_script(
        "const t = document.querySelectorAll('#panels .plot')[1].data;"
        "return t.slice(4).map((t) => [t.x, t.y, t.customdata])"
    )
    for p, (layers, values, texts) in enumerate(plot):
        assert layers == list(range(12))
        np.testing.assert_allclose(values, found.estimate[:, p], rtol=5.1e-4)
        for layer, text in enumerate(texts):
            shown = [float(part) for part in re.findall(r"[\d.]+", text)]
            expected = [of[layer, p] for of in (found.estimate, found.low, found.high)]
            np.testing.assert_allclose(shown, expected, rtol=1.1e-3)
    # What a person sees who points at layer 3.
    settle(page, "Plotly.Fx.hover(document.querySelectorAll('#panels .plot')[1], {xval: 3}, 'xy')")
    text = page.execute_script(
        "return document.querySelectorAll('#panels .plot')[1].querySelector('.hoverlayer').textContent"
    )
    assert "layer 3" in text
    for _, _, texts in plot:
        assert texts[3] in text


def test_log_and_own_axes(page):
    axis = "return document.querySelectorAll('#panels .plot')[arguments[0]].layout.yaxis"
    assert page.execute_script(axis, 0)["range"] == page.execute_script(axis, 2)["range"]
    settle(page, "for (const id of ['log', 'shared']) document.getElementById(id).click()")
    first, third = page.execute_script(axis, 0), page.execute_script(axis, 2)
    assert first["type"] == "log" and first["range"] != third["range"]


def test_relative_differences_and_similarities(page, study):
    settle(page, "document.getElementById('tab-rd').click()")
    comparison = next(c for c in study.comparisons if c.kind == "response")
    expected = comparison.contrasts["nuclear_norm"].rd_LP.estimate[:, 2]
    values = page.execute_script(
        "return document.querySelector('#panels .plot').data.find((t) => t.uid === 'v').y"
    )
    np.testing.assert_allclose(values, expected, rtol=1e-3)
    settle(page, "document.getElementById('tab-similarity').click()")
    matrix = page.execute_script("return document.querySelectorAll('#panels .plot')[3].data[0].z")
    np.testing.assert_allclose(matrix, study.cells[0].similarity.layer_cosine_PLL[3], atol=5.1e-4)
    assert errors(page) == []


def test_a_table_is_sorted_by_numbers_and_by_text(page):
    column = "return [...document.querySelectorAll('#table-0 tbody tr')].map((r) => r.cells[0].textContent)"
    head = "document.querySelectorAll('#table-0 thead tr:last-child th')[{}]"

    def click(place):
        page.execute_script(f"{head.format(place)}.querySelector('button').click()")
        return page.execute_script(column), page.execute_script(
            f"return {head.format(place)}.getAttribute('aria-sort')"
        )

    assert click(1) == (["detailed", "simplified", "none"], "ascending")
    assert click(1) == (["none", "simplified", "detailed"], "descending")
    # What is undefined comes last in both directions.
    assert click(2) == (["simplified", "detailed", "none"], "ascending")
    assert click(2) == (["detailed", "simplified", "none"], "descending")
    assert click(0) == (["detailed", "none", "simplified"], "ascending")


def test_an_example_is_shown_with_its_response_marked(page, study):
    examples = study.cells[0].examples
    norm_E = examples.values("nuclear_norm").per_example.mean(axis=1)
    order = np.argsort(-norm_E)
    rows = "return [...document.querySelectorAll('#example-list tbody tr')].map((r) => r.dataset.index)"
    assert [int(index) for index in page.execute_script(rows)] == order.tolist()
    chosen = int(order[4])
    settle(page, f"document.querySelector('#example-list tr[data-index=\"{chosen}\"]').click()")
    text = page.execute_script("return document.querySelector('#example pre').textContent")
    assert text == f"{examples.instructions[chosen]}\n{examples.responses[chosen]}"
    marked = page.execute_script("return document.querySelector('#example mark').textContent")
    assert marked == examples.responses[chosen]
    curves = page.execute_script(
        "return [...document.querySelectorAll('#example .plot')].map((p) => p.data.at(-1).y)"
    )
    for name, values in zip(("nuclear_norm", "sigma_ratio", "effective_rank"), curves, strict=True):
        expected = examples.values(name).value_ELP[chosen, :, 3]
        np.testing.assert_allclose(values, expected, rtol=5.1e-4)
    settle(page, "document.querySelector('[data-column=sum_loss_norm]').click()")
    summed_E = examples.values("sum_loss_norm").per_example.mean(axis=1)
    assert int(page.execute_script(rows)[0]) == int(summed_E.argmax())
    word = examples.instructions[chosen].split()[0]
    settle(
        page,
        "const f = document.getElementById('example-filter'); f.value = arguments[0];"
        "f.dispatchEvent(new Event('input'))".replace("arguments[0]", json.dumps(word)),
    )
    found = {int(index) for index in page.execute_script(rows)}
    texts = [
        f"{a}\n{b}".lower() for a, b in zip(examples.instructions, examples.responses, strict=True)
    ]
    assert found == {e for e, text in enumerate(texts) if word.lower() in text}
    assert "1 left out" in page.execute_script(
        "return document.getElementById('example-left-out').textContent"
    )


def test_hostile_text_is_shown_and_runs_nothing(browser, folder):
    count = 3
    cells = [
        cell(
            role(f"M {HOSTILE}", f"D {HOSTILE}", f"S{n} {HOSTILE}"), examples=count, layers=4, seed=n,
            ids=[f"{HOSTILE} {e}" for e in range(count)], instructions=[HOSTILE] * count,
            responses=[f"R {HOSTILE} \u05d0\u05d1"] * count, reason=HOSTILE,
        )
        for n in range(2)
    ]  # fmt: skip
    study = compare_all(
        cells, title=HOSTILE, about=HOSTILE, unavailable={HOSTILE: HOSTILE},
        resampling=QUICK,
    )  # fmt: skip
    tables = [Table("t", HOSTILE, HOSTILE, (Column(HOSTILE, HOSTILE),), ((HOSTILE,),))]
    findings = [Finding(HOSTILE, HOSTILE, (HOSTILE,), "info")]
    write_page(study, tables, findings, folder / "hostile.html")
    open_page(browser, folder / "hostile.html")
    browser.execute_script("window.alert = () => { window.ran = true; }")
    settle(browser, "document.querySelector('#example-list tbody tr').click()")
    settle(browser, "document.getElementById('layout-projection').click()")
    settle(browser, "Plotly.Fx.hover(document.querySelector('#panels .plot'), {xval: 2}, 'xy')")
    settle(browser, "document.getElementById('tab-rd').click()")
    assert browser.execute_script("return document.images.length") == 0
    assert (
        browser.execute_script("return document.querySelectorAll('b b, bdi b, pre b').length") == 0
    )
    assert not browser.execute_script("return window.ran ?? false")
    assert errors(browser) == []
    # U+FFFD stands for what HTML or UTF-8 cannot hold; the script's own texts are kept as they are.
    mended = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    for selector in ("h1", "title", ".about", "#findings h3", "#table-0 td", "#table-0 .name"):
        shown = browser.execute_script(
            "return document.querySelector(arguments[0]).textContent", selector
        )
        assert shown == mended, selector
    marked = browser.execute_script(
        "return document.querySelector('#example mark').textContent.toWellFormed()"
    )
    assert marked.startswith("R </script><img src=x onerror=alert(1)>{{7*7}}\u202eabc")
    assert "{{7*7}}" in browser.execute_script(
        "return document.getElementById('example-list').textContent.toWellFormed()"
    )


def test_one_example_one_layer_no_texts_no_similarity(browser, folder):
    study = compare_all(
        [
            cell(
                role(data="", setting=setting), examples=count, layers=layers, similarity=False,
                instructions=[None] * count, responses=[None] * count,
            )
            for setting, count, layers in (("one", 1, 2), ("two", 3, 1))
        ],
        title="Little", resampling=QUICK,
    )  # fmt: skip
    size = write_page(study, [], [], folder / "little.html")
    assert size.examples == size.all_examples == 4
    open_page(browser, folder / "little.html")
    for tab in ("rd", "similarity", "curves"):
        settle(browser, f"document.getElementById('tab-{tab}').click()")
    # One example has a curve and no band.
    assert names_of_traces(browser) == ["q", "k", "v", "o"]
    assert "no texts" in browser.find_element("css selector", "#example pre").text
    assert errors(browser) == []


def test_without_a_decompressor_the_page_says_so_and_keeps_its_tables(browser, small_page):
    added = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        browser.get(small_page.as_uri())
        shown = browser.find_element("id", "no-curves")
        assert shown.is_displayed() and "DecompressionStream" in shown.text
        browser.execute_script(
            "document.querySelector('#table-0 thead tr:last-child button').click()"
        )
        assert "detailed" in browser.find_element("css selector", "#table-0 tbody").text
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


@pytest.mark.slow
def test_ten_models_and_nine_data_sets_open_in_under_three_seconds(chromium, folder):
    study = large_study()
    size = write_page(study, [TABLE], FINDINGS, folder / "large.html")
    assert size.num_bytes < LIMIT
    assert size.left_out == ()
    assert size.all_examples == 90 * 50 and size.examples >= 90 * 3
    # A browser that has seen the script before is quicker, so each time a new one; the best of
    # three, because the machine does other things as well.
    times, work = [], []
    for _ in range(3):
        driver = new_browser()
        try:
            driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
            open_page(driver, folder / "large.html")
            times.append(driver.execute_script(
                "return performance.getEntriesByName('jaxgrad-first-plot')[0].startTime"
            ) / 1000)  # fmt: skip
            metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            work.append({item["name"]: item["value"] for item in metrics}["TaskDuration"])
            if times[-1] < 3:
                break
        finally:
            driver.quit()
    print(f"first plot after {times} s; the page's thread worked {work} s")
    busy = os.getloadavg()[0] > (os.cpu_count() or 1)
    # On a machine with more to do than it has processors, the clock measures the other work.
    assert min(times) < 3 or (busy and min(work) < 3)
