"""The datasets that `fusmae prepare` and `open_archive` know, as a table: for each its reader, layout and options.

To add a dataset, add an entry to `ARCHIVES`; no other code needs to know it, only `CASES` of its tests.
"""

import argparse
import csv
import importlib
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusmae_hf.data.pairs import PairReader


@dataclass(frozen=True)
class Archive:
    """A dataset that can be opened and prepared.

    Attributes:
        command: its name after `fusmae prepare`.
        reader: where its reader is, as `module:class`. It is imported only when it is needed.
        summary: what the dataset is, in one line.
        example: a command that prepares it.
        layout: what ROOT holds and what else to know, for `--help`. Empty where there is no ROOT.
        options: keywords of the reader that can be given as options, `--like-this`, with what
            `ArgumentParser.add_argument` takes for them. Only those that the user gives, or that have a `default`
            here, are passed on.
        shared: options of `fusmae prepare` itself that the reader takes too.
        fixed: further keywords of the reader and their values, unless others are given.
    """

    command: str
    reader: str
    summary: str
    example: str
    layout: str = ""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def imported_reader(self) -> Any:
        """The class (or function) of the reader."""
        module, name = self.reader.split(":")
        return getattr(importlib.import_module(module), name)

    def open(self, root: str | Path | None, options: Mapping[str, Any]) -> PairReader:
        """Open the dataset in `root`, None where it has none, with these keywords of its reader.

        Raises:
            FileNotFoundError, ValueError, ImportError: whatever the reader raises.
        """
        places = () if root is None else (root,)
        defaults = {name: option["default"] for name, option in self.options.items() if "default" in option}
        return self.imported_reader()(*places, **{**defaults, **self.fixed, **options})


def open_archive(name: str, root: str | Path | None = None, **options: Any) -> PairReader:
    """Open a dataset on disk by the name that `fusmae prepare` has for it.

    Args:
        name: such as `"reben"`; `fusmae prepare --help` lists all.
        root: folder of the dataset, laid out as `fusmae prepare NAME --help` says; None for `simulated` and `example`.
        **options: keywords of its reader, which are the options of `fusmae prepare NAME` (`--max-cloud` is
            `max_cloud`).

    Returns:
        The reader: `ids`, `info`, `summary`; `read(index)` gives a `Pair`.

    Raises:
        FileNotFoundError: a folder or file is missing; says where it was searched.
        ValueError: there is no dataset of that name, `root` is missing or not wanted, an option has a wrong value, or
            no pair is complete.
        ImportError: a package that reads the files is missing; names the pip command.
    """
    archive = next((archive for archive in ARCHIVES if archive.command == name), None)
    if archive is None:
        raise ValueError(f"There is no dataset {name!r}; known: {', '.join(known.command for known in ARCHIVES)}.")
    if (root is None) == bool(archive.layout):
        needed = (
            f"needs root, its folder: {archive.layout}" if archive.layout else f"has no root, but {root} was given."
        )
        raise ValueError(f"The dataset {name!r} {needed}")
    return archive.open(root, options)


def example_pairs(folder: str | Path | None = None) -> PairReader:
    """The six real pairs of BigEarthNet v1 that the PyPI package bigearthnet-common carries.

    Args:
        folder: where to unpack them, or where they were unpacked before. By default a temporary folder, which goes
            with the reader.

    Returns:
        The reader: `read(0)` to `read(5)` give pairs of VV and VH in dB and 12 bands of Level-2A, of 120x120 px.

    Raises:
        FileNotFoundError: the package is not installed; names the pip command.
        ImportError: rasterio is not installed; names the pip command.
    """
    from fusmae_hf.readers.bigearthnet import BigEarthNet, example_pairs_root

    root = Path(folder or tempfile.mkdtemp(prefix="bigearthnet-six-"))
    try:
        reader = BigEarthNet(example_pairs_root(root), splits="official", keep_unlisted=True)
    except BaseException:
        if folder is None:
            shutil.rmtree(root)
        raise
    if folder is None:
        weakref.finalize(reader, shutil.rmtree, root, ignore_errors=True)
    return reader


def names(text: str) -> list[str]:
    """Type of an option that takes several names: `A,B`, `"A, with a comma",B`, or `@FILE` with one name a line.

    Raises:
        argparse.ArgumentTypeError: the file cannot be read, or a quotation mark is not closed.
    """
    try:
        if text.startswith("@"):
            lines = Path(text[1:]).read_text(encoding="utf-8-sig").splitlines()
        else:
            (lines,) = csv.reader([text], skipinitialspace=True, strict=True) if text else [[]]
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"the names {text!r} cannot be read ({reason})") from error
    return [name.strip() for name in lines if name.strip()]


