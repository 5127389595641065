"""Which files of a user's own folder make up pairs: by patterns of file names, or by a table."""

import difflib
import os
import re
import string
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq

from fusmae_hf.modeling.sensors_fusmae import BASELINE_0400_OFFSET
from fusmae_hf.readers.declarations import BAND_FIELD, SKIPPED_BAND
from fusmae_hf.readers.listed_pairs import require_folders
from fusmae_hf.vocabulary import IMAGES, SENSORS, SPLITS

LISTING_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sar", pa.string()),
        ("optical", pa.string()),
        ("label_map", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("sar_time", pa.string()),
        ("optical_time", pa.string()),
        ("optical_offset", pa.float64()),
        ("sar_units", pa.string()),
        ("optical_units", pa.string()),
        ("processing_baseline", pa.string()),
    ]
)
"""Columns of every listing: paths are complete; extra columns follow."""

_REQUIRED = ("id", "sar", "optical")
_UNNAMED = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
"""Names that pandas gives to an index."""

BASELINE_WITH_OFFSET = 4.0
"""Products of processing baseline 04.00 and later carry an offset."""

_EXTRA_TYPES = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}


class PairListing:
    """Pairs of files, sorted by id.

    Attributes:
        table: a row a pair: the columns of `LISTING_SCHEMA`, then the extra ones.
        left_out: pairs of which a file is missing, as (id, reason).
        extra_columns: type of each extra column, as in `PairsInfo.extra_columns`.
    """

    def __init__(self, table: pa.Table, left_out: list[tuple[str, str]], extra_columns: dict[str, str]):
        self.table = table.sort_by("id")
        self.left_out = sorted(left_out)
        self.extra_columns = extra_columns
        counts = Counter([*self.table["id"].to_pylist(), *(name for name, _ in left_out)])
        if repeated := [name for name, count in counts.most_common(8) if count > 1]:
            raise ValueError(f"Ids must be unique, but several pairs are named {repeated}.")
        for split in pc.unique(self.table["split"]).to_pylist():
            if split not in (None, *SPLITS):
                raise ValueError(f"A split is called {split!r}, but must be one of {SPLITS}, or empty for none.")


def list_by_patterns(
    root: Path,
    sar: str,
    optical: str,
    label_map: str | None,
    bands: Mapping[str, Sequence[str]],
    keep_single: bool = False,
) -> PairListing:
    """Pair the files whose names agree in every field of their patterns.

    Args:
        root: folder to which the patterns are relative.
        sar: pattern of the SAR files, such as `"s1/{id}_{date}.tif"`: `/` separates folders, `{name}` stands for one
            or more characters other than `/`, the same wherever it is repeated. Of several fields in a name the first
            takes as much as it can.
        optical: pattern of the optical files, with the same fields.
        label_map: pattern of the label maps, with some or all of the fields; pairs without one are left out.
        bands: names of the bands of each sensor, for `{band}` in its pattern: one file a band. The path of such a pair
            keeps the `{band}`.
        keep_single: keep files without a partner of the other sensor.

    Returns:
        Pairs named by the values of their fields in the order of `sar`, joined by `_`; `{split}` gives the split
        instead. Every field but `id` and `split` is an extra column of strings.

    Raises:
        FileNotFoundError: a folder that a pattern names is missing.
        ValueError: a pattern is wrong, or the fields of two patterns differ.
    """
    patterns = {"sar": sar, "optical": optical} | ({"label_map": label_map} if label_map else {})
    fields_of = {kind: _fields(pattern) for kind, pattern in patterns.items()}
    wanted = {kind: [name for name in bands.get(kind, ()) if name != SKIPPED_BAND] for kind in patterns}
    for kind, pattern in patterns.items():
        if BAND_FIELD in pattern and not wanted[kind]:
            raise ValueError(
                f"The pattern {pattern!r} has a field {{band}}, which needs the names of the bands: --{kind}-bands."
            )
    fields = fields_of["sar"]
    if set(fields) != set(fields_of["optical"]) or not set(fields_of.get("label_map", ())) <= set(fields):
        raise ValueError(
            f"The patterns sar={sar!r}, optical={optical!r} and label_map={label_map!r} must have the same fields "
            "(label_map may have fewer). Where names do not agree, list the pairs in a manifest."
        )
    found = {
        kind: _match(root, pattern, fields if kind in SENSORS else fields_of[kind], wanted[kind])
        for kind, pattern in patterns.items()
    }
    names = [field for field in fields if field != "split"]
    extra = [field for field in names if field != "id"]
    rows, left_out = [], []
    for values in sorted(found["sar"].keys() | found["optical"].keys()):
        of_field = dict(zip(fields, values, strict=True))
        name = "_".join(of_field[field] for field in names)
        row, missing = {"id": name, "label_map": None}, list[str]()
        for kind, pattern in patterns.items():
            key = values if kind in SENSORS else tuple(of_field[field] for field in fields_of[kind])
            there: Any = found[kind].get(key, {})
            if keep_single and kind in SENSORS and not there:
                row[kind] = None
                continue
            for band in wanted[kind] if BAND_FIELD in pattern else [""]:
                if band not in there:
                    file = pattern.format_map(of_field | {"band": band})
                    missing.append(
                        f"its {kind.replace('_', ' ')}{'' if kind not in SENSORS else ' file'} {file} is missing"
                    )
            row[kind] = f"{root}/{pattern.format_map(of_field | {'band': BAND_FIELD})}" if there else None
        if missing:
            left_out.append((name, "; ".join(missing)))
            continue
        rows.append(row | {"split": of_field.get("split")} | {field: of_field[field] for field in extra})
    schema = pa.schema([*LISTING_SCHEMA, *((field, pa.string()) for field in extra)])
    return PairListing(pa.Table.from_pylist(rows, schema), left_out, dict.fromkeys(extra, "string"))


