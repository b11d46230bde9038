"""Pictures in the terminal, decoded again as terminals do."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from sd_numba.cli import terminal
from sd_numba.cli.terminal import Screen, graphics_kind

TRUE_COLOUR = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
KITTY, SIXEL = {"TERM": "xterm-kitty"}, {"TERM": "foot"}


class Stream(io.StringIO):
    """A terminal, or a file."""

    def __init__(self, tty=True, encoding="utf-8"):
        super().__init__()
        self.tty, self._encoding = tty, encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return self.tty

    def taken(self):
        """What was written since the last time."""
        text = self.getvalue()
        self.seek(0)
        self.truncate()
        return text


class Emulator:
    """As much of a terminal as pictures need: characters with their colours, and where bitmaps begin."""

    TOKEN = re.compile(
        r"\x1b\[(?P<numbers>[\d;]*)(?P<code>[A-Za-z])|\x1b(?P<short>[78])|\x1b_G(?P<kitty>[^\x1b]*)\x1b\\"
        r"|\x1bP(?P<sixel>[^\x1b]*)\x1b\\|(?P<text>[^\x1b])",
        re.DOTALL,
    )

    def __init__(self, columns=80, lines=24):
        self.size, self.row, self.column, self.saved = (columns, lines), 0, 0, (0, 0)
        self.cells, self.colours = {}, None
        self.bitmaps, self.chunks, self.deleted = [], "", []

    def feed(self, text):
        position = 0
        while position < len(text):
            match = self.TOKEN.match(text, position)
            assert match, text[position : position + 40]
            position = match.end()
            if match["code"]:
                self.control(match["code"], match["numbers"])
            elif match["short"]:
                if match["short"] == "7":
                    self.saved = self.row, self.column
                else:
                    self.row, self.column = self.saved
            elif match["kitty"] is not None:
                self.graphics(match["kitty"])
            elif match["sixel"] is not None:
                self.bitmaps.append((self.row, decode_sixels(match["sixel"])))
            else:
                self.character(match["text"])
        return self

    def control(self, code, numbers):
        values = [int(number or 0) for number in numbers.split(";")]
        if code == "A":
            self.row = max(0, self.row - values[0])
        elif code == "B":
            self.row = min(self.size[1] - 1, self.row + values[0])
        elif code == "K":
            assert values == [2]
            self.cells = {place: cell for place, cell in self.cells.items() if place[0] != self.row}
        elif code == "m":
            self.colours = None if values == [0] else colours_of(values)
        else:
            raise AssertionError(code)

    def character(self, character):
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.column = 0  # as the driver of terminals makes it
            self.row += 1
            if self.row == self.size[1]:  # scrolls
                self.row -= 1
                self.cells = {(row - 1, column): cell for (row, column), cell in self.cells.items() if row}
                self.bitmaps = [(row - 1, bitmap) for row, bitmap in self.bitmaps]
        else:
            assert self.column < self.size[0]
            self.cells[self.row, self.column] = (character, self.colours)
            self.column += 1

    def graphics(self, command):
        keys, _, data = command.partition(";")
        settings = dict(pair.split("=") for pair in keys.split(","))
        if settings.get("a") == "d":
            self.deleted.append(settings["i"])
            self.bitmaps = []
            return
        assert len(data) <= 4096
        self.place = settings if "a" in settings else self.place
        self.chunks += data
        if settings["m"] == "0":
            assert (self.place["f"], self.place["C"], self.place["q"]) == ("100", "1", "2")
            picture = Image.open(io.BytesIO(base64.standard_b64decode(self.chunks)))
            self.bitmaps.append((self.row, np.asarray(picture)))
            self.chunks = ""

    def line(self, row):
        return "".join(self.cells.get((row, column), " ")[0] for column in range(self.size[0])).rstrip()

    def picture(self):
        """Colours of all half blocks, ``(2 rows, columns, 3)``."""
        blocks = {place: colours for place, (character, colours) in self.cells.items() if character == "▀"}
        top, rows, columns = (f(place[i] for place in blocks) for f, i in ((min, 0), (max, 0), (max, 1)))
        return np.array(
            [[blocks[row, column][half] for column in range(columns + 1)]
             for row in range(top, rows + 1) for half in (0, 1)]
        )  # fmt: skip


def colours_of(values):
    """Foreground and background of an SGR command."""
    found = {}
    while values:
        kind, mode = values[:2]
        if mode == 2:
            found[kind], values = values[2:5], values[5:]
        else:
            cube, values = values[2] - 16, values[3:]
            found[kind] = [55 + 40 * level if level else 0 for level in (cube // 36, cube // 6 % 6, cube % 6)]
    return found[38], found[48]


def decode_sixels(text):
    """The pixels of a sixel picture; every one must be painted."""
    match = re.match(r'0;1q"1;1;(\d+);(\d+)', text)
    width, height = int(match[1]), int(match[2])
    pixels, palette = np.full((height + 6, width, 3), -1), {}
    x = top = colour = 0
    for token in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)(.)|([$-])|([?-~])", text[match.end() :]):
        number, red, green, blue, chosen, count, repeated, move, single = token.groups()
        if number:
            palette[int(number)] = [round(int(share) * 2.55) for share in (red, green, blue)]
        elif chosen:
            colour = int(chosen)
        elif move:
            x, top = 0, top + (6 if move == "-" else 0)
        else:
            bits = ord(repeated or single) - 63
            for _ in range(int(count or 1)):
                for bit in range(6):
                    if bits >> bit & 1:
                        pixels[top + bit, x] = palette[colour]
                x += 1
            assert x <= width
    assert (pixels[:height] >= 0).all() and (pixels[height:] < 0).all()
    return pixels[:height]


def gradient(width, height):
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=2).astype(np.uint8))


@pytest.mark.parametrize(
    ("env", "kind"),
    [
        (TRUE_COLOUR, "blocks"),
        ({"TERM": "linux"}, "blocks"),
        ({"TERM": "dumb"}, "none"),
        ({}, "none"),
        ({**TRUE_COLOUR, "NO_COLOR": "1"}, "none"),
        (KITTY, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "kitty"),
        ({"TERM": "xterm-256color", "KONSOLE_VERSION": "230804"}, "kitty"),
        ({**KITTY, "TMUX": "/tmp/tmux-0/default,1,0"}, "blocks"),
        ({"TERM": "screen.xterm-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        (SIXEL, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "sixel"),
        ({"TERM": "xterm-256color", "WT_SESSION": "x"}, "sixel"),
        ({**TRUE_COLOUR, "SD_NUMBA_GRAPHICS": "sixel"}, "sixel"),
        ({**KITTY, "SD_NUMBA_GRAPHICS": "none"}, "none"),
        ({**KITTY, "SD_NUMBA_GRAPHICS": "hologram"}, "kitty"),
    ],
)
def test_what_a_terminal_can_show(env, kind):
    assert graphics_kind(Stream(), env) == kind
    assert Screen(Stream(), env).kind == kind


def test_files_and_other_encodings_show_nothing():
    assert graphics_kind(Stream(tty=False), KITTY) == "none"
    assert graphics_kind(Stream(encoding="latin-1"), TRUE_COLOUR) == "none"
    stream = Stream(tty=False)
    Screen(stream, KITTY).show(gradient(8, 8))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("size", [(40, 40), (37, 40), (128, 128), (512, 320), (64, 640), (1, 1), (3, 200), (300, 2)])
def test_half_blocks(size):
    stream = Stream()
    Screen(stream, TRUE_COLOUR).show(gradient(*size))
    found = Emulator().feed(stream.getvalue()).picture()
    scale = min(40 / size[0], 40 / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    assert found.shape == (height + height % 2, width, 3)
    wanted = np.asarray(gradient(*size).resize((width, height), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(found[:height], wanted)


def test_half_blocks_in_256_colours():
    stream = Stream()
    Screen(stream, {"TERM": "xterm-256color"}).show(gradient(40, 40))
    found = Emulator().feed(stream.getvalue()).picture()
    assert np.abs(found - np.asarray(gradient(40, 40)).astype(int)).max() <= 48  # half of the widest gap in the cube


@pytest.mark.parametrize("size", [(128, 128), (512, 512), (64, 200), (7, 5), (1, 1)])
def test_kitty_gets_the_picture_itself(size):
    stream = Stream()
    screen = Screen(stream, KITTY)
    screen.show(gradient(*size))
    emulator = Emulator(lines=50).feed(stream.taken())
    ((row, found),) = emulator.bitmaps
    assert row == 0 and emulator.row == screen.rows and emulator.column == 0
    assert int(emulator.place["r"]) == screen.rows == -(-found.shape[0] // 20)
    shape = found.shape[:2]
    np.testing.assert_array_equal(found, gradient(*size).resize(shape[::-1], Image.Resampling.LANCZOS))
    emulator.feed(stream.taken())
    screen.show(gradient(*size))
    assert len(emulator.feed(stream.taken()).bitmaps) == 1  # the one before is gone
    assert emulator.deleted == [emulator.place["i"]] * 2


@pytest.mark.parametrize("size", [(128, 128), (200, 61), (5, 7), (1, 1)])
def test_sixels(size):
    stream = Stream()
    Screen(stream, SIXEL).show(gradient(*size))
    ((row, found),) = Emulator(lines=50).feed(stream.getvalue()).bitmaps
    assert row == 0
    wanted = np.asarray(gradient(*size).resize(found.shape[1::-1], Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(found - wanted).mean() < 12  # 64 colours


@pytest.mark.parametrize("env", [TRUE_COLOUR, KITTY, SIXEL])
@pytest.mark.parametrize("line", [0, 5, 23])
def test_pictures_are_drawn_over_each_other_above_the_bar(env, line):
    """Wherever the cursor is, and if sizes change; what is above stays."""
    stream, emulator = Stream(), Emulator()
    screen = Screen(stream, env)
    emulator.feed("\n" * line + "above\n" + "bar 0")
    for number, size in enumerate([(64, 64), (64, 64), (64, 20), (20, 64), (1, 1)], 1):
        screen.show(gradient(*size))
        stream.write(f"bar {number}")
        emulator.feed(stream.taken())
        lines = [emulator.line(row) for row in range(24)]
        assert emulator.row < 24 and lines[emulator.row] == f"bar {number}"
        assert sum(text.startswith("bar") for text in lines) == 1
        top = emulator.row - screen.rows
        assert lines[top - 1] == "above" or top == 0
        if env is TRUE_COLOUR:
            assert all(lines[row].startswith("▀") for row in range(top, emulator.row))
            assert not any("▀" in text for text in lines[:top] + lines[emulator.row :])
        else:
            assert emulator.bitmaps[-1][0] == top


def test_a_picture_that_is_left_stays(monkeypatch):
    stream, emulator = Stream(), Emulator()
    screen = Screen(stream, TRUE_COLOUR)
    screen.show(gradient(40, 8))
    screen.leave()
    stream.write("done\n")
    screen.show(gradient(40, 8))
    emulator.feed(stream.taken())
    assert [bool("▀" in emulator.line(row)) for row in range(10)] == [True] * 4 + [False] + [True] * 4 + [False]
    assert emulator.line(4) == "done"


def test_small_terminals_get_small_pictures(monkeypatch):
    for columns, lines in [(20, 10), (5, 3), (1, 1)]:
        monkeypatch.setattr(terminal, "_size", lambda stream, size=(columns, lines): (size, (10, 20)))
        for env in (TRUE_COLOUR, KITTY, SIXEL):
            stream = Stream()
            screen = Screen(stream, env)
            screen.show(gradient(64, 64))
            Emulator(columns, lines).feed(stream.getvalue())  # fails on characters beyond the last column
            assert screen.rows <= max(1, lines - 2)


def test_a_stream_that_is_no_terminal_has_a_size_all_the_same():
    assert terminal._size(Stream()) == ((80, 24), (10, 20))
