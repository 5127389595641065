"""Vectors of tokens and windows land where they should, however the map is cut."""

import json
import re
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.transform import Affine
from torch.nn import functional

from fusmae_hf import (
    FusMAEConfig,
    FusMAEForPreTraining,
    FusMAEImageProcessor,
    FusMAEModel,
    SimulatedPairs,
    SimulationOptions,
    extract_features,
    load_pairs,
)
from fusmae_hf.cli.main import main
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.scenes.blocks import compute_block
from fusmae_hf.scenes.mapping import map_scenes
from fusmae_hf.scenes.plan import MapOptions, make_plan
from tests.scenes.conftest import RAW, ground, write


def mean_of_patches(inputs):
    """The model of tokens: the mean of the valid pixels of a patch of each optical band."""
    values, mask = inputs["pixel_values"], inputs["pixel_mask"][:, None].float()
    shares = functional.avg_pool2d(mask, 4)
    return functional.avg_pool2d(torch.where(mask > 0, values, 0.0), 4) / shares.clamp(min=1e-6)


@pytest.fixture
def make_tokens(make_model):
    def make(predict=mean_of_patches, kind="tokens"):
        return replace(make_model(predict, kind=kind), columns=("fused",))

    return make


def offset_of(x, y):
    return np.stack([x - 600_000, 5_300_000 - y]).astype(np.float32)


def scene(tmp_path, shape=(46, 61), missing=None):
    """Each pixel says how far it lies from the corner."""
    values = offset_of(*ground(shape))
    if missing is not None:
        values[:, missing[0], missing[1]] = 0
    return write(tmp_path / "s2.tif", values)


def test_a_token_holds_the_mean_of_its_pixels_where_it_lies_on_the_ground(tmp_path, make_tokens):
    path = scene(tmp_path, missing=(slice(20, 33), slice(16, 40)))
    (result,) = map_scenes(make_tokens(), tmp_path / "out", optical=path, options=RAW, progress=False)
    frame = geopandas.read_parquet(tmp_path / "out" / "embeddings")
    assert result.failed == 0
    rows, columns = np.meshgrid(np.arange(12), np.arange(16), indexing="ij")
    wanted = {(r, c) for r, c in zip(rows.ravel(), columns.ravel(), strict=True)
              if not (20 <= 4 * r <= 29 and 16 <= 4 * c < 40)}  # fmt: skip
    assert set(zip(frame.row, frame.column, strict=True)) == wanted
    assert len(frame) == len(wanted)
    whole = frame[frame.valid == 1]
    np.testing.assert_allclose(np.stack(whole.fused), offset_of(whole.x, whole.y).T, atol=0.01)
    partial = frame[frame.valid < 1]
    assert {*partial.row} >= {8, 11}
    back = frame.to_crs("EPSG:32632").geometry.bounds
    np.testing.assert_allclose(back.minx, 600_000 + 40 * frame.column, atol=1e-3)
    np.testing.assert_allclose(back.maxy, 5_300_000 - 40 * frame.row, atol=1e-3)
    assert (frame.sensors == "optical").all()
    assert (frame.scene == "out").all()


def places_of(plan, model):
    found = [strip.arrays["places"] for block in plan.blocks() for strip in compute_block(plan, model, block)
             if "places" in strip.arrays]  # fmt: skip
    return np.sort(np.concatenate(found), order=("row", "column"))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    side=st.sampled_from([16, 24, 33, 50]),
    shift=st.integers(0, 15),
    overlap=st.sampled_from([0, 4, 8, 12]),
    kind=st.sampled_from(["tokens", "vectors"]),
)
def test_any_cut_gives_the_same_places(tmp_path_factory, make_tokens, side, shift, overlap, kind):
    folder = tmp_path_factory.mktemp("cut")
    values = np.random.default_rng(shift).normal(5, 1, (2, 57, 71)).astype(np.float32)
    values[:, 10:30, 20:50] = 0
    path = write(folder / "s2.tif", values, Affine(10, 0, 600_000 + 10 * shift, 0, -10, 5_300_000 - 10 * shift))
    model = make_tokens(
        mean_of_patches if kind == "tokens" else lambda inputs: inputs["pixel_values"].mean((2, 3)), kind
    )
    plan = make_plan(model, [path], [], replace(RAW, overlap=overlap), look=False)
    whole, cut = places_of(plan.with_block_side(1024), model), places_of(plan.with_block_side(side), model)
    assert len(whole) > 10
    assert whole.tobytes() == cut.tobytes()


def test_a_crop_gives_the_crop_of_the_tokens(tmp_path, make_tokens):
    path, model = scene(tmp_path), make_tokens()
    whole = places_of(make_plan(model, [path], [], RAW, look=False), model)
    bounds = (600_000 + 70, 5_300_000 - 400, 600_000 + 430, 5_300_000 - 90)
    part = places_of(make_plan(model, [path], [], replace(RAW, bounds=bounds), look=False), model)
    inside = whole[np.isin(whole[["row", "column"]], part[["row", "column"]])]
    assert len(part) == len(inside) == 8 * 10
    full = part["valid"] == 1
    assert full.sum() == 7 * 8
    assert part[full].tobytes() == inside[full].tobytes()


