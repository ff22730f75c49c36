"""The page asks the server, shows its answers, and lights what each pruning point kept."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from tests.support.batching import Gate
from tests.support.browser import browser, needs_browser
from tests.support.http_server import HttpServer
from tests.support.questions import IMAGE_ITEM
from tests.support.waiting import wait_for
from trio_deploy import Pipeline, Request
from trio_deploy.pipeline.request import Generation
from trio_deploy.serve.openai.gate import Doors, digest_of
from trio_deploy.serve.openai.page import page

PAGE = Path(__file__).parents[3] / "trio_deploy" / "serve" / "openai" / "page.html"
SIDE = 96
QUESTIONS = ("what color is the circle ?", "what shape is red ?")

# Places of a panel's canvas that are black as the picture, or of a frame: those of kept patches.
LIT = """return [...document.querySelectorAll(".turn")].map((turn) =>
  [...turn.querySelectorAll("canvas")].map((canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const lit = [];
    for (let place = 0; place < data.length; place += 4) {
      if (data[place] < 150) lit.push(place / 4);
    }
    return { width: canvas.width, height: canvas.height, lit };
  }));"""


def test_the_page_is_served_and_may_run_its_own_program_alone(
    start: Callable[..., HttpServer],
) -> None:
    server = start(doors=Doors([digest_of("secret")]))
    reply = server.ask("GET", "/")  # it asks for the key itself
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    content, headers = page()
    assert reply.content == content == PAGE.read_bytes()
    policy = headers["Content-Security-Policy"]
    assert reply.headers["content-security-policy"] == policy
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2
    assert "unsafe" not in policy and "*" not in policy


def test_the_page_takes_nothing_from_elsewhere_and_puts_no_text_in_as_markup() -> None:
    text = PAGE.read_text()
    assert not re.findall(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
    assert not re.findall(r"""\s(?:style|on\w+)=["']""", text)  # which the policy would not let in


def black(side: int = SIDE) -> bytes:
    """A picture's file; on the page, a dropped patch of it turns light grey."""
    out = io.BytesIO()
    Image.new("RGB", (side, side)).save(out, "PNG")
    return out.getvalue()


def ask(driver: Chrome, question: str) -> None:
    """Ask on the page and wait until the answer has ended."""
    driver.find_element(By.ID, "question").send_keys(question)
    driver.find_element(By.ID, "send").click()
    wait_for(driver.find_element(By.ID, "send").is_enabled)


def shown(driver: Chrome, what: str) -> list[str]:
    """Texts of elements, those of the newest turn first."""
    return [found.text for found in driver.find_elements(By.CSS_SELECTOR, what)]


def answers(pipeline: Pipeline, picture: bytes) -> list[Generation]:
    """Answers to the questions, each with those before it."""
    messages: list[dict[str, Any]] = []
    found = []
    for question in QUESTIONS:
        parts = [*([] if messages else [IMAGE_ITEM]), {"type": "text", "text": question}]
        messages = [*messages, {"role": "user", "content": parts}]
        found.append(pipeline.generate(Request(messages, [picture], max_new_tokens=4)))
        messages = [*messages, {"role": "assistant", "content": found[-1].text}]
    return found


def kept_places(generation: Generation, point: int) -> np.ndarray:
    """Places of a panel, [height, width], that kept tokens cover."""
    places = np.zeros((SIDE, SIDE), bool)
    for token in generation.kept_of_image(0)[point]:
        x0, y0, x1, y1 = (round(edge) for edge in generation.processed[0].boxes[token])
        places[y0:y1, x0:x1] = True
    return places


