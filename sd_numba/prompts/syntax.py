r"""The syntax of prompts: variants, emphasis, and prompts that change while a picture is made.

============================  ======================================================================
``{red|green} apple``         variants: a prompt for every combination (`expand_variants`)
``(x)  [x]  (x:1.3)``         emphasis: 1.1 times as strong, 1.1 times weaker, 1.3 times as strong
``[from:to:when]``            the text changes after a step (``8``) or a share of them (``0.4``)
``[to:when]  [from::when]``   text is added, or removed, after that step
``[a|b]``                     alternation: the texts take turns, one for each step
``BREAK``                     the text after it begins a new chunk
``\(  \)  \[  \]  \\``        the characters themselves
============================  ======================================================================

The syntax is that of AUTOMATIC1111's stable-diffusion-webui 1.10 (``modules/prompt_parser.py``). Variants, which it
lacks, are written as in the extension sd-dynamic-prompts. `sd_numba.prompts.encoding` turns the texts into vectors.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import InputError

MAX_VARIANTS = 10_000
MAX_DEPTH = 64  # of nested brackets

BREAK = ("BREAK", -1.0)
FACTORS = {"(": 1.1, "[": 1 / 1.1}
CLOSING = {"(": ")", "[": "]"}

_VARIANT_TOKENS = re.compile(r"(?:[^\\{|}]|\\.)+|[{|}\\]", re.DOTALL)
# Emphasis: escapes, a weight with its bracket, brackets, text. float() reads the numbers; no backtracking is needed.
_EMPHASIS_TOKENS = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|:")
_BREAK_WORD = re.compile(r"\bBREAK\b")
_SCHEDULE_TOKENS = re.compile(r"(?:[^\\()\[\]:|]|\\.)+|[()\[\]:|]|\\")  # a backslash at the end of a line is no escape
_WHEN = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")

# ---- variants

_Variants = list["str | list[_Variants]"]  # texts, and groups with their alternatives


def expand_variants(text: str) -> list[str]:
    r"""Return every combination of the alternatives of ``{a|b|c}``; the last group varies fastest.

    Groups may be nested, and alternatives may be empty. Braces without a ``|`` and unmatched braces are text. So are
    ``\{``, ``\|`` and ``\}``, which keep their backslash: `parse_attention` removes it. None of the returned texts
    therefore expands any further.

    Raises
    ------
    InputError
        There are more than 10,000 combinations.

    Examples
    --------
    >>> expand_variants("a {red|big} {cat|dog}")
    ['a red cat', 'a red dog', 'a big cat', 'a big dog']
    """
    parts = _parse_variants(require_text(text))
    if _count(parts) > MAX_VARIANTS:
        raise InputError(f"prompt: more than {MAX_VARIANTS:,} combinations of {{a|b}}; use fewer")
    return list(_combinations(parts))


def _parse_variants(text: str) -> _Variants:
    opened: list[list[_Variants]] = [[[]]]  # the text, then the groups within each other
    for token in _VARIANT_TOKENS.findall(text):
        if token == "{":
            if len(opened) > MAX_DEPTH:
                return [text]
            opened.append([[]])
        elif token == "|" and len(opened) > 1:
            opened[-1].append([])
        elif token == "}" and len(opened) > 1:
            group = opened.pop()
            opened[-1][-1] += [group] if len(group) > 1 else ["{", *group[0], "}"]
        else:
            opened[-1][-1].append(token)
    ((parts,), *rest) = opened
    for first, *others in rest:
        parts += ["{", *first]
        for option in others:
            parts += ["|", *option]
    return parts


def _count(parts: _Variants) -> int:
    count = 1
    for part in parts:
        if not isinstance(part, str):
            count = min(count * sum(map(_count, part)), MAX_VARIANTS + 1)
    return count


def _combinations(parts: _Variants) -> Iterator[str]:
    choices = (
        [part] if isinstance(part, str) else [text for option in part for text in _combinations(option)]
        for part in parts
    )
    return map("".join, itertools.product(*choices))


# ---- emphasis


def parse_attention(text: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of equal weight, without brackets and escapes.

    Brackets multiply the weight: ``(x)`` by 1.1, ``[x]`` by 1 / 1.1, ``(x:1.3)`` by 1.3. An unclosed bracket reaches to
    the end. A closing bracket without an opening one is text, as is ``:1.3`` outside round brackets. ``BREAK`` is a
    piece of its own, ``("BREAK", -1.0)``; within brackets, where its weight differs, it is an ordinary word. Brackets
    more than 64 deep have no effect. The result equals that of AUTOMATIC1111's ``parse_prompt_attention`` bit for bit.

    Examples
    --------
    >>> parse_attention("an (important) word")
    [('an ', 1.0), ('important', 1.1), (' word', 1.0)]
    """
    pieces: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {bracket: [] for bracket in FACTORS}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        if len(opened[bracket]) < MAX_DEPTH:
            weights[start:] = [weight * factor for weight in weights[start:]]

    for match in _EMPHASIS_TOKENS.finditer(require_text(text)):
        token, number = match.group(0), match.group(1)
        if token in opened:
            opened[token].append(len(pieces))
        elif number and opened["("]:
            close("(", float(number))
        elif token == ")" and opened["("]:
            close("(", FACTORS["("])
        elif token == "]" and opened["["]:
            close("[", FACTORS["["])
        else:
            found = [(token[1:], 1.0)] if token.startswith("\\") else _split_at_breaks(token)
            pieces += [piece for piece, _ in found]
            weights += [weight for _, weight in found]
    for bracket, factor in FACTORS.items():
        while opened[bracket]:
            close(bracket, factor)
    runs = itertools.groupby(zip(pieces, weights, strict=True), operator.itemgetter(1))
    return [("".join(piece for piece, _ in run), weight) for weight, run in runs] or [("", 1.0)]


