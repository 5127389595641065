"""The card of a dataset on the Hub, written from what `dataset_info.json` says."""

import re
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from fusmae_hf.data.pairs import PairsInfo
from fusmae_hf.files.plain_text import inline
from fusmae_hf.prepare.statistics import DatasetStatistics, dataset_title, scale_in_words
from fusmae_hf.shards.dataset_info import DatasetInfo

HUB_LICENSES = frozenset(
    (
        "apache-2.0", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-3.0",
        "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
        "cc-by-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "etalab-2.0", "mit", "odbl",
        "odc-by", "pddl", "unlicense",
    )
)  # fmt: skip
"""Licences of data by the Hub's identifiers (https://huggingface.co/docs/hub/repositories-licenses)."""

TAGS = ("remote-sensing", "earth-observation", "sentinel-1", "sentinel-2", "sar", "multispectral", "fus-mae")

_UNITS = {
    "db": "backscatter in dB",
    "linear": "backscatter as linear power",
    "dn": "digital numbers (reflectance x 10,000)",
    "reflectance": "reflectance",
    "raw": "raw values",
}
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
)

_BODY = """
# {title}

{simulated}{pairs:,} pairs of one Sentinel-1 (SAR) and one Sentinel-2 (optical) patch of the same place, as parquet
shards. Pixels are raw: in the data type of the source, nothing converted or normalised. Prepared with `fusmae_hf`
(Fus-MAE for transformers).

- **Source**: {source}
- **Licence of the imagery**: {license}

## Bands

| | bands, in order | units | subtract before use |
|---|---|---|---|
| SAR | {sar_bands} | {sar_units} | - |
| optical | {optical_bands} | {optical_units} | {offset} |

{no_data}{resolution}

## Splits

| split | pairs | files | MB |
|---|---|---|---|
{splits}

{left_out}

{classes}{statistics}## Use

```python
from fusmae_hf import load_pairs

pairs = load_pairs("{address}", "{split}", streaming=True)  # nothing is stored; without `streaming`, a local copy
pairs[0]["sar"], pairs[0]["optical"]  # tensors (bands, height, width)
```

or without this package:

```python
import numpy as np
from datasets import load_dataset

rows = load_dataset("{repo_id}", split="{split}", streaming=True{revision})
row = next(iter(rows))
sar = np.frombuffer(row["sar"], row["sar_dtype"]).reshape(row["sar_shape"])
{plain_optical}
```

Rows carry a checksum, and every band, unit and class stands in `dataset_info.json`.
"""

_SAME_GRID = 'optical = np.frombuffer(row["optical"], row["optical_dtype"]).reshape(row["optical_shape"])'
_NATIVE = """\
values, (_, height, width) = np.frombuffer(row["optical"], row["optical_dtype"]), row["optical_shape"]
factors = np.array({factors})  # by how much each band is coarser than the grid
ends = np.cumsum(height * width // factors**2)
optical = [
    values[end - height * width // f**2 : end].reshape(height // f, width // f).repeat(f, 0).repeat(f, 1)
    for end, f in zip(ends, factors)
]"""


def dataset_card(
    dataset: DatasetInfo, repo_id: str, *, revision: str | None = None, statistics: DatasetStatistics | None = None
) -> DatasetCard:
    """The card of a folder of shards.

    Args:
        dataset: what the folder holds.
        repo_id: `<user>/<name>`, for the examples.
        revision: branch for the examples; the main one by default.
        statistics: band statistics to show, if any.

    Returns:
        The card; `str(card)` is the README.md, whose YAML the Hub can read.
    """
    info = dataset.info
    pairs = sum(map(dataset.rows, dataset.splits))
    split = "train" if "train" in dataset.splits else next(iter(dataset.splits))
    body = _BODY.format(
        title=inline(dataset_title(info)),
        simulated="**Simulated imagery, made up by a program: no satellite has seen it.**\n\n"
        if info.simulated
        else "",
        pairs=pairs,
        source=inline(info.source),
        license=inline(info.license),
        sar_bands=inline(", ".join(info.sar_bands)),
        sar_units=_UNITS[info.sar_units],
        optical_bands=inline(", ".join(info.optical_bands)),
        optical_units=_UNITS[info.optical_units],
        offset=f"{info.optical_offset:g}" if info.optical_offset else "nothing",
        no_data=_no_data(info),
        resolution=_resolution(info),
        splits="\n".join(_split_row(dataset, name) for name in dataset.splits),
        left_out=_left_out(dataset),
        classes=_classes(info),
        statistics=_statistics(statistics, info),
        address=f"hf://datasets/{repo_id}@{revision}" if revision else repo_id,
        repo_id=repo_id,
        revision=f', revision="{revision}"' if revision else "",
        split=split,
        plain_optical=_NATIVE.format(factors=list(info.optical_factors)) if info.optical_factors else _SAME_GRID,
    )
    return DatasetCard(f"---\n{_metadata(dataset, pairs).to_yaml()}\n---\n{body}")


