"""The page at / in headless Chromium, against a real server with SmolLM2 and adapters of the bank.

Not covered: browsers other than Chromium, and what a screen reader says aloud.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Response, Route, expect, sync_playwright
from serving import running_server

from edgelora import bases
from edgelora.adapters.merge import merge_adapters

pytestmark = pytest.mark.clients

BANK = Path(__file__).parents[2] / "models" / "bank" / "adapters"
SOURCES = {
    "task1481_gene_extraction_bc2gm_dataset": 0.75,
    "task212_logic2text_classification": -0.25,
    "task229_arc_answer_generation_hard": 0.5,
}
SMOLLM2 = bases.resolve("smollm2-135m-instruct")
BASE = "smollm2"
QUESTION = "Name three colours."
PHONE = {"width": 360, "height": 740}
# Collects the length of the answer whenever the page changes.
LENGTHS = """() => {
  window.lengths = [];
  const length = () => document.querySelector(".text")?.textContent.length ?? 0;
  const options = { childList: true, subtree: true };
  new MutationObserver(() => window.lengths.push(length())).observe(document.body, options);
}"""


@dataclass(frozen=True)
class Exchange:
    """One request of the page: the messages sent and the text that came."""

    messages: list[str]
    text: str


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter combined from three of the bank."""
    path = tmp_path_factory.mktemp("page") / "mix.gguf"
    paths = [BANK / f"{name}.gguf" for name in SOURCES]
    merge_adapters(paths, list(SOURCES.values()), path)
    return path


