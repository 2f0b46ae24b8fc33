"""run.html and the page of generate.py --html in a real browser, opened from the file system."""

import json
import re
import time

import pytest
from chromium import PROGRAM, Browser
from conftest import run_script
from pages import PROMPT, TEXT, rows

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.usefixtures("quick"),
]

TOKEN = "document.querySelectorAll('#passage .t:not(.first)')"


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.show(1280)
        yield browser
        assert browser.complaints() == []
        assert all(address.startswith("file://") for address in browser.requests())


def test_the_slider_moves_and_its_place_survives_a_reload(browser, run):
    address, samples = (run / "run.html").as_uri(), rows(run)
    browser.open(address)
    assert browser.run("slider.value") == "3" and browser.run("sample.textContent") == samples[3]["sample"]
    assert browser.run("label.textContent") == "iteration 20"
    browser.run("slider.focus()")
    for _ in range(2):
        browser.key("ArrowLeft", 37)
    assert browser.run("label.textContent") == "iteration 8" and browser.run("location.hash") == "#8"
    assert browser.run("sample.textContent") == samples[1]["sample"]
    assert browser.run("bits.textContent") == f"{samples[1]['passage']['bits_per_byte']:.3f}"
    assert browser.run("reading.textContent").startswith("iteration 8")
    browser.reload()
    assert (
        browser.run("label.textContent") == "iteration 8" and browser.run("sample.textContent") == samples[1]["sample"]
    )
    browser.key("End", 35)  # the slider has no focus after a reload
    assert browser.run("label.textContent") == "iteration 8"


def test_an_evaluation_that_is_not_shown_any_more_leads_to_the_nearest(browser, run):
    browser.open((run / "run.html").as_uri() + "#9")
    assert browser.run("label.textContent") == "iteration 8" and browser.run("location.hash") == "#8"


def with_data(page: str, count: int, **changes) -> str:
    """The page of a run with its first `count` evaluations alone, and with other data."""
    raw = re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(raw)
    now = json.dumps({**data, "views": data["views"][:count], **changes}).replace("<", "\\u003c")
    return page.replace(raw, now).replace(f'max="{len(data["views"]) - 1}"', f'max="{max(0, count - 1)}"')


def with_passage(page: str, words: list[str]) -> str:
    """The page of a run with one evaluation alone, whose passage is these tokens of 1, 2, 3, ... bits."""
    bits = [None, *map(float, range(1, len(words)))]
    passage = {"text": words, "bits": bits, "alternatives": [[]] * len(words), "bits_per_byte": 1.0}
    view = {"iter": 0, "label": "iteration 0", "prompt": "", "sample": "", "passage": passage}
    return with_data(page, 1, views=[view])


@pytest.fixture
def waits(browser):
    """A function for the milliseconds that a page waits before it reloads itself. It then waits only a tenth of them."""
    browser.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="""{ const real = setTimeout; window.waits = [];
            window.setTimeout = (action, wait) => { waits.push(wait); return real(action, wait / 10); }; }""",
    )
    return lambda: browser.run("waits")


def test_a_page_of_a_run_under_way_reloads_itself(browser, waits, run, tmp_path):
    """It keeps the place that the reader chose; otherwise it follows the newest evaluation."""
    page = (run / "run.html").read_text(encoding="utf-8")

    def write(views: int) -> None:
        (tmp_path / "run.html").write_text(with_data(page, views, due=time.time() + 3600))

    write(2)
    browser.open((tmp_path / "run.html").as_uri())
    browser.run("window.before = true")
    write(3)
    browser.wait_until("!window.before && document.readyState === 'complete' && label.textContent === 'iteration 16'")
    browser.run("slider.value = 0, slider.dispatchEvent(new Event('input')), window.before = true")
    write(4)
    browser.wait_until("!window.before && document.readyState === 'complete' && slider.max === '3'")
    assert browser.run("label.textContent") == "iteration 0"


