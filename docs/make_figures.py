"""Draw the figures of docs/concepts.md: `python docs/make_figures.py`, from the root of a checkout."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.plots.pairs import TRUE_COLOUR, composite
from fusmae_hf.simulation.pairs import SimulatedPairs

IMAGES = Path(__file__).parent / "images"
OPTICAL, SAR, JOINT, FUSION = "#cfe3f7", "#f7ddc4", "#e3dcf2", "#d6ecd2"

BOXES = {  # name: (x, y, text, colour)
    "optical": (0.0, 2.2, "Sentinel-2\n12 bands", OPTICAL),
    "sar": (0.0, 0.0, "Sentinel-1\nVV, VH", SAR),
    "optical tokens": (2.5, 2.2, "visible patches\n+ positions", OPTICAL),
    "sar tokens": (2.5, 0.0, "visible patches\n+ positions", SAR),
    "early": (5.0, 1.1, "early fusion\ncross-attention\nboth ways", FUSION),
    "joint": (7.5, 1.1, "joint layers\nself-attention\n[class, S2, S1]", JOINT),
    "optical decoder": (10.0, 2.2, "optical decoder\n+ mask tokens", OPTICAL),
    "sar decoder": (10.0, 0.0, "SAR decoder\n+ mask tokens", SAR),
    "optical out": (12.5, 2.2, "hidden\noptical pixels", OPTICAL),
    "sar out": (12.5, 0.0, "hidden\nSAR pixels", SAR),
}
ARROWS = (
    ("optical", "optical tokens"), ("sar", "sar tokens"), ("optical tokens", "early"), ("sar tokens", "early"),
    ("early", "joint"), ("joint", "optical decoder"), ("joint", "sar decoder"), ("optical decoder", "optical out"),
    ("sar decoder", "sar out"),
)  # fmt: skip
WIDTH, HEIGHT = 2.1, 1.05
TEXT = 10.5  # points


def fusion() -> Figure:
    """The way of a pair through encoder and decoders, and where the sensors meet."""
    figure = Figure(figsize=(9.5, 3.1), layout="constrained")
    axis = figure.subplots()
    for x, y, text, colour in BOXES.values():
        box = FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.03", facecolor=colour, edgecolor="#555555")
        axis.add_patch(box)
        axis.text(x + WIDTH / 2, y + HEIGHT / 2, text, ha="center", va="center", fontsize=TEXT)
    for start, end in ARROWS:
        (x0, y0, *_), (x1, y1, *_) = BOXES[start], BOXES[end]
        from_, to = (x0 + WIDTH + 0.05, y0 + HEIGHT / 2), (x1 - 0.05, y1 + HEIGHT / 2)
        axis.add_patch(FancyArrowPatch(from_, to, arrowstyle="-|>", mutation_scale=12, color="#555555"))
    x = BOXES["optical decoder"][0] + WIDTH / 2
    axis.add_patch(
        FancyArrowPatch((x, HEIGHT + 0.05), (x, 2.15), arrowstyle="<|-|>", mutation_scale=14, color="#3b7a34", lw=2)
    )
    axis.text(x + 0.15, 1.62, "feature fusion\ncross-attention", color="#3b7a34", fontsize=TEXT, va="center")
    axis.text(7.5 + WIDTH / 2, 0.98, "features are\ntaken here", color="#5b4a8a", fontsize=TEXT, ha="center", va="top")
    axis.set(xlim=(-0.1, 14.7), ylim=(-0.1, 3.35))
    axis.set_axis_off()
    return figure


def masking() -> Figure:
    """What each strategy shows of one simulated pair."""
    pairs = SimulatedPairs(12)
    pair = pairs.read(9)
    processor = FusMAEImageProcessor()
    inputs = processor(sar=pair.sar, optical=pair.optical)
    optical = composite(pair.optical, pairs.info.optical_bands, TRUE_COLOUR)
    low, high = np.percentile(pair.sar[0], (2, 98))
    sar = np.repeat(np.clip((pair.sar[0] - low) / (high - low), 0, 1)[:, :, None], 3, axis=2)
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots(2, 4)
    generator = torch.Generator().manual_seed(1)
    noise = {name: torch.rand((1, 100), generator=generator) for name in ("noise", "noise_sar")}
    columns = [("the pair", None), *((name, name) for name in ("independent", "consistent", "complementary"))]
    for column, (title, strategy) in zip(axes.T, columns, strict=True):
        masks = [np.zeros(100), np.zeros(100)]
        if strategy:
            config = FusMAEConfig.from_preset(
                "tiny", num_hidden_layers=1, patch_size=12, mask_strategy=strategy, mask_ratio=0.6
            )
            with torch.no_grad():
                outputs = FusMAEForPreTraining(config)(
                    pixel_values=inputs["pixel_values"], pixel_values_sar=inputs["pixel_values_sar"], **noise
                )
            masks = [outputs.mask[0].numpy(), outputs.mask_sar[0].numpy()]
        for axis, image, mask in zip(column, (optical, sar), masks, strict=True):
            hidden = np.kron(mask.reshape(10, 10), np.ones((12, 12)))[:, :, None] > 0
            axis.imshow(np.where(hidden, 0.86, image))
            axis.set(xticks=[], yticks=[])
        column[0].set_title(title, fontsize=12)
    axes[0, 0].set_ylabel("optical", fontsize=12)
    axes[1, 0].set_ylabel("SAR, VV", fontsize=12)
    return figure


if __name__ == "__main__":
    for name, figure, dpi in (("fusion", fusion(), 150), ("masking", masking(), 110)):
        figure.savefig(IMAGES / f"{name}.png", dpi=dpi)
        with Image.open(IMAGES / f"{name}.png") as picture:  # few colours keep the file small
            picture.convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)
