"""Icons in the JSON format of Iconify (https://iconify.design/docs/types/iconify-json.html), and their pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class IconSet:
    """The icons of one style: ``icons.json``, and by the code points of their emoji their names (``chars.json``)."""

    icons: dict[str, Any]
    names: dict[str, str]

    def svg(self, code: str, size: int) -> str:
        """Return a document of ``size x size``, with an icon that is not square centred in it."""
        name = self.names[code]
        icon = {"left": 0, "top": 0, "width": 16, "height": 16, **self.icons, **self._find(name)}
        if icon.keys() & {"hFlip", "vFlip", "rotate"}:
            raise ValueError(f"icon {name} is flipped or turned, which is not supported; exclude its emoji")
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}" width="{size}" height="{size}">'
            f"{icon['body']}</svg>"
        )

    def _find(self, name: str) -> dict[str, Any]:
        if name in self.icons["icons"]:
            return self.icons["icons"][name]
        alias = self.icons["aliases"][name]
        return {**self._find(alias["parent"]), **alias}


def rasterise(svg: str) -> np.ndarray:
    """The picture as uint8 ``(4, h, w)``, RGB premultiplied, and alpha."""
    import resvg_py  # noqa: PLC0415  # whoever only loads the artwork needs none

    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), np.uint16).transpose(2, 0, 1)
    colours = (pixels[:3] * pixels[3] + 127) // 255
    return np.concatenate([colours, pixels[3:]]).astype(np.uint8)