def hub_license(license: str) -> dict[str, str]:
    """The YAML fields with which the Hub names a licence.

    Args:
        license: licence as a dataset states it, such as `"CC BY 4.0"`.

    Returns:
        `license`, an identifier of the Hub; `"unknown"` where none is stated. For a licence without an identifier
        `"other"`, with the link in its text as `license_link` and `license_name`.
    """
    identifier = re.sub(r"[\s_]+", "-", license.strip().lower())
    if identifier in HUB_LICENSES:
        return {"license": identifier}
    if identifier in ("", "none", "none-stated", "unknown"):
        return {"license": "unknown"}
    link = re.search(r"https?://[^\s;,)]+", license)
    named = {"license": "other", "license_name": "see-the-card"}
    return named | ({"license_link": link.group().rstrip(".")} if link else {})


def size_category(pairs: int) -> str:
    """The Hub's size category of so many pairs."""
    return next((name for limit, name in _SIZES if pairs < limit), "100M<n<1B")


def _metadata(dataset: DatasetInfo, pairs: int) -> DatasetCardData:
    info = dataset.info
    tasks = ["image-feature-extraction"]
    tasks += ["image-classification"] if info.class_names else []
    tasks += ["image-segmentation"] if info.map_class_names else []
    fields: dict[str, Any] = dict(hub_license(info.license))
    return DatasetCardData(
        pretty_name=dataset_title(info),
        size_categories=[size_category(pairs)],
        task_categories=tasks,
        **fields,
        tags=[*TAGS, *(["simulated"] if info.simulated else [])],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in dataset.splits],
            }
        ],
    )


def _split_row(dataset: DatasetInfo, split: str) -> str:
    shards = dataset.shards(split)
    size = sum(shard.bytes for shard in shards) / 1e6
    return f"| {split} | {dataset.rows(split):,} | {len(shards):,} | {size:,.1f} |"


def _no_data(info: PairsInfo) -> str:
    sar = "not finite, zero or negative" if info.sar_units == "linear" else "not finite"
    return f"A pixel holds no data where SAR is {sar} in any band, or where all optical bands are zero."


def _resolution(info: PairsInfo) -> str:
    factors = info.optical_factors or (1,) * len(info.optical_bands)
    coarse = [f"{band} (1/{factor})" for band, factor in zip(info.optical_bands, factors, strict=True) if factor > 1]
    if not coarse:
        return ""
    return f"\nCoarser bands are stored in their own resolution, as a part of the grid: {inline(', '.join(coarse))}."


def _left_out(dataset: DatasetInfo) -> str:
    if not dataset.num_left_out:
        return "No pair was left out when preparing."
    lines = [
        f"{dataset.num_left_out:,} pairs were left out when preparing (`left_out.csv` names each):",
        "",
        "| pairs | reason |",
        "|---|---|",
    ]
    return "\n".join(
        lines + [f"| {count:,} | {inline(reason)} |" for reason, count in dataset.left_out_reasons.items()]
    )


def _classes(info: PairsInfo) -> str:
    parts = []
    if info.class_names:
        parts.append(f"Scene labels ({len(info.class_names)} classes): {inline('; '.join(info.class_names))}.")
    if info.map_class_names:
        named = "; ".join(f"{index} {name}" for index, name in enumerate(info.map_class_names))
        without = "" if info.map_no_data is None else f"; {info.map_no_data} means no class"
        parts.append(f"Label maps: {inline(named)}{without}.")
    if info.map_units:
        parts.append(f"Maps of a quantity in {inline(info.map_units)}.")
    return "".join(["## Labels\n\n", "\n\n".join(parts), "\n\n"]) if parts else ""


def _statistics(statistics: DatasetStatistics | None, info: PairsInfo) -> str:
    if statistics is None:
        return ""
    lines = [
        "## Band statistics",
        "",
        f"Over {statistics.num_pairs:,} of {statistics.total_pairs:,} pairs of `{statistics.split}`; "
        f"{inline(scale_in_words(info))}.",
        "",
        "| band | mean | std | min | median | max |",
        "|---|---|---|---|---|---|",
    ]
    for band in statistics.bands:
        figures = (band.mean, band.std, band.minimum, band.percentiles[50], band.maximum)
        lines.append(f"| {inline(band.band)} | {' | '.join(f'{value:.2f}' for value in figures)} |")
    return "\n".join(lines) + "\n\n"
