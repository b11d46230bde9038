"""Variants, emphasis and editing of prompts; examples are those of AUTOMATIC1111's stable-diffusion-webui."""

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_numba.errors import InputError
from sd_numba.prompts.syntax import BREAK, expand_variants, parse_attention, prompt_schedule

# ---- variants


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a cat", ["a cat"]),
        ("", [""]),
        ("{a|b}", ["a", "b"]),
        ("a {red|big} {cat|dog}", ["a red cat", "a red dog", "a big cat", "a big dog"]),
        ("{a|}b", ["ab", "b"]),
        ("{|}", ["", ""]),
        ("{a|{b|c} d}", ["a", "b d", "c d"]),
        ("{{a|b}|{c|d}}", ["a", "b", "c", "d"]),
        ("{a}", ["{a}"]),
        ("{a {b|c}}", ["{a b}", "{a c}"]),
        ("a | b", ["a | b"]),
        ("{a|b", ["{a|b"]),
        ("a|b}", ["a|b}"]),
        ("{a|{b|c}", ["{a|b", "{a|c"]),
        (r"{a\|b|c}", [r"a\|b", "c"]),
        (r"\{a|b\}", [r"\{a|b\}"]),
        ("{a|b}\\", ["a\\", "b\\"]),
        ("(cat:{1.1|1.3})", ["(cat:1.1)", "(cat:1.3)"]),
        ("[a|b] {c|d}", ["[a|b] c", "[a|b] d"]),
    ],
)
def test_variants(text, wanted):
    assert expand_variants(text) == wanted


words = st.text(st.sampled_from("ab ,:()[]"), max_size=4)
groups = st.lists(st.lists(words, min_size=2, max_size=3), max_size=4)


@settings(max_examples=100, deadline=None)
@given(options=groups, between=st.lists(words, min_size=5, max_size=5))
def test_every_combination_once_and_in_order(options, between):
    text = between[0] + "".join(
        "{" + "|".join(group) + "}" + rest for group, rest in zip(options, between[1:], strict=False)
    )
    wanted = [
        between[0] + "".join(choice + rest for choice, rest in zip(chosen, between[1:], strict=False))
        for chosen in itertools.product(*options)
    ]
    assert expand_variants(text) == wanted


@given(text=st.text(st.sampled_from("{|}\\ab"), max_size=14))
def test_what_comes_out_stands_for_itself_alone(text):
    for variant in expand_variants(text):
        assert expand_variants(variant) == [variant]


def test_too_many_variants():
    assert len(expand_variants("{a|b}" * 13)) == 8192
    with pytest.raises(InputError, match=r"more than 10,000 combinations of \{a\|b\}; use fewer"):
        expand_variants("{a|b}" * 14)
    start = time.perf_counter()
    with pytest.raises(InputError):
        expand_variants("{a|b}" * 10_000)
    assert expand_variants("{" * 10_000) == ["{" * 10_000]
    expand_variants("{a|" * 60 + "b}" * 60)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("function", [expand_variants, parse_attention, lambda text: prompt_schedule(text, 10)])
def test_texts_only(function):
    with pytest.raises(InputError, match="prompt: found int, expected text"):
        function(5)


