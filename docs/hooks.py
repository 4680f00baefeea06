"""
mkdocs hooks that add the repository's other Markdown files, and its recipes, to the site.

A repository viewer shows every file in its place, with relative links between them, but the site holds only `docs/`. So files outside it become pages
below `project/` (recipes as code blocks), and every relative link is rewritten to match.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page


ROOT = Path(__file__).parents[1]
PROJECT = "project/"
MARKDOWN = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md")
# Shown as code
CODE = {".yaml": "yaml", ".cff": "yaml", ".py": "python", "": "text"}
SOURCES = ("LICENSE", "CITATION.cff", "recipes/**/*.yaml", "recipes/**/*.py")
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`\n]*`|(\]\()([^)\s]+)(\))", flags=re.MULTILINE | re.DOTALL)


def sources() -> list[str]:
    """Paths of the files that are shown as code, without what a recipe's script has built."""
    found = (path.relative_to(ROOT).as_posix() for pattern in SOURCES for path in ROOT.glob(pattern))
    return sorted(path for path in found if "/build/" not in path)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside `docs/`."""
    for path in MARKDOWN:
        files.append(_page(config, path, (ROOT / path).read_text(encoding="utf-8")))
    for path in sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        language = CODE[Path(path).suffix]
        file = _page(config, f"{path}.md", f"# {Path(path).name}\n\n`{path}`\n\n````{language}\n{text}\n````\n")
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def _page(config: MkDocsConfig, path: str, text: str) -> File:
    return File.generated(config, PROJECT + path, content=text)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between repository files into links between pages, and an escaped `\\|` in a table's code into `|`."""
    here = page.file.src_uri
    in_repository = here.removeprefix(PROJECT) if here.startswith(PROJECT) else f"docs/{here}"

    def link(match: re.Match) -> str:
        if match.group(2) is None:  # code
            in_table = markdown.startswith("|", markdown.rfind("\n", 0, match.start()) + 1)
            return match.group().replace(r"\|", "|") if in_table else match.group()
        target, hash_, anchor = match.group(2).partition("#")
        if not target or "://" in target:
            return match.group()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        site = posixpath.relpath(page_of(target, files), posixpath.dirname(here) or ".")
        return f"{match.group(1)}{site}{hash_}{anchor}{match.group(3)}"

    return CODE_OR_LINK.sub(link, markdown)


def page_of(path: str, files: Files) -> str:
    """Path of a repository file in the site. If the site does not have it, mkdocs reports a dead link."""
    inside = path.removeprefix("docs/")
    if inside != path and (path.endswith(".md") or files.get_file_from_path(inside) is not None):
        return inside
    return PROJECT + (path if path in MARKDOWN else f"{path}.md")