def _fields(pattern: str) -> list[str]:
    """Names of the fields of a pattern, each once.

    Raises:
        ValueError: it has no `{id}`, leaves its root, or cannot be understood.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(pattern) if field is not None]
    except ValueError as error:
        raise ValueError(f"The pattern {pattern!r} cannot be understood: {error}.") from error
    parts = pattern.split("/")
    if "id" not in fields or any(not re.fullmatch(r"[A-Za-z]\w*", field) for field in fields):
        raise ValueError(f"The pattern {pattern!r} needs a field {{id}}, and plain names such as {{date}} for others.")
    if any(part in ("", ".", "..") for part in parts) or any(
        specification or conversion for _, _, specification, conversion in string.Formatter().parse(pattern)
    ):
        raise ValueError(
            f"The pattern {pattern!r} must be folders and a file name below the root, such as s1/{{id}}.tif."
        )
    return list(dict.fromkeys(field for field in fields if field != "band"))


def _match(root: Path, pattern: str, fields: Sequence[str], bands: Collection[str]) -> dict[tuple[str, ...], set[str]]:
    """What fits a pattern, by the values of its fields: for each the bands of which there is a file, `""` if there is
    one file for all. One directory scan a folder."""
    parts = pattern.split("/")
    fixed = "/".join(parts[: next(index for index, part in enumerate(parts) if "{" in part)])
    if not root.is_dir():
        raise FileNotFoundError(
            f"Paired GeoTIFFs: looked for files that fit {pattern!r} in {root}, but there is no such folder. Give the "
            "one that the patterns start from."
        )
    if fixed:
        require_folders(root, [fixed], "Paired GeoTIFFs")
    found = dict[tuple[str, ...], set[str]]()
    for values in _walk(str(root), parts, {}):
        if (band := values.get("band", "")) in bands or not band:
            found.setdefault(tuple(values[field] for field in fields), set()).add(band)
    return found


def _walk(folder: str, parts: Sequence[str], known: dict[str, str]) -> Iterator[dict[str, str]]:
    """For each file below `folder` that fits, the value of each field."""
    part, rest = parts[0], parts[1:]
    if "{" not in part and rest:
        if os.path.isdir(f"{folder}/{part}"):
            yield from _walk(f"{folder}/{part}", rest, known)
        return
    expression, seen = "", set(known)
    for literal, field, _, _ in string.Formatter().parse(part):
        expression += re.escape(literal)
        if field is not None:
            expression += (
                re.escape(known[field])
                if field in known
                else f"(?P={field})"
                if field in seen
                else (f"(?P<{field}>.+)")
            )
            seen.add(field)
    matcher = re.compile(expression)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = matcher.fullmatch(entry.name)
            if match and rest and entry.is_dir():
                yield from _walk(entry.path, rest, known | match.groupdict())
            elif match and not rest and entry.is_file():
                yield known | match.groupdict()


def list_by_manifest(path: Path, class_names: Collection[str]) -> PairListing:
    """Read pairs from a table.

    Args:
        path: CSV (comma-separated, UTF-8) or Parquet (`.parquet`) with the columns `id`, `sar` and `optical`, and
            optionally `label_map`, `labels` (separated by `;`), `split`, `sar_time` and `optical_time` (ISO 8601),
            and what differs from scene to scene: `optical_offset`, `sar_units`, `optical_units`, and
            `processing_baseline` (`04.00`, `N0509`), which tells the offset where `optical_offset` does not. A pair
            without a path of one sensor has the other alone. Paths are relative to the folder of the table. Any
            further column is an extra column; those of a CSV file get their type from their values (`012` is a
            number), dates and times become strings in ISO 8601.
        class_names: what labels may be called.

    Raises:
        FileNotFoundError: the table is missing.
        ValueError: the table cannot be read, lacks a column, has one whose name is nearly that of a known one, or
            holds an id twice, an empty id, a pair without any file, an unknown split or label, a time that is not
            ISO 8601, a baseline that is none, or an extra column of another type.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest. Give a CSV or Parquet file with the columns {_REQUIRED}.")
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else _read_csv(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix or 'CSV'} table ({error}).") from error
    names = table.column_names
    if missing := [name for name in _REQUIRED if name not in names]:
        raise ValueError(
            f"{path}: lacks the columns {missing}; it has {names}. A manifest is comma-separated, and its first line "
            "names the columns."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: several columns have the same name: {names}.")
    if unnamed := [name for name in names if _UNNAMED.fullmatch(name) and name not in LISTING_SCHEMA.names]:
        warnings.warn(f"{path}: the columns {unnamed} have no name of their own and are left out.", stacklevel=2)
        names = [name for name in names if name not in unnamed]
    _refuse_near_misses(path, names)
    columns: dict[str, pa.ChunkedArray] = {}
    extra_columns: dict[str, str] = {}
    for name in names:
        known = name in LISTING_SCHEMA.names
        columns[name], kind = _plain_column(path, name, table[name], pa.string() if known else None)
        if not known:
            extra_columns[name] = kind
    folder = path.parent
    if not all(columns["id"].to_pylist()):
        raise ValueError(f"{path}: the column 'id' has empty cells.")
    for id, *files in zip(*(columns[name].to_pylist() for name in _REQUIRED), strict=True):
        if not any(files):
            raise ValueError(f"{path}: {id} has neither a SAR nor an optical file.")
    for name in {"sar", "optical", "label_map"} & columns.keys():
        paths = [os.path.join(folder, cell) if cell else None for cell in columns[name].to_pylist()]
        columns[name] = pa.chunked_array([paths], pa.string())
    for name in {"sar_time", "optical_time"} & columns.keys():
        _require_times(path, name, columns[name])
    _tell_offsets(path, columns)
    if "labels" in columns:
        columns["labels"] = _split_labels(path, columns["labels"], class_names)
    rows = len(table)
    complete = pa.table(
        {field.name: columns.get(field.name, pa.nulls(rows, field.type)) for field in LISTING_SCHEMA}
        | {name: columns[name] for name in extra_columns}
    )
    missing_files = _missing_files(complete)
    keep = pa.array([not reason for reason in missing_files], pa.bool_())
    left_out = [
        (name, reason) for name, reason in zip(complete["id"].to_pylist(), missing_files, strict=True) if reason
    ]
    return PairListing(complete.filter(keep), left_out, extra_columns)


def _refuse_near_misses(path: Path, names: Sequence[str]) -> None:
    """Raise a ValueError where a column that is needed for nothing has nearly the name of a known one that lacks."""
    lacking = [name for name in LISTING_SCHEMA.names if name not in names]
    for name in names:
        if name in LISTING_SCHEMA.names:
            continue
        plain = re.sub(r"[\s-]+", "_", name.strip().lower())
        for near in difflib.get_close_matches(plain, lacking, 3, 0.8):
            given, known = (word.rpartition("_")[2] for word in (plain, near))
            if difflib.SequenceMatcher(None, given, known).ratio() >= 0.6:
                raise ValueError(
                    f"{path}: there is a column {name!r}. Did you mean {near!r}? Else give it another name."
                )


def _tell_offsets(path: Path, columns: dict[str, pa.ChunkedArray]) -> None:
    """Put numbers in the column of offsets, and what the baselines imply where it says nothing."""
    if not {"optical_offset", "processing_baseline"} & columns.keys():
        return
    nothing = [None] * len(columns["id"])
    said = columns["optical_offset"].to_pylist() if "optical_offset" in columns else nothing
    baselines = columns["processing_baseline"].to_pylist() if "processing_baseline" in columns else nothing
    offsets: list[float | None] = []
    for offset, baseline in zip(said, baselines, strict=True):
        try:
            implied = None if not baseline else _offset_of_baseline(baseline)
            offsets.append(implied if offset in (None, "") else float(offset))
        except ValueError as error:
            raise ValueError(
                f"{path}: optical_offset holds {offset!r}, processing_baseline {baseline!r}: {error}."
            ) from error
    columns["optical_offset"] = pa.chunked_array([offsets], pa.float64())


def _offset_of_baseline(baseline: str) -> float:
    """What a Sentinel-2 product of a processing baseline, such as `04.00` or `N0509`, carries."""
    match = re.fullmatch(r"N?(\d{2})\.?(\d{2})|(\d)(?:\.(\d{1,2}))?", baseline.strip())
    if not match:
        raise ValueError("a baseline is two digits, a point and two digits, such as 04.00")
    major = int(match[1] or match[3])
    return float(BASELINE_0400_OFFSET) if major >= BASELINE_WITH_OFFSET else 0.0


def _read_csv(path: Path) -> pa.Table:
    """Columns of a CSV file; those of `LISTING_SCHEMA` as strings. An empty cell alone is missing, not `NA`."""
    types = dict.fromkeys(LISTING_SCHEMA.names, pa.string())
    options = pv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True)
    return pv.read_csv(path, convert_options=options)


