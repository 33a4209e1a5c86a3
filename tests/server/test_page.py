"""The page in a headless browser: with a mouse, with a keyboard, on a phone.

It needs Debian's Chromium (``apt-get install chromium``) or another, named by the environment variable CHROMIUM;
Playwright does not download a browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_models import chain, scripted_policy
from helpers.pages import SECONDS, opened
from helpers.servers import Server, serving, slow_down

from rlchat.chat.saved import SavedConversation, SavedMessage, load_conversation, save_conversation
from rlchat.data.formats import read_trees
from rlchat.models.model_file import PolicyBundle
from rlchat.tokenizer.chat_tokenizer import ChatTokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect

REPLY = "<img onerror=x()> ü😀 & <b>"  # no byte comes twice, as the scripted model needs; and no tag may come to life


def script(text: str) -> list[int]:
    """The bytes of ``text``, each once."""
    return list(dict.fromkeys(text.encode()))


SAID = bytes(script(REPLY)).decode()


@pytest.fixture(scope="module")
def bundle(byte_tokenizer: ChatTokenizer) -> PolicyBundle:
    return slow_down(scripted_policy(byte_tokenizer, chain(byte_tokenizer, script(REPLY)), max_length=400), 0.01)


@pytest.fixture(scope="module")
def server(bundle: PolicyBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bundle, tmp_path_factory.mktemp("kept") / "feedback.jsonl") as server:
        yield server


@pytest.fixture(scope="module")
def endless(byte_tokenizer: ChatTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model whose response takes ten seconds."""
    bundle = scripted_policy(byte_tokenizer, chain(byte_tokenizer, list(b"on "), endless=True), max_length=800)
    with serving(slow_down(bundle, 0.05), tmp_path_factory.mktemp("kept") / "feedback.jsonl") as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    yield from opened(browser, server)


