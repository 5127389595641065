"""Band statistics of a folder of shards, read once, in the form that the image processor normalises with."""

import dataclasses
import json
import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.files.atomic import write_atomically
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.sensors_fusmae import STATISTICS
from fusmae_hf.preparation.bands import BandSummary, Rows, SensorBands, read_batches, spread_rows
from fusmae_hf.shards.loading import StreamedPairDataset, load_pairs

_SCALES = {"db": "dB", "linear": "dB", "dn": "digital numbers", "reflectance": "digital numbers", "raw": "raw values"}
_CONFIG = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class DatasetStatistics:
    """What `band_statistics` found; prints as a table.

    Attributes:
        name: of the dataset; made-up imagery is called simulated.
        split: the split.
        num_pairs: number of pairs read.
        total_pairs: number of pairs in the split.
        sar_units: as declared; `"linear"` was converted to dB.
        optical_units: as declared; `"reflectance"` was multiplied by 10,000.
        optical_offset: as declared; it has been subtracted from all figures of the optical bands.
        bands: statistics of each band, SAR first.
    """

    name: str
    split: str
    num_pairs: int
    total_pairs: int
    sar_units: str
    optical_units: str
    optical_offset: float
    bands: tuple[BandSummary, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.name}, {self.split}: {self.num_pairs:,} of {self.total_pairs:,} pairs",
            scale_in_words(self),
            "",
            "band  "
            + "".join(f"{name:>10}" for name in ("mean", "std", "min", "1 %", "median", "99 %", "max", "valid")),
        ]
        for band in self.bands:
            shown = (band.mean, band.std, band.minimum, *(band.percentiles[p] for p in (1, 50, 99)), band.maximum)
            lines.append(f"{band.band:<6}{''.join(f'{x:>10.2f}' for x in shown)}{format_share(1 - band.no_data):>10}")
        return "\n".join(lines)

    def of_sensor(self, sensor: str) -> tuple[BandSummary, ...]:
        """Bands of `"sar"` or `"optical"`, in order."""
        return tuple(band for band in self.bands if band.sensor == sensor)

    def to_json(self) -> dict[str, Any]:
        """All figures, without the distributions, for a file; `from_json` reads them back."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        bands = [{key: value for key, value in vars(band).items() if key != "distribution"} for band in self.bands]
        return content | {"bands": bands}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "DatasetStatistics":
        """Take over what `to_json` gave; `ValueError`, `TypeError` or `KeyError` where it is something else."""
        bands = tuple(
            BandSummary(**{**band, "percentiles": {int(p): value for p, value in band["percentiles"].items()}})
            for band in content["bands"]
        )
        return cls(**{**content, "bands": bands})


def band_statistics(
    folder: str | os.PathLike[str],
    split: str = "train",
    *,
    max_pairs: int | None = None,
    num_proc: int = 1,
    progress: bool = False,
) -> DatasetStatistics:
    """Statistics of every band, in one pass over one split.

    Statistics that a model is trained with must not have seen the pairs it is judged by, hence one split, `train`
    unless told otherwise. Pixels without data do not count: those not finite in some band of the sensor, optical ones
    that are zero in all bands, and linear power that is not positive. A pixel of a 20 m or 60 m band counts as often
    as it covers the grid of the patch, as it does in what the processor gives to the model. Integers of up to 16 bits
    are summed exactly, all else in float64.

    Args:
        folder: a folder of shards, its URL, or `<user>/<name>` on the Hub.
        split: name of the split.
        max_pairs: read at most so many pairs, out of row groups spread over the split; all by default.
        num_proc: row groups that are read and summed at the same time, by threads.
        progress: show a progress bar where the output is a terminal.

    Returns:
        The figures, in the scale in which the image processor stores them: see `BandSummary`. Values that `prepare`
        recorded as odd are in them, with a warning.

    Raises:
        FileNotFoundError: there is no such folder, or no shards in it.
        ValueError: there is no such split, a shard is damaged, or a number is below one.
    """
    for name, value in (("max_pairs", max_pairs), ("num_proc", num_proc)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    pairs = load_pairs(folder, split, streaming=True)
    assert isinstance(pairs, StreamedPairDataset)
    pairs.dataset_info.warn_of_odd_values(split)
    info, rows = pairs.info, spread_rows([pairs], max_pairs)
    bands = _take_in(rows, info, num_proc, progress)
    return DatasetStatistics(
        name=dataset_title(info),
        split=split,
        num_pairs=sum(number for _, _, number in rows),
        total_pairs=len(pairs),
        sar_units=info.sar_units,
        optical_units=info.optical_units,
        optical_offset=info.optical_offset,
        bands=bands.summaries(),
    )


def _take_in(rows: Sequence[Rows], info: PairsInfo, num_proc: int, progress: bool) -> SensorBands:
    """Sum up rows. Thread k of n takes every n-th row group from the k-th on: the same n gives the same sums."""
    failed = threading.Event()

    def take_in(part: Sequence[Rows]) -> SensorBands:
        bands = SensorBands(info)
        for of_group in part:
            if failed.is_set():
                break
            for batch in read_batches(of_group):
                bands.add(batch)
                bar.update(len(batch["id"]))
        return bands

    parts = [rows[start::num_proc] for start in range(min(num_proc, len(rows)))]
    total = sum(number for _, _, number in rows)
    with (
        tqdm(total=total, unit=" pairs", desc="statistics", disable=None if progress else True) as bar,
        ThreadPoolExecutor(len(parts)) as threads,
    ):
        try:
            first, *others = threads.map(take_in, parts)
        except BaseException:
            failed.set()
            raise
    for other in others:
        first.merge(other)
    return first


def write_processor(statistics: DatasetStatistics, info: PairsInfo, folder: str | os.PathLike[str]) -> Path:
    """Put statistics into an image processor, in the folder of a checkpoint or in one of its own.

    The processor stores the mean in dB and in digital numbers *without* offset and subtracts the offset that it is
    told beside it, so nothing is to be added to `BandSummary.mean`. Where the folder has a preprocessor_config.json,
    its mean and std are replaced, for its bands in its order, and `statistics`, which names published ones, becomes
    None; all other fields are kept. Else a new processor with the bands, units and offset of the dataset is saved.

    Args:
        statistics: of the training split.
        info: bands, units and offset of the dataset.
        folder: made if need be.

    Returns:
        Path of the preprocessor_config.json.

    Raises:
        ValueError: the processor of the folder is of another kind or units, needs a band that the dataset lacks, or a
            band has no data or one value only, so that nothing can be normalised by it.
    """
    path = Path(folder, _CONFIG)
    found = {band.band: band for band in statistics.bands}
    if not path.exists():
        config: dict[str, Any] = {
            "sar_bands": list(info.sar_bands),
            "optical_bands": list(info.optical_bands),
            "sar_units": info.sar_units,
            "optical_units": info.optical_units,
            "optical_offset": info.optical_offset,
        }
    else:
        config = _read_config(path, info)
    for sensor in ("sar", "optical"):
        missing = [band for band in config[f"{sensor}_bands"] if band not in found]
        if missing:
            raise ValueError(
                f"{path} is for the {sensor} bands {config[f'{sensor}_bands']}, but the shards have no {missing}."
            )
        for name in ("mean", "std"):
            config[f"{sensor}_{name}"] = {band: getattr(found[band], name) for band in config[f"{sensor}_bands"]}
    config["statistics"] = None
    processor = FusMAEImageProcessor(**{key: config[key] for key in config if key != "image_processor_type"})
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        processor.save_pretrained(path.parent)
        return path
    write_atomically(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return path


def _read_config(path: Path, info: PairsInfo) -> dict[str, Any]:
    """The processor's file, checked to be of the same units as the dataset."""
    try:
        config = json.loads(path.read_text())
        kind = config["image_processor_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no image processor that can be read: {error!r}. Move it away.") from error
    if kind != FusMAEImageProcessor.__name__:
        raise ValueError(f"{path} is a {kind}, but a FusMAEImageProcessor is needed. Give another folder.")
    for key in ("sar_units", "optical_units"):
        theirs, ours = config[key], getattr(info, key)
        if _SCALES[theirs] != _SCALES[ours]:
            raise ValueError(
                f"{path} declares {key} {theirs!r} and the shards {ours!r}: statistics of one are none of the other. "
                "Give another folder."
            )
    if config["optical_offset"] != info.optical_offset:
        warnings.warn(
            f"{path} subtracts an offset of {config['optical_offset']:g}, but the shards declare "
            f"{info.optical_offset:g}. Statistics are without offset, so they fit both; the processor's own was kept.",
            stacklevel=3,
        )
    return config


