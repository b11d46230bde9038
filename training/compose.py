"""Painting compositions, in batches, on any device that torch knows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from .art import SIZE, Art
from .backdrops import scene_pictures, shape_pictures
from .world import HALF_BELOW, LUMA, MAX_ITEMS, Background, Composition

PAINTS = ("", "tint", "fill")
NOTHING = -1


def to_rows(compositions: Sequence[Composition]) -> tuple[np.ndarray, np.ndarray]:
    """Return compositions as float32 arrays: items ``(n, MAX_ITEMS, 8)`` and backgrounds ``(n, 7)``."""
    items = np.zeros((len(compositions), MAX_ITEMS, 8), np.float32)
    items[:, :, 0] = NOTHING
    backgrounds = np.empty((len(compositions), 7), np.float32)
    for row, background, composition in zip(items, backgrounds, compositions, strict=True):
        for slot, item in zip(row, composition.items, strict=False):
            slot[:] = item.picture, item.size, item.x, item.y, PAINTS.index(item.paint), *item.rgb
        background[:] = _background_row(composition.background)
    return items, backgrounds


def _background_row(background: Background) -> tuple[float, ...]:
    return background.scene, *background.top, *background.bottom


def tint(pictures: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """Recolour pictures but keep light and shade.

    What has a colour gets the new one, and what has none stays, such as a car's windows; pictures that are mostly
    without colour, such as a white rabbit, are recoloured wherever they are not dark.

    Parameters
    ----------
    pictures : Tensor
        ``(n, 4, h, w)`` in 0 to 1, RGB premultiplied, and alpha.
    rgb : Tensor
        ``(n, 3)`` in 0 to 1.
    """
    alpha = pictures[:, 3:]
    colour = pictures[:, :3] / alpha.clamp(min=1e-3)
    high, low = colour.amax(1, keepdim=True), colour.amin(1, keepdim=True)
    luma = (colour * colour.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    saturated = (((high - low) / high.clamp(min=1e-3) - 0.12) / 0.2).clamp(0, 1)
    light = ((luma - 0.1) / 0.1).clamp(0, 1)

    def total(values: torch.Tensor) -> torch.Tensor:
        return (values * alpha).sum((1, 2, 3), keepdim=True)

    colourful = total(saturated) > 0.35 * total(torch.ones_like(alpha))
    weight = torch.where(colourful, saturated, light)
    usual = total(luma * weight) / total(weight).clamp(min=1e-3)
    shade = (luma / usual.clamp(min=0.05)).clamp(0.45, 1.35)
    painted = rgb.view(-1, 3, 1, 1).clamp(min=0.09) * shade
    painted = painted + 0.35 * (painted - 1).clamp(min=0).sum(1, keepdim=True)  # excess light goes to all channels
    return torch.cat([(colour * (1 - weight) + painted.clamp(0, 1) * weight) * alpha, alpha], 1)


class Composer:
    """Paints compositions of the artwork, the shapes and the scenes."""

    def __init__(self, art: Art, device: torch.device | str = "cpu"):
        pictures = np.concatenate([art.pictures.reshape(-1, 4, SIZE, SIZE), shape_pictures()])
        self.pictures = torch.from_numpy(pictures).to(device)
        halves = [functional.avg_pool2d(some.float(), 2).round().byte() for some in self.pictures.split(256)]
        self.half_pictures = torch.cat(halves)
        self.scenes = torch.from_numpy(scene_pictures().reshape(-1, 3, SIZE, SIZE)).to(device)
        centres = (torch.arange(SIZE, device=device) + 0.5) / SIZE
        self._y, self._x = torch.meshgrid(centres, centres, indexing="ij")

    @torch.no_grad()
    def __call__(self, items: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
        """Paint what `to_rows` returned, as tensors on the device: ``(n, 3, SIZE, SIZE)`` in -1 to 1."""
        top, bottom = backgrounds[:, 1:4, None, None], backgrounds[:, 4:7, None, None]
        canvas = (top + (bottom - top) * self._y) / 255
        (in_scene,) = (backgrounds[:, 0] >= 0).nonzero(as_tuple=True)
        canvas[in_scene] = self.scenes[backgrounds[in_scene, 0].long()] / 255
        for slot in items.unbind(1):
            present, small = slot[:, 0] >= 0, slot[:, 1] < HALF_BELOW
            for pictures, chosen in ((self.half_pictures, present & small), (self.pictures, present & ~small)):
                (rows,) = chosen.nonzero(as_tuple=True)
                if len(rows):
                    layer = self._layer(pictures, slot[rows])
                    canvas[rows] = canvas[rows] * (1 - layer[:, 3:]) + layer[:, :3]
        return canvas * 2 - 1

    def _layer(self, pictures: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Paint one item of each composition on a transparent background."""
        index, size, x, y, paint, *_ = slot.unbind(1)
        chosen, rgb = pictures[index.long()] / 255, slot[:, 5:8] / 255
        (tinted,) = (paint == PAINTS.index("tint")).nonzero(as_tuple=True)
        (filled,) = (paint == PAINTS.index("fill")).nonzero(as_tuple=True)
        chosen[tinted] = tint(chosen[tinted], rgb[tinted])
        chosen[filled, :3] = chosen[filled, 3:] * rgb[filled, :, None, None]
        across, down = (
            (axis - centre[:, None, None]) * 2 / size[:, None, None] for axis, centre in ((self._x, x), (self._y, y))
        )
        return functional.grid_sample(
            chosen, torch.stack([across, down], -1), padding_mode="zeros", align_corners=False
        )
