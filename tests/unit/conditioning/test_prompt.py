"""Laws of the prompt grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conditioning.prompt import Break, Prompt, Span, parse
from ldm_pipe.pretrained import LdmPipeError


def line(text: str, i: int = 0, num_steps: int = 10, **options: str) -> list[object]:
    """Return the spans of the only branch as (text, weight), a break as None."""
    ((weight, spans),) = parse(text, **options).at(i, num_steps)  # type: ignore[arg-type]
    assert weight == 1
    return [None if isinstance(span, Break) else (span.text, pytest.approx(span.weight)) for span in spans]


def words(text: str, i: int, num_steps: int) -> str:
    return "".join(text for text, _ in line(text, i, num_steps))  # type: ignore[misc]


@pytest.mark.parametrize(
    "text",
    [
        "red apple",
        "",
        " ",
        "a: b, 16:9",
        "one | two",
        "back\\slash",
        "and break",
        "BRANDY",
        "\u5929 \U0001f34e",
        "\n\t",
    ],
)
def test_a_plain_prompt_stays_to_the_letter(text: str) -> None:
    assert line(text) == ([(text, 1)] if text else [])


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("(red:1.3) apple", [("red", 1.3), (" apple", 1)]),
        ("(red) apple", [("red", 1.1), (" apple", 1)]),
        ("[red] apple", [("red", 1 / 1.1), (" apple", 1)]),
        ("((red))", [("red", 1.21)]),
        ("((red:1.5) apple:2)", [("red", 3), (" apple", 2)]),
        ("(a:b:0.5)", [("a:b", 0.5)]),
        ("(red:-1)(green:.5)( x : 2 )", [("red", -1), ("green", 0.5), (" x ", 2)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("()[]", []),
        ("a BREAK b", [("a ", 1), None, (" b", 1)]),
        ("(a BREAK b:2)", [("a ", 2), None, (" b", 2)]),
        (r"\(red\) \[x\] 1\:2 a\|b \\ \(", [("(red) [x] 1:2 a|b \\ (", 1)]),
        (r"(a\:1.5)", [("a:1.5", 1.1)]),
        (r"[a\|b]", [("a|b", 1 / 1.1)]),
    ],
)
def test_weights_and_breaks(text: str, spans: list[object]) -> None:
    assert line(text) == spans


def test_weights_multiply_where_brackets_are_nested() -> None:
    (red,) = line("(([red]:1.5):2)")
    assert red == ("red", 3 / 1.1)


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("[cat:dog:0.5]", "cat cat dog dog"),
        ("[cat:dog:1]", "cat dog dog dog"),
        ("[cat:dog:0]", "dog dog dog dog"),
        ("[cat:dog:1.0]", "cat cat cat cat"),
        ("[cat:dog:9]", "cat cat cat cat"),
        ("x[dog:0.25]", "x xdog xdog xdog"),
        ("x[cat::2]", "xcat xcat x x"),
        ("[cat|dog]", "cat dog cat dog"),
        ("[a|b|c]", "a b c a"),
        ("[[a|b]:c:2]", "a b c c"),
        ("[a:[b:c:3]:1]", "a b b c"),
    ],
)
def test_switches_and_turns(text: str, drawn: str) -> None:
    assert " ".join(words(text, i, 4) for i in range(4)) == drawn


def test_weights_reach_into_a_switch() -> None:
    assert line("(a [b:(c:2):1]:3)", 0) == [("a b", 3)]
    assert line("(a [b:(c:2):1]:3)", 1) == [("a ", 3), ("c", 6)]


def test_and_joins_branches_with_a_weight_each() -> None:
    rows = parse("red apple AND (blue:2) sky :0.5 AND fog:-1").at(0, 1)
    assert rows == (
        (1.0, (Span("red apple"),)),
        (0.5, (Span("blue", 2.0), Span(" sky"))),
        (-1.0, (Span("fog"),)),
    )


def test_a_colon_without_and_is_text() -> None:
    assert line("apple :0.5") == [("apple :0.5", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a (red apple", "'\\(' has no partner at position 2"),
        ("red) apple", "'\\)' has no partner at position 3"),
        ("(a]", "'\\(' has no partner at position 0"),
        ("(red:big)", "weight 'big' is no number at position 4"),
        ("(red:)", "weight '' is no number"),
        ("(red:nan)", "weight 'nan' is no number"),
        ("(red:1e400)", "is no number"),
        ("(red:1000)", "weight 1000 is too large"),
        ("(red:(1))", "is no number"),
        ("[cat:dog]", "time of the switch 'dog' is no number"),
        ("[cat:dog:1.5]", "time of the switch is 1.5"),
        ("[cat:dog:-1]", "time of the switch is -1"),
        ("[a:b:c:1]", "3 colons"),
        ("(a AND b)", "AND inside of brackets at position 3"),
        ("(" * 60 + ")" * 60, "nested deeper than 50"),
        (" AND ".join("a" * 40), "40 prompts joined by AND"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(LdmPipeError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a face :) and (red) apple(", [("a face :) and ", 1), ("red", 1.1), (" apple(", 1)]),
        ("(a]", [("(a]", 1)]),
        ("([a)]", [("(", 1), ("a)", 1 / 1.1)]),
    ],
)
def test_lone_brackets_are_text_when_asked(text: str, spans: list[object]) -> None:
    assert line(text, brackets="literal") == spans


@given(st.text(alphabet="ab ()[]:|\\.1-ANDBREK\n", max_size=40), st.integers(0, 5))
def test_any_text_is_a_prompt_or_a_clear_error(text: str, i: int) -> None:
    try:
        prompt = parse(text, brackets="literal")
    except LdmPipeError:
        return
    assert isinstance(prompt, Prompt)
    assert all(weight == weight for weight, _ in prompt.at(i, 6))


@given(st.text(max_size=30))
def test_escaped_text_comes_back(text: str) -> None:
    escaped = "".join("\\" + char if char in "()[]:|\\" else char for char in text)
    if "AND" not in text and "BREAK" not in text:
        assert line(escaped) == ([(text, 1)] if text else [])
