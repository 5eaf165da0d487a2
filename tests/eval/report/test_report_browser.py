"""The report in a real browser, headless Chromium: from disk, without the network, in step,
sortable, in any light and width.
"""

import json
import os
import shutil
import subprocess
import time
from itertools import pairwise

import pytest
from sla2_eval.report.page import write_report
from sla2_eval.report.preference import count, export

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


class Browser:
    """One page of headless Chromium, driven over its debugging pipe."""

    def __init__(self, profile):
        to_read, self.to = os.pipe()
        self.answers, to_write = os.pipe()
        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--mute-audio",
            "--autoplay-policy=no-user-gesture-required",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        # Chromium reads commands from descriptor 3 and writes answers to 4; both first move out of
        # the way.
        wrapped = [
            "bash",
            "-c",
            f'exec 8<&{to_read} 9>&{to_write}; exec "$@" 3<&8 4>&9',
            "bash",
            *command,
        ]
        self.process = subprocess.Popen(
            wrapped,
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self.buffer, self.number, self.session, self.events = b"", 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict:
        while b"\0" not in self.buffer:
            block = os.read(self.answers, 1 << 16)
            assert block, "Chromium ended"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.to, json.dumps(request).encode() + b"\0")
        while (message := self._message()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def js(self, expression: str):
        """The value of an expression, awaited if it is a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 120):
        end = time.time() + seconds
        while not self.js(expression):
            assert time.time() < end, f"never came true: {expression}"
            time.sleep(0.05)

    def press(self, key: str, text: str = "") -> None:
        code = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, " ": 32, "Enter": 13, "Tab": 9}[
            key
        ]
        for kind in ("keyDown", "keyUp"):
            down = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **down
            )

    def close(self) -> None:
        os.write(self.to, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.to)
        os.close(self.answers)


@pytest.fixture
def page(run_dir, tmp_path):
    for variant, seconds in (("full", 4), ("sla2-90", 2.5), ("sla2-97-s0", 2)):
        line = json.dumps({"videos": 1, "seconds": seconds})
        (run_dir / "videos" / variant / "speed.jsonl").write_text(line + "\n")
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=write_report(run_dir).as_uri())
        browser.until("document.readyState === 'complete'")
        browser.until("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
        yield browser
    finally:
        browser.close()


TIMES = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
PAUSED = "[...document.querySelectorAll('video')].map(v => v.paused)"


def test_report_in_chromium(page):
    """One browser for every check, as starting it takes longer than they do."""
    asks_for_nothing(page)
    plays_in_step(page)
    table_sorts(page)
    noise_is_marked(page)
    keyboard_works(page)
    everything_has_a_name(page)
    points_are_read_out(page)
    focus_is_seen(page)
    light_and_dark(page)
    words_are_whole_and_labels_apart(page)
    narrow_screens(page)
    asks_for_nothing(page)
    broken_videos_stop_no_other(page)


def asks_for_nothing(page):
    page.js("1")
    urls = [
        e["params"]["request"]["url"]
        for e in page.events
        if e["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in urls if not url.startswith(("file://", "data:"))] == []
    assert [
        url for url in urls if url.startswith("file://") and not url.endswith("/report/index.html")
    ] == []
    wrong = [e for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert wrong == []


def plays_in_step(page):
    assert page.js(TIMES) == [0, 0, 0]
    page.js(
        "document.getElementById('rate').value = '0.5'; document.getElementById('play').click()"
    )
    page.until(f"{TIMES}[0] > 0.1")
    assert page.js(PAUSED) == [False] * 3
    times = page.js(TIMES)
    assert max(times) - min(times) <= 1 / 10
    page.js("document.getElementById('play').click()")
    page.until(f"{PAUSED}.every(p => p) && new Set({TIMES}).size === 1")

    page.js("scrub.value = 500; scrub.dispatchEvent(new Event('input'))")
    page.until("[...document.querySelectorAll('video')].every(v => !v.seeking)")
    times, durations = (
        page.js(TIMES),
        page.js("[...document.querySelectorAll('video')].map(v => v.duration)"),
    )
    assert durations == [pytest.approx(5 / 10, abs=0.01)] * 3
    assert times == [pytest.approx(durations[0] / 2, abs=0.01)] * 3
    assert "/ 0.50 s" in page.js("clock.value")

    before = page.js("document.querySelector('video').src")
    page.js("document.getElementById('next').click()")
    assert page.js("prompt.value || document.getElementById('prompt').value") == "1"
    assert page.js("document.querySelector('video').src") != before
    page.until("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")


def table_sorts(page):
    names = (
        "[...document.querySelectorAll('#scores tbody th')].map(c =>"
        " c.textContent.replaceAll('\\xa0', ' '))"
    )
    head = "[...document.querySelectorAll('#scores thead tr:last-child th')]"
    page.js(f"{head}.find(h => h.textContent.startsWith('PSNR')).querySelector('button').click()")
    assert page.js(names)[:2] == ["SLA2 90 %", "SLA2 97 %"]
    assert page.js(f"{head}.filter(h => h.ariaSort).map(h => h.ariaSort)") == ["descending"]
    page.js(f"{head}.find(h => h.textContent.startsWith('PSNR')).querySelector('button').click()")
    assert page.js(names)[:2] == ["SLA2 97 %", "SLA2 90 %"]
    assert sorted(page.js(names)[2:]) == ["<b>Not</b> scored", "Full attention"]
    page.js(f"{head}[0].querySelector('button').click()")
    assert page.js(names)[0] == "Full attention"


def keyboard_works(page):
    page.js("document.getElementById('player').focus()")
    page.js(
        "seekTest = document.getElementById('scrub'); seekTest.value = 0;"
        " seekTest.dispatchEvent(new Event('input'))"
    )
    for frame in (1, 2):
        page.press("ArrowRight")
        page.until(f"{TIMES}.every(t => t >= {frame} / 10 && t < {frame} / 10 + 0.02)")
    page.press("ArrowLeft")
    page.until(f"{TIMES}.every(t => t >= 0.1 && t < 0.12)")
    page.press(" ", " ")
    page.until(f"{PAUSED}.every(p => !p)")
    page.press(" ", " ")
    page.until(f"{PAUSED}.every(p => p)")

    said = page.js("document.getElementById('map-said').value")
    assert said == "query block 1 keeps 2 of 4 key blocks; this head leaves out 62.5 %"
    page.js("document.getElementById('map-frames').focus()")
    page.press("ArrowLeft")
    assert page.js("document.getElementById('map-said').value").startswith(
        "query block 0 keeps 1 of 4"
    )
    page.js(  # the first token, which comes last in this token order
        "{ const map = document.getElementById('map-frames'), at = map.getBoundingClientRect();"
        " map.dispatchEvent(new MouseEvent('click', {clientX: at.x + 2, clientY: at.y + 2})) }"
    )
    assert page.js("document.getElementById('map-said').value").startswith("query block 1 keeps")
    colours = (
        "new Set(document.getElementById('map-frames').getContext('2d').getImageData(0, 0, 400,"
        " 40).data).size"
    )
    assert page.js(colours) > 20

    page.js("document.querySelector('[role=tab]').focus()")
    page.press("ArrowRight")
    assert page.js("[...document.querySelectorAll('[role=tabpanel]')].map(p => p.hidden)") == [
        True,
        False,
    ]

    page.js("document.querySelector('#scores thead tr:last-child th:nth-child(2) button').focus()")
    page.press("Enter", "\r")
    assert (
        page.js("document.querySelector('#scores thead tr:last-child th:nth-child(2)').ariaSort")
        == "descending"
    )


def broken_videos_stop_no_other(page):
    page.js("document.querySelector('video').src = 'data:video/mp4;base64,AAAA'")
    page.until("!!document.querySelector('video').error")
    page.js("document.getElementById('scrub').value = 0; document.getElementById('play').click()")
    page.until(f"{TIMES}[1] > 0.2 && {TIMES}[2] > 0.2")


def noise_is_marked(page):
    head = (
        "[...document.querySelectorAll('#scores thead tr:last-child th')].map(h => h.textContent)"
    )
    column = next(
        i for i, title in enumerate(page.js(head)) if title.startswith("Temporal flickering")
    )
    rows = "[...document.querySelectorAll('#scores tbody tr')]"
    cells = page.js(f"{rows}.map(r => [r.cells[0].textContent, r.cells[{column}].textContent])")
    said = {name.replace("\xa0", " "): cell for name, cell in cells}
    assert "≈ +0.0000" in said["SLA2 90 %"]
    assert "Δ -0.2000" in said["SLA2 97 %"]
    assert "≈" not in said["Full attention"] + said["SLA2 97 %"]
    assert "no test shows" in page.js("document.querySelector('.same').parentElement.textContent")


def everything_has_a_name(page):
    """What a screen reader is told: names of all controls and pictures, and an outline without
    gaps.
    """
    roles = {"button", "slider", "combobox", "tab", "tablist", "image", "link", "region"}
    found = []
    for node in page.call("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if not node.get("ignored") and role in roles:
            found.append(role)
            assert node.get("name", {}).get("value", "").strip(), node
    assert set(found) >= {"button", "slider", "combobox", "tab", "link", "region", "image"}
    levels = page.js(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert page.js("document.documentElement.lang") == "en"
    assert page.js("document.title") == "A run & its <title>"
    assert page.js("document.querySelector('a.skip').hash && !!document.querySelector('main#main')")
    assert page.js(
        "document.querySelectorAll('[id]').length === new"
        " Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
    )


def points_are_read_out(page):
    """Both axes' charts: each point with its value, interval and place."""
    page.js("document.querySelectorAll('[role=tabpanel]').forEach(panel => panel.hidden = false)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    names = {node.get("name", {}).get("value", "") for node in nodes}
    page.js("document.querySelector('[role=tab]').click()")
    assert "SLA2 90 %: 32 [31.39, 32.61] at sparsity 90 %" in names
    assert "SLA2 90 %: 32 [31.39, 32.61] at seconds a video 2.5 s" in names
    assert "PSNR (dB) against sparsity" in names


def focus_is_seen(page):
    """Tab goes forwards through the page, and what has the focus shows it."""
    page.js("document.activeElement.blur(); scrollTo(0, 0)")
    page.js("document.querySelector('a.skip').focus()")
    seen = []
    for _ in range(12):
        page.press("Tab")
        style = (
            "(e => [e.outerHTML.slice(0, 60), getComputedStyle(e).outlineStyle,"
            " parseFloat(getComputedStyle(e).outlineWidth)])"
        )
        what, outline, width = page.js(f"{style}(document.activeElement)")
        assert outline != "none", what
        assert width >= 1, what
        seen.append(what)
    assert len(set(seen)) > 6


CONTRAST = """(() => {
  const style = getComputedStyle(document.documentElement);
  const light = (name) => {
    const n = parseInt(style.getPropertyValue(name).trim().slice(1), 16);
    const f = (c) => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(n >> 16) + 0.7152 * f((n >> 8) & 255) + 0.0722 * f(n & 255);
  };
  return ['--ink', '--soft', '--faint', '--accent', '--warn', '--same'].map((name) => {
    const [a, b] = [light(name), light('--panel')].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
})()"""


def light_and_dark(page):
    background = "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for scheme in ("light", "dark"):
        page.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        seen[scheme] = page.js(background)
        assert min(page.js(CONTRAST)) >= 4.5, scheme
    assert seen["light"] != seen["dark"]
    page.js("document.getElementById('theme').click()")
    assert page.js(background) == seen["light"]
    assert min(page.js(CONTRAST)) >= 4.5


BROKEN = """(() => {
  const found = [], main = document.querySelector('main');
  const walk = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode());) {
    const parent = node.parentElement;
    if (!parent.checkVisibility() || parent.closest('script, style, .sr')) continue;
    for (const word of node.data.matchAll(/[A-Za-z]{2,}/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map((r) => Math.round(r.top)));
      if (lines.size > 1) found.push(word[0]);
    }
  }
  return found;
})()"""
COLLIDING = """[...document.querySelectorAll('svg.chart')].flatMap((svg) => {
  const texts = [...svg.querySelectorAll('text')].filter((t) => t.getBoundingClientRect().width);
  const over = (a, b) => {
    const [r, s] = [a.getBoundingClientRect(), b.getBoundingClientRect()];
    const across = r.left < s.right && s.left < r.right;
    return across && r.top < s.bottom - 1 && s.top < r.bottom - 1;
  };
  return texts.flatMap((a, i) => texts.slice(i + 1).filter((b) => over(a, b)).map(
    (b) => `${a.textContent} and ${b.textContent}`));
})"""


def words_are_whole_and_labels_apart(page):
    for width in (420, 1400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert page.js(BROKEN) == []
        assert page.js(COLLIDING) == []


def narrow_screens(page):
    for width in (340, 768, 1280):
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.js("dispatchEvent(new Event('resize'))")
        assert page.js("document.documentElement.scrollWidth") <= width
        outside = (
            "[...document.querySelectorAll('section > *')].filter(e =>"
            " e.getBoundingClientRect().right > innerWidth + 1)"
        )
        assert page.js(f"{outside}.map(e => e.outerHTML.slice(0, 80))") == []
    words = (
        "document.querySelectorAll('h1, h2, .legend li, .cell b, .pick output, tbody .name, .note')"
    )
    page.js(f"{words}.forEach(e => {{ e.textContent = 'a_name_without_a_gap_'.repeat(9); }})")
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=340,
        height=800,
        deviceScaleFactor=1,
        mobile=False,
    )
    assert page.js("document.documentElement.scrollWidth") <= 340


CAN_VOTE = "!document.getElementById('left').disabled"


def test_the_blind_page_takes_votes(make_folder, tmp_path):
    full, sla2 = (make_folder(name, 3, frames=5) for name in ("full", "sla2"))
    written = export([full, sla2], "sla2", tmp_path / "out", reference=full)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("Page.navigate", url=written.as_uri())
        browser.until("document.readyState === 'complete'")
        assert browser.js("document.getElementById('pair').hidden")
        browser.js("document.getElementById('rater').value = 'Anna B.'")
        browser.js("document.querySelector('#who button').click()")
        browser.until("[...document.querySelectorAll('video')].every((v) => v.currentTime > 0)")
        browser.press("ArrowRight")
        browser.js("document.getElementById('back').click()")
        assert browser.js("document.getElementById('right').getAttribute('aria-pressed')") == "true"
        for choice in ("left", "same"):
            browser.until(CAN_VOTE)
            browser.js(f"document.getElementById('{choice}').click()")
        browser.call("Page.reload")  # the votes are kept, and the third pair is next
        browser.until("performance.getEntriesByType('navigation')[0]?.type === 'reload'")
        browser.until("document.getElementById('said')?.textContent === '2 of 3'")
        browser.until(CAN_VOTE)
        browser.press("ArrowDown")
        assert not browser.js("document.getElementById('end').hidden")
        assert browser.js("document.getElementById('save').download") == "votes-Anna-B-.json"
        saved = browser.js("fetch(document.getElementById('save').href).then((r) => r.text())")
    finally:
        browser.close()
    assert json.loads(saved)["votes"] == {"001": "left", "002": "same", "003": "same"}
    (tmp_path / "votes.json").write_text(saved)
    found = count(tmp_path / "out", [tmp_path / "votes.json"])
    assert (found["num_videos"], found["num_left_out"], found["votes"]["same"]) == (1, 2, 2)


def test_two_raters_share_a_browser_and_what_it_cannot_show_takes_no_vote(make_folder, tmp_path):
    full, sla2 = (make_folder(name, 2, frames=5) for name in ("full", "sla2"))
    written = export([full, sla2], "sla2", tmp_path / "out", reference=full)
    (written.parent / "videos" / "002-right.mp4").write_bytes(b"no video")
    browser = Browser(tmp_path / "profile")
    saved = []
    try:
        browser.call("Page.navigate", url=written.as_uri())
        browser.until("document.readyState === 'complete'")
        for rater, choice in (("Anna", "left"), ("Ben", "right")):
            assert not browser.js("document.getElementById('who').hidden")
            browser.js(f"document.getElementById('rater').value = '{rater}'")
            browser.js("document.querySelector('#who button').click()")
            assert browser.js("document.getElementById('name').textContent") == rater
            assert browser.js("document.getElementById('said').textContent") == "0 of 2"
            browser.until(CAN_VOTE)
            browser.js(f"document.getElementById('{choice}').click()")
            browser.until("!document.getElementById('unshown').hidden")
            said = browser.js("document.getElementById('unshown').innerText")
            assert said.startswith(
                "This browser cannot show the right video, so this pair takes no"
            )
            browser.press("ArrowLeft")  # is not taken
            assert browser.js("document.getElementById('end').hidden")
            browser.js("document.getElementById('next').click()")
            assert not browser.js("document.getElementById('end').hidden")
            saved.append(
                browser.js("fetch(document.getElementById('save').href).then(r => r.text())")
            )
            browser.js("document.getElementById('other').click()")
    finally:
        browser.close()
    votes = [tmp_path / "anna.json", tmp_path / "ben.json"]
    for path, text in zip(votes, saved, strict=True):
        path.write_text(text)
    assert [json.loads(text)["rater"] for text in saved] == ["Anna", "Ben"]
    assert [json.loads(text)["votes"] for text in saved] == [{"001": "left"}, {"001": "right"}]
    found = count(tmp_path / "out", votes)
    assert (found["num_raters"], found["num_not_shown"], found["num_left_out"]) == (2, 2, 1)
