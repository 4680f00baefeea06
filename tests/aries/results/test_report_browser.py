"""
The pages of runs in headless Chromium: nothing is run, loaded or complained about, whatever models wrote; they fit a phone, a desktop
and paper; and their text can be read in the light and in the dark.
"""

import re

import pytest
from tests.aries.results.test_report import AFTER, BEFORE, TEXTS, hostile_run
from tests.browser import CHROMIUM, Browser
from tests.made_run import make_run

from trl_ext.aries.results.compare import compare
from trl_ext.aries.results.listing import list_runs
from trl_ext.aries.results.report import write_report


pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: `apt install chromium`, or any other with that name"),
]

# The lowest contrast of a text with what is behind it (WCAG 2), and what has it. Figures' texts have their fill.
CONTRAST = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const luminance = c => parse(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const opaque = c => { const p = parse(c); return p.length < 4 || p[3] === 1; };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter(n => n.nodeType === 3 && n.data.trim()).map(n => n.data).join("");
    if (!text || !element.getClientRects().length || element.closest("title")) continue;
    const style = getComputedStyle(element);
    let behind = element;
    while (behind && !opaque(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const ink = luminance(element.tagName === "text" ? style.fill : style.color);
    const paper = luminance(getComputedStyle(behind || document.body).backgroundColor);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < worst[0]) worst = [contrast, element.tagName + ": " + text.slice(0, 40)];
  }
  return worst;
})()
"""
# Elements that reach out of the window, but for those in a box that scrolls
OUTSIDE = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.closest(".scroll") && !e.classList.contains("skip"))
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
  .map(e => e.tagName + "." + e.className)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def silence(browser):
    """Whatever a test opens: no message in the console, and no request but the page's own."""
    browser.console.clear()
    browser.requests.clear()
    yield
    assert browser.console == []
    assert all(re.match(r"file://.*/\w+.html$|data:,$", url) for url in browser.requests), browser.requests


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "run", TEXTS, [BEFORE, AFTER]).path)


@pytest.fixture(scope="module")
def graded_page(tmp_path_factory):
    """Scores between and beyond 0 and 1, four turns, and a run that goes on."""
    texts = [[["one", "one two", "one two three", "three"]] * 9, [["five", "five six", "six", "six seven"]] * 9]
    scores = [[[turn * i * s / 9 - 0.5 for turn in range(1, 5)] for i in range(9)] for s in (1, -30)]
    return write_report(
        make_run(tmp_path_factory.mktemp("runs") / "graded", texts, scores, rounds=9).path, running=True
    )


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    return write_report(hostile_run(tmp_path_factory.mktemp("runs") / "hostile").path)


@pytest.fixture(scope="module")
def comparison(page, hostile_page):
    compare([page.parent, hostile_page.parent], page.parent.parent / "comparison.html")
    return page.parent.parent / "comparison.html"


@pytest.fixture(scope="module")
def index(page):
    """Of a finished run, one in a stage with a long name, and a broken one."""
    make_run(page.parents[1] / "stopped", TEXTS, [BEFORE, AFTER], rounds=3).log_event(
        event="stopped", round=2, stage="drafts and refinements", error="why"
    )
    make_run(page.parents[1] / "broken", TEXTS, [BEFORE, AFTER]).round(1).metrics.write_text("{")
    list_runs(page.parents[1])
    return page.parents[1] / "index.html"


def test_hostile_text_is_inert(browser, hostile_page):
    browser.open(hostile_page)
    assert browser.evaluate("window.pwned === undefined")
    assert (
        browser.evaluate(
            "document.scripts.length + document.images.length + document.querySelectorAll('iframe').length"
        )
        == 0
    )
    assert browser.evaluate("document.title") == "hostile · ARIES report"
    assert browser.evaluate("getComputedStyle(document.body).display") == "block"
    # Clicking and pointing at everything does nothing either
    browser.evaluate(
        "document.querySelectorAll('body *').forEach(e => { e.dispatchEvent(new MouseEvent('mouseover')); })"
    )
    assert browser.evaluate("window.pwned === undefined")