def test_scores_are_a_table_too(tmp_path, make_model):
    model = make_model(lambda inputs: inputs["pixel_values"].mean(dim=(2, 3)), kind="scores")
    map_scenes(
        model, tmp_path / "out", optical=scene(tmp_path, (64, 64)), options=replace(RAW, overlap=0), progress=False
    )
    frame = geopandas.read_parquet(tmp_path / "out" / "scores.parquet")
    assert len(frame) == 16
    np.testing.assert_allclose(np.stack(frame.scores), offset_of(frame.x, frame.y).T, atol=0.01)


def test_times_and_sensors_are_noted(tmp_path, make_tokens):
    path = scene(tmp_path, (16, 32))
    sar = write(
        tmp_path / "s1.tif",
        np.where(np.arange(32) < 16, np.nan, 1).astype(np.float32) * np.ones((1, 16, 1), np.float32),
    )
    options = replace(RAW, optical_time="2026-05-31T10:20:31Z", overlap=0)
    map_scenes(make_tokens(), tmp_path / "out", optical=path, sar=sar, options=options, progress=False)
    table = pq.read_table(tmp_path / "out" / "embeddings").to_pandas()
    assert {*table.optical_time.astype(str)} == {"2026-05-31 10:20:31+00:00"}
    assert table.sar_time.isna().all()
    assert {*zip(table.column // 4, table.sensors, strict=True)} == {(0, "optical"), (1, "both")}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny encoder of two depths, and its processor."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    config = FusMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_intermediate_size=32, feature_layers=[1, 2],
    )  # fmt: skip
    FusMAEForPreTraining(config).save_pretrained(folder)
    FusMAEImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    prepare(SimulatedPairs(200, options=SimulationOptions(image_size=32)), folder, progress=False)
    return folder


def options_of(info, **changed):
    return MapOptions(
        what=("embeddings",), optical_units="dn", optical_offset=0, sar_units="db", optical_bands=info.optical_bands,
        sar_bands=info.sar_bands, num_workers=1, **changed,
    )  # fmt: skip


@pytest.mark.parametrize("unit", ["patch", "window"])
def test_vectors_of_a_checkpoint_are_those_of_extract_features(tmp_path, checkpoint, shards, unit):
    pairs = load_pairs(shards, "train")
    info, row = pairs.info, pairs[0]
    optical = write(tmp_path / "s2.tif", np.asarray(row["optical"]))
    sar = write(tmp_path / "s1.tif", np.asarray(row["sar"]))
    options = options_of(info, embedding_unit=unit, embedding_sensors=("fused", "sar", "optical"))
    map_scenes(checkpoint, tmp_path / "out", optical=optical, sar=sar, options=options, progress=False)
    frame = geopandas.read_parquet(tmp_path / "out" / "embeddings")
    encoder, processor = FusMAEModel.from_pretrained(checkpoint), FusMAEImageProcessor.from_pretrained(checkpoint)
    for column, sensors in (("fused", "both"), ("sar", "sar"), ("optical", "optical")):
        wanted = extract_features(encoder, pairs, processor, sensors=sensors, progress=False)
        vectors = np.stack(frame[column])
        assert vectors.shape == (1 if unit == "window" else 16, 32)
        np.testing.assert_allclose(vectors.mean(axis=0), wanted.values[0], atol=2e-5)


def test_eight_bits_come_from_ranges_that_were_measured_for_the_checkpoint(tmp_path, checkpoint, shards, capsys):
    pairs = load_pairs(shards, "train")
    optical = write(tmp_path / "s2.tif", np.asarray(pairs[0]["optical"]))
    options = options_of(pairs.info, embedding_sensors=("optical",))
    with pytest.raises(ValueError, match="fusmae stats SHARDS --embeddings"):
        map_scenes(checkpoint, tmp_path / "none", optical=optical, options=replace(options, embedding_dtype="uint8"))
    assert main(["stats", str(shards), "--embeddings", str(checkpoint)]) == 0
    vectors = {}
    for dtype in ("float32", "uint8"):
        out = tmp_path / dtype
        (result,) = map_scenes(
            checkpoint, out, optical=optical, options=replace(options, embedding_dtype=dtype), progress=False
        )
        table = pq.read_table(out / "embeddings")
        vectors[dtype] = np.array(table.column("optical").to_pylist())
    described = json.loads(table.schema.metadata[b"fusmae"])["quantisation"]["optical"]
    scale, offset = np.array(described["scale"]), np.array(described["offset"])
    error = np.abs(offset + scale * vectors["uint8"] - vectors["float32"])
    assert (error <= 0.51 * scale + 1e-6).mean() >= 1 - result.clipped - 1e-9
    assert result.clipped < 0.05


def test_embeddings_are_a_run_of_their_own(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="a run of their own"):
        map_scenes(checkpoint, tmp_path, options=MapOptions(what=("embeddings", "classes")))
    with pytest.raises(ValueError, match="must be some of fused, sar, optical"):
        map_scenes(checkpoint, tmp_path, options=MapOptions(what=("embeddings",), embedding_sensors=("radar",)))


def test_the_snippet_of_the_page_opens_what_is_written(tmp_path, make_tokens, monkeypatch):
    map_scenes(make_tokens(), tmp_path / "vectors", optical=scene(tmp_path), options=RAW, progress=False)
    page = (Path(__file__).resolve().parents[2] / "docs" / "scenes.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "scenes.md", "exec"), {})
