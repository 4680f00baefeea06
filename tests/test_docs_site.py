"""
The site of `make docs`: a dead link fails the build, files outside `docs/` are pages, nothing is loaded from elsewhere, and Chromium shows the pages on a phone
without sideways scrolling.
"""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from .browser import CHROMIUM, Browser


ROOT = Path(__file__).parents[1]

DRAWN_AS = {"light": "default", "dark": "slate"}
# Types a recipe key into the search, waits for results, and returns their addresses
SEARCH = """(async () => {
    const input = document.querySelector("input[name=query]");
    input.focus();
    input.value = "min_diversity";
    input.dispatchEvent(new Event("keyup"));
    for (let waited = 0; waited < 4000; waited++) {
        const links = [...document.querySelectorAll(".md-search-result__link")].map(link => link.href).join(" ");
        if (links) return links;
        await new Promise(resolve => setTimeout(resolve, 50));
    }
    return "";
})()"""

pytestmark = pytest.mark.skipif(find_spec("material") is None, reason="needs mkdocs-material, the extra `docs`")


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    """What `make docs` runs, into another directory."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(site),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("site")
    result = build(ROOT / "mkdocs.yml", path)
    assert result.returncode == 0, result.stderr
    return path


def test_every_page_is_there(site):
    for page in (ROOT / "docs").rglob("*.md"):
        file = site / page.relative_to(ROOT / "docs")
        assert file.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html").is_file(), page


def test_files_outside_docs_are_pages(site):
    """Links to recipes, to headings of the README, and to figures lead to their place in the site."""
    recipe = (site / "project/recipes/pythia-2.8b/tdpo/config_full.yaml.html").read_text()
    assert "rmsprop" in re.sub(r"<[^>]+>", "", recipe)
    assert 'href="project/recipes/pythia-2.8b/tdpo/config_full.yaml.html"' in (site / "tdpo.html").read_text()
    assert 'href="project/index.html#what-the-quickstart-measured"' in (site / "tour.html").read_text()
    assert 'id="what-the-quickstart-measured"' in (site / "project/index.html").read_text()
    assert 'src="../figures/overview.svg"' in (site / "project/index.html").read_text()


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    """In a copy of the pages with one dead link out of `docs/` and one dead heading."""
    for name in (
        "docs",
        "recipes",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "CITATION.cff",
        "mkdocs.yml",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    docs = tmp_path / "docs"
    docs.unlink()
    docs.mkdir()
    for path in (ROOT / "docs").iterdir():
        (docs / path.name).symlink_to(path)
    tdpo = docs / "tdpo.md"
    text = tdpo.read_text() + "\n[a](../recipes/none.yaml) [b](aries.md#no-such-heading)\n"
    tdpo.unlink()
    tdpo.write_text(text)
    hooks = docs / "hooks.py"  # finds the repository from its own path
    hooks.unlink()
    hooks.write_text((ROOT / "docs" / "hooks.py").read_text())

    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 1
    assert "link 'project/recipes/none.yaml.md'" in result.stderr
    assert "does not contain an anchor '#no-such-heading'" in result.stderr
    assert result.stderr.count("WARNING") == 2


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]*)"', page.read_text())
        loaded += re.findall(r'<link[^>]* href="([^"]*)"', page.read_text())
        assert loaded and not [url for url in loaded if re.match(r"(?:https?:)?//", url)], page


def test_code_in_tables_has_no_escapes(site):
    """A repository viewer needs `\\|` for a pipe in a table; the site shows the pipe."""
    assert r"\|" in (ROOT / "docs" / "self_refine_dpo.md").read_text()
    for page in site.rglob("*.html"):
        assert not re.findall(r"<td>(?:(?!</td>).)*\\\|", page.read_text()), page


@pytest.fixture
def server(site) -> Iterator[str]:
    """The address of the site on a web server, as with `make docs-serve`."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_in_chromium(server, tmp_path):
    """Pages fit the window, follow the system's colours, load nothing from elsewhere and leave the console empty; the search finds a key."""
    with Browser(tmp_path) as browser:
        for name in ("index", "tour", "recipe_keys", "api", "benchmarks/tdpo", "project/index"):
            for width, scheme in ((375, "light"), (1280, "dark")):
                browser.open(f"{server}{name}.html", width=width, scheme=scheme)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
                assert browser.evaluate("document.body.dataset.mdColorScheme") == DRAWN_AS[scheme], name
        found = browser.evaluate(SEARCH)
        assert "recipe_keys.html?h=min_diversity#health" in found
        assert browser.console == []
        assert [url for url in browser.requests if not url.startswith((server, "data:", "blob:"))] == []