def send(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def finished(page: Any, replies: int = 1) -> Any:
    """The text of the last response, when it is complete."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    texts = page.locator(".message.assistant .text")
    expect(texts).to_have_count(replies)
    return texts.last


def lines(server: Server) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.feedback.read_text().splitlines()] if server.feedback.exists() else []


def test_send_and_read(page: Any) -> None:
    send(page, "Hi <script>alert(1)</script><img src=x onerror=alert(2)>")
    expect(finished(page)).to_have_text(SAID)
    question = page.locator(".message.user .text")
    expect(question).to_have_text("Hi <script>alert(1)</script><img src=x onerror=alert(2)>")
    assert page.locator("#log script, #log img, #log b, #list script, #list img").count() == 0  # text, all of it
    expect(page.locator(".meta")).to_contain_text(f"{len(script(REPLY)) + 1} tokens")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Hi <script>")
    expect(page.locator("#heard")).to_have_text(SAID)  # what a screen reader reads


def test_a_reply_streams_and_stops(browser: Any, endless: Server) -> None:
    for page in opened(browser, endless):
        send(page, "Go on")
        text = page.locator(".message.assistant .text")
        expect(text).to_contain_text("on on")
        early = len(text.inner_text())
        page.wait_for_function("n => document.querySelector('.assistant .text').innerText.length > n", arg=early)
        page.get_by_role("button", name="Stop").click()
        expect(finished(page)).to_contain_text("on on")
        expect(page.locator(".meta")).to_have_text("stopped")
        page.wait_for_timeout(200)
        shown = text.inner_text()
        page.wait_for_timeout(200)
        assert text.inner_text() == shown  # and does not change any more
        assert endless.engine.counts.cancelled == 1
        assert endless.engine.running == 0


def test_regenerate_and_edit(page: Any, server: Server) -> None:
    send(page, "One")
    finished(page)
    send(page, "Two")
    finished(page, 2)
    tokens = server.engine.counts.generated_tokens
    page.get_by_role("button", name="Another response").last.click()
    expect(finished(page, 2)).to_have_text(SAID)
    assert server.engine.counts.generated_tokens > tokens
    page.locator(".message.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Send").first.fill("Uno")
    page.locator(".editor").get_by_role("button", name="Send").click()
    expect(finished(page)).to_have_text(SAID)  # what came after is gone
    expect(page.locator(".message.user .text")).to_have_text("Uno")
    page.get_by_role("button", name="Undo").click()  # … but not lost
    expect(page.locator(".message.user .text")).to_have_text(["One", "Two"])
    page.locator(".message.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Send").first.fill("Uno")
    page.keyboard.press("Enter")
    expect(finished(page)).to_have_text(SAID)
    page.locator(".message.user").hover()
    page.get_by_role("button", name="Edit").click()
    page.keyboard.press("Escape")
    expect(page.locator(".message.user .text")).to_have_text("Uno")


def test_feedback_is_saved(page: Any, server: Server) -> None:
    before = len(lines(server))
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System message").fill("Be kind.")
    send(page, "Hello")
    finished(page)
    page.get_by_role("button", name="Good response").evaluate("button => { button.click(); button.click(); }")
    expect(page.get_by_role("button", name="Good response")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Good response").click()  # already given
    page.get_by_role("button", name="Bad response").click()
    expect(page.get_by_role("button", name="Bad response")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Good response")).to_have_attribute("aria-pressed", "false")
    for correction in ("Hello to you!", "Hello, hello!"):
        page.get_by_role("button", name="Correct this response").click()
        page.get_by_label("Save the correction").first.fill(correction)
        page.get_by_role("button", name="Save the correction").click()
        expect(page.locator(".message.assistant .text")).to_have_text(correction)
        # A verdict on a text by a person is no feedback on the model.
        expect(page.get_by_role("button", name="Good response")).to_have_count(0)
        expect(page.get_by_role("button", name="Bad response")).to_have_count(0)
    good, bad, corrected, again = lines(server)[before:]
    for row in (good, bad, corrected, again):
        assert (row["prompt"]["role"], row["prompt"]["text"]) == ("system", "Be kind.")
        assert row["prompt"]["replies"][0]["text"] == "Hello"
    replies = [row["prompt"]["replies"][0]["replies"] for row in (good, bad, corrected, again)]
    assert [reply[0]["labels"]["quality"]["value"] for reply in replies[:2]] == [1.0, 0.0]
    assert [reply[-1]["model_name"] for reply in replies] == ["tiny.pt"] * 4
    assert [(reply["text"], reply["rank"]) for reply in replies[2]] == [("Hello to you!", 0), (SAID, 1)]
    assert [(reply["text"], reply["rank"]) for reply in replies[3]] == [("Hello, hello!", 0), (SAID, 1)]
    trees, _ = read_trees([str(server.feedback)], progress=False)
    assert len(trees) >= 1  # data, as the readers see it


def test_save_and_load(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System message").fill("Be kind.")
    page.get_by_label("Maximum response length in tokens").fill("7")
    page.get_by_label("Seed").fill("42")
    page.get_by_label("Top k").fill("9")
    send(page, "Füße 😀")
    finished(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    assert download.value.suggested_filename == "Füße.json"
    download.value.save_as(tmp_path / "saved.json")
    saved = load_conversation(tmp_path / "saved.json")
    assert [(message.role, message.text) for message in saved.messages] == [
        ("system", "Be kind."),
        ("user", "Füße 😀"),
        ("assistant", SAID[:7]),
    ]
    assert saved.model == "tiny.pt"
    assert saved.sampling == {"max_new_tokens": 7, "temperature": 0.7, "top_k": 9, "top_p": 1, "seed": 42}
    assert all(message.time for message in saved.messages[1:])

    messages = (
        SavedMessage("system", "Rhyme."),
        SavedMessage("user", "<i>Cat?</i>"),
        SavedMessage("assistant", "Hat."),
    )
    save_conversation(tmp_path / "terminal.json", SavedConversation(messages, "m", {"temperature": 0.25}))
    page.set_input_files("#file", tmp_path / "terminal.json")
    expect(page.locator(".message .text")).to_have_text(["<i>Cat?</i>", "Hat."])
    expect(page.get_by_label("System message")).to_have_value("Rhyme.")
    expect(page.locator("#temperature-shown")).to_have_text("0.25")

    older = [
        {"user": "Old?", "assistant": "Very.", "timestamp": "2023-01-01T00:00:00"},
        {"user": "How?", "assistant": "So.", "timestamp": 1_700_000_000.9},
    ]
    (tmp_path / "older.json").write_text(json.dumps({"conversation_history": older}))
    page.set_input_files("#file", tmp_path / "older.json")
    expect(page.locator(".message .text")).to_have_text(["Old?", "Very.", "How?", "So."])
    with page.expect_download() as download:
        page.get_by_role("button", name="Save", exact=True).click()
    download.value.save_as(tmp_path / "again.json")
    again = load_conversation(tmp_path / "again.json")
    assert again.messages == load_conversation(tmp_path / "older.json").messages  # as the terminal has it
    assert again.messages[-1].time == "2023-11-14T22:13:20+00:00"

    for content, sentence in [
        ("{", "bad.json is not a conversation file: it is not valid JSON."),
        ("[]", "bad.json: its format is neither rlchat's nor OpenAI's."),
        ('{"format": "rlchat-conversation", "version": 9}', "its version is 9; this page reads 1"),
        ('{"conversation_history": [{"user": 1}]}', "message 1 is damaged"),
        ('{"conversation_history": [{"user": "a", "assistant": "b", "timestamp": 1e300}]}', "message 1 is damaged"),
    ]:
        (tmp_path / "bad.json").write_text(content)
        page.set_input_files("#file", tmp_path / "bad.json")
        expect(page.locator("#toast")).to_contain_text(sentence)
        expect(page.locator(".message .text")).to_have_text(["Old?", "Very.", "How?", "So."])  # still there


def test_settings_of_a_file_are_limited_to_the_range(page: Any, tmp_path: Path) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    seed, toast, longest = (
        page.get_by_label("Seed"),
        page.locator("#toast"),
        page.get_by_label("Maximum response length"),
    )

    def load(**sampling: Any) -> None:
        saved = SavedConversation((SavedMessage("user", "Hi"), SavedMessage("assistant", "Ho")), "m", sampling)
        save_conversation(tmp_path / "file.json", saved, overwrite=True)
        page.set_input_files("#file", tmp_path / "file.json")

    load(temperature=5, top_p=-1, top_k=2.6, max_new_tokens=0, seed=9223372036854775807)
    expect(toast).to_contain_text("expected an integer from 0 to 9007199254740991")
    for name, value in [("temperature", "2"), ("top_p", "0.05"), ("top_k", "3"), ("max_new_tokens", "1"), ("seed", "")]:
        expect(page.locator(f"#{name}")).to_have_value(value)
    send(page, "And?")
    expect(finished(page, 2)).not_to_have_text("")  # the server takes them all
    load(temperature=1e-9, max_new_tokens=7, seed=9007199254740991)
    expect(page.locator("#temperature")).to_have_value("0")
    expect(seed).to_have_value("9007199254740991")
    send(page, "And?")
    expect(finished(page, 2)).to_have_text(SAID[:7])
    load(seed=None)
    expect(seed).to_have_value("")  # a new one each time, as in the file
    seed.fill("9007199254740993")  # which JavaScript would round
    expect(toast).to_contain_text("Invalid seed")
    expect(seed).to_have_value("")
    seed.fill("12")
    page.reload()
    expect(seed).to_have_value("12")
    expect(longest).to_have_value("7")  # what came from a file is kept, too


def test_the_default_response_length_depends_on_the_context(page: Any) -> None:
    longest = page.locator("#max_new_tokens")
    expect(longest).to_have_value("100")  # of a context of 400
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("Top k").fill("5")
    page.reload()
    expect(longest).to_have_value("100")
    assert "max_new_tokens" not in page.evaluate("localStorage['rlchat.settings']")  # the user did not set it
    longest.evaluate("input => { input.value = '300'; input.dispatchEvent(new Event('input')); }")
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")
    expect(longest).to_have_value("300")  # somebody did


def test_conversations_stay_in_the_browser(page: Any) -> None:
    send(page, "First")
    finished(page)
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("What is on your mind?")).to_be_visible()
    send(page, "Second")
    finished(page)
    page.reload()
    titles = page.locator("#list .open")
    expect(titles).to_have_text(["Second", "First"])
    titles.last.click()
    expect(page.locator(".message .text")).to_have_text(["First", SAID])
    page.get_by_role("button", name="Delete “First”").click()
    expect(titles).to_have_text(["Second"])
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".message .text")).to_have_text(["First", SAID])


def test_use_with_the_keyboard_only(page: Any, endless: Server, browser: Any) -> None:
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator(".message.user .text")).to_have_text("a\nb")
    page.keyboard.press("ArrowUp")  # edits the last message
    page.keyboard.type("c")
    page.keyboard.press("Enter")
    finished(page)
    expect(page.locator(".message.user .text")).to_have_text("a\nbc")
    page.keyboard.press("Alt+s")
    expect(page.get_by_label("System message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.get_by_role("button", name="Settings", exact=True)).to_be_focused()
    page.keyboard.press("Alt+n")
    expect(page.get_by_text("What is on your mind?")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    for page in opened(browser, endless):
        page.keyboard.type("Go on")
        page.keyboard.press("Enter")
        expect(page.locator(".message.assistant .text")).to_contain_text("on on")
        page.keyboard.press("Escape")
        finished(page)
        page.keyboard.press("Tab")  # whatever has the focus shows it
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"


def test_every_control_has_a_name(page: Any) -> None:
    send(page, "Hi")
    finished(page)
    page.get_by_role("button", name="Settings", exact=True).click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea")].filter((control) =>
          !(control.getAttribute("aria-label") || control.innerText?.trim() || control.labels?.length))
          .map((control) => control.outerHTML)"""
    )
    assert nameless == []


