"""What the site needs beyond mkdocs.yml: pages from outside docs/, links to them, and formulas without a script.

The same Markdown is read on a forge, where `docs/functions.md` links to `../results/README.md`. The site has docs/ at
its root, and beside it every file of the repository that a page links to or that the navigation names:

- `README.md` becomes the home page, and other Markdown a page at its own path.
- Code and settings, such as `recipes/gpt2_pretrain.py`, become pages that show the file, and notebooks their cells.
- Pictures are copied.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Link, Navigation
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}
COPIED = {".png", ".svg", ".html", ".js", ".css"}
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Replaces `results/*/report.md` in the navigation by the files that are there."""
    config.nav = _expanded(config.nav)


def _expanded(entries: list[Any]) -> list[Any]:
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            ((title, value),) = entry.items()
            found.append({title: _expanded(value) if isinstance(value, list) else value})
        else:
            found += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(entry)) if "*" in entry else [entry]
    return found


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds what is outside docs/ and named in the navigation or linked to, and what that links to in turn."""
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    todo = [ROOT / "README.md", *pages, *(_source(uri) for uri in _uris(config.nav) if uri not in files.src_uris)]
    while todo:
        path = todo.pop()
        uri = site_uri(path)
        if path.is_file() and uri not in files.src_uris:
            files.append(_file(path, uri, config))
        if path.suffix == ".md" and path.is_file():
            todo += [target for target in _targets(path) if site_uri(target) not in files.src_uris]


def _source(uri: str) -> Path:
    """The file of the repository that a page is made from; a notebook for a page that is not there."""
    path = ROOT / uri
    return path if path.exists() else path.with_suffix(".ipynb")


def _uris(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    for entry in entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ():
        yield from _uris(entry)


def site_uri(path: Path) -> str:
    """Where the site has a file of the repository, before Markdown becomes HTML."""
    if path == ROOT / "README.md":
        return "index.md"
    uri = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    if path.suffix == ".ipynb":
        return uri.replace(".ipynb", ".md")
    return uri if path.suffix in {".md", *COPIED} else f"{uri}.md"


def _targets(page: Path) -> Iterator[Path]:
    for target in LINK.findall(page.read_text()):
        path = _resolved(page, target)
        if path is not None:
            yield path


def _resolved(page: Path, target: str) -> Path | None:
    """The file that a link means; None where there is none in the repository."""
    path = (page.parent / target).resolve()
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def _file(path: Path, uri: str, config: MkDocsConfig) -> File:
    inclusion = InclusionLevel.NOT_IN_NAV  # or elsewhere mkdocs would want all of them there
    if path.suffix in {".md", *COPIED}:
        return File.generated(config, uri, abs_src_path=str(path), inclusion=inclusion)
    text = path.read_text()
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=_notebook(text), inclusion=inclusion)
    shown = _fenced(text, LANGUAGES.get(path.suffix, "text"))
    name = path.relative_to(ROOT).as_posix()
    content = f"---\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n{shown}\n"
    return File.generated(config, uri, content=content, inclusion=inclusion)


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _notebook(text: str) -> str:
    cells = ((cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"])
    return "\n\n".join(_fenced(source, "python") if kind == "code" else source for kind, source in cells)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Leads entries such as `functions.md#gains` to that part of the page."""
    for link in _links(nav.items):
        uri, _, anchor = link.url.partition("#")
        file = files.get_file_from_path(uri)
        if file is None:
            raise PluginError(f"mkdocs.yml: the navigation has {link.url}. There is no such page. Correct the entry.")
        link.url = f"{file.url}#{anchor}"


def _links(items: list[Any]) -> Iterator[Link]:
    for item in items:
        if isinstance(item, Link):
            yield item
        yield from _links(item.children or [])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links between files of the repository to links between pages of the site."""
    if page.file.abs_src_path is None:  # a file that is shown: it has no links
        return markdown
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]  # the tabs above are all there is
    source, folder = Path(page.file.abs_src_path), posixpath.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _resolved(source, match[1])
        return match[0] if target is None else "](" + posixpath.relpath(site_uri(target), folder or ".")

    return LINK.sub(rewritten, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns formulas into MathML, which browsers draw themselves."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(drawn, content)
