"""The report in a real browser: the slider moves, the numbers are right, nothing complains."""

import shutil

import h5py
import numpy as np
import pytest

from fastpair import jobs

pytest.importorskip("matplotlib")
pytest.importorskip("selenium")

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page over cosines of 50 entities, with the scores and labels in it."""
    folder = tmp_path_factory.mktemp("page")
    rng = np.random.default_rng(4)
    groups = np.arange(50) % 5
    rows = (rng.normal(size=(5, 8))[groups] + 0.9 * rng.normal(size=(50, 8))).astype("f4")
    left, right = rng.integers(0, 50, (2, 400))
    labels = groups[left] == groups[right]
    np.save(folder / "rows.npy", rows)
    with h5py.File(folder / "pairs.h5", "w") as file:
        file["pairs"], file["label"] = np.stack([left, right], 1), labels.astype(np.int8)
    path = folder / "report.html"
    jobs.evaluate("cosine", folder / "rows.npy", folder / "pairs.h5", bootstrap=5, report=path)
    unit = rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return path, np.einsum("ij,ij->i", unit[left], unit[right]), labels


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def shown(browser, name):
    return browser.find_element("css selector", f"[data-show={name}]").text.replace(",", "")


def places(browser):
    names = ("histogram", "roc", "ranked")
    return [browser.find_element("id", f"{name}-mark").rect["x"] for name in names]


def test_the_slider_shows_what_plain_counting_gives(browser, report):
    from selenium.webdriver.common.keys import Keys

    path, scores, labels = report
    browser.get(path.as_uri())
    slider = browser.find_element("id", "threshold")
    assert slider.is_displayed()
    before = places(browser)
    seen = set()
    for steps in (0, 40, 60, -30, 3, -200):
        slider.send_keys(*[Keys.ARROW_RIGHT if steps > 0 else Keys.ARROW_LEFT] * abs(steps))
        text = browser.find_element("css selector", "[data-value=threshold]").text
        threshold = float(text)
        assert slider.get_attribute("aria-valuetext").startswith(f"{text}, precision")
        # Thresholds lie as close to scores as float32 does, so that no pair is between.
        taken = scores >= threshold - 1e-6
        sure = np.abs(scores - threshold) > 2e-6
        hits, wrong = (taken & labels).sum(), (taken & ~labels).sum()
        assert abs(int(shown(browser, "hits")) - hits) <= (~sure).sum()
        assert int(shown(browser, "hits")) + int(shown(browser, "missed")) == labels.sum()
        hits, wrong = int(shown(browser, "hits")), int(shown(browser, "wrong"))
        assert abs(wrong - (taken & ~labels).sum()) <= (~sure).sum()
        assert wrong + int(shown(browser, "left")) == (~labels).sum()
        precision, recall = hits / (hits + wrong), hits / labels.sum()
        assert shown(browser, "precision") == f"{precision:.4f}"
        assert shown(browser, "recall") == f"{recall:.4f}"
        f1 = 2 * precision * recall / (precision + recall)
        assert float(shown(browser, "f1")) == pytest.approx(f1, abs=1e-4)
        seen.add(threshold)
    assert len(seen) == 6
    after = places(browser)
    assert all(abs(a - b) > 5 for a, b in zip(before, after, strict=True))
    browser.find_element("id", "back").click()
    assert places(browser) == pytest.approx(before, abs=0.5)
    assert browser.get_log("browser") == []


def test_expected_pairs_follow_what_is_entered(browser, report):
    path, _, labels = report
    browser.get(path.as_uri())
    for name, value in (("candidates", "20000000"), ("share", "0.5")):
        field = browser.find_element("id", name)
        field.clear()
        field.send_keys(value)
    hits, wrong = int(shown(browser, "hits")), int(shown(browser, "wrong"))
    good = 2e7 * 0.005 * hits / labels.sum()
    bad = 2e7 * 0.995 * wrong / (~labels).sum()
    assert int(shown(browser, "expected-good")) == pytest.approx(good, abs=1)
    assert int(shown(browser, "expected-bad")) == pytest.approx(bad, abs=1)
    assert float(shown(browser, "expected-precision")) == pytest.approx(
        good / (good + bad), abs=1e-4
    )
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_its_window_in_light_and_dark(browser, report, width, scheme, tmp_path):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(report[0].as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper, ink = (
        browser.execute_script(f"return getComputedStyle(document.body)['{name}']")
        for name in ("background-color", "color")
    )
    assert contrast(paper, ink) > 7
    label = browser.find_element("css selector", "svg text").value_of_css_property("fill")
    assert contrast(paper, label) > 7
    browser.get_screenshot_as_file(str(tmp_path / "page.png"))
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert browser.get_log("browser") == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_with_scripts_off_the_numbers_of_one_threshold_stand_there(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report[0].as_uri())
        assert not browser.find_element("id", "threshold").is_displayed()
        assert float(shown(browser, "recall")) > 0
        assert "Scripts are off" in browser.find_element("tag name", "main").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def contrast(first, second):
    """The contrast of two colours after WCAG 2, from 1 to 21."""
    lights = []
    for colour in (first, second):
        parts = [int(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(np.dot(linear, [0.2126, 0.7152, 0.0722]))
    return (max(lights) + 0.05) / (min(lights) + 0.05)