@pytest.mark.parametrize(
    ("due_in", "expected", "state"),
    [(None, [], "finished"), (3600, [10_000], "finished"), (-1, [300_000], "no news, perhaps killed")],
    ids=["finished", "running", "killed"],
)
def test_a_page_whose_run_was_killed_rarely_reloads(browser, waits, run, tmp_path, due_in, expected, state):
    """The page is of a finished run and says so, whatever its data says."""
    due = due_in and time.time() + due_in
    (tmp_path / "run.html").write_text(with_data((run / "run.html").read_text(encoding="utf-8"), 2, due=due))
    browser.open((tmp_path / "run.html").as_uri())
    assert (waits(), browser.run("state.textContent")) == (expected, state)


def test_a_run_without_samples_has_a_chart(browser, run, tmp_path):
    (tmp_path / "run.html").write_text(with_data((run / "run.html").read_text(encoding="utf-8"), 0))
    browser.open((tmp_path / "run.html").as_uri())
    assert browser.run("reading.textContent").startswith("iteration 20")
    browser.run("document.querySelector('#chart').dispatchEvent(new MouseEvent('click', { clientX: 300 }))")
    assert browser.run("document.querySelectorAll('.slider, .columns').length") == 0


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "touch"])
def test_alternatives_show_at_a_token(browser, run, touch):
    browser.show(390 if touch else 1280, touch=touch)
    browser.open((run / "run.html").as_uri())
    assert browser.run("$('tip').hidden")
    (browser.tap if touch else browser.point)(f"{TOKEN}[3]")
    browser.wait_until("!$('tip').hidden")
    shown = browser.run("$('tip').innerText")
    token = browser.run(f"{TOKEN}[3].group[0]")
    passage = rows(run)[-1]["passage"]
    assert f"{passage['bits'][token]:.1f} bits" in shown
    for text, p in passage["alternatives"][token]:
        assert text.replace(" ", "␣").replace("\n", "↵") in shown and re.search(rf"{100 * p:.1f}|{100 * p:.0f}", shown)
    inside = "(() => { const r = $('tip').getBoundingClientRect(); return r.left >= 0 && r.right <= innerWidth; })()"
    assert browser.run(inside)
    browser.run("document.dispatchEvent(new PointerEvent('pointerup'))")  # outside the window
    assert browser.run("$('tip').hidden")


def test_a_character_of_several_tokens_is_one(browser, run):
    browser.open((run / "run.html").as_uri())
    shown = browser.run(f"[...{TOKEN}].map((span) => [span.textContent, span.group.length])")
    assert ["三", 3] in shown and ["🦉", 4] in shown and ["ä", 2] in shown and ["K", 1] in shown
    text = browser.run("passage.textContent").replace("↵\n", "\n")
    assert TEXT.startswith(text) and len(text.encode()) > 250


def test_script_tags_in_texts_do_nothing(browser, run):
    browser.open((run / "run.html").as_uri())
    assert "<script>alert(1)</script>" in browser.run("passage.textContent")
    assert browser.run("sample.textContent").startswith(PROMPT)
    assert browser.run("document.querySelectorAll('img, b:not(.status b, .figure b)').length") == 0
    # Even if text became HTML, the policy would stop its scripts. The browser reports that, so clear its events.
    stopped = """new Promise((done) => { document.addEventListener("securitypolicyviolation", (e) => done(e.violatedDirective));
        const s = document.createElement("script"); s.textContent = "window.hacked = 1"; document.body.append(s); })"""
    assert browser.run(stopped).startswith("script-src") and not browser.run("window.hacked")
    browser.events.clear()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_and_follows_the_colour_scheme(browser, run, tmp_path, width, dark):
    browser.show(width, dark=dark)
    browser.open((run / "run.html").as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= width
    red, green, blue = map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.body).backgroundColor")))
    assert (red + green + blue < 200) == dark
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_values_can_be_read_off_the_curves(browser, run):
    browser.open((run / "run.html").as_uri())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    x, y = browser.place("document.querySelector('#chart')")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    text = browser.run("reading.innerText")
    row = next(row for row in metrics if f"iteration {row['iter']}\n" in text + "\n")
    assert abs(row["iter"] - 10) <= 1
    loss, bits = metrics[8]["val_loss"], metrics[8]["bits_per_byte"]
    assert f"training {row['train_loss']:.4f}" in text
    assert f"validation {loss:.4f}, {bits:.3f} bits per byte (at 8)" in text


