"""Terminal output: marks in color or brackets, escaped control characters, lines that fit."""

import io
import re
import sys
from dataclasses import replace

import pytest
from report_scores import NASTY, make_scores

from cutlm.inspect.terminal import WIDTH, Terminal, make_printable


def make_flagged(output: str = "It is Sydney."):
    spans = [(0, 2), (3, 5), (6, 12), (12, 13), (13, 13)]
    values = {"spans": spans, "token_ids": [1] * 5, "tokens": ["?"] * 5, "logps_without": [-1.0] * 5}
    scores = make_scores(output, **values, logps_with=[-1.0] * 5, is_flagged=[False] * 5, weights=[0.0] * 5)
    return replace(scores, is_flagged=[False, False, True, False, True])


def test_flagged_tokens_are_in_brackets_without_color(capsys):
    Terminal().print_pairs([("response", make_flagged())])
    assert capsys.readouterr().out == "\n    response     It is [Sydney]. [<end>]\n"


def test_flagged_tokens_are_colored_on_a_terminal_unless_no_color_is_set(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Terminal().print_pairs([("response", make_flagged())])
    assert "It is \033[1;4;31mSydney\033[0m. \033[1;4;31m<end>\033[0m\n" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    Terminal().print_pairs([("response", make_flagged())])
    assert "It is [Sydney]. [<end>]\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", NASTY)
def test_control_characters_are_escaped(text, capsys):
    Terminal().print_pairs([("instruction", text), ("response", make_scores(text))])
    Terminal().print_heading(text)
    Terminal().print_line(text)
    out = capsys.readouterr().out
    harmless = ("\n", "\xa0", "\u200d", "\U000e0067", "\U000e0062")
    assert all(letter.isprintable() or letter in harmless for letter in out)
    assert make_printable("caf\u00e9 \x1b[0m \u202e") == "caf\u00e9 \\x1b[0m \\u202e"


@pytest.mark.parametrize(
    "text",
    [
        "\u6771\u4eac\u3000\u5927\u962a",  # an ideographic space
        "10\xa0km, 1\u202f000\u2009m",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f \u2764\ufe0f",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",  # Persian spelling needs a non-joiner
    ],
)
def test_spaces_and_joiners_are_kept(text):
    assert make_printable(text) == text


@pytest.mark.parametrize("letter", ["\x9b", "\u2067", "\u200f", "\u2028", "\ufeff", "\u200b", "\U000e0001", "\ue000"])
def test_invisible_and_direction_characters_are_escaped(letter):
    assert make_printable(letter).startswith("\\")


def test_characters_outside_the_output_encoding_are_escaped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert make_printable("\U0001f600 ok") == "\\U0001f600 ok"


@pytest.mark.parametrize("has_color", [False, True])
def test_long_texts_are_wrapped_without_losing_words(has_color, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: has_color)
    text = " ".join(f"word{number}" for number in range(60))
    terminal = Terminal()
    terminal.print_text(text, indent=3)
    terminal.print_pairs([("response", make_scores(text, seed=3))])
    out = re.sub(r"\033\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, out.splitlines())) <= WIDTH
    assert re.findall(r"word\d+", out.translate({ord(letter): None for letter in "[]"})) == 2 * text.split()


def test_a_stage_prints_one_line_unless_it_fails(capsys):
    terminal = Terminal()
    with terminal.stage("blame") as stage:
        stage.text = "5 of 9"
    out = capsys.readouterr().out
    assert re.fullmatch(r"  blame        5 of 9 +\d+\.\d s\n", out)
    assert len(out) <= WIDTH + 1
    with pytest.raises(ValueError, match="no"), terminal.stage("train"):
        raise ValueError("no")
    assert capsys.readouterr().out == ""


def test_table_alignment(capsys):
    Terminal().print_table(["", "base", "1"], [["capitals", "5%", "100%"], ["mean", "5%", "10%"]])
    assert capsys.readouterr().out.splitlines() == [
        "              base       1",
        "  capitals      5%    100%",
        "  mean          5%     10%",
    ]