def test_the_browser_would_tell(browser, tmp_path):
    """What the tests look for is seen where it happens: a script, a message, a request."""
    file = tmp_path / "report.html"
    file.write_text("<script>window.pwned = 1; console.log('here')</script><img src='http://127.0.0.1:8099/x.png'>")
    browser.open(file)
    assert browser.evaluate("window.pwned") == 1
    assert "['here']" in browser.console
    assert "http://127.0.0.1:8099/x.png" in browser.requests
    browser.console.clear()
    browser.requests.clear()


@pytest.mark.parametrize("width", [375, 390, 1280])
@pytest.mark.parametrize("kind", ["page", "graded_page", "hostile_page", "comparison", "index"])
def test_it_fits_the_window(browser, request, kind, width):
    browser.open(request.getfixturevalue(kind), width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OUTSIDE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["page", "graded_page", "comparison", "index"])
def test_it_can_be_read(browser, request, kind, scheme):
    """WCAG 2 AA: a contrast of 4.5, and the page is dark if the browser asks for it."""
    browser.open(request.getfixturevalue(kind), scheme=scheme)
    contrast, what = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, what
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == (scheme == "dark")


WRAPPED = """
[...document.querySelectorAll("td:not(.left, .long)")]
  .filter(cell => cell.getClientRects().length && [...cell.childNodes].some(node => {
    if (node.nodeType !== 3 || !node.data.trim()) return false;
    const range = document.createRange();
    range.selectNodeContents(node);
    return new Set([...range.getClientRects()].map(line => line.top)).size > 1;
  }))
  .map(cell => cell.textContent)
"""
HIDDEN = """
[...document.querySelectorAll("#main .scroll")].filter(box => box.getClientRects().length && box.scrollWidth > box.clientWidth + 1)
  .map(box => box.getAttribute("aria-label"))
"""


@pytest.mark.parametrize("kind", ["page", "graded_page"])
def test_tables_on_a_phone(browser, request, kind):
    """No number is broken over two lines, and no column is out of sight."""
    browser.open(request.getfixturevalue(kind), 390)
    assert browser.evaluate(WRAPPED) == []
    assert browser.evaluate(HIDDEN) == []


def test_the_contents_stay_in_sight(browser, page):
    browser.open(page, 390)
    browser.evaluate("document.querySelector('#training').scrollIntoView()")
    assert browser.evaluate("document.querySelector('nav').getBoundingClientRect().top") == 0
    assert browser.evaluate("document.querySelector('#training h2').getBoundingClientRect().top") > 0


@pytest.mark.parametrize("name", ["score-by-round", "score-by-turn", "histogram", "flips"])
def test_a_value_appears_where_its_mark_is(browser, graded_page, name):
    """What is hovered over lies on the drawing, and a point's on its marker."""
    browser.open(graded_page)
    found = browser.evaluate(
        f"""(() => {{
          const figure = document.getElementById("{name}-title").parentElement, all = figure.getBoundingClientRect();
          const shapes = [...figure.querySelectorAll(":scope > circle, :scope > rect")].map(s => s.getBoundingClientRect());
          const marks = [...figure.querySelectorAll("use")].map(s => s.getBoundingClientRect());
          const middle = s => [s.x + s.width / 2, s.y + s.height / 2];
          const near = (s, m) => Math.hypot(middle(s)[0] - middle(m)[0], middle(s)[1] - middle(m)[1]) < 2;
          return [shapes.length, shapes.every(s => s.x >= all.x - 1 && s.y >= all.y - 1 && s.right <= all.right + 1 && s.bottom <= all.bottom + 1),
                  shapes.every(s => marks.some(m => near(s, m)))];
        }})()"""
    )
    assert found[0] >= 2 and found[1]
    if name.startswith("score"):
        assert found[2]


def test_small_text_on_a_phone(browser, page):
    """Figures are drawn near their own size: their labels keep 9 px."""
    browser.open(page, 375)
    sizes = browser.evaluate("[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)")
    assert sizes and min(sizes) >= 9


def test_it_prints(browser, page, tmp_path):
    """In ink on paper even where the screen is dark, with the recipe that is folded on the screen, on a few pages."""
    browser.open(page, scheme="dark")
    browser.print(tmp_path / "report.pdf")
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("document.querySelector('details.printed pre').getBoundingClientRect().height") > 10