def _split_at_breaks(text: str) -> list[tuple[str, float]]:
    """Split a text at each ``BREAK``; return the pieces, stripped there, with a ``BREAK`` between any two."""
    first, *others = _BREAK_WORD.split(text)
    found = [(first, 1.0)]
    for other in others:
        found[-1] = (found[-1][0].rstrip(), 1.0)
        found += [BREAK, (other.lstrip(), 1.0)]
    return found


# ---- prompts that change over the steps

_Parts = list["str | _Edit"]


@dataclass(frozen=True)
class _Edit:
    """Alternative texts: the second replaces the first after step ``when``; if that is None, they take turns."""

    options: list[_Parts]
    when: int | None


@dataclass
class _Open:
    """A bracket that is not closed yet, and its content so far."""

    bracket: str
    segments: list[_Parts] = field(default_factory=lambda: [[]])
    separators: str = ""

    def text(self) -> _Parts:
        parts = [self.bracket, *self.segments[0]]
        for separator, segment in zip(self.separators, self.segments[1:], strict=True):
            parts += [separator, *segment]
        return parts


def prompt_schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """Return the texts that a prompt stands for, each with the last step, counted from 1, that it applies to.

    ``[from:to:when]``, ``[to:when]`` and ``[from::when]`` change after step ``when``; a number with a dot is a share of
    the steps. ``[a|b]`` changes in every step. These and emphasis can contain each other.
    Brackets that do not fit the grammar are text. A text with a ``|`` outside square brackets, with a backslash at the
    end of a line or with brackets more than 64 deep is taken as it is. The result is that of AUTOMATIC1111's
    ``get_learned_conditioning_prompt_schedules`` wherever its ambiguous grammar leaves one reading.

    Parameters
    ----------
    text
        The prompt.
    steps
        Number of steps.

    Examples
    --------
    >>> prompt_schedule("a [red:green:0.4] apple", 20)
    [(8, 'a red apple'), (20, 'a green apple')]
    """
    edits: list[_Edit] = []
    parts = _parse_schedule(require_text(text), steps, edits)
    if parts is None:
        return [(steps, text)]
    ends = {steps, *(edit.when for edit in edits if edit.when)}
    if any(edit.when is None for edit in edits):
        ends.update(range(1, steps + 1))
    return [(end, "".join(_at_step(parts, end))) for end in sorted(ends)]


def _at_step(parts: _Parts, step: int) -> Iterator[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            index = (step - 1) % len(part.options) if part.when is None else step > part.when
            yield from _at_step(part.options[index], step)


def _parse_schedule(text: str, steps: int, edits: list[_Edit]) -> _Parts | None:
    """Parse a prompt and collect its edits; return None if the grammar does not allow it."""
    opened = [_Open("")]
    for token in _SCHEDULE_TOKENS.findall(text):
        top = opened[-1]
        if token == "\\" or (token == "|" and len(opened) == 1):
            return None
        if token in CLOSING:
            if len(opened) > MAX_DEPTH:
                return None
            opened.append(_Open(token))
        elif token in CLOSING.values():
            group = _close(top, steps) if CLOSING.get(top.bracket) == token else None
            if group is None:
                # Inside a group every bracket must belong to a group, so the open ones around this one are text, too.
                if not _flatten(opened):
                    return None
                opened[0].segments[-1].append(token)
            else:
                opened.pop()
                opened[-1].segments[-1] += group
                edits += [part for part in group[:1] if isinstance(part, _Edit)]
        elif token in (":", "|"):
            top.separators += token
            top.segments.append([])
        else:
            top.segments[-1].append(token)
    return opened[0].text() if _flatten(opened) else None


def _close(group: _Open, steps: int) -> _Parts | None:
    """Return what a closed bracket stands for; None if the grammar has no such group."""
    kind = group.bracket, group.separators
    if kind in (("(", ""), ("[", ""), ("(", ":")):
        return [*group.text(), CLOSING[group.bracket]]
    if group.bracket == "[" and set(group.separators) == {"|"}:
        return [_Edit(group.segments, None)]
    if kind in (("[", ":"), ("[", "::")):
        *options, last = group.segments
        number = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if number:
            when = float(number[1]) * (steps if "." in number[1] else 1)
            return [_Edit([[], *options][-2:], int(min(max(when, 0), steps)))]
    return None


def _flatten(opened: list[_Open]) -> bool:
    """Turn all open brackets into text; return whether the grammar allows that: they must not contain ``|``."""
    outside, *groups = opened
    del opened[1:]
    for group in groups:
        outside.segments[-1] += group.text()
    return not any("|" in group.separators for group in groups)


def require_text(text: str) -> str:
    """Return the text; raise InputError if it is not a str."""
    if not isinstance(text, str):
        raise InputError(f"prompt: found {type(text).__name__}, expected text")
    return text