def test_all_values_can_be_read_by_keyboard(browser, run):
    browser.open((run / "run.html").as_uri())
    order = []
    for _ in range(3):
        browser.key("Tab", 9)
        order.append(browser.run("document.activeElement.id"))
        if order[-1] == "chart":
            browser.key("Home", 36)
            assert browser.run("reading.innerText").startswith("iteration 0")
            browser.key("ArrowRight", 39)
            assert browser.run("reading.innerText").startswith("iteration 1\n")
    assert order == ["chart", "slider", "passage"]
    assert browser.run("slider.getAttribute('aria-valuetext')") == "iteration 20"
    for _ in range(4):
        browser.key("ArrowRight", 39)
    assert not browser.run("$('tip').hidden")
    token, passage = browser.run("document.querySelector('#passage .on').group[0]"), rows(run)[-1]["passage"]
    assert f"{passage['bits'][token]:.1f} bits" in browser.run("$('tip').innerText")
    browser.key("Tab", 9)
    assert browser.run("$('tip').hidden")


def test_the_tip_of_the_lowest_token_is_in_the_window(browser, run):
    browser.open((run / "run.html").as_uri())
    lowest = f"[...{TOKEN}].reduce((a, b) => (b.getBoundingClientRect().bottom <= innerHeight ? b : a))"
    browser.run(f"{TOKEN}[60].scrollIntoView({{ block: 'end' }}), window.lowest = {lowest}")
    browser.point("lowest")
    browser.wait_until("!$('tip').hidden")
    top, bottom, height = browser.run(
        "[...['top', 'bottom'].map((side) => $('tip').getBoundingClientRect()[side]), innerHeight]"
    )
    assert 0 <= top < bottom <= height


def test_the_tip_of_a_broken_token_is_at_its_word(browser, run, tmp_path):
    """Its space ends the line above."""
    page = with_passage((run / "run.html").read_text(encoding="utf-8"), [" brownish"] * 200)
    (tmp_path / "run.html").write_text(page)
    browser.open((tmp_path / "run.html").as_uri())
    browser.run("window.broken = [...passage.children].find((span) => span.getClientRects().length > 1), tip(broken)")
    space, word = browser.run("[...broken.getClientRects()].map((box) => box.left)")
    assert browser.run("$('tip').getBoundingClientRect().left") == pytest.approx(word, abs=1) and space > word + 50


def test_the_slider_does_not_hide_the_chosen_token(browser, run, tmp_path):
    page = with_passage((run / "run.html").read_text(encoding="utf-8"), [" brownish"] * 200)
    (tmp_path / "run.html").write_text(page)
    browser.show(390, 600)
    browser.open((tmp_path / "run.html").as_uri())
    browser.run("passage.focus()")
    browser.key("End", 35)
    browser.key("Home", 36)
    top = browser.run("document.querySelector('.on').getBoundingClientRect().top")
    assert top >= browser.run("document.querySelector('.slider').getBoundingClientRect().bottom")


def test_invisible_tokens_have_names(browser, run):
    browser.open((run / "run.html").as_uri())
    names = browser.run("['\\x1b', '\\u200b', '\\u{e0001}', 'a b\\tc\\n', ''].map(visible)")
    assert names == ["<U+001B>", "<U+200B>", "<U+E0001>", "a␣b⇥c↵", "(nothing)"]


