"""The report of a run in headless Chromium: it draws itself, plays, reads what is drawn, and is fit for all to use.

Slow, because each test starts a browser; run with ``-m slow``. Skipped where Chromium, its driver or
selenium is missing.
"""

import shutil

import numpy as np
import pytest

from configs import pixel_gru
from seqmnist_jax.analysis.report import build, page, reading, runs
from seqmnist_jax.training.replicas import QUIET
from seqmnist_jax.training.run import build_run
from seqmnist_jax.training.train import train

pytestmark = pytest.mark.slow

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Fifteen seconds suffice for what the page does at a touch.
PATIENCE = 15


@pytest.fixture(scope="module")
def report(tmp_path_factory, cache_dir, compilation_cache):
    """The page of a pixel GRU of the size that configs/pixel_gru.py has, a few steps old."""
    folder = tmp_path_factory.mktemp("browser") / "run"
    config = pixel_gru.get_config()
    config.data.source = "embedded"
    config.train.steps, config.train.eval_every, config.optimizer.warmup_steps = 4, 2, 0
    train(build_run(config), folder, watch=QUIET)
    return build.write([folder])


@pytest.fixture
def open_page(tmp_path):
    """Opens a file in a browser of its own: ``open_page(path, width=1280, dark=False)``."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("Chromium and its chromedriver are not installed")
    browsers = []

    def open_one(path, width=1280, dark=False):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={tmp_path / f'profile{len(browsers)}'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        browsers.append(browser)
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(path.as_uri())
        wait(browser, "document.documentElement.dataset.ready === 'true'")
        return browser

    yield open_one
    for browser in browsers:
        browser.quit()


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, PATIENCE).until(lambda b: b.execute_script(f"return {condition}"), condition)


def errors(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def now(browser):
    return browser.execute_script("return document.querySelector('.now').textContent")


def test_it_is_small_and_seen_at_once(report, open_page):
    assert report.stat().st_size <= 5 * 2**20
    browser = open_page(report)
    # Of three loads the best: another process may have had the cores.
    paints = []
    for _ in range(3):
        browser.refresh()
        wait(browser, "performance.getEntriesByType('paint').length === 2")
        paints += [browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")]
    print("first paint, ms:", paints)
    assert min(paints) <= 1000
    wait(browser, "document.querySelector('.mind').textContent.includes('makes up its mind')")
    assert errors(browser) == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def test_it_plays_smoothly_to_the_end(report, open_page):
    browser = open_page(report)
    wait(browser, "document.querySelector('.mind').textContent !== ''")
    browser.execute_script(
        "const select = document.querySelector('.controls select');"
        "select.value = '2';"
        "const slider = document.querySelector('.controls input'); slider.value = 0;"
        "slider.dispatchEvent(new Event('input'));"
        "window.frames_ = []; const tick = (t) => { window.frames_.push(t); requestAnimationFrame(tick); };"
        "requestAnimationFrame(tick); document.querySelector('.play').click();"
    )
    assert browser.execute_script("return document.querySelector('.play').textContent") == "Pause"
    wait(browser, "document.querySelector('.play').textContent === 'Play'")
    assert now(browser).startswith("Step 784 of 784")
    frames = np.array(browser.execute_script("return window.frames_"))
    rate = 1000 * (len(frames) - 1) / (frames[-1] - frames[0])
    print(f"{rate:.1f} frames a second")
    assert rate >= 30
    assert errors(browser) == []


def test_what_is_drawn_is_read(report, open_page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    browser = open_page(report)
    browser.find_element(By.XPATH, "//button[text()='Draw your own']").click()
    pad = browser.find_element(By.CSS_SELECTOR, ".pad")
    # A 7: across, then down.
    chain = ActionChains(browser, duration=50).move_to_element_with_offset(pad, -60, -80).click_and_hold()
    chain.move_by_offset(120, 0).move_by_offset(-60, 150).release().perform()
    wait(browser, "document.querySelector('.mind').textContent.includes('from then on it says')")
    image = browser.execute_script(
        "const canvas = document.querySelector('.reading'); const { data } ="
        "canvas.getContext('2d').getImageData(0, 0, 28, 28); return Array.from(data).filter((_, k) => k % 4 === 0)"
    )
    image = np.array(image, np.uint8).reshape(28, 28)
    inked = np.argwhere(image > 60)
    assert np.ptp(inked, axis=0).max() in (18, 19, 20)  # the box of 20
    weights = image / image.sum()
    centre = [(weights.sum(1 - axis) * np.arange(28)).sum() for axis in (0, 1)]
    np.testing.assert_allclose(centre, [13.5, 13.5], atol=0.8)
    # The network itself says the same of this image.
    opened = runs.open_run(runs.find(report.parent))
    probabilities = opened.model.read(image[None])[0, -1]
    assert (
        now(browser)
        == f"Step 784 of 784: {probabilities.argmax()} with {100 * probabilities.max():.0f}\N{NO-BREAK SPACE}%"
    )
    assert errors(browser) == []


def test_the_keyboard_suffices(report, open_page):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = open_page(report)
    wait(browser, "document.querySelector('.mind').textContent !== ''")
    slider = browser.find_element(By.CSS_SELECTOR, ".controls input")
    slider.send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert now(browser).startswith("Step 2 of 784: ")
    assert slider.get_attribute("aria-valuetext").startswith("Step 2 of 784: ")
    chart = browser.find_element(By.CSS_SELECTOR, "#curves svg[tabindex]")
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert browser.execute_script("return document.querySelector('#curves output').textContent").startswith("step 4: ")
    is_zoomed = "return !document.querySelector('#curves .legend button').hidden"
    chart.send_keys("+")
    assert browser.execute_script(is_zoomed)
    chart.send_keys("0")
    assert not browser.execute_script(is_zoomed)
    cell = browser.find_element(By.CSS_SELECTOR, ".confusion td[tabindex='0']")
    cell.send_keys(Keys.ARROW_DOWN)
    assert "of class 1" in browser.execute_script("return document.querySelector('.told').textContent")
    browser.find_element(By.XPATH, "//button[text()='Draw your own']").send_keys(Keys.ENTER)
    pad = browser.find_element(By.CSS_SELECTOR, ".pad")
    pad.send_keys(Keys.ARROW_UP, Keys.SPACE, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.SPACE)
    wait(browser, "document.querySelector('.mind').textContent.includes('from then on it says')")
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, select, svg[role], canvas[role]')].filter((node) =>"
        "!(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length)).map((n) => n.outerHTML)"
    )
    assert unnamed == []
    assert browser.execute_script("return [...document.querySelectorAll('h1, main, nav, footer')].length") == 4


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (375, False), (375, True)])
def test_it_fits_the_screen_in_both_colours(report, open_page, width, dark):
    browser = open_page(report, width, dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") == width
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 28)" if dark else "rgb(252, 252, 250)")
    browser.execute_script("document.querySelector('header button').click()")  # light, whatever the system says
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(252, 252, 250)"
    assert errors(browser) == []


def test_the_script_reads_100_digits_as_jax_does(report, open_page):
    """As tests/test_report.py has it in Node, of the whole model and in the browser."""
    browser = open_page(report)
    opened = runs.open_run(runs.find(report.parent))
    model, images = opened.model, opened.images[:100]
    script = (
        page.static("recurrence.js")
        + "const [network, view, images] = arguments; const decoded = decodeNetwork(network);"
        + "return images.map((pixels) => Array.from("
        + "beginReading(decoded, makeSequence(view, pixels)).advance(view.time).probabilities))"
    )
    network, view = reading.describe_network(model), reading.describe_view(model.learner.view)
    browser.set_script_timeout(120)
    told = browser.execute_script(script, network, view, images.reshape(100, -1).tolist())
    np.testing.assert_allclose(np.array(told).reshape(100, 784, 10), model.read(images), atol=1e-4)
