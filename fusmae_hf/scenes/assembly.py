"""From finished parts to the files of a map: cloud-optimised GeoTIFFs, areas, a quicklook."""

from __future__ import annotations

import colorsys
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
import xxhash

from fusmae_hf.files.atomic import explain_failed_write, incomplete_path
from fusmae_hf.readers.geotiff import require_rasterio
from fusmae_hf.readers.grids import Grid
from fusmae_hf.scenes.blocks import cells_of
from fusmae_hf.scenes.parts import part_path, shape_of

if TYPE_CHECKING:
    from fusmae_hf.scenes.plan import Plan

_DATA_TYPES = {"uint8": "Byte", "uint16": "UInt16", "float32": "Float32"}

_AREA_CELL = 64
"""Side in pixels of the squares whose true area is calculated: within one, all pixels are as large."""


def grid_of_product(plan: Plan, product: str) -> Grid:
    """Where the pixels of a product lie."""
    whole = plan.reader.grid
    if product != "scores":
        return whole.window(*plan.area)
    rows, columns = cells_of(plan)
    down, across = plan.lattice.stride
    a, b, c, d, e, f = whole.window(rows[0], columns[0], 1, 1).transform
    return Grid(whole.crs, (a * across, b * down, c, d * across, e * down, f), len(rows), len(columns))


def bands_of(plan: Plan, product: str) -> tuple[list[str], str, float]:
    """Descriptions of the bands of a product, dtype, and the value of no data."""
    if product == "classes":
        return (["class"], "uint8", 255.0) if len(plan.labels) <= 255 else (["class"], "uint16", 65535.0)
    if product == "confidence":
        return ["largest probability", "entropy (nats)"], "float32", float("nan")
    if product == "probabilities" and plan.probability_dtype == "uint8":
        return list(plan.labels), "uint8", 255.0
    return list(plan.labels), "float32", float("nan")


def assemble(
    plan: Plan, product: str, marks: Mapping[int, Mapping[str, Any]], folder: Path, out: Path
) -> list[int | str]:
    """Write the file of a product, from parts.

    Args:
        plan: of the map.
        product: to write.
        marks: of the blocks, by number.
        folder: of the parts.
        out: the file. It appears when it is whole.

    Returns:
        See `checksums_of`.

    Raises:
        OSError: it cannot be written.
    """
    rasterio = require_rasterio()
    from rasterio.shutil import copy

    virtual = folder / f"{product}.vrt"
    virtual.write_text(_virtual(plan, product, marks, folder), encoding="utf-8")
    incomplete = incomplete_path(folder / out.name)
    averaged = product != "classes"
    options = {
        "COMPRESS": "DEFLATE",
        "PREDICTOR": "YES",
        "BLOCKSIZE": "512",
        "BIGTIFF": "IF_SAFER",
        "OVERVIEWS": "AUTO",
        "OVERVIEW_RESAMPLING": "AVERAGE" if averaged else "NEAREST",
        "NUM_THREADS": "2",
    }
    for left_over in folder.glob(f".{out.name}.*"):
        left_over.unlink()
    try:
        with explain_failed_write(out):
            copy(str(virtual), str(incomplete), driver="COG", **options)
            with rasterio.open(virtual) as wanted, rasterio.open(incomplete) as written:
                checksums = checksums_of(written)
                if checksums != checksums_of(wanted):
                    raise OSError(f"{incomplete} does not hold what was written to it. Is the disk full?")
            with incomplete.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(incomplete, out)
    finally:
        incomplete.unlink(missing_ok=True)
    return checksums


def checksums_of(raster: Any) -> list[int | str]:
    """A checksum of each band: GDAL's of whole numbers.

    Of floating-point numbers it is xxh3_128 of the pixels, tile after tile of 512 px: GDAL's takes them as whole
    numbers, so that those of all probabilities below 1 are 0.
    """
    if np.dtype(raster.dtypes[0]).kind != "f":
        return [raster.checksum(band) for band in raster.indexes]
    hashes = [xxhash.xxh3_128() for _ in raster.indexes]
    for row in range(0, raster.height, 512):
        for column in range(0, raster.width, 512):
            rows, columns = (row, min(row + 512, raster.height)), (column, min(column + 512, raster.width))
            values = raster.read(window=(rows, columns))
            values[np.isnan(values)] = np.nan  # of which there are many kinds
            for band, of_band in zip(values, hashes, strict=True):
                of_band.update(band.tobytes())
    return [of_band.hexdigest() for of_band in hashes]