def test_a_copied_passage_has_no_marks(browser, run):
    browser.open((run / "run.html").as_uri())
    browser.run("getSelection().selectAllChildren(passage)")
    copied = browser.run("getSelection().toString()")
    assert copied in TEXT and "\n\n" in copied and "↵" in browser.run("passage.textContent")


def test_a_contrast_theme_leaves_the_colours_of_surprise(browser, run):
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}])
    browser.open((run / "run.html").as_uri())
    colour = "getComputedStyle(span).backgroundColor"
    colours = browser.run(f"[...{TOKEN}].map((span) => {colour})")
    paper = browser.run(f"((span) => {colour})(document.body)").removeprefix("rgb(").removesuffix(")")
    assert len(set(colours)) > 10 and not any(paper in colour for colour in colours)


def test_a_printed_chart_is_whole(browser, run):
    """It is drawn for the screen, and scaled to the paper."""
    browser.open((run / "run.html").as_uri())
    width = browser.run("$('chart').clientWidth")
    assert browser.run("$('chart').getAttribute('viewBox')").split()[2] == f"{width}"
    browser.run("$('chart').style.width = '300px'")
    right = "Math.max(...[...$('chart').querySelectorAll('text')].map((text) => text.getBoundingClientRect().right))"
    assert browser.run(right) <= browser.run("$('chart').getBoundingClientRect().right") + 1


def test_a_page_that_reloads_itself_keeps_the_focus(browser, waits, run, tmp_path):
    page = with_data((run / "run.html").read_text(encoding="utf-8"), 4, due=time.time() + 3600)
    (tmp_path / "run.html").write_text(page)
    browser.open((tmp_path / "run.html").as_uri())
    browser.run("window.before = true, slider.focus()")
    browser.wait_until("!window.before && document.readyState === 'complete' && document.activeElement.id === 'slider'")
    browser.run("window.before = true, $('chart').focus()")
    browser.key("Home", 36)
    browser.wait_until("!window.before && document.readyState === 'complete' && document.activeElement.id === 'chart'")
    assert browser.run("reading.innerText").startswith("iteration 0")


@pytest.mark.parametrize(
    "busy", [f"tip({TOKEN}[3])", "getSelection().selectAllChildren(sample)"], ids=["tip", "selection"]
)
def test_a_page_in_use_waits(browser, waits, run, tmp_path, busy):
    """It cannot know whether its run was killed: a new page may have come meanwhile."""
    page = with_data((run / "run.html").read_text(encoding="utf-8"), 4, due=time.time() + 3600)
    (tmp_path / "run.html").write_text(page)
    browser.open((tmp_path / "run.html").as_uri())
    browser.run(f"window.before = true, {busy}, Date.now = () => 1e14")
    browser.wait_until("waits.length > 1")
    assert set(waits()) == {10_000} and browser.run("window.before && state.textContent") == "finished"
    browser.run("tip(null), getSelection().empty()")
    browser.wait_until("!window.before")


def test_the_page_of_several_samples_opens_at_the_first(browser, run, tmp_path):
    """It is the one whose attention is shown. A place that the reader chose is kept."""
    path = tmp_path / "text.html"
    options = ["--num-samples", 3, "--max-new-tokens", 2, "--html", path]
    made = run_script("generate.py", "--checkpoint", run, "--prompt", TEXT[:9], *options)
    assert made.returncode == 0, made.stderr
    browser.open(path.as_uri())
    assert browser.run("slider.value") == "0" and browser.run("label.textContent") == "sample 1 of 3"
    headings = browser.run("[...document.querySelectorAll('h2')].map((heading) => heading.textContent)")
    assert "Where the heads look in sample 1" in headings
    for number in (1, 2):
        browser.run(f"slider.value = {number}, slider.dispatchEvent(new Event('input'))")
        browser.reload()
        assert browser.run("label.textContent") == f"sample {number + 1} of 3"