def test_dark_and_light(browser: Any, server: Server) -> None:
    def paper(page: Any) -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour[4:-1].split(","))

    for page in opened(browser, server, color_scheme="dark"):
        assert paper(page) < 150
        page.get_by_role("button", name="Switch between dark and light").click()
        assert paper(page) > 600
        page.reload()
        assert paper(page) > 600  # remembered
    for page in opened(browser, server, color_scheme="light"):
        assert paper(page) > 600


def test_navigation_on_a_phone(browser: Any, server: Server) -> None:
    for page in opened(browser, server, viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True):
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 390
        send(page, "x" * 300)
        expect(finished(page)).to_have_text(SAID)
        assert page.evaluate(wide) == 390  # a long word widens nothing
        expect(page.locator("#side")).not_to_be_in_viewport()
        page.get_by_role("button", name="Conversations").tap()
        expect(page.locator("#list .open")).to_be_in_viewport()
        page.get_by_role("button", name="Close the list").tap()
        expect(page.locator("#side")).not_to_be_in_viewport()
        page.get_by_role("button", name="Settings", exact=True).tap()
        expect(page.get_by_label("Temperature")).to_be_in_viewport()


def test_errors_are_shown_and_no_message_is_lost(browser: Any, bundle: PolicyBundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path / "feedback.jsonl", api_key="s3cret") as server:
        context = browser.new_context()
        context.set_default_timeout(SECONDS)
        page = context.new_page()
        page.goto(server.url)
        expect(page.locator("#toast")).to_have_text("The API key is missing or wrong.")
        page.get_by_label("API key").fill("s3cret")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#model")).to_have_text("tiny")
        send(page, "Hi")
        expect(finished(page)).to_have_text(SAID)
    send(page, "Still there?")
    expect(page.locator("#toast")).to_have_text("The server cannot be reached.")
    expect(page.locator(".message .text")).to_have_text(["Hi", SAID, "Still there?"])
    context.close()