def _virtual(plan: Plan, product: str, marks: Mapping[int, Mapping[str, Any]], folder: Path) -> str:
    """The parts as one raster, in GDAL's language."""
    grid = grid_of_product(plan, product)
    height, width = shape_of(plan, product)
    names, dtype, no_data = bands_of(plan, product)
    a, b, c, d, e, f = (repr(float(number)) for number in grid.transform)
    lines = [
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">',
        f"<SRS>{escape(grid.crs.to_wkt())}</SRS>",
        f"<GeoTransform>{c}, {a}, {b}, {f}, {d}, {e}</GeoTransform>",
        "<Metadata>",
        *(f'<MDI key="{key}">{escape(value)}</MDI>' for key, value in tags_of(plan, product).items()),
        "</Metadata>",
    ]
    for band, name in enumerate(names, 1):
        lines += [
            f'<VRTRasterBand dataType="{_DATA_TYPES[dtype]}" band="{band}">',
            f"<Description>{escape(name)}</Description>",
            f"<NoDataValue>{no_data:g}</NoDataValue>",
        ]
        if product == "classes":
            entries = "".join(
                f'<Entry c1="{red}" c2="{green}" c3="{blue}" c4="255"/>' for red, green, blue in colours(plan.labels)
            )
            lines += ["<ColorInterp>Palette</ColorInterp>", f"<ColorTable>{entries}</ColorTable>"]
        if product == "probabilities" and dtype == "uint8":
            lines += ["<Offset>0</Offset>", f"<Scale>{1 / 254!r}</Scale>"]
        for number, mark in marks.items():
            if product not in mark["files"]:
                continue
            row, column, rows, columns = mark["files"][product]["window"]
            path = part_path(folder, number, product).name
            lines.append(
                f'<SimpleSource><SourceFilename relativeToVRT="1">{path}</SourceFilename><SourceBand>{band}'
                f'</SourceBand><SourceProperties RasterXSize="{columns}" RasterYSize="{rows}" '
                f'DataType="{_DATA_TYPES[dtype]}" BlockXSize="256" BlockYSize="256"/>'
                f'<SrcRect xOff="0" yOff="0" xSize="{columns}" ySize="{rows}"/>'
                f'<DstRect xOff="{column}" yOff="{row}" xSize="{columns}" ySize="{rows}"/></SimpleSource>'
            )
        lines.append("</VRTRasterBand>")
    return "\n".join([*lines, "</VRTDataset>"])


def tags_of(plan: Plan, product: str) -> dict[str, str]:
    """What a file says of how it was made."""
    made_of, lattice = plan.made_of, plan.lattice
    tags = {
        "FUSMAE_VERSION": str(made_of.get("version", "")),
        "FUSMAE_CHECKPOINT": str(made_of.get("checkpoint", "")),
        "FUSMAE_CONTENT_HASH": str(made_of.get("content_hash", "")),
        "FUSMAE_OPTICAL": json.dumps(made_of.get("optical", [])),
        "FUSMAE_SAR": json.dumps(made_of.get("sar", [])),
        "FUSMAE_DECLARED": json.dumps(plan.declared),
        "FUSMAE_WINDOW": f"{lattice.height}x{lattice.width}",
        "FUSMAE_OVERLAP": str(lattice.overlap),
        "FUSMAE_PRODUCT": product,
    }
    if product == "classes":
        tags["FUSMAE_CLASSES"] = json.dumps(dict(enumerate(plan.labels)))
    return tags


_COLOURS = ((31, 119, 180), (44, 160, 44), (255, 187, 51), (214, 39, 40), (148, 103, 189), (140, 86, 75),
            (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207))  # fmt: skip


def colours(labels: Sequence[str]) -> list[tuple[int, int, int]]:
    """A colour for each class: told apart easily where there are few."""
    found = list(_COLOURS[: len(labels)])
    for index in range(len(found), len(labels)):
        shade = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.45 + 0.4 * (index % 2), 0.95 - 0.3 * (index % 3) / 2)
        found.append((int(255 * shade[0]), int(255 * shade[1]), int(255 * shade[2])))
    return found


def areas(plan: Plan, file: Path) -> dict[str, float]:
    """True area of each class in km2, of a file of classes, whatever its CRS."""
    from rasterio.warp import transform

    rasterio = require_rasterio()
    totals = np.zeros(len(plan.labels))
    with rasterio.open(file) as raster:
        grid = grid_of_product(plan, "classes")
        for row in range(0, raster.height, 512):
            rows = min(512, raster.height - row)
            values = raster.read(1, window=((row, row + rows), (0, raster.width)))
            down = np.append(np.arange(0, rows, _AREA_CELL), rows)
            along = np.append(np.arange(0, raster.width, _AREA_CELL), raster.width)
            columns, lines = np.meshgrid(along, row + down)
            x, y = grid.to_map(columns.ravel().astype(float), lines.ravel().astype(float))
            x, y = (np.reshape(part, columns.shape) for part in transform(grid.crs, "EPSG:6933", x, y))
            crossed = (x[1:, 1:] - x[:-1, :-1]) * (y[1:, :-1] - y[:-1, 1:])
            crossed = crossed - (x[1:, :-1] - x[:-1, 1:]) * (y[1:, 1:] - y[:-1, :-1])
            each = np.abs(crossed) / 2 / (np.diff(down)[:, None] * np.diff(along))
            sizes = np.repeat(np.repeat(each, np.diff(down), axis=0), np.diff(along), axis=1)
            known = values < len(plan.labels)
            totals += np.bincount(values[known].astype(np.int64), weights=sizes[known], minlength=len(totals))
    return {label: float(f"{total / 1e6:.6g}") for label, total in zip(plan.labels, totals, strict=True)}