_ADDED = "what was added to every optical value: 1000 for processing baseline 04.00 and later"


def number(text: str) -> int | float:
    """Type of an option that takes a whole number, as classes are, or another one."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


_OPTICAL_OFFSET = {"type": float, "metavar": "DN", "help": f"{_ADDED} (default 0)"}
_MAX_DAYS_APART = {
    "type": float,
    "metavar": "DAYS",
    "help": "most days between the two scenes of a pair (default 45, half the distance of two seasons)",
}
_LEVEL = {
    "choices": ["l2a", "l1c"],
    "help": "Sentinel-2 product: l2a (surface reflectance, 12 bands, default) or l1c (top of atmosphere, 13 bands)",
}

ARCHIVES = (
    Archive(
        command="bigearthnet",
        reader="fusmae_hf.readers.bigearthnet:BigEarthNet",
        summary="BigEarthNet-MM version 1.",
        layout="ROOT holds BigEarthNet-v1.0/ and BigEarthNet-S1-v1.0/.",
        example="fusmae prepare bigearthnet archive/ shards/ --splits official",
        options={
            "splits": {
                "metavar": "FOLDER",
                "help": "folder of train.csv, val.csv and test.csv; `official`: those of the PyPI package "
                "bigearthnet-common",
            },
            "leave_out": {
                "action": "append",
                "choices": ["snow", "cloud", "unlabelled"],
                "help": "leave out the patches of this official list, which must be in the folder of --splits; may be "
                "repeated",
            },
            "keep_unlisted": {"action": "store_true", "help": "keep patches that are in no split list"},
            "optical_offset": _OPTICAL_OFFSET,
        },
        fixed={"progress": True},
    ),
    Archive(
        command="reben",
        reader="fusmae_hf.readers.reben:ReBEN",
        summary="reBEN (BigEarthNet version 2), or the part of it that is on disk.",
        layout="ROOT holds BigEarthNet-S1/, BigEarthNet-S2/ and metadata.parquet.",
        example="fusmae prepare reben archive/ shards/",
        options={
            "keep_snow_and_clouds": {
                "action": "store_true",
                "help": "also take the patches with snow, cloud or shadow",
            },
            "optical_offset": _OPTICAL_OFFSET,
        },
    ),
    Archive(
        command="sen12ms",
        reader="fusmae_hf.readers.sen12ms:SEN12MS",
        summary="SEN12MS: 180,662 pairs of 256x256 px, Sentinel-1 and Sentinel-2 L1C, with MODIS land cover.",
        layout="ROOT holds ROIs1158_spring/, ROIs1868_summer/, ROIs1970_fall/ and ROIs2017_winter/, or some of them, "
        "each with s1_<scene>/, s2_<scene>/ and lc_<scene>/.",
        example="fusmae prepare sen12ms archive/ shards/ --splits archive/splits",
        options={
            "splits": {
                "metavar": "FOLDER",
                "help": "folder of the official train_list.txt and test_list.txt; without it pairs have no split, "
                "with it pairs on neither list are left out",
            },
            "label_threshold": {
                "type": float,
                "metavar": "SHARE",
                "help": "share of the pixels from which on a class is a label of the scene (default 0.1)",
            },
            "label_map": {
                "choices": ["simplified", "igbp"],
                "help": "classes of the label maps: the ten of simplified IGBP (default), or all 17",
            },
        },
    ),
    Archive(
        command="dfc2020",
        reader="fusmae_hf.readers.dfc2020:DFC2020",
        summary="DFC2020: 986 validation and 5,128 test pairs of 256x256 px with land-cover maps of 10 m.",
        layout="ROOT holds ROIs0000_validation/ (s1_validation/, s2_validation/, dfc_validation/, lc_validation/) and "
        "ROIs0000_test/ (s1_0/, s2_0/, dfc_0/, lc_0/), or one of them.",
        example="fusmae prepare dfc2020 archive/ shards/",
        options={
            "label_map": {
                "choices": ["dfc", "lc"],
                "help": "land cover of 10 m made for the contest (default), or MODIS land cover of 500 m in the same "
                "ten classes",
            },
        },
    ),
    Archive(
        command="ssl4eo",
        reader="fusmae_hf.readers.ssl4eo:SSL4EOS12",
        summary="SSL4EO-S12 v1.0: Sentinel-1 and Sentinel-2 of 251,079 locations in up to four seasons, GeoTIFF.",
        layout="ROOT holds s1/<7 digits>/<scene>/ with VV.tif and VH.tif, and s2a/ or s2c/ with B1.tif and so on. "
        "Scenes are paired by time.",
        example="fusmae prepare ssl4eo archive/ shards/ --level l2a",
        options={
            "level": _LEVEL,
            "max_days_apart": _MAX_DAYS_APART,
            "optical_offset": _OPTICAL_OFFSET,
        },
        fixed={"progress": True},
    ),
    Archive(
        command="ssl4eo-zarr",
        reader="fusmae_hf.readers.ssl4eo_zarr:SSL4EOS12Zarr",
        summary="SSL4EO-S12 v1.1: Sentinel-1 and Sentinel-2 of 246,144 locations in four seasons, zarr in zip.",
        layout="ROOT holds train/ and val/, or one of them, with S1GRD/ and S2L2A/ or S2L1C/, and in these "
        "ssl4eos12_<split>_seasonal_data_<6 digits>.zarr.zip. Scenes are paired by time. Every file holds many pairs: "
        "--keep-order reads each once and is much faster.",
        example="fusmae prepare ssl4eo-zarr archive/ shards/ --keep-order",
        options={
            "level": _LEVEL,
            "max_days_apart": _MAX_DAYS_APART,
            "optical_offset": {**_OPTICAL_OFFSET, "help": "what was added to every optical value (default 1000)"},
        },
        fixed={"progress": True},
    ),
    Archive(
        command="terramesh",
        reader="fusmae_hf.readers.terramesh:TerraMesh",
        summary="TerraMesh samples as GeoTIFF, with land cover.",
        layout="ROOT holds <modality>/<name>.tif: S1RTC/ or S1GRD/, S2L2A/ or S2L1C/, and LULC/ if there is one. Some "
        "samples carry +1000 and some do not: prepare them apart (column optical_minimum tells).",
        example="fusmae prepare terramesh archive/ shards/ --optical S2L1C",
        options={
            "optical": {"choices": ["S2L2A", "S2L1C"], "help": "Sentinel-2 product (default S2L2A)"},
            "sar": {"choices": ["S1RTC", "S1GRD"], "help": "Sentinel-1 product (default S1RTC)"},
            "optical_offset": _OPTICAL_OFFSET,
        },
    ),
    Archive(
        command="sen1floods11",
        reader="fusmae_hf.readers.sen1floods11:Sen1Floods11",
        summary="Sen1Floods11 v1.1: 446 hand-labelled flood chips of 512x512 px.",
        layout="ROOT holds v1.1/, or is v1.1/ itself with data/flood_events/HandLabeled/{S1Hand,S2Hand,LabelHand}/ "
        "and splits/flood_handlabeled/.",
        example="fusmae prepare sen1floods11 archive/ shards/ --bolivia test",
        options={
            "bolivia": {
                "choices": ["leave_out", "test"],
                "help": "the 15 chips of the region held out: leave them out (default), or add them to the test split",
            },
        },
    ),
    Archive(
        command="biomassters",
        reader="fusmae_hf.readers.biomassters:BioMassters",
        summary="BioMassters: 256x256 px in twelve months, with above-ground biomass in t/ha.",
        layout="ROOT holds train_features/, train_agbm/ and test_features/, or a folder for each chip.",
        example="fusmae prepare biomassters archive/ shards/ --max-cloud 0.2",
        options={
            "orbit": {
                "choices": ["ascending", "descending"],
                "help": "which of the two orbits gives VV and VH (default ascending)",
            },
            "max_cloud": {
                "type": float,
                "metavar": "SHARE",
                "help": "leave out pairs of which a larger share of the pixels is cloudy (default 1: none)",
            },
        },
    ),
    Archive(
        command="ombria",
        reader="fusmae_hf.readers.ombria:OMBRIA",
        summary="OMBRIA: 8-bit images of floods with masks, 256x256 px.",
        layout="ROOT holds OmbriaS1/ and OmbriaS2/, each with train/ and test/ or one of them.",
        example="fusmae prepare ombria archive/ shards/ --splits events",
        options={
            "time": {"choices": ["after", "before"], "help": "images after (default) or before the flood"},
            "splits": {
                "choices": ["official", "events"],
                "help": "the official folders (default), or whole events dealt to train, validation and test",
            },
        },
    ),
    Archive(
        command="geotiffs",
        reader="fusmae_hf.readers.paired_geotiffs:PairedGeoTIFFs",
        summary="GeoTIFFs (or JP2, VRT and others) of your own: a SAR and an optical file for each pair or scene.",
        layout="Files below ROOT are paired by patterns (--sar, --optical) or by a table (--manifest). Units must be "
        "said; bands, offset and no data too, where the files do not declare them; nothing is guessed. Large scenes "
        "are cut into patches (--patch-size); --max-no-data 0.1 leaves out those of which more is missing. NAMES are "
        "A,B, or quoted where they hold commas, or @FILE with one name a line.",
        example="fusmae prepare geotiffs scenes/ shards/ --sar s1/{id}.tif --optical s2/{id}.tif --sar-bands VV,VH "
        "--sar-units db --optical-bands B02,B03,B04,B08 --optical-units dn --optical-offset 1000 --patch-size 120 "
        "--on-different-grids warp",
        options={
            "sar": {
                "metavar": "PATTERN",
                "help": "SAR files below ROOT, such as 's1/{id}.tif'; {band} for one file a band",
            },
            "optical": {"metavar": "PATTERN", "help": "optical files, with the same fields"},
            "label_map": {"metavar": "PATTERN", "help": "label maps of one band, if there are any"},
            "manifest": {
                "metavar": "FILE",
                "help": "instead of patterns: CSV or Parquet with the columns id, sar, optical and, if you like, "
                "label_map, labels (separated by ;), split, sar_time, optical_time and others",
            },
            "sar_bands": {
                "type": names,
                "metavar": "NAMES",
                "help": "bands of the SAR files in order; - skips one (default: their descriptions)",
            },
            "optical_bands": {
                "type": names,
                "metavar": "NAMES",
                "help": "bands of the optical files in order (default: their descriptions)",
            },
            "sar_units": {"choices": ["db", "linear", "raw"], "help": "units of the SAR files"},
            "optical_units": {
                "choices": ["dn", "reflectance", "raw"],
                "help": "units of the optical files; dn is reflectance x 10,000",
            },
            "optical_offset": {**_OPTICAL_OFFSET, "help": f"{_ADDED} (default: what the files' tags imply, or 0)"},
            "sar_no_data": {"type": float, "metavar": "VALUE", "help": "SAR value without data (default: the file's)"},
            "optical_no_data": {
                "type": float,
                "metavar": "VALUE",
                "help": "optical value without data (default: the file's)",
            },
            "class_names": {"type": names, "metavar": "NAMES", "help": "classes of the labels, in index order"},
            "map_class_names": {"type": names, "metavar": "NAMES", "help": "classes 0, 1, ... of the label maps"},
            "map_no_data": {
                "type": number,
                "metavar": "VALUE",
                "help": "value of label maps without a class or quantity (default: the files')",
            },
            "map_units": {"metavar": "UNITS", "help": "units of label maps that hold a quantity"},
            "on_different_grids": {
                "choices": ["error", "warp"],
                "help": "where the grids of a pair differ: leave it out (default), or warp it onto one",
            },
            "target": {"choices": ["optical", "sar"], "help": "whose grid that is (default optical)"},
            "max_pixel_ratio": {
                "type": float,
                "metavar": "TIMES",
                "help": "by how much pixels of the sensors may differ in size (default 5)",
            },
            "resolution": {"type": float, "metavar": "SIZE", "help": "size of its pixels in units of the CRS"},
            "resampling": {"choices": ["bilinear", "nearest"], "help": "how to warp (default bilinear)"},
            "patch_size": {"type": int, "metavar": "PX", "help": "cut scenes into squares of so many pixels"},
            "stride": {"type": int, "metavar": "PX", "help": "distance of the squares (default: their size)"},
            "edges": {
                "choices": ["drop", "shift", "pad"],
                "help": "what remains at the right and lower edge: drop it (default), shift the last square back over "
                "the one before, or pad it with no data",
            },
            "keep_single": {"action": "store_true", "help": "with patterns, keep files of one sensor alone"},
            "name": {"metavar": "NAME", "help": "name of the dataset, kept in the shards"},
            "source": {"metavar": "TEXT", "help": "where the imagery comes from, kept in the shards"},
            "license": {"metavar": "TEXT", "help": "licence of the imagery, kept in the shards"},
        },
        fixed={"max_no_data": 1.0},  # `prepare` itself leaves patches out
    ),
    Archive(
        command="simulated",
        reader="fusmae_hf.simulation.pairs:SimulatedPairs",
        summary="Simulated scenes with labels, made up on the spot: no download. The seed is also that of the scenes.",
        example="fusmae prepare simulated shards/ --num-pairs 512 --seed 0",
        options={
            "num_pairs": {"type": int, "default": 256, "metavar": "N", "help": "number of pairs (default 256)"},
        },
        shared=("seed",),
    ),
    Archive(
        command="example",
        reader="fusmae_hf.readers.archives:example_pairs",
        summary="The six real pairs of BigEarthNet v1 that the PyPI package bigearthnet-common carries. Install it "
        "with `pip install --no-deps bigearthnet-common==2.8.0`.",
        example="fusmae prepare example shards/",
    ),
)
"""All datasets that can be prepared, in the order in which they are listed."""
