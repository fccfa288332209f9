"""The Playground in a real browser, on a real endpoint."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import CDPSession, Locator, Page, Route, expect

from sampo_ray.run.directory import Activity, Status
from sampo_ray.run.manifest import Manifest, RoundRecord, StageRecord
from sampo_ray.run.storage import Place
from tests.endpoint.live import KEY, Endpoint, Visit, get
from tests.test_run_view import write_probe
from tests.waiting import scaled

pytestmark = pytest.mark.slow

PHONE = {"viewport": {"width": 360, "height": 740}}
CONTRASTS = """() => {
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const clear = (color) => color === "transparent" || /, 0\\)$/.test(color);
  const ground = (node) => {
    while (node && clear(getComputedStyle(node).backgroundColor)) node = node.parentElement;
    return node ? getComputedStyle(node).backgroundColor : "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("p, button:not(:disabled), label, summary, b, span, h1, h2, dt, dd")]
    .filter((node) => node.offsetParent && node.textContent.trim() && !node.closest(".hidden"))
    .map((node) => {
      const [low, high] = [getComputedStyle(node).color, ground(node)].map(luminance).sort((x, y) => x - y);
      return [(high + 0.05) / (low + 0.05), node.textContent.slice(0, 30)];
    });
}"""
"""For each visible text of the page, the contrast with its ground (WCAG 2: at least 4.5) and its first letters."""


def chat_requests(page: Page, **fields: Any) -> list[dict[str, Any]]:
    """Adds fields to the page's chat requests on their way; returns them as the page sent them."""
    asked: list[dict[str, Any]] = []

    def onward(route: Route) -> None:
        asked.append(json.loads(route.request.post_data or "{}"))
        route.continue_(post_data=json.dumps({**asked[-1], **fields}))

    page.route("**/v1/chat/completions", onward)
    return asked


def send(page: Page, text: str, answers: int = 1) -> Locator:
    """Sends a message and waits for its answers to end."""
    before = page.locator(".answer").count()
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")
    expect(page.locator(".answer")).to_have_count(before + answers)
    expect(page.locator(".answer[aria-busy=true]")).to_have_count(0, timeout=scaled(30_000))
    return page.locator(".turn").last.locator(".answer")


def limit(page: Page, tokens: int) -> None:
    page.locator("#settings summary").click()
    page.get_by_label("Max tokens").fill(str(tokens))
    page.locator("#settings summary").click()


def feedback_of(page: Page) -> list[dict[str, Any]]:
    """What the page posts as feedback; it is answered here and does not reach the endpoint."""
    judgements: list[dict[str, Any]] = []

    def take(route: Route) -> None:
        judgements.append(route.request.post_data_json)
        route.fulfill(json={"stored": True, "duplicate": len(judgements) > 1})

    page.route("**/feedback", take)
    return judgements


