"""Take the picture of the page that docs/app.md shows: `python -m tests.app.screenshot CHECKPOINT`."""

import argparse
import io
from pathlib import Path

from PIL import Image

from fusmae_hf.app.page import build, launch
from tests.app.chromium import PICTURES, chromium, picture, reconstruct

FILE = Path(__file__).resolve().parents[2] / "docs" / "images" / "app.png"
LARGEST = 250_000
"""Bytes: as many colours as fit."""


def take(checkpoint: str) -> Image.Image:
    """The whole page after the reconstruction of the first sample."""
    page_of_app = build(checkpoint)
    address = launch(page_of_app, block=False)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.goto(address)
        reconstruct(page)
        for beginning in PICTURES:
            picture(page, beginning).wait_for()
            page.wait_for_function("image => image.complete", arg=picture(page, beginning).element_handle())
        page.mouse.move(0, 0)
        page.wait_for_timeout(1000)  # for what fades
        taken = page.screenshot(full_page=True)
    page_of_app.close()
    return Image.open(io.BytesIO(taken)).convert("RGB")


def save(image: Image.Image, file: Path) -> None:
    """Write a PNG of at most `LARGEST` bytes."""
    for colours in (256, 224, 192, 160, 128):
        reduced = image.quantize(colours, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
        reduced.save(file, optimize=True)
        if file.stat().st_size <= LARGEST:
            break
    print(f"{file}: {image.width} x {image.height} px, {colours} colours, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("file", type=Path, nargs="?", default=FILE)
    arguments = parser.parse_args()
    save(take(arguments.checkpoint), arguments.file)
