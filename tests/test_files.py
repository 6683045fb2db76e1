"""What others may have written is read with its types checked, and its text does no more than stand there."""

import json
from typing import Any, Literal, TypedDict

import pytest

from hf_gem.files import (
    check_type,
    is_inside,
    markdown_block,
    markdown_code,
    markdown_table,
    markdown_text,
    read_json,
    redact,
    redacted,
    shown,
    write_atomically,
)

MarkdownIt = pytest.importorskip("markdown_it", reason="pages are read by it").MarkdownIt


class Part(TypedDict):
    size: int


class _Optional(TypedDict, total=False):
    note: str | None
    parts: list[Part] | None


class Whole(_Optional):
    name: Literal["a", "b"]
    values: dict[str, float]


GOOD: dict[str, Any] = {"name": "a", "values": {"x": 1, "y": 2.5}, "parts": [{"size": 3}], "more": object()}


def test_what_has_the_type_passes():
    check_type(GOOD, Whole, "f:")
    check_type({"name": "b", "values": {}, "note": None, "parts": None}, Whole, "f:")
    check_type([[1, 0.5]], list[list[float]], "f:")
    check_type(object(), Any, "f:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "c"}, "f: name must be one of a, b, got 'c'"),
        ({"name": ["a"]}, "f: name must be one of a, b, got ['a']"),
        ({"values": []}, "f: values must be a mapping, got []"),
        ({"values": {"x": True}}, "f: values['x'] must be a number, got True"),
        ({"values": {1: 2}}, "f: values must be text as a key, got 1"),
        ({"values": None}, "f: values must be a mapping, got None"),
        ({"note": 3}, "f: note must be text or null, got 3"),
        ({"parts": 3}, "f: parts must be a list or null, got 3"),
        ({"parts": [{}]}, "f: parts[0].size is missing"),
        ({"parts": [{"size": 1}, {"size": 1.0}]}, "f: parts[1].size must be a whole number, got 1.0"),
    ],
)
def test_what_has_not_is_named_with_its_place(change, message):
    with pytest.raises(ValueError, match="f:") as error:
        check_type({**GOOD, **change}, Whole, "f:")
    assert str(error.value) == message


def test_a_missing_field_and_no_mapping():
    with pytest.raises(ValueError, match=r"^f: values is missing$"):
        check_type({"name": "a"}, Whole, "f:")
    with pytest.raises(ValueError, match=r"^f: must be a mapping, got \[\]$"):
        check_type([], Whole, "f:")


def test_messages_stay_short():
    with pytest.raises(ValueError, match="f:") as error:
        check_type({"name": "x" * 10**6, "values": {}}, Whole, "f:")
    assert len(str(error.value)) < 120


@pytest.mark.parametrize("value", ["gem_n0", 3, None, [1, 2], {"a": 1}, 0.5])
def test_a_short_value_is_shown_as_it_is(value):
    assert shown(value) == repr(value)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["x" * 70] * 10, {"k" * 90: 1}, 10**100, 10**10_000, [10**10_000], nested(10_000), b"x" * 99],
    ids=lambda value: type(value).__name__,
)
def test_a_long_value_is_cut(value):
    assert 0 < len(shown(value)) <= 80


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1,", b"\xff\xfe", b"nothing", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000]
)
def test_what_is_no_json_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"record\.json"):
        read_json(path, dict[str, Any])


def test_a_file_that_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "nothing.json"):
        with pytest.raises(ValueError, match=path.name):
            read_json(path, Any)
    (tmp_path / "good.json").write_text(json.dumps({"size": 1}))
    assert read_json(tmp_path / "good.json", Part) == {"size": 1}


def test_names_that_leave_their_folder():
    good = ("a", "a.b", "a/b/c", ".metadata", "a..b")
    bad = ("", ".", "..", "/etc/passwd", "../a", "a/../../b", "a\\b", "c:a", "a\0b")
    assert [name for name in (*good, *bad) if is_inside(name)] == list(good)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--dataset=https://me:secret@host/x.parquet", "--dataset=https://***@host/x.parquet"),
        ("https://token@host", "https://***@host"),
        ("https://me:p@ss@host", "https://***@host"),
        ("https://me:p/s#s@host/x", "https://***@host/x"),
        ("s3://b/k?X-Amz-Signature=0a&x=1", "s3://b/k?X-Amz-Signature=***&x=1"),
        ("https://h/x?a=1&access_token=abc'", "https://h/x?a=1&access_token=***'"),
        ("hf_" + "a" * 34, "***"),
        ("github_pat_" + "a" * 20 + "_" + "b" * 20, "***"),
    ],
)
def test_secrets_are_redacted(text, expected):
    assert redact(f"x {text} y") == f"x {expected} y"
    assert redacted({"a": [text], "b": 1, "c": (text, None)}) == {"a": [expected], "b": 1, "c": [expected, None]}


@pytest.mark.parametrize(
    "text",
    ["git@github.com:me/x", "https://host:8080/x@v1", "git+https://host/x@main", "hf_gem_is_a_package_name", "a?b=c"],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


HOSTILE = (
    "<script>x</script>", "<!-- x", "&lt;b&gt;", "# x", "- x", "+ x", "1. x", "123456789) x", "===", "> x", "    x",
    "```\nx", "~~~\nx", "`x`", "``x", "x`", "`", "[x](http://x)", "![x](http://x)", "[x]: http://x", "<http://x>",
    "a|b", "a\\|b", "a\\\\|b", "\\", "x\n\n# y", "x\r\n---\r\n", "*x*", "__x__", "_x_", "~~x~~", "a_b_c", "$x$", "",
)  # fmt: skip
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def tokens(text):
    """What Markdown makes of a text, with what is inside of lines."""
    for token in PARSER.parse(text):
        yield token
        yield from token.children or ()


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stands_as_it_is(text):
    line = " ".join(text.split())
    found = list(tokens(f"{markdown_text(text)}\n"))
    assert {token.type for token in found} <= {
        *("paragraph_open", "inline", "text", "text_special", "paragraph_close"),
    }
    assert "".join(token.content for token in found if token.type in ("text", "text_special")) == line

    codes = [token for token in tokens(f"x {markdown_code(text)} y") if token.type == "code_inline"]
    assert [token.content.strip() for token in codes] == [line]
    (block,) = tokens(markdown_block(text, "bash"))
    assert (block.type, block.info, block.content) == ("fence", "bash", f"{text}\n".replace("\r\n", "\n"))


@pytest.mark.parametrize("render", [markdown_text, markdown_code, str])
@pytest.mark.parametrize("text", HOSTILE)
def test_cells_stay_in_their_places(text, render):
    table = markdown_table(["a", "b"], [[render(text), "1"], ["2", "3"]])
    assert table.count("\n") == 3
    kinds = [token.type for token in tokens(table)]
    assert (kinds.count("tr_open"), kinds.count("td_open"), kinds.count("th_open")) == (3, 4, 2)


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="a"):
        write_atomically(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