def test_a_chat_streams_and_shows_version_and_number_of_tokens(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    assert page.url == f"{endpoint.open}/", "relative addresses need the slash"
    asked = chat_requests(page, ignore_eos=True)
    limit(page, 200)  # long enough to be seen in pieces on a busy machine
    page.evaluate(
        """() => { window.lengths = new Set();
        new MutationObserver(() => { const text = document.querySelector('.answer .text');
          if (text) window.lengths.add(text.textContent.length); })
        .observe(document.getElementById('turns'), {subtree: true, childList: true, characterData: true}); }"""
    )
    answer = send(page, "hello world")
    expect(answer.locator(".meta")).to_have_text(re.compile(rf"^v{endpoint.live()} · 200 tokens · .*cut at the limit$"))
    assert page.evaluate("window.lengths.size") > 2, "text comes in pieces"
    first = answer.locator(".text").text_content()
    send(page, "and again")
    roles = [[message["role"] for message in each["messages"]] for each in asked]
    assert roles == [["user"], ["user", "assistant", "user"]]
    assert asked[1]["messages"][1]["content"] == first
    assert (asked[0]["model"], asked[0]["max_tokens"], asked[0]["temperature"]) == ("policy", 200, 1)


def test_a_system_prompt_goes_first(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    asked = chat_requests(page, max_tokens=4)
    page.locator("#settings summary").click()
    page.get_by_label("System prompt").fill("be brief")
    send(page, "hello")
    assert asked[0]["messages"][0] == {"role": "system", "content": "be brief"}


def test_markup_in_an_answer_is_shown_as_text(visit: Visit, endpoint: Endpoint) -> None:
    markup = "<script>document.title='x'</script><img src=/x onerror=\"document.title='x'\"><b style='color:red'>b</b>"
    page = visit(endpoint.open)
    chat_requests(page, structured_outputs={"choice": [markup]})
    answer = send(page, markup)
    expect(answer.locator(".text")).to_have_text(markup)
    assert page.locator(".turns :is(script, img, b)").count() == 0
    assert page.title() == "Playground · sampo-ray"


def test_the_page_keeps_to_its_content_security_policy(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    header = page.reload().all_headers()["content-security-policy"]  # type: ignore[union-attr]
    assert "default-src 'none'" in header and "unsafe" not in header
    assert page.locator("[style], script:not([src]), style").count() == 0


def slow_down(session: CDPSession, bytes_per_second: int) -> None:
    """Makes the page's network as slow as that; -1 ends it."""
    speed = {"offline": False, "latency": 0, "downloadThroughput": bytes_per_second, "uploadThroughput": -1}
    session.send("Network.emulateNetworkConditions", speed)


def test_escape_stops_an_answer_and_it_can_be_tried_again(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    chat_requests(page, ignore_eos=True, max_tokens=450)
    network = page.context.new_cdp_session(page)
    slow_down(network, 8_000)  # so that there is something left to stop, however fast the engine is
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector(".answer[data-state=streaming]")
    page.keyboard.press("Escape")
    expect(page.locator(".answer .meta")).to_contain_text("stopped")
    slow_down(network, -1)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    limit(page, 4)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer[data-state=done]")).to_be_visible()


def test_an_error_is_readable_and_can_be_tried_again(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_label("Message").fill("hello")
    page.keyboard.press("Enter")
    expect(page.locator(".problem")).to_contain_text("does not answer")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.continue_(post_data=b'{"messages": []}'))
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".problem")).to_contain_text("messages: must be a list of at least one message")


def test_two_answers_are_compared_blind_and_the_vote_has_their_ids(visit: Visit, endpoint: Endpoint) -> None:
    page, version = visit(endpoint.open), f"v{endpoint.live()}"
    judgements = feedback_of(page)
    asked = chat_requests(page, ignore_eos=True, max_tokens=6)
    page.get_by_label("Compare two").check()
    page.get_by_label("Blind").check()
    answers = send(page, "hello", answers=2)
    for each in answers.all():
        expect(each.locator(".meta")).to_contain_text("6 tokens")
        assert version not in each.inner_text() and "policy" not in each.inner_text()
    page.get_by_role("button", name="B is better").click()
    expect(page.locator(".vote")).to_contain_text("The chat goes on with answer B")
    for each in answers.all():
        expect(each.locator(".meta")).to_contain_text(version)
    assert len(judgements) == 1 and set(judgements[0]) == {"better", "worse"}
    assert all(value.startswith("chatcmpl-") for value in judgements[0].values())
    assert judgements[0]["better"] != judgements[0]["worse"]
    better = answers.nth(1).locator(".text").text_content()
    send(page, "go on", answers=2)
    assert asked[-1]["messages"][1]["content"] == better
    page.get_by_role("button", name="Both bad").click()
    expect(page.locator(".vote").last).to_contain_text("This was stored before")
    assert len(judgements[1]["tie"]) == 2 and judgements[1]["note"] == "both bad"


def test_an_answer_can_be_rated_and_edited(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    judgements = feedback_of(page)
    asked = chat_requests(page, ignore_eos=True, max_tokens=6)
    answer = send(page, "hello")
    page.get_by_role("button", name="Good answer").click()
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("The answer as it should be").fill("Hello to you.")
    page.get_by_role("button", name="Save edit").click()
    expect(answer.locator(".text")).to_have_text("Hello to you.")
    assert [sorted(each) for each in judgements] == [["response", "thumb"], ["edited", "response"]]
    assert judgements[0]["response"] == judgements[1]["response"]
    send(page, "go on")
    assert asked[1]["messages"][1]["content"] == "Hello to you."


def test_the_feedback_buttons_say_when_feedback_is_off(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    chat_requests(page, max_tokens=4, ignore_eos=True)
    answer = send(page, "hello")
    page.get_by_role("button", name="Bad answer").click()
    expect(answer.locator(".status")).to_have_text(re.compile("serve.feedback"))


def test_a_key_opens_the_page_and_stays_in_the_tab(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.url)
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The endpoint does not know this key.")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    chat_requests(page, max_tokens=4)
    answer = send(page, "hello")
    expect(answer.locator(".meta")).to_contain_text("token")
    page.get_by_role("button", name="Good answer").click()
    expect(answer.locator(".status")).to_have_text("Stored, thank you.")
    assert KEY not in page.content() and KEY not in page.url
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    page.reload()
    expect(page.locator("#summary")).to_contain_text("live")
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_role("dialog")).to_be_visible()


def test_versions_are_listed_and_go_live_by_hand(visit: Visit, endpoint: Endpoint) -> None:
    before = endpoint.live()
    endpoint.publish(before + 1)
    page = visit(endpoint.open)
    panel = page.get_by_role("region", name="Versions")
    expect(panel).to_contain_text(f"v{before + 1} is live")
    row = panel.get_by_role("listitem").filter(has_text=f"v{before}").first
    row.locator("summary").focus()
    page.keyboard.press("Enter")
    row.get_by_role("button", name="Make live").press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text(f"Make v{before} live?")
    page.get_by_role("dialog").get_by_role("button", name="Make live").press("Enter")
    expect(panel).to_contain_text(f"v{before} is live. It is held there by hand.")
    chat_requests(page, max_tokens=4)
    expect(send(page, "hello").locator(".meta")).to_contain_text(f"v{before} ")
    panel.get_by_role("button", name="Follow training").click()
    page.get_by_role("dialog").get_by_role("button", name="Follow training").click()
    expect(panel).to_contain_text(f"v{before + 1} is live. Each new version goes live.")


def test_a_key_without_admin_sees_the_versions_but_cannot_change_them(visit: Visit, endpoint: Endpoint) -> None:
    page = visit("about:blank")
    refusal = {"error": {"message": "a valid API key is needed", "type": "x", "param": None, "code": "invalid_api_key"}}
    page.route("**/admin/**", lambda route: route.fulfill(status=401, json=refusal))
    page.goto(endpoint.open)
    panel = page.get_by_role("region", name="Versions")
    expect(panel).to_contain_text("needs a key with the scope admin")
    expect(page.get_by_role("dialog")).to_be_hidden()
    panel.get_by_role("listitem").last.locator("summary").click()
    assert panel.get_by_role("button", name=re.compile("Make live|Pin|Roll back")).count() == 0


def test_what_fails_and_which_pins_are_not_up_is_said(visit: Visit, endpoint: Endpoint) -> None:
    seen = get(f"{endpoint.open}/admin/versions").json()
    seen["versions"][-1] |= {"version": 0, "state": "failing", "reason": "no memory"}
    seen["troubles"] = [{"what": "pinned versions", "reason": "no memory", "since": 1.0, "last": 2.0, "tries": 7}]
    page = visit("about:blank")
    page.route("**/admin/versions", lambda route: route.fulfill(json=seen))
    page.goto(endpoint.open)
    panel = page.get_by_role("region", name="Versions")
    expect(panel).to_contain_text("Fails: pinned versions. no memory (tried 7 times)")
    row = panel.get_by_role("listitem").last
    row.locator("summary").click()
    expect(row).to_contain_text("Does not start: no memory")
    expect(row.get_by_role("button", name="Chat with it")).to_be_hidden()


def versions_with_an_adapter(page: Page, admin: bool) -> None:
    """Answers as an endpoint of two versions, the older pinned and with an adapter, would."""
    versions = [{"run": "r", "version": n, "labels": [], "state": s} for n, s in ((4, "live"), (3, "pinned"))]
    adapter = {**versions[1], "adapter": "french"}
    cards = {"policy": versions[0], "policy@4": versions[0], "policy@3": versions[1], "policy@french": adapter}
    models = [{"id": name, "object": "model", "metadata": about} for name, about in cards.items()]
    refusal = {"error": {"message": "this key may not", "type": "x", "param": None, "code": None}}
    state = {"run": "r", "live": 4, "held": None, "follow": "latest", "previous": None, "pinned": [3]}
    state |= {"versions": versions, "adapters": [{"name": "french", "base": 3}]}
    status, answer = (200, state) if admin else (403, refusal)
    page.route("**/admin/versions", lambda route: route.fulfill(status=status, json=answer))
    page.route("**/v1/models", lambda route: route.fulfill(json={"object": "list", "data": models}))


@pytest.mark.parametrize("admin", [True, False])
def test_the_picker_has_each_pinned_version_and_each_adapter_once(
    visit: Visit, endpoint: Endpoint, admin: bool
) -> None:
    page = visit("about:blank")
    versions_with_an_adapter(page, admin)
    page.goto(endpoint.open)
    options = page.locator("#model-a option")
    expect(options).to_have_text(["Live · v4", "v3", "french · on v3"])
    assert [each.get_attribute("value") for each in options.all()] == ["policy", "policy@3", "policy@french"]
    expect(page.get_by_role("region", name="Versions").get_by_role("listitem")).to_have_count(2)
    page.locator("#model-a").select_option("policy@french")
    asked = chat_requests(page)
    send(page, "hello")
    assert asked[0]["model"] == "policy@french"


def test_a_command_without_an_answer_is_sent_again_as_the_same_command(visit: Visit, endpoint: Endpoint) -> None:
    seen, ids = get(f"{endpoint.open}/admin/versions").json(), list[str]()
    seen["versions"][-1] |= {"state": "kept"}

    def answer(route: Route) -> None:
        ids.append(route.request.headers["idempotency-key"])
        if len(ids) == 1:
            route.abort()
        else:
            route.fulfill(json=seen)

    page = visit("about:blank")
    page.route("**/admin/pin", answer)
    page.route("**/admin/versions", lambda route: route.fulfill(json=seen))
    page.goto(endpoint.open)
    panel = page.get_by_role("region", name="Versions")
    row = panel.get_by_role("listitem").last
    row.locator("summary").click()
    for said in ("Press the button again: it is done once.", "is pinned", "is pinned"):
        row.get_by_role("button", name="Pin", exact=True).click()
        expect(panel.get_by_role("status")).to_contain_text(said)
    assert ids[0] == ids[1] != ids[2]


def test_the_run_is_seen_live(visit: Visit, endpoint: Endpoint) -> None:
    run = Place(str(Path(endpoint.versions).parent))
    record = RoundRecord(
        index=0, start_version=0, steps=16, stages={"completions": StageRecord(rows=[8], seconds=14.2)}
    )
    run.at("manifest.json").write(Manifest(id="run-a", rounds=[record]).model_dump_json().encode())
    steps = [{"round": 0, "step": n, "version": n, "loss": 0.7 - n / 100, "chosen_tokens": 20.0 + n} for n in (1, 2, 3)]
    run.at("metrics.jsonl").write("".join(json.dumps(step) + "\n" for step in steps).encode())

    def tell(done: int) -> None:
        stage = Activity(name="train", done=done, total=16, unit="steps", seconds=2.0, rate=1.5)
        run.at("status.json").write(Status(round=1, rounds=2, stage=stage, time=time.time()).model_dump_json().encode())

    tell(3)
    page = visit(endpoint.open)
    panel = page.get_by_role("region", name="Run")
    expect(panel).to_contain_text("Round 1 of 2")
    expect(panel).to_contain_text("3 of 16 steps")
    expect(panel.get_by_role("img", name=re.compile("^Loss from step 1 to step 3; last: Loss 0.6700"))).to_be_visible()
    expect(panel).to_contain_text("Sampling completions 14 s")
    tell(9)
    expect(panel).to_contain_text("9 of 16 steps")
    expect(page.locator("#summary")).to_contain_text("Round 1/2, training 56%")
    for version, label, rewards in ((0, "base", [0.0, 0.0]), (16, "round-1", [1.0, 2.0])):
        write_probe(run, version, label, rewards)
    expect(
        panel.get_by_role("img", name=re.compile("^Win rate .*: base 50% at 10.5, round-1 100% at 10.5"))
    ).to_be_visible()
    expect(
        panel.get_by_role("img", name=re.compile("^Reward over length: round-1 1.00 at 10, round-1 2.00 at 11"))
    ).to_be_visible()
    seen = get(f"{endpoint.open}/run").text
    assert str(run.path) not in seen


def test_a_hidden_page_sends_no_requests(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    expect(page.locator("#summary")).to_contain_text("live")
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.wait_for_timeout(2500)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(4500)
    assert asked == []
    with page.expect_request(lambda _: True):
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")


def test_nothing_is_wider_than_a_phone(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open, **PHONE)
    expect(page.locator("#summary")).to_contain_text("live")
    chat_requests(page, max_tokens=100, ignore_eos=True)

    def overflow() -> int:
        return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    send(page, "x" * 300)
    page.get_by_label("Compare two").check()
    page.get_by_label("Blind").check()
    send(page, "hello", answers=2)
    page.locator("#settings summary").click()
    assert overflow() <= 0
    for view in ("Run", "Versions"):
        page.get_by_role("button", name=view, exact=True).click()
        expect(page.get_by_role("region", name=view)).to_be_visible()
        page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        assert overflow() <= 0


def test_everything_can_be_reached_with_the_keyboard(visit: Visit, endpoint: Endpoint) -> None:
    page = visit(endpoint.open)
    chat_requests(page, max_tokens=4)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Message")).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".answer[data-state=done]")).to_be_visible()
    expect(page.locator(".user .text")).to_have_text("one\ntwo")
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#announcer")).to_contain_text("finished")
    page.evaluate("document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus()")
    order: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => { const node = document.activeElement, style = getComputedStyle(node),
            ring = getComputedStyle(node.closest('.field') ?? node);
            return [node.id || node.title || node.textContent.slice(0, 40),
              style.outlineStyle !== 'none' || ring.boxShadow !== 'none'] }"""
        )
        assert seen[1], f"no sign of focus on {seen[0]}"
        order.append(seen[0])
        if "v0" in seen[0]:
            break
    assert order[0] == "Skip to the message field"
    wanted = ["model-a", "compare", "fresh", "Good answer", "message", "send"]
    assert [name for name in order if name in wanted] == wanted
    assert any("v0" in name for name in order)


def test_the_page_follows_the_users_color_scheme_and_is_legible_in_both(visit: Visit, endpoint: Endpoint) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        page = visit(endpoint.open, color_scheme=scheme, reduced_motion="reduce")
        expect(page.locator("#summary")).to_contain_text("live")
        ratios = page.evaluate(CONTRASTS)
        assert len(ratios) > 10
        assert min(ratios)[0] >= 4.5, min(ratios)
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] != grounds["dark"]


def test_only_the_files_of_the_page_are_served(endpoint: Endpoint) -> None:
    assert get(endpoint.open).headers["location"] == "open/"
    served = get(f"{endpoint.open}/page/app.js")
    assert served.headers["content-type"].startswith("text/javascript")
    assert get(f"{endpoint.open}/page/%2e%2e%2fgateway.py").status_code == 404