@pytest.fixture(scope="module")
def url(mix: Path) -> Iterator[str]:
    """A server of SmolLM2, the combined adapter and one of the bank."""
    plain = BANK / "task229_arc_answer_generation_hard.gguf"
    with running_server(SMOLLM2, [mix, plain], base_id=BASE, n_ctx=2048, n_slots=2) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium."""
    program = shutil.which("chromium")
    if program is None:
        pytest.fail("no chromium on the PATH: install Debian's (apt-get install chromium)")
    expect.set_options(timeout=60_000)  # a busy machine
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """The loaded page; what the console says is an error, and so is a request to elsewhere."""
    yield from watched(browser, url)


@pytest.fixture
def phone(browser: Browser, url: str) -> Iterator[Page]:
    """The same on a screen of 360 pixels."""
    yield from watched(browser, url, viewport=PHONE, has_touch=True, is_mobile=True)


def watched(browser: Browser, url: str, expected: str = "^$", **options: Any) -> Iterator[Page]:
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert [text for text in said if not re.search(expected, text)] == []
    assert {urlsplit(each).netloc for each in asked} == {urlsplit(url).netloc}


def choose(page: Page, model: str, other: str = "", max_tokens: int = 24) -> None:
    page.get_by_label("Model", exact=True).select_option(model)
    page.get_by_label("Compare with").select_option(other)
    set_longest(page, max_tokens)


def set_longest(page: Page, max_tokens: int) -> None:
    if not page.get_by_label("Longest answer").is_visible():
        page.get_by_text("Options").click()
    page.get_by_label("Longest answer").fill(str(max_tokens))


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")


def exchange(page: Page, question: str, *models: str) -> list[Exchange]:
    """Ask by keyboard; for each model, what was sent and what came over the wire."""
    with contextlib.ExitStack() as stack:
        awaited = [
            stack.enter_context(page.expect_response(functools.partial(is_answer_of, model)))
            for model in models
        ]
        ask(page, question)
    exchanges = []
    for reply in (each.value for each in awaited):
        sent = json.loads(reply.request.post_data or "")
        events = [line[6:] for line in reply.text().splitlines() if line.startswith("data: {")]
        deltas = [c["delta"] for event in events for c in json.loads(event)["choices"]]
        text = "".join(delta.get("content") or "" for delta in deltas)
        exchanges.append(Exchange([m["content"] for m in sent["messages"]], text))
    return exchanges


def is_answer_of(model: str, reply: Response) -> bool:
    sent = reply.request.post_data or ""
    return reply.url.endswith("/v1/chat/completions") and json.loads(sent)["model"] == model


def answers(page: Page) -> list[str]:
    """Every answer on the page, once all are whole."""
    expect(page.locator(".text[aria-busy=true]")).to_have_count(0)
    return [text or "" for text in page.locator(".text").all_text_contents()]


def test_loads_without_anything_from_elsewhere(page: Page, url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as reply:
        policy = reply.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy and "style-src 'self';" in policy
    options = page.get_by_label("Model", exact=True).locator("option")
    names = [BASE, "mix", "task229_arc_answer_generation_hard", "auto: what fits the message"]
    expect(options).to_have_text(names)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.get_by_role("button", name="New conversation")).to_be_hidden()


def test_an_answer_streams(page: Page) -> None:
    choose(page, BASE, max_tokens=48)
    page.evaluate(LENGTHS)
    [first] = exchange(page, QUESTION, BASE)
    assert answers(page) == [first.text] != [""]
    lengths = page.evaluate("lengths")
    assert len(set(lengths)) > 5 and lengths == sorted(lengths)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert re.fullmatch(
        r"(complete|cut at 48 tokens) · \d+ tokens · \d+\.\d tokens/s",
        page.locator(".meta").inner_text(),
    )


def test_it_is_the_answer_of_the_api(browser: Browser) -> None:
    """The streamed one on the page is the one that is asked for without streaming.

    On a server of its own and with few tokens: what other requests left in the KV cache could
    change float sums.
    """
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": BASE, "messages": messages, "temperature": 0, "max_tokens": 24}
    with running_server(SMOLLM2, base_id=BASE) as url:
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            whole = json.load(reply)["choices"][0]["message"]["content"]
        for page in watched(browser, url):
            expect(page.get_by_label("Compare with")).to_be_hidden()
            set_longest(page, 24)
            ask(page, QUESTION)
            assert answers(page) == [whole]


@pytest.mark.parametrize("by", ["Escape", "the button"])
def test_stop(page: Page, by: str) -> None:
    choose(page, BASE, max_tokens=1500)
    ask(page, "Write a long story about a river, with many chapters.")
    expect(page.locator(".text[aria-busy=true]")).to_have_text(re.compile(".{20}"))
    if by == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.locator(".meta")).to_have_text("stopped by you")
    assert len(answers(page)[0]) >= 20
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    set_longest(page, 24)
    [next_one] = exchange(page, QUESTION, BASE)
    assert next_one.messages == [QUESTION]
    assert answers(page) == [next_one.text]


def test_two_models_side_by_side(page: Page) -> None:
    choose(page, BASE, "mix")
    both = exchange(page, QUESTION, BASE, "mix")
    assert answers(page) == [each.text for each in both]
    assert both[0].text != both[1].text
    assert page.locator(".answer h2").all_text_contents() == [BASE, "mix"]
    left, right = (box.bounding_box() for box in page.locator(".answer").all())
    assert left and right and left["y"] == right["y"] and left["x"] < right["x"]


def test_each_model_sees_only_its_own_conversation(page: Page) -> None:
    choose(page, BASE)
    [first] = exchange(page, QUESTION, BASE)
    choose(page, "mix")
    [second] = exchange(page, "Name one.", "mix")
    choose(page, BASE)
    [third] = exchange(page, "Again.", BASE)
    assert second.messages == ["Name one."]
    assert third.messages == [QUESTION, first.text, "Again."]
    assert answers(page) == [first.text, second.text, third.text]


def test_auto_says_what_it_took(browser: Browser) -> None:
    with running_server(SMOLLM2, base_id=BASE, bank=BANK.parent) as url:
        for page in watched(browser, url):
            choose(page, "auto")
            ask(page, "Which of these is a planet? A. Mars B. Moon C. Sun D. Comet")
            answers(page)
            names = page.get_by_label("Model", exact=True).locator("option").all_inner_texts()
            took = page.locator(".answer h2").inner_text().removeprefix("auto: ")
            assert took in names[:-1]


def test_how_an_adapter_was_made(page: Page) -> None:
    choose(page, "mix")
    page.get_by_text("How mix was made").click()
    rows = page.get_by_role("list", name="Sources and their coefficients").get_by_role("listitem")
    largest_first = sorted(SOURCES.items(), key=lambda item: -abs(item[1]))
    expect(rows).to_have_count(len(SOURCES))
    widths = []
    for row, (name, weight) in zip(rows.all(), largest_first, strict=True):
        expect(row).to_contain_text(name)
        expect(row.locator(".value")).to_have_text(f"{weight:+.3f}".replace("-", "−"))
        box = row.locator("rect").bounding_box()
        assert box
        widths.append(box["width"])
    weights = [abs(weight) for _, weight in largest_first]
    assert [w / widths[0] for w in widths] == pytest.approx([w / weights[0] for w in weights], 0.02)
    expect(page.locator("#origins")).to_contain_text("svd")


def test_an_adapter_that_is_not_a_combination(page: Page) -> None:
    choose(page, "task229_arc_answer_generation_hard")
    page.get_by_text("How task229").click()
    expect(page.locator("#origins")).to_contain_text("not combined from others")
    expect(page.locator("#origins")).to_contain_text("CC BY-SA 4.0")
    choose(page, BASE)
    expect(page.locator("#origins")).to_be_empty()


def test_keyboard_only(page: Page) -> None:
    """From the message back to the options and the model, and an answer, without a pointer."""
    press = page.keyboard.press
    focused = "document.activeElement.id || document.activeElement.textContent"
    expect(page.get_by_text("How mix was made")).to_be_visible()
    stops = []
    for _ in range(4):
        press("Shift+Tab")
        stops.append(page.evaluate(focused))
        ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid", stops
    assert stops == ["Options", "How mix was made", "other", "model"]
    press("ArrowUp")
    assert page.evaluate("document.activeElement.value") == BASE
    press("Tab")
    press("Tab")
    press("Enter")
    press("Tab")
    press("Tab")
    page.keyboard.type("24")
    press("Tab")
    page.keyboard.type("Name three")
    press("Shift+Enter")
    page.keyboard.type("colours.")
    expect(page.locator(".turn")).to_have_count(0)
    press("Enter")
    assert len(answers(page)[0]) > 0
    assert page.locator(".question").text_content() == "Name three\ncolours."
    expect(page.locator(".answer h2")).to_have_text(BASE)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_nothing_overflows_a_phone(phone: Page) -> None:
    choose(phone, "mix", "task229_arc_answer_generation_hard")
    phone.get_by_text("How mix was made").click()
    ask(phone, "Repeat: " + "Donaudampfschifffahrtsgesellschaft" * 5)
    answers(phone)
    assert phone.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    for part in phone.locator("body *:visible").all():
        box = part.bounding_box()
        assert box is None or box["x"] + box["width"] <= PHONE["width"] + 1, part
    for control in phone.locator("button:visible, select, input:visible, textarea").all():
        box = control.bounding_box()
        assert box and box["height"] >= 44


def test_text_is_never_markup(page: Page) -> None:
    choose(page, BASE)
    ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
    answers(page)
    expect(page.locator(".question")).to_have_text("<img src=x onerror=alert(1)><b>bold</b>")
    expect(page.locator("#conversation img, #conversation b")).to_have_count(0)


def test_a_full_context_is_said(browser: Browser, url: str) -> None:
    for page in watched(browser, url, "status of 400"):
        choose(page, BASE)
        ask(page, "word " * 3000)
        problem = page.locator(".answer [role=alert]")
        expect(problem).to_contain_text("2048")
        expect(problem).to_contain_text("new conversation")
        page.get_by_role("button", name="New conversation").click()
        [answer] = exchange(page, QUESTION, BASE)
        assert answers(page) == [answer.text]


def test_a_refused_question_is_said_and_kept(browser: Browser, url: str) -> None:
    for page in watched(browser, url, "status of 400"):
        choose(page, BASE, max_tokens=1_000_000)
        ask(page, QUESTION)
        expect(page.locator(".answer [role=alert]")).to_contain_text("Longest answer")
        expect(page.get_by_label("Message", exact=True)).to_have_value(QUESTION)


def test_a_wrong_option_is_not_sent(page: Page) -> None:
    choose(page, BASE)
    page.get_by_label("Temperature").fill("7")
    page.get_by_text("Options").click()
    ask(page, QUESTION)
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value(QUESTION)


def test_a_server_that_is_gone(browser: Browser, url: str) -> None:
    for page in watched(browser, url, "ERR_INTERNET_DISCONNECTED"):
        choose(page, BASE)
        page.context.set_offline(True)
        ask(page, QUESTION)
        expect(page.locator(".answer [role=alert]")).to_have_text("The server cannot be reached.")
        page.context.set_offline(False)
        page.get_by_label("Message", exact=True).press("Enter")
        assert len(answers(page)[1]) > 0


def test_it_waits_for_a_model_that_is_loaded(browser: Browser, url: str) -> None:
    error = {"message": "The model is still being loaded.", "code": "not_ready"}
    for page in watched(browser, url, "status of 503"):
        page.route("**/v1/models", lambda r: r.fulfill(status=503, json={"error": error}), times=1)
        page.reload()
        expect(page.locator("#problem [role=alert]")).to_have_text(error["message"])
        expect(page.get_by_label("Model", exact=True)).to_have_value("mix")
        expect(page.locator("#problem")).to_be_empty()


def test_a_key_is_asked_for_and_kept(browser: Browser) -> None:
    with running_server(SMOLLM2, base_id=BASE, n_ctx=512, n_slots=1, api_keys=("secret",)) as url:
        for page in watched(browser, url, "status of 401"):
            expect(page.get_by_label("API key")).to_be_focused()
            page.keyboard.type("wrong")
            page.keyboard.press("Enter")
            expect(page.locator("#problem [role=alert]")).not_to_be_empty()
            page.get_by_label("API key").fill("secret")
            page.keyboard.press("Enter")
            expect(page.get_by_label("Model", exact=True)).to_have_value(BASE)
            expect(page.get_by_label("API key")).to_be_hidden()
            page.reload()
            choose_only(page)
            ask(page, QUESTION)
            assert len(answers(page)[0]) > 0
            assert page.evaluate("localStorage.length + document.cookie.length") == 0


def test_a_late_refusal_of_an_earlier_key_changes_nothing(browser: Browser) -> None:
    held: list[Route] = []

    def hold_the_wrong_key(route: Route) -> None:
        is_wrong = route.request.headers.get("authorization") == "Bearer wrong"
        held.append(route) if is_wrong else route.continue_()

    with running_server(SMOLLM2, base_id=BASE, n_ctx=512, n_slots=1, api_keys=("secret",)) as url:
        for page in watched(browser, url, "status of 401"):
            page.route("**/v1/models", hold_the_wrong_key)
            for key in ("wrong", "secret"):
                page.get_by_label("API key").fill(key)
                page.keyboard.press("Enter")
            expect(page.get_by_label("Model", exact=True)).to_have_value(BASE)
            with page.expect_response("**/v1/models") as refusal:
                held[0].continue_()
            assert refusal.value.status == 401
            refusal.value.finished()
            page.evaluate("new Promise(requestAnimationFrame)")
            expect(page.get_by_label("API key")).to_be_hidden()


def choose_only(page: Page) -> None:
    """The base alone: nothing to compare it with."""
    expect(page.get_by_label("Model", exact=True)).to_have_value(BASE)
    expect(page.get_by_label("Compare with")).to_be_hidden()
    set_longest(page, 24)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_by_axe(browser: Browser, url: str, scheme: str) -> None:
    """axe-core finds nothing: names, roles, structure, and the contrast of text."""
    for page in watched(browser, url, color_scheme=scheme):
        choose(page, BASE, "mix")
        page.get_by_text("How mix was made").click()
        ask(page, QUESTION)
        answers(page)
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
