"""The documentation site: built strictly, whole, without other hosts, and with the text that forges show."""

import functools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hf_gem
from tests.helpers import ROOT

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("material")
MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt

pytestmark = pytest.mark.slow

LOADING = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href", "video": "src"}
VOID = {"img", "br", "hr", "input", "meta", "link", "source"}


class Page(HTMLParser):
    """What a page refers to, and the text of its article.

    Args:
        html: The page.
    """

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.loads, self.links, self.anchors, self.navigation = [], [], set(), []
        self.text, self._open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self._open.append((tag, attrs.get("class", "").split()))
        self.anchors |= {attrs.get("id"), attrs.get("name")}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
            if "md-nav__link" in attrs.get("class", "") or "md-tabs__link" in attrs.get("class", ""):
                self.navigation.append(attrs["href"])
        elif attrs.get(LOADING.get(tag)) and attrs.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(attrs[LOADING[tag]])

    def handle_endtag(self, tag):
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if any(tag == "article" for tag, _ in self._open) and not any("headerlink" in c for _, c in self._open):
            self.text.append(data)


def make_docs(*flags):
    """`make docs` in this environment: its exit status and what it said."""
    variables = ["READY=", f"RUN={Path(sys.executable).parent}", f"ARGS={' '.join(flags)}"]
    done = subprocess.run(["make", "docs", *variables], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    code, said = make_docs("--site-dir", str(folder))
    assert code == 0, said
    assert "WARNING -" not in said
    return folder


def test_a_dead_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: []\nnav: [index.md]\nplugins: []\n")
    flags = "--config-file", str(settings), "--site-dir", str(tmp_path / "site")
    for text, message in (
        ("[here](#title)", None),
        ("[gone](gone.md)", "gone.md"),
        ("[gone](#gone)", "no such anchor"),
        ("[gone](index.md#gone)", "#gone"),
    ):
        (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{text}\n")
        code, said = make_docs(*flags)
        assert (code == 0) == (message is None), said
        assert message is None or message in said


@functools.cache
def parsed(path: Path) -> Page:
    return Page(path.read_text())


def pages(site):
    return sorted(site.rglob("*.html"))


def page_of(site, source):
    """The page that the site has of a Markdown file."""
    inside = source.relative_to(ROOT / "docs" if source.is_relative_to(ROOT / "docs") else ROOT)
    return site / (inside.parent if source.name == "README.md" else inside.with_suffix("")) / "index.html"


def markdown():
    """The Markdown files that people wrote and studies made, which all belong on the site."""
    top = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG", "CODE_OF_CONDUCT")]
    folders = [(ROOT / name).rglob("*.md") for name in ("docs", "results", "benchmarks", "model_cards")]
    return [*top, *(path for found in folders for path in sorted(found))]


def target(site, page, link):
    """The file that a link within the site leads to."""
    path = unquote(urlsplit(link).path)
    found = site / path.lstrip("/") if path.startswith("/") else (page.parent / path) if path else page
    return found / "index.html" if found.is_dir() else found


def test_every_file_has_its_page(site):
    assert [path for path in markdown() if not page_of(site, path).is_file()] == []


def test_every_page_of_the_navigation_exists(site):
    home = site / "index.html"
    entries = {target(site, home, link) for link in parsed(home).navigation}
    assert len(entries) > 5  # the tabs
    for page in pages(site):
        entries |= {target(site, page, link) for link in parsed(page).navigation if not urlsplit(link).netloc}
    assert [entry for entry in entries if not entry.is_file()] == []
    for name in ("functions", "models", "supported_models", "api/models", "results", "architecture", "SECURITY"):
        assert site / name / "index.html" in entries
    for report in (ROOT / "results").glob("*/report.md"):
        assert page_of(site, report) in entries


def test_links_lead_somewhere(site):
    for page in pages(site):
        if page.name == "404.html":  # its links start from the root of the host
            continue
        for link in parsed(page).links + parsed(page).loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            found = target(site, page, link)
            assert found.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and found.suffix == ".html" and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in parsed(found).anchors, f"{page.relative_to(site)}: {link}"


def test_nothing_is_loaded_from_another_host(site):
    for page in pages(site):
        for link in parsed(page).loads:
            parts = urlsplit(link)
            assert not parts.netloc, f"{page.relative_to(site)}: {link}"
            assert parts.scheme in ("", "data"), f"{page.relative_to(site)}: {link}"
        assert "md-source" not in page.read_text()  # the theme would ask the forge for the number of stars
        assert "mermaid" not in page.read_text()  # which the theme would load from elsewhere
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text()), style.name
    for path in (ROOT / "docs").rglob("*.js"):
        assert not re.search(r"(https?:)?//\w+\.\w", re.sub(r"^\s*//.*", "", path.read_text(), flags=re.M)), path.name


def test_the_search_finds_the_supported_models(site):
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    text = " ".join(entry["text"] for entry in entries if entry["location"].startswith("supported_models/"))
    models = re.findall(r"^\| (\w[\w.-]*) \|", (ROOT / "docs" / "supported_models.md").read_text(), re.MULTILINE)
    assert len(models) > 800
    words = set(re.split(r"[^\w.-]+", text))
    assert [name for name in models if name not in words] == []
    assert not any("gpt2_pretrain.py/" in entry["location"] for entry in entries)  # shown files would drown the rest


def test_every_public_name_has_its_place_in_the_api(site):
    anchors = set().union(*(parsed(page).anchors for page in (site / "api").rglob("*.html")))
    assert [name for name in hf_gem.__all__ if f"hf_gem.{name}" not in anchors] == []
    config = (site / "api" / "training" / "index.html").read_text()
    assert "Number of optimizer steps." in config
    assert "<code>1000</code>" in config


def words(text):
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("path", markdown(), ids=lambda path: str(path.relative_to(ROOT)))
def test_forges_show_the_same_text(site, path):
    """Python-Markdown and CommonMark read some lists, tables and blocks of code differently."""
    source = re.sub(r"\A---\n.*?\n---\n", "", path.read_text(), flags=re.DOTALL)
    if re.search(r"^(:::|\$\$)", source, re.MULTILINE):
        pytest.skip("it has what only one of the two knows: generated documentation, or formulas")
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
    expected = Page(f"<article>{html}</article>")
    built = page_of(site, path).read_text()
    assert words("".join(parsed(page_of(site, path)).text)) == words("".join(expected.text))
    for tag in ("li", "ul", "ol", "pre", "table", "tr", "td", "th", "img", "h1", "h2", "h3", "blockquote"):
        article = re.search(r"<article.*?</article>", built, re.DOTALL)[0]
        assert len(re.findall(rf"<{tag}\b", article)) == len(re.findall(rf"<{tag}\b", html)), tag


def test_formulas_are_drawn_without_a_script(site):
    html = (site / "proofs" / "index.html").read_text()
    assert html.count("<math") > 50
    assert "arithmatex" not in html
    assert "\\frac" not in html


def test_long_tables_can_be_filtered(site, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs Chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    address = (site / "supported_models" / "index.html").as_uri() + "?h=llama4"
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=False)
    rows = re.findall(r"<tr( hidden=\"\")?>\s*<td[^>]*>(.*?)</td>", done.stdout)
    shown = [name for hidden, name in rows if not hidden and "llama4" in re.sub("<.*?>", "", name)]
    assert "llama4" in {re.sub("<.*?>", "", name) for name in shown}
    assert sum(bool(hidden) for hidden, _ in rows) > 700
