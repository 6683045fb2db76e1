"""Markdown as one HTML page."""

import base64
import json
import re
import shutil
import subprocess

import pytest

pytest.importorskip("markdown_it", reason="pages are made by it")

from hf_gem.compare.drawing import Picture
from hf_gem.compare.pages import to_html, write_pages

PICTURE = Picture(b"png", b"svg")

TEXT = """# A <title>

A *paragraph* with `code <b>`, validation_loss of gem_n2, and <script>alert(1)</script>.

| a | b |
| --- | --- |
| 1 | **2** |

![What `it` shows](it.png)

<div>not HTML</div>
"""


def test_a_page_has_its_tables_and_pictures_inside():
    page = to_html(TEXT, {"it.png": PICTURE})
    assert page.startswith("<!doctype html>")
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert "<td><strong>2</strong></td>" in page
    data = base64.b64encode(b"svg").decode()
    assert (
        f'<figure><img src="data:image/svg+xml;base64,{data}" alt="What it shows" />'
        "<figcaption>What <code>it</code> shows</figcaption></figure>" in page
    )
    assert "validation_loss of gem_n2" in page
    assert re.search(r'<div class="table" tabindex="0"><table>.*</table></div>', page, re.DOTALL)


def test_html_in_a_text_is_shown_and_not_obeyed():
    page = to_html(TEXT, {})
    assert "<title>A &lt;title&gt;</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;div&gt;not HTML&lt;/div&gt;" in page
    assert "<code>code &lt;b&gt;</code>" in page


def test_pages_are_written_with_their_pictures(tmp_path):
    page = write_pages(tmp_path, "it", TEXT, {"it.png": PICTURE})
    assert page == tmp_path / "it.html"
    assert page.read_text() == to_html(TEXT, {"it.png": PICTURE})
    assert (tmp_path / "it.md").read_text() == TEXT
    assert (tmp_path / "it.png").read_bytes() == b"png"


WIDE = f"""# {"A long title " * 9}

| {" | ".join(f"column {number}" for number in range(8))} |
| {" | ".join(["---"] * 8)} |
| {" | ".join(["+0.1234 to +0.5678"] * 8)} |

![A picture](it.png)
"""
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="300"></svg>'
MEASURE = """<body><iframe style="width: %dpx; height: 800px; border: 0"></iframe><pre></pre><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, box = inside.querySelector(".table");
  document.querySelector("pre").textContent = JSON.stringify({page: inside.documentElement.scrollWidth,
    box: box.clientWidth, table: box.scrollWidth, picture: inside.querySelector("img").clientWidth});
};
frame.srcdoc = %s;
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1600])
def test_a_page_fits_a_phone_and_a_desktop(tmp_path, width):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("pages are laid out by Chromium, which is not installed")
    page = to_html(WIDE, {"it.png": Picture(b"", SVG)})
    assert 'name="viewport" content="width=device-width' in page
    (tmp_path / "frame.html").write_text(MEASURE % (width, json.dumps(page).replace("</", "<\\/")))
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path}")
    command = [browser, *flags, f"--window-size={width + 100},900", "--dump-dom", str(tmp_path / "frame.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])
    assert found["page"] == width  # nothing sticks out
    assert found["box"] < width
    assert (found["table"] > found["box"]) == (width == 390)  # there the table scrolls inside its box
    assert found["picture"] <= found["box"]