@needs_browser
@pytest.mark.parametrize("keys", [[], ["secret"]], ids=["open", "with a key"])
def test_a_person_asks_and_sees_what_each_question_kept(
    start: Callable[..., HttpServer], pipeline: Pipeline, tmp_path: Path, keys: list[str]
) -> None:
    doors = Doors([digest_of(key) for key in keys])
    server = start(settings={"default_max_tokens": "4"}, doors=doors)
    (tmp_path / "picture.png").write_bytes(black())
    with browser() as driver:
        driver.get(server.url)
        for key in keys:
            driver.switch_to.alert.send_keys(key)
            driver.switch_to.alert.accept()
        wait_for(lambda: shown(driver, "#model") == ["· tiny"])
        driver.find_element(By.ID, "file").send_keys(str(tmp_path / "picture.png"))
        wait_for(lambda: bool(driver.find_elements(By.CSS_SELECTOR, "#drop img")))
        for question in QUESTIONS:
            ask(driver, question)
        newest_first = answers(pipeline, black())[::-1]
        assert shown(driver, "h2") == list(QUESTIONS[::-1])
        assert shown(driver, ".answer") == [each.text for each in newest_first]
        assert all("tokens/s · kept" in text for text in shown(driver, ".figures"))
        captions = shown(driver, "figcaption")
        assert all(text.startswith("from layer ") for text in captions)
        assert [text.endswith(" new") for text in captions] == [True] * 3 + [False] * 3
        for generation, panels in zip(newest_first, driver.execute_script(LIT), strict=True):
            for point, panel in enumerate(panels):
                lit = np.zeros(panel["width"] * panel["height"], bool)
                lit[panel["lit"]] = True
                expected = kept_places(generation, point)
                assert 0 < expected.sum() < expected.size
                assert np.array_equal(lit.reshape(expected.shape), expected), point
        said = [entry for entry in driver.get_log("browser") if entry["source"] != "network"]
        assert said == []  # its policy refused nothing


@needs_browser
def test_an_error_is_shown_in_the_place_of_the_answer(
    start: Callable[..., HttpServer],
) -> None:
    server = start(settings={"max_prompt_bytes": "10"})
    with browser() as driver:
        driver.get(server.url)
        ask(driver, QUESTIONS[0])
        assert "max_prompt_bytes" in shown(driver, ".answer.error")[0]


@needs_browser
def test_an_answer_that_comes_after_a_new_start_is_no_part_of_it(
    start: Callable[..., HttpServer],
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start(settings={"default_max_tokens": "4"})
    gate = Gate(pipeline, monkeypatch)
    (tmp_path / "picture.png").write_bytes(black())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with browser() as driver:
        driver.get(server.url)
        drop = driver.find_element(By.ID, "file")
        drop.send_keys(str(tmp_path / "picture.png"))
        wait_for(lambda: bool(driver.find_elements(By.CSS_SELECTOR, "#drop img")))
        drop.send_keys(str(tmp_path / "broken.png"))
        wait_for(lambda: shown(driver, "#status") == ["This browser cannot open the picture"])
        driver.find_element(By.ID, "question").send_keys(QUESTIONS[0])
        driver.find_element(By.ID, "send").click()
        gate.held()  # so the picture before the broken one was sent
        driver.find_element(By.ID, "reset").click()
        gate.open.set()
        wait_for(driver.find_element(By.ID, "send").is_enabled)
        assert driver.execute_script("return [messages.length, before.length]") == [0, 0]


@needs_browser
@pytest.mark.parametrize("size", [(1200, 900), (360, 740)], ids=["desktop", "phone"])
def test_nothing_is_wider_than_the_window(
    start: Callable[..., HttpServer], tmp_path: Path, size: tuple[int, int]
) -> None:
    server = start(settings={"default_max_tokens": "4"})
    (tmp_path / "picture.png").write_bytes(black())
    with browser(*size) as driver:
        driver.get(server.url)
        driver.find_element(By.ID, "file").send_keys(str(tmp_path / "picture.png"))
        ask(driver, QUESTIONS[0])
        assert driver.execute_script("return innerWidth") == size[0]
        assert driver.execute_script("return document.documentElement.scrollWidth") == size[0]
