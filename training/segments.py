"""Finding things on a plain background: what stands out from the colour of the border, in connected pieces.

Pictures are float32 ``(h, w, 3)`` in 0 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

STANDS_OUT = 0.08  # of the range, in one channel at least: not background
BORDER = 2  # pixels
LEAST_AREA = 30  # pixels; smaller pieces are specks
AROUND = 4  # pixels around a thing that are neither thing nor background
CROP = 32  # pixels, side of a normalised crop


@dataclass(frozen=True)
class Segment:
    """A thing: its pixels, and the box around them, as shares of the picture's side."""

    mask: np.ndarray
    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, mask: np.ndarray) -> Segment:
        """Put a box around the pixels of a mask."""
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return cls(mask, *(float(edge) / mask.shape[0] for edge in (left, top, right, bottom)))

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return max(self.right - self.left, self.bottom - self.top)

    @property
    def centre(self) -> tuple[float, float]:
        """The centre of the box."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def background_colour(picture: np.ndarray) -> np.ndarray:
    """Return the median colour of the border."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return np.median(picture[~inner], 0)


def outstanding(picture: np.ndarray, background: np.ndarray, least: float = STANDS_OUT) -> np.ndarray:
    """Return which pixels are not background: bool ``(h, w)``."""
    return (np.abs(picture - background) > least).any(-1)


def grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return a mask grown by `radius` pixels in all directions."""
    for axis in (0, 1):
        ends = [(radius, radius) if each == axis else (0, 0) for each in (0, 1)]
        mask = np.asarray(sliding_window_view(np.pad(mask, ends), 2 * radius + 1, axis).any(-1))
    return mask


def segments(mask: np.ndarray, radius: int) -> list[Segment]:
    """Return the pieces of a mask; those up to ``2 * radius`` pixels apart are one."""
    pieces = (piece & mask for piece in _connected(grown(mask, radius)))
    return [Segment.of(piece) for piece in pieces if piece.sum() >= LEAST_AREA]


def _connected(mask: np.ndarray) -> list[np.ndarray]:
    """Return the 4-connected pieces of a mask."""
    padded = np.pad(mask, 1)  # so that steps beyond the edges find background
    width = padded.shape[1]
    unvisited = set(np.flatnonzero(padded).tolist())
    pieces = []
    while unvisited:
        piece = [unvisited.pop()]
        for pixel in piece:  # grows during iteration
            neighbours = {pixel - 1, pixel + 1, pixel - width, pixel + width} & unvisited
            unvisited -= neighbours
            piece.extend(neighbours)
        flat = np.zeros(padded.size, bool)
        flat[piece] = True
        pieces.append(flat.reshape(padded.shape)[1:-1, 1:-1])
    return pieces


def isolated(picture: np.ndarray, segment: Segment, background: np.ndarray, around: int = 1) -> np.ndarray:
    """Return a picture of one thing alone on a background."""
    return np.where(grown(segment.mask, around)[..., None], picture, background)


def crop(picture: np.ndarray, segment: Segment, background: np.ndarray) -> np.ndarray:
    """Return the square around a thing, scaled to a fixed size: uint8 ``(CROP, CROP, 3)``."""
    side = picture.shape[0]
    half = segment.side * side / 2
    margin = int(half) + 1  # the square may reach beyond the picture
    wide = np.empty((side + 2 * margin, side + 2 * margin, 3), np.float32)
    wide[:] = background
    wide[margin:-margin, margin:-margin] = picture
    x, y = (centre * side + margin for centre in segment.centre)
    image = Image.fromarray(np.rint(wide * 255).clip(0, 255).astype(np.uint8))
    box = x - half, y - half, x + half, y + half
    return np.asarray(image.resize((CROP, CROP), Image.Resampling.BILINEAR, box=box))


def share_of_specks(mask: np.ndarray, found: list[Segment]) -> float:
    """Return how much of the background stands out from its own colour."""
    things = np.zeros(mask.shape, bool)
    for segment in found:
        things |= segment.mask
    background = ~grown(things, AROUND)
    return float((mask & background).sum() / max(1, background.sum()))
