"""The page of token scores: nothing from outside is markup, nothing is loaded, every token and figure is there."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_scores import NASTY, make_scores

from cutlm.data.records import JudgedRecord
from cutlm.inspect.pages import POLICY, Example, Picture, Table, render_page, show_text, write_page
from cutlm.inspect.tokens import split_pieces

VOID = {"meta", "img", "source"}
ALLOWED = {"html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "div", "aside", "span", "mark"}
ALLOWED |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "picture", "source", "img", "section", "article"}
ALLOWED |= {"dl", "dt", "dd", "details", "summary", "bdi", "i"}


class Reader(HTMLParser):
    """Reads a page: every element by name with its attributes and text, and that all are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED, tag
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for place in self._open:
            self.elements[place][2].append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def list_texts(self, kind: str) -> list[str]:
        return ["".join(text) for _, attrs, text in self.elements if attrs.get("class") == kind]


def read(*examples: Example, title: str = "T", **options) -> Reader:
    return Reader(render_page(title, ["lead"], examples, **options))


@pytest.mark.parametrize("kind", ["bpe", "bpe_unsplit", "llama", "unigram"])
@pytest.mark.parametrize("text", NASTY)
def test_the_texts_of_a_pages_tokens_joined_are_the_response(text, kind):
    scores = make_scores(text, kind=kind)
    pieces = split_pieces(scores)
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text or piece.is_end for piece in pieces)  # the bytes of a character stand together
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert read(Example(scores)).list_texts("response") == [text]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip))
def test_any_text_is_shown_as_it_is(text):
    scores = make_scores(text)
    assert read(Example(scores)).list_texts("response") == [text]
    assert "".join(Reader(f"<p>{show_text(text)}</p>").elements[0][2]) == text


@pytest.mark.parametrize("text", NASTY)
def test_whatever_comes_from_outside_is_text(text):
    record = JudgedRecord(instruction=text, input=text, output=text, judgment=text)
    scores = replace(make_scores(text), record=record)
    page = read(
        Example(scores, text, text, text),
        title=text,
        table=Table(text, [text], [[text, text]]),
        picture=Picture(b"png", b"png", text),
    )
    assert page.list_texts("instruction") == [f"{text}\n{text}"]
    assert page.list_texts("judgment") == [text]
    assert page.list_texts("after") == [text]
    assert page.list_texts("verdict bad") == [f"\u2717 {text}"]
    (alt,) = [attrs["alt"] for tag, attrs, _ in page.elements if tag == "img"]
    assert alt == text


def test_what_cannot_be_seen_is_named_and_a_mark_of_direction_ends_where_it_stands():
    shown = show_text("a\u202eb\x1bc\rd  e")
    assert '<bdi class="odd" data-name="U+202E">\u202e</bdi>' in shown
    assert 'data-name="U+001B"' in shown
    assert 'data-name="CR">&#13;</bdi>' in shown
    assert shown.count('<i class="space"> </i>') == 2
    assert show_text("one two") == "one two"
    assert "odd" not in show_text("\U0001f468\u200d\U0001f469")


def test_half_a_surrogate_pair_does_not_stop_the_page(tmp_path):
    scores = make_scores("x y", tokens=["x", "\ud83d", "y"][: len(make_scores("x y").token_ids)])
    write_page(tmp_path / "p.html", "\ud83d", ["\udfff"], [Example(scores, "\ud83d")])
    assert 'data-name="U+D83D"' in (tmp_path / "p.html").read_text("utf-8")


def test_the_page_runs_nothing_and_loads_nothing():
    page = read(Example(make_scores(NASTY[1])), picture=Picture(b"light", b"dark", "alt"))
    (policy,) = [attrs["content"] for _, attrs, _ in page.elements if attrs.get("http-equiv")]
    assert policy == POLICY
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    for _, attrs, _ in page.elements:
        assert not any(name.startswith("on") or name in ("href", "style", "action") for name in attrs)
        for name in ("src", "srcset"):
            assert attrs.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    (style,) = ["".join(text) for tag, _, text in page.elements if tag == "style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_shade_mark_and_figures_are_those_of_the_scores():
    scores = make_scores("x y", spans=[(0, 1), (2, 3), (3, 3)], token_ids=[1, 2, 3], tokens=["x", " y", "<eos>"])
    scores = replace(
        scores,
        logps_without=[-3.5, -0.00001, -1.0],
        logps_with=[-0.25, -2.5, -0.9],
        is_flagged=[True, False, True],
        weights=[0.7788, 0.0, 0.4],
    )
    page = read(Example(scores))
    tokens = [(tag, attrs) for tag, attrs, _ in page.elements if attrs.get("title")]
    assert [tag for tag, _ in tokens] == ["mark", "span", "mark"]
    assert [attrs["class"] for _, attrs in tokens] == ["t p4", "t n4", "t end"]
    assert tokens[0][1]["title"] == (
        "log p without -3.5000, with -0.2500, difference +3.2500, times as likely 25.7903, blamed"
    )
    cells = ["".join(text) for tag, _, text in page.elements if tag in ("th", "td")]
    assert cells[6:12] == ["x", "-3.5000", "-0.2500", "+3.2500", "25.7903", "yes, weight 0.779"]
    assert cells[12:18] == [" y", "0.0000", "-2.5000", "-2.5000", "0.0821", ""]
    assert cells[18] == "\u27e8end\u27e9"


def test_scores_without_log_probs_show_their_marks_alone():
    scores = make_scores("The capital is Sydney.", logps_without=None, logps_with=None)
    page = read(Example(scores))
    titles = [attrs["title"] for _, attrs, _ in page.elements if attrs.get("title")]
    assert set(titles) == {"blamed", "not scored"}
    assert {attrs["class"] for _, attrs, _ in page.elements if attrs.get("title")} <= {"t", "t end"}


def test_a_satisfactory_record_and_a_page_without_examples_are_fine():
    assert read(Example(make_scores("Yes.", None))).list_texts("judgment") == ["satisfactory"]
    assert read().list_texts("legend") == []


def test_examples_stand_under_their_group_with_their_verdict():
    examples = [
        Example(make_scores("a"), "one", "b"),
        Example(make_scores("a"), "one", "c", "Still wrong."),
        Example(make_scores("a"), "two"),
    ]
    page = read(*examples)
    assert ["".join(text) for tag, _, text in page.elements if tag == "h2"] == ["one", "two"]
    assert page.list_texts("verdict good") == ["\u2713 satisfactory"]
    assert page.list_texts("verdict bad") == ["\u2717 Still wrong."]
    names = ["".join(text) for tag, _, text in page.elements if tag == "dt"]
    assert names.count("Before") == names.count("After") == 2
    assert names.count("Response") == 1


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_pieces_make_up_the_response_whatever_the_spans_of_an_edited_file(pairs):
    spans = [(min(pair), max(pair)) for pair in pairs]
    num = len(spans)
    scores = make_scores(
        "abc   ghi",
        token_ids=[1] * num,
        tokens=["?"] * num,
        spans=spans,
        logps_without=[-1.0] * num,
        logps_with=[-1.0] * num,
        is_flagged=[False] * num,
        weights=[0.0] * num,
    )
    pieces = split_pieces(scores)
    assert "".join(piece.text for piece in pieces) == "abc   ghi"
    assert sorted(place for piece in pieces for place in piece.indices) == list(range(num))
    assert read(Example(scores)).list_texts("response") == ["abc   ghi"]
