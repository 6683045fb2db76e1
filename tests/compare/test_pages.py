"""Markdown as one HTML page."""

import base64

import pytest

pytest.importorskip("markdown_it", reason="pages are made by it")

from hf_gem.compare.pages import to_html, write_pages

TEXT = """# A <title>

A *paragraph* with `code <b>`, validation_loss of gem_n2, and <script>alert(1)</script>.

| a | b |
| --- | --- |
| 1 | **2** |

![What `it` shows](it.png)

<div>not HTML</div>
"""


def test_a_page_has_its_tables_and_pictures_inside():
    page = to_html(TEXT, {"it.png": b"png"})
    assert page.startswith("<!doctype html>")
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert "<td><strong>2</strong></td>" in page
    data = base64.b64encode(b"png").decode()
    assert (
        f'<figure><img src="data:image/png;base64,{data}" alt="What it shows" />'
        "<figcaption>What <code>it</code> shows</figcaption></figure>" in page
    )
    assert "validation_loss of gem_n2" in page


def test_html_in_a_text_is_shown_and_not_obeyed():
    page = to_html(TEXT, {})
    assert "<title>A &lt;title&gt;</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;div&gt;not HTML&lt;/div&gt;" in page
    assert "<code>code &lt;b&gt;</code>" in page


def test_pages_are_written_with_their_pictures(tmp_path):
    page = write_pages(tmp_path, "it", TEXT, {"it.png": b"png"})
    assert page == tmp_path / "it.html"
    assert page.read_text() == to_html(TEXT, {"it.png": b"png"})
    assert (tmp_path / "it.md").read_text() == TEXT
    assert (tmp_path / "it.png").read_bytes() == b"png"