def _plain_column(
    path: Path, name: str, column: pa.ChunkedArray, wanted: pa.DataType | None
) -> tuple[pa.ChunkedArray, str]:
    """A column as one of `_EXTRA_TYPES`, and which; nothing is rounded."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_temporal(kind):
        values = [None if value is None else value.isoformat() for value in column.to_pylist()]
        return pa.chunked_array([values], pa.string()), "string"
    if wanted is None:
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)
        checks = {
            "string": is_text,
            "bool": pa.types.is_boolean(kind),
            "int64": pa.types.is_integer(kind),
            "double": pa.types.is_floating(kind),
        }
        plain = next((name for name, holds in checks.items() if holds), None)
        if plain is None:
            raise ValueError(
                f"{path}: column {name!r} holds {kind}, but strings, numbers, booleans or times are needed. Leave it "
                "out or convert it."
            )
    else:
        plain = "string"
    try:
        return column.cast(_EXTRA_TYPES[plain]), plain
    except pa.ArrowException as error:
        raise ValueError(f"{path}: column {name!r} cannot be taken as {plain} ({error}).") from error


def _require_times(path: Path, name: str, column: pa.ChunkedArray) -> None:
    for value in column.drop_null().to_pylist():
        try:
            datetime.fromisoformat(value)
        except ValueError as error:
            raise ValueError(f"{path}: {name} holds {value!r}, which is not a time in ISO 8601.") from error


def _split_labels(path: Path, column: pa.ChunkedArray, class_names: Collection[str]) -> pa.ChunkedArray:
    """Lists of labels, None where there are none."""
    if not class_names:
        raise ValueError(f"{path}: has a column `labels`: give class_names, all names in the order of their indices.")
    known = set(class_names)
    lists = []
    for cell in column.to_pylist():
        labels = [label.strip() for label in (cell or "").split(";") if label.strip()]
        if unknown := sorted(set(labels) - known):
            raise ValueError(f"{path}: the labels {unknown} are none of class_names, {list(class_names)}.")
        lists.append(labels or None)
    return pa.chunked_array([lists], pa.list_(pa.string()))


def _missing_files(table: pa.Table) -> list[str]:
    """For each row which of its files are missing, or an empty string: one directory scan a folder."""
    in_folder: dict[str, set[str]] = {}
    reasons = [""] * len(table)
    for sensor in IMAGES:
        for number, path in enumerate(table[sensor].to_pylist()):
            if not path or BAND_FIELD in path:
                continue
            folder, file = os.path.split(path)
            if folder not in in_folder:
                in_folder[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
            if file not in in_folder[folder]:
                what = f"its {sensor.replace('_', ' ')} file {path} is missing"
                reasons[number] = f"{reasons[number]}; {what}" if reasons[number] else what
    return reasons