def scale_in_words(declared: PairsInfo | DatasetStatistics) -> str:
    """In what scale the figures of `BandSummary` are, for data declared so."""
    linear = ", from linear power" if declared.sar_units == "linear" else ""
    reflectance = " (reflectance x 10,000)" if declared.optical_units == "reflectance" else ""
    subtracted = f" after subtracting the offset of {declared.optical_offset:g}" if declared.optical_offset else ""
    return (
        f"SAR in {_SCALES[declared.sar_units]}{linear}, optical in {_SCALES[declared.optical_units]}{reflectance}"
        f"{subtracted}; pixels without data do not count"
    )


def published_figures(info: PairsInfo, sensor: str, band: str) -> tuple[float, float] | None:
    """Published mean and standard deviation of a band, in the scale of `BandSummary`; None where none are known."""
    known = STATISTICS.get(info.statistics or "")
    units = info.sar_units if sensor == "sar" else info.optical_units
    return getattr(known, sensor).get(band) if known and units != "raw" else None


def dataset_title(info: PairsInfo) -> str:
    """Name of the dataset; made-up imagery is always called so."""
    return f"{info.name} (simulated)" if info.simulated and "simulated" not in info.name else info.name


def format_share(share: float) -> str:
    """A share from 0 to 1 in percent; 100 % and 0 % are said only where it is all or nothing."""
    text = f"{share:.2%}"
    if text == "100.00%" and share < 1:
        return "<100%"
    return ">0%" if text == "0.00%" and share > 0 else text