# ---- emphasis


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.5730000000000004),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641000000000006),
                (".", 1.1),
            ],
        ),
        ("", [("", 1.0)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:0)", [("a", 0.0)]),
        ("(a : 1.5 )", [("a ", 1.5)]),
        ("(a:.5)(b:2.)", [("a", 0.5), ("b", 2.0)]),
        ("(a:x)", [("a:x", 1.1)]),
        ("a:1.3)", [("a:1.3)", 1.0)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("a) b] c", [("a) b] c", 1.0)]),
        ("((a)", [("a", 1.1 * 1.1)]),
        (r"\\(a)", [("\\", 1.0), ("a", 1.1)]),
        ("a BREAK b", [("a", 1.0), BREAK, ("b", 1.0)]),
        ("BREAK", [("", 1.0), BREAK, ("", 1.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("a\nBREAK\n\nb BREAK", [("a", 1.0), BREAK, ("b", 1.0), BREAK, ("", 1.0)]),
        ("a BREAK BREAK b", [("a", 1.0), BREAK, ("", 1.0), BREAK, ("b", 1.0)]),
        ("(a BREAK b)", [("a", 1.1), ("BREAK", -1.1), ("b", 1.1)]),
    ],
)
def test_emphasis(text, wanted):
    assert parse_attention(text) == wanted


PATTERN = re.compile(
    r"\\\(|\\\)|\\\[|\\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|\]|[^\\()\[\]:]+|:",
)


def twin(text):
    """Two stacks of where brackets began; every close multiplies what has come since."""
    found, stacks = [], {"(": [], "[": []}

    def multiply(start, factor):
        for piece in found[start:]:
            piece[1] *= factor

    for match in PATTERN.finditer(text):
        token, number = match.group(0), match.group(1)
        if token.startswith("\\"):
            found.append([token[1:], 1.0])
        elif token in stacks:
            stacks[token].append(len(found))
        elif number is not None and stacks["("]:
            multiply(stacks["("].pop(), float(number))
        elif token == ")" and stacks["("]:
            multiply(stacks["("].pop(), 1.1)
        elif token == "]" and stacks["["]:
            multiply(stacks["["].pop(), 1 / 1.1)
        else:
            first, *others = re.split(r"\s*\bBREAK\b\s*", token)
            found.append([first, 1.0])
            for other in others:
                found += [["BREAK", -1.0], [other, 1.0]]
    for start in reversed(stacks["("]):
        multiply(start, 1.1)
    for start in reversed(stacks["["]):
        multiply(start, 1 / 1.1)
    merged = []
    for piece, weight in found:
        if merged and merged[-1][1] == weight:
            merged[-1][0] += piece
        else:
            merged.append([piece, weight])
    return [tuple(piece) for piece in merged] or [("", 1.0)]


@settings(max_examples=500, deadline=None)
@given(parts=st.lists(st.sampled_from([*"ab ()[]:\\,", "1.3)", ":0.5)", ": 2 )", ":-1)", "BREAK", "\n"]), max_size=20))
def test_emphasis_as_its_twin(parts):
    assert parse_attention("".join(parts)) == twin("".join(parts))


@pytest.mark.parametrize("text", ["(" * 20_000, "[" * 20_000, "(a" * 9000 + ")" * 9000, "\\" * 50_001, ":" * 50_000])
def test_emphasis_in_linear_time(text):
    start = time.perf_counter()
    parse_attention(text)
    prompt_schedule(text, 20)
    assert time.perf_counter() - start < 4


def test_brackets_deeper_than_64():
    def within(depth, text, brackets):
        return brackets[0] * depth + text + brackets[1] * depth

    assert expand_variants(within(64, "a|b", "{}")) == [within(63, "a", "{}"), within(63, "b", "{}")]
    assert expand_variants(within(65, "a|b", "{}")) == [within(65, "a|b", "{}")]
    ((_, weight),) = parse_attention(within(64, "a", "()"))
    assert weight == pytest.approx(1.1**64)
    assert parse_attention(within(70, "a", "()")) == [("a", weight)]
    assert prompt_schedule(within(63, "[a:b:3]", "()"), 9) == [(3, within(63, "a", "()")), (9, within(63, "b", "()"))]
    assert prompt_schedule(within(64, "[a:b:3]", "()"), 9) == [(9, within(64, "[a:b:3]", "()"))]


# ---- editing


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", [(step, "a" if step % 2 else "(b:1.1)") for step in range(1, 11)]),
        ("[fe|]male", [(step, "female" if step % 2 else "male") for step in range(1, 11)]),
        ("[fe|||]male", [(step, "female" if step % 4 == 1 else "male") for step in range(1, 11)]),
        ("[a::3] b", [(3, "a b"), (10, " b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:25]", [(10, "a")]),
        ("[a:b:0.4]", [(4, "a"), (10, "b")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a]", [(10, "[a]")]),
        ("(a:1.2)", [(10, "(a:1.2)")]),
        (r"\[a:b:3\]", [(10, r"\[a:b:3\]")]),
        ("a | b", [(10, "a | b")]),
        ("(x [a:b:5] y:1.2)", [(5, "(x a y:1.2)"), (10, "(x b y:1.2)")]),
    ],
)
def test_editing(text, wanted):
    assert prompt_schedule(text, 10) == wanted


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("ab []():|2.\\"), max_size=25), steps=st.integers(1, 30))
def test_a_schedule_covers_all_steps(text, steps):
    found = prompt_schedule(text, steps)
    ends = [end for end, _ in found]
    assert ends == sorted(set(ends)) and ends[-1] == steps and ends[0] >= 1


# A prompt that keeps to the grammar, and what it stands for in each of ten steps.
STEPS = 10
WHEN = {"0": 0, "3": 3, " 7 ": 7, "12": 10, "-1": 0, ".5": 5, "0.25": 2, "1.": 10, "1e0": 1}
plain = st.sampled_from(["a", "b", " c,", "", r"\[", r"\:", "2"]).map(lambda text: (text, [text] * STEPS))


def change(first, second, when):
    (before, early), (after, late) = first, second
    return f"[{before}:{after}:{when}]", [*early[: WHEN[when]], *late[WHEN[when] :]]


def turns(options):
    texts = [options[step % len(options)][1][step] for step in range(STEPS)]
    return "[" + "|".join(source for source, _ in options) + "]", texts


def emphasis(prompt):
    source, texts = prompt
    return f"({source}:1.2)", [f"({text}:1.2)" for text in texts]


def both(first, second):
    return first[0] + second[0], [a + b for a, b in zip(first[1], second[1], strict=True)]


def larger(prompts):
    return (
        st.builds(change, prompts, prompts, st.sampled_from([*WHEN]))
        | st.builds(turns, st.lists(prompts, min_size=2, max_size=3))
        | st.builds(emphasis, prompts)
        | st.builds(both, prompts, prompts)
    )


@settings(max_examples=300, deadline=None)
@given(prompt=st.recursive(plain, larger, max_leaves=10))
def test_every_step_has_its_text(prompt):
    source, wanted = prompt
    found, start = [], 0
    for end, text in prompt_schedule(source, STEPS):
        found += [text] * (end - start)
        start = end
    assert found == wanted
