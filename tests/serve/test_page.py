"""The built-in page, in a real browser."""

import re
import shutil

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from multiexit_engine import Engine, Exit, SamplingParams
from tests.serve.running import serving

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,900",
]
EVIL = '<img src=x onerror="document.title=1">'

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    browser.get(server.url)
    wait(browser, lambda: len(columns(browser)) == 3)
    return browser


def wait(browser, condition):
    WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def columns(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".column")


def fill(browser, name, value):
    element = browser.find_element(By.ID, name)
    element.clear()
    element.send_keys(str(value))


def generate(browser, prompt, max_tokens):
    fill(browser, "prompt", prompt)
    fill(browser, "max-tokens", max_tokens)
    browser.find_element(By.ID, "run").click()
    wait(browser, lambda: browser.find_element(By.ID, "stop").get_attribute("disabled"))


def tokens_of(column):
    return column.find_elements(By.CSS_SELECTOR, ".token")


def raw_text(elements):
    return "".join(element.get_attribute("textContent") for element in elements)


def test_modes_stream_side_by_side_with_their_layers(page, engine):
    generate(page, "The old house stood", 15)
    original, exit_4, contrast = columns(page)
    (wanted,) = engine.generate("The old house stood", SamplingParams(max_new_tokens=15), Exit(4))
    assert raw_text(tokens_of(exit_4)) == wanted.outputs[0].text
    for column, layer in ((original, "8"), (exit_4, "4"), (contrast, "8")):
        assert [t.get_attribute("data-layer") for t in tokens_of(column)] == [layer] * 15
        assert all(0 < float(t.get_attribute("data-confidence")) <= 1 for t in tokens_of(column))
    assert "15 tokens" in exit_4.text and "mean layer 4.0" in exit_4.text
    assert not [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


def test_layers_and_confidences_have_their_colours(page):
    generate(page, "The old", 12)
    original, exit_4, _ = columns(page)
    background = "background-color"
    by_layer = {tokens_of(c)[0].value_of_css_property(background) for c in (original, exit_4)}
    assert len(by_layer) == 2
    page.find_element(By.CSS_SELECTOR, "#colour option[value=confidence]").click()
    by_confidence = {t.value_of_css_property(background) for t in tokens_of(original)}
    assert len(by_confidence) > 4
    assert "Probability" in page.find_element(By.ID, "legend").text


def test_a_prompt_with_markup_is_only_text(page):
    generate(page, EVIL, 3)
    assert raw_text(page.find_elements(By.CSS_SELECTOR, ".prompt")) == EVIL * 3
    assert not page.find_elements(By.CSS_SELECTOR, "img")
    assert page.title == "multiexit_engine"


def test_markup_from_the_model_is_only_text(page):
    page.execute_script("addToken(document.querySelector('.text'), arguments[0], 2, 0.5)", EVIL)
    assert raw_text(tokens_of(columns(page)[0])) == EVIL
    assert not page.find_elements(By.CSS_SELECTOR, "img")
    assert page.title == "multiexit_engine"


def test_modes_can_be_added_written_and_removed(page):
    page.find_element(By.ID, "add").click()
    added = columns(page)[3]
    added.find_element(By.CSS_SELECTOR, ".mode option[value='']").click()
    json = added.find_element(By.CSS_SELECTOR, ".json")
    json.clear()
    json.send_keys('{"mode": "exit", "layer": 3}')
    columns(page)[0].find_element(By.CSS_SELECTOR, ".remove").click()
    generate(page, "The old", 3)
    assert len(columns(page)) == 3
    assert "exits at layers 2, 4, 6, 8" in columns(page)[2].text


def test_stopping_ends_the_requests(page, server):
    fill(page, "max-tokens", 480)
    page.find_element(By.ID, "run").click()
    wait(page, lambda: all(tokens_of(column) for column in columns(page)))
    page.find_element(By.ID, "stop").click()
    wait(page, lambda: "stopped" in columns(page)[0].text)
    server.wait_until_empty(2.0)


def test_a_key_can_be_given(browser):
    with serving(Engine.from_pretrained("demo", kv_cache_memory=2**24), api_key=("k",)) as guarded:
        browser.get(guarded.url)
        wait(browser, lambda: "asks for an API key" in browser.find_element(By.ID, "model").text)
        browser.find_element(By.ID, "key").send_keys("k\t")
        wait(browser, lambda: len(columns(browser)) == 3)


def test_the_page_loads_nothing_from_elsewhere(http):
    response = http.get("/")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", response.text)
    assert "http:" not in response.text and "https:" not in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe-inline'; style" not in response.headers["content-security-policy"]
    assert httpx.get(str(http.base_url)).headers["content-type"] == "text/html; charset=utf-8"
