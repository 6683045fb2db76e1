"""Writes pages as Markdown with separate pictures, and as one HTML file that contains them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

from ..files import write_atomically
from .drawing import Picture
from .words import render


def write_pages(folder: Path, name: str, text: str, pictures: Mapping[str, Picture]) -> Path:
    """Writes a page as Markdown and as HTML.

    Args:
        folder: Folder for the files.
        name: Name of both files, without suffix.
        text: Markdown. Its first line is the title.
        pictures: Name of a PNG file that the text shows -> the picture. The HTML page contains the SVG.

    Returns:
        The HTML page.
    """
    for file, picture in pictures.items():
        (folder / file).write_bytes(picture.png)
    write_atomically(folder / f"{name}.md", text)
    write_atomically(folder / f"{name}.html", to_html(text, pictures))
    return folder / f"{name}.html"


def to_html(text: str, pictures: Mapping[str, Picture]) -> str:
    """Converts Markdown to an HTML page that needs no other file. HTML in the text is shown as text.

    Args:
        text: Markdown. Its first line is the title.
        pictures: Name of a PNG file that the text shows -> the picture.
    """
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    body = parser.render(text, {"pictures": pictures})
    return render("page.html.j2", title=text.partition("\n")[0].lstrip("# "), body=body)


class _Renderer(RendererHTML):
    """A renderer that embeds pictures with their titles below them, and puts tables into boxes that scroll."""

    def render(self, tokens: Sequence[Token], options: OptionsDict, env: EnvType) -> str:
        for before, token, after in zip(tokens, tokens[1:], tokens[2:], strict=False):
            if [child.type for child in token.children or ()] == ["image"]:  # a paragraph with nothing else
                before.tag = after.tag = "figure"
        return super().render(tokens, options, env)

    def image(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[idx]
        picture = env["pictures"].get(token.attrs["src"])
        if picture is not None:
            token.attrs["src"] = f"data:image/svg+xml;base64,{base64.b64encode(picture.svg).decode()}"
        title = self.renderInline(token.children or (), options, env)
        return f"{super().image(tokens, idx, options, env)}<figcaption>{title}</figcaption>"

    def table_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        # With a tabindex the keyboard can scroll it too.
        return f'<div class="table" tabindex="0">{self.renderToken(tokens, idx, options, env)}'

    def table_close(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: EnvType) -> str:
        return f"{self.renderToken(tokens, idx, options, env).rstrip()}</div>\n"