def draw_quicklook(plan: Plan, marks: Mapping[int, Mapping[str, Any]], folder: Path, out: Path) -> None:
    """A picture of inputs and results side by side, with a legend and a scale bar."""
    rasterio = require_rasterio()
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    step = plan.quicklook_step()
    shape = tuple(-(-side // step) for side in plan.area[2:])
    looks: np.ndarray | None = None
    for number, mark in marks.items():
        if "quicklook" not in mark["files"]:
            continue
        row, column, rows, columns = mark["files"]["quicklook"]["window"]
        part = np.load(part_path(folder, number, "quicklook"))
        if looks is None:
            looks = np.full((len(part), *shape), np.nan, np.float32)
        looks[:, row : row + rows, column : column + columns] = part
    panels: list[tuple[str, np.ndarray, dict[str, Any]]] = []
    if looks is not None:
        optical = len(looks) - ("sar" in plan.reader.files)
        panels += [("optical", _stretched(looks[:optical]), {})] if optical else []
        panels += [("SAR", _stretched(looks[optical:]), {})] if optical < len(looks) else []
    legend: list[Any] = []
    for product in (name for name in plan.what if name != "embeddings"):
        with rasterio.open(out.parent / f"{product}.tif") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = tuple(min(side, whole) for side, whole in zip(shape, (file.height, file.width), strict=True))
            values = file.read(1, out_shape=size, masked=True)
        if product == "classes":
            palette = np.array([*colours(plan.labels), (255, 255, 255)], np.uint8)
            panels.append((product, palette[values.filled(len(plan.labels))], {}))
            seen = [index for index in np.unique(values.compressed()).tolist() if index < len(plan.labels)]
            shades = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours(plan.labels)]
            legend = [Patch(color=shades[index], label=plan.labels[index]) for index in seen[:20]]
        else:
            name = f"{product}: {bands_of(plan, product)[0][0]}"
            panels.append((name, values, {"cmap": "viridis"}))
    tall = min(max(4.2 * shape[0] / shape[1], 1.5), 9.0) + 0.8
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), tall), squeeze=False)
    for axis, (title, picture, style) in zip(axes[0], panels, strict=True):
        shown = axis.imshow(picture, interpolation="nearest", **style)
        if style:
            figure.colorbar(shown, ax=axis, shrink=0.6)
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    _scale_bar(axes[0][0], plan, step)
    if legend:
        figure.legend(handles=legend, loc="lower center", ncols=min(len(legend), 5), fontsize=8, frameon=False)
    incomplete = incomplete_path(out).with_suffix(".png")
    figure.savefig(incomplete, dpi=110, bbox_inches="tight")
    plt.close(figure)
    os.replace(incomplete, out)


def _stretched(bands: np.ndarray) -> np.ndarray:
    """One or three bands as grey or colours from 0 to 1; white without data."""
    shown = bands if len(bands) == 3 else np.repeat(bands[:1], 3, axis=0)
    picture = np.ones((*shown.shape[1:], 3))
    for index, band in enumerate(shown):
        there = np.isfinite(band)
        if there.any():
            low, high = np.percentile(band[there], (2, 98))
            picture[..., index][there] = np.clip((band[there] - low) / max(high - low, 1e-6), 0, 1)
    return picture


def _scale_bar(axis: Any, plan: Plan, step: int) -> None:
    """A bar of a round length at the lower left."""
    grid = plan.reader.grid
    from rasterio.warp import transform

    row, column, height, width = plan.area
    x, y = grid.to_map(np.array([column, column + width], float), np.full(2, row + height / 2))
    (west, east), (south, north) = transform(grid.crs, "EPSG:4326", x, y)
    across = np.hypot((east - west) * np.cos(np.radians((south + north) / 2)), north - south) * 111_195.0
    if not np.isfinite(across) or across <= 0:
        return
    wanted = across / 4
    power = 10.0 ** np.floor(np.log10(wanted))
    length = power * max(factor for factor in (1, 2, 5) if factor * power <= wanted)
    pixels = length / across * width / step
    rows = height / step
    axis.plot([0.02 * width / step, 0.02 * width / step + pixels], [rows * 0.97] * 2, color="black", lw=4)
    axis.plot([0.02 * width / step, 0.02 * width / step + pixels], [rows * 0.97] * 2, color="white", lw=2)
    text = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axis.text(0.02 * width / step, rows * 0.94, text, color="white", fontsize=8,
              bbox={"color": "black", "alpha": 0.5, "pad": 1, "lw": 0})  # fmt: skip