def answered(page: Any, text: str, finish: str | None = "stop") -> None:
    """Makes every response ``text``; without ``finish`` the stream breaks off after it."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": text}}]}]
    chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}] if finish else []
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def test_markdown_is_built_from_nodes(page: Any) -> None:
    answered(page, "Use `a<b>` and **not** this:\n```python\nprint('<img src=x onerror=alert(1)>')\n```\nEnd.")
    send(page, "How?")
    text = finished(page)
    expect(text.locator("strong")).to_have_text("not")
    expect(text.locator("code").first).to_have_text("a<b>")
    expect(text.locator("pre code")).to_have_text("print('<img src=x onerror=alert(1)>')\n")
    expect(text.locator("figcaption")).to_have_text("python")
    expect(text.locator("img")).to_have_count(0)
    expect(text).to_contain_text("End.")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text.get_by_role("button", name="Copy code").click()
    expect(page.locator("#toast")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "print('<img src=x onerror=alert(1)>')\n"


MARKDOWN = """# Title with `code`
Some **bold** text.
## Part
- one
  1. first
  2. second [site](https://example.com/a?b=1)
- two
3. third
> quoted https://example.com/x.

[bad](javascript:alert(1)) [<b>](https://example.com/<img>)
"""


def test_headings_lists_and_links(page: Any) -> None:
    answered(page, MARKDOWN)
    send(page, "How?")
    text = finished(page)
    expect(text.locator("h3")).to_have_text("Title with code")
    expect(text.locator("h3 code")).to_have_text("code")
    expect(text.locator("h4")).to_have_text("Part")
    expect(text.locator(".text > ul > li, ul > li").first).to_contain_text("one")
    assert text.evaluate("text => [...text.querySelectorAll('li')].map((li) => li.parentElement.tagName)") == [
        "UL",
        "OL",
        "OL",
        "UL",
        "OL",
    ]
    assert text.evaluate("text => text.querySelector('ul > li > ol').children.length") == 2
    assert text.evaluate("text => text.querySelector(':scope > ol').start") == 3
    expect(text.locator("blockquote")).to_have_text("quoted https://example.com/x.")
    links = text.locator("a")
    assert links.evaluate_all("all => all.map((a) => [a.textContent, a.href, a.rel, a.target])") == [
        ["site", "https://example.com/a?b=1", "noopener noreferrer", "_blank"],
        ["https://example.com/x", "https://example.com/x", "noopener noreferrer", "_blank"],
        ["<b>", "https://example.com/%3Cimg%3E", "noopener noreferrer", "_blank"],
    ]
    expect(text).to_contain_text("[bad](javascript:alert(1))")
    assert text.locator("b, img").count() == 0


def test_switching_between_responses(page: Any) -> None:
    answered(page, "One.")
    send(page, "Count")
    finished(page)
    for number, text in enumerate(("Two.", "Three."), 2):
        page.unroute("**/v1/chat/completions")
        answered(page, text)
        page.get_by_role("button", name="Another response").click()
        expect(finished(page)).to_have_text(text)
        expect(page.locator(".count")).to_have_text(f"{number} / {number}")
    expect(page.get_by_role("button", name="Next response")).to_be_disabled()
    page.get_by_role("button", name="Previous response").click()
    page.get_by_role("button", name="Previous response").click()
    expect(finished(page)).to_have_text("One.")
    expect(page.get_by_role("button", name="Previous response")).to_be_disabled()
    page.get_by_role("button", name="Good response").click()
    expect(page.get_by_role("button", name="Good response")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Next response").click()
    expect(page.get_by_role("button", name="Good response")).to_have_attribute("aria-pressed", "false")
    page.reload()
    page.locator("#list .open").click()
    expect(finished(page)).to_have_text("Two.")
    page.get_by_role("button", name="Previous response").click()
    expect(page.get_by_role("button", name="Good response")).to_have_attribute("aria-pressed", "true")
    page.unroute("**/v1/chat/completions")
    failed = 'data: {"error": {"message": "generation failed"}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=failed, content_type="text/event-stream"))
    page.get_by_role("button", name="Another response").click()
    expect(page.locator("#toast")).to_have_text("Generation failed.")
    expect(finished(page)).to_have_text("One.")  # what was there comes back
    expect(page.locator(".count")).to_have_text("1 / 3")


def test_a_response_at_the_length_limit_is_continued(page: Any) -> None:
    page.locator("#max_new_tokens").evaluate("input => { input.value = '7'; input.dispatchEvent(new Event('input')); }")
    send(page, "Hi")
    expect(finished(page)).to_have_text(SAID[:7])
    expect(page.locator(".meta")).to_contain_text("reached the length limit")
    page.get_by_role("button", name="Continue").click()
    expect(finished(page)).to_have_text(SAID[:14])
    while page.get_by_role("button", name="Continue").count():
        page.get_by_role("button", name="Continue").click()
        finished(page)
    expect(finished(page)).to_have_text(SAID)


def test_renaming_and_searching_conversations(page: Any) -> None:
    answered(page, "A response about lions.")
    for question in ("First", "Second"):
        page.get_by_role("button", name="New conversation").click()
        send(page, question)
        finished(page)
    titles = page.locator("#list .open")
    expect(titles).to_have_text(["Second", "First"])
    page.get_by_role("button", name="Rename “Second”").click()
    page.get_by_label("Title").fill("Zoo <b>")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("Zoo <b>")
    page.reload()
    expect(titles).to_have_text(["Zoo <b>", "First"])
    search = page.get_by_label("Search conversations")
    for words, found in [("zoo", ["Zoo <b>"]), ("FIRST", ["First"]), ("lions", ["Zoo <b>", "First"]), ("tigers", [])]:
        search.fill(words)
        expect(titles).to_have_text(found)
    expect(page.get_by_text("No conversation found.")).to_be_visible()
    search.fill("")
    page.get_by_role("button", name="Rename “Zoo <b>”").click()
    page.get_by_label("Title").fill("")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["Second", "First"])  # the first message is the title again


def test_the_reward_and_its_factors(browser: Any, bundle: PolicyBundle, tmp_path: Path) -> None:
    factors = [
        {"class_path": "rlchat.rewards.TooShort", "init_args": {"min_words": 100}},
        {"class_path": "rlchat.rewards.MissingEnd", "init_args": {"weight": 0.5}},
        {"class_path": "nowhere.Factor", "init_args": {}},
    ]
    rated = replace(bundle, about={"reward": factors})
    with serving(rated, tmp_path / "f") as server:
        for page in opened(browser, server):
            send(page, "Hi")
            finished(page)
            page.get_by_role("button", name="Reward").click()
            shown = page.locator(".reward")
            expect(shown.locator("dt")).to_have_count(3)
            expect(shown.locator("dt").first).to_have_text("reward")
            expect(shown).to_contain_text("too_short")
            expect(shown).to_contain_text("not included: nowhere.Factor (cannot import nowhere")
            page.get_by_role("button", name="Reward").click()
            expect(shown).to_have_count(0)


def test_a_stream_that_the_network_interrupts(page: Any) -> None:
    answered(page, "Half a resp", finish=None)
    send(page, "Go on")
    expect(finished(page)).to_have_text("Half a resp")
    expect(page.locator("#toast")).to_have_text("The connection was lost before the response was complete.")
    expect(page.locator(".meta")).to_have_text("incomplete")


def test_two_tabs_do_not_overwrite_each_other(page: Any, server: Server) -> None:
    answered(page, "One.")
    send(page, "First")
    expect(finished(page)).to_have_text("One.")
    page.evaluate("addEventListener('storage', (event) => event.stopImmediatePropagation(), true)")
    other = page.context.new_page()
    other.goto(server.url)
    answered(other, "Two.")
    other.locator("#list .open").first.click()
    send(other, "In the other tab")
    expect(finished(other, 2)).to_have_text("Two.")
    page.evaluate("conversation.updated = 1")  # as if this tab had not heard of the change
    page.evaluate("conversation.messages = conversation.messages.slice(0, 2); render()")
    send(page, "In this tab")
    expect(finished(page, 2)).to_have_text("One.")
    stored = page.evaluate("kept().map((one) => one.messages.filter((m) => m.role === 'user').map((m) => m.content))")
    assert sorted(stored) == [["First", "In the other tab"], ["First", "In this tab"]]


def test_invalid_settings_are_marked(page: Any) -> None:
    page.get_by_role("button", name="Settings", exact=True).click()
    top_k = page.get_by_label("Top k")
    top_k.fill("-5")
    expect(top_k).to_have_attribute("aria-invalid", "true")
    top_k.fill("5")
    expect(top_k).to_have_attribute("aria-invalid", "false")


def test_touch_targets_and_focus_on_a_phone(browser: Any, server: Server) -> None:
    """Buttons have at least 44 pixels, and the text field is not focused, which would open the keyboard."""
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    for page in opened(browser, server, **phone):
        assert page.evaluate("document.activeElement === document.body")
        answered(page, "Hi.")
        send(page, "Hello")
        finished(page)
        sizes = page.evaluate(
            "[...document.querySelectorAll('main button')].filter((b) => b.offsetParent)"
            ".map((b) => [b.getAttribute('aria-label'), b.offsetWidth, b.offsetHeight])"
        )
        assert len(sizes) >= 6
        assert [size for size in sizes if min(size[1:]) < 44] == []