def test_the_page_of_a_text_shows_where_heads_look(browser, run, tmp_path):
    path = tmp_path / "text.html"
    made = run_script("generate.py", "--checkpoint", run, "--prompt", TEXT[:12], "--max-new-tokens", 0, "--html", path)
    assert made.returncode == 0, made.stderr
    browser.open(path.as_uri())
    assert browser.run("$('heads').querySelectorAll('canvas').length") == 4  # 2 layers of 2 heads
    assert browser.run("$('head').textContent") == "layer 1, head 1"
    browser.run("$('heads').querySelectorAll('button')[3].click()")
    assert browser.run("$('head').textContent") == "layer 2, head 2"
    browser.point("looks.children[0]")
    browser.wait_until("looks.children[0].classList.contains('on')")
    strength = "[...looks.children].map((word) => +word.style.getPropertyValue('--a'))"
    assert browser.run(strength)[0] == 1 and set(browser.run(strength)[1:]) == {0}  # the first token sees only itself
    first, second = browser.run("['0', '1'].map((n) => `\u2068${looks.children[n].textContent}\u2069`)")
    assert browser.run("most.textContent") == f"{first} looks most at {first} 100 %"
    browser.run("looks.focus()")
    browser.key("ArrowRight", 39)
    assert browser.run("looks.children[1].classList.contains('on')")
    assert browser.run("most.textContent").startswith(f"{second} looks most at ")  # for a screen reader


def test_a_line_break_can_be_chosen_among_the_words_that_heads_look_at(browser, run, tmp_path):
    path = tmp_path / "text.html"
    options = ["--max-new-tokens", 0, "--html", path]
    made = run_script("generate.py", "--checkpoint", run, "--prompt", "a\n\nb", *options)
    assert made.returncode == 0, made.stderr
    browser.open(path.as_uri())
    words = browser.run("[...looks.children].map((word) => word.textContent)")
    number = next(n for n, word in enumerate(words) if "↵" in word)
    browser.point(f"looks.children[{number}].querySelector('small')")
    browser.wait_until(f"looks.children[{number}].classList.contains('on')")


def test_a_passage_from_right_to_left_is_read_from_right_to_left(browser, run, tmp_path):
    """Each token is an element of its own, but the line has one direction."""
    page = with_passage((run / "run.html").read_text(encoding="utf-8"), ["שלום ", "עולם ", "וספרים"])
    (tmp_path / "run.html").write_text(page, encoding="utf-8")
    browser.open((tmp_path / "run.html").as_uri())
    lefts = browser.run(
        "[...document.querySelectorAll('#passage .t')].map((span) => span.getBoundingClientRect().left)"
    )
    assert len(lefts) == 3 and lefts[0] > lefts[1] > lefts[2]


def test_a_heading_from_right_to_left_ends_on_the_left(browser, run, tmp_path):
    page = (run / "run.html").read_text(encoding="utf-8")
    (tmp_path / "run.html").write_text(re.sub("<h1>.*?</h1>", "<h1>שלום עולם…</h1>", page), encoding="utf-8")
    browser.open((tmp_path / "run.html").as_uri())
    left = """(n) => { const range = document.createRange(), text = document.querySelector('h1').firstChild;
        range.setStart(text, n); range.setEnd(text, n + 1); return range.getBoundingClientRect().left; }"""
    first, last = browser.run(f"[0, 9].map({left})")
    assert last < first


def test_a_slider_whose_address_cannot_be_set_shows_the_right_evaluation(browser, run):
    """Safari and Firefox refuse to change the address more than 100 or 200 times in ten seconds."""
    browser.open((run / "run.html").as_uri())
    browser.run("history.replaceState = () => { throw new DOMException('too often', 'SecurityError'); }")
    browser.run("slider.focus()")
    browser.key("ArrowLeft", 37)
    assert browser.run("sample.textContent") == rows(run)[2]["sample"]
    assert browser.run("label.textContent") == f"iteration {rows(run)[2]['iter']}"
