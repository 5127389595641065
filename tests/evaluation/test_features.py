"""Features are those of the encoder, masked by nothing, of the sensors asked for, and never stale."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, FusMAEModel, load_pairs
from fusmae_hf.evaluation import features as features_module
from fusmae_hf.evaluation.baselines import BandStatistics
from fusmae_hf.evaluation.features import (
    Features,
    class_indices,
    extract_features,
    label_matrix,
    read_scene_labels,
    weights_hash,
)
from fusmae_hf.preparation.prepare import prepare
from fusmae_hf.shards.dataset import PairDataset
from fusmae_hf.simulation.pairs import SimulatedPairs, SimulationOptions
from tests.small_shards import INFO, edit_shard, make_pair, write_shards

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
    "optical_bands": INFO.optical_bands,
}


def make_model(seed: int = 0, **fields) -> FusMAEModel:
    torch.manual_seed(seed)
    return FusMAEModel(FusMAEConfig(**SMALL | fields))


@pytest.fixture
def processor() -> FusMAEImageProcessor:
    return FusMAEImageProcessor(optical_bands=INFO.optical_bands)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def pairs(folder) -> PairDataset:
    return load_pairs(folder, "train")


def extract(model, pairs, processor, **options) -> Features:
    return extract_features(model, pairs, processor, **{"batch_size": 5, "progress": False} | options)


def encode(model, pairs, processor, sensors) -> torch.Tensor:
    """What the encoder gives for all pairs at once, put together by hand."""
    batch = pairs.__getitems__(range(len(pairs)))
    images = {sensor: batch[sensor] for sensor in ("sar", "optical") if sensors in ("both", sensor)}
    with torch.no_grad():
        return model.eval()(**processor(**images))


def test_label_maps_of_the_pairs_are_kept_from_the_encoder(tmp_path):
    prepare(SimulatedPairs(8, options=SimulationOptions(image_size=16)), tmp_path / "shards", progress=False)
    mapped, processor = load_pairs(tmp_path / "shards", "train"), FusMAEImageProcessor()
    assert "label_map" in mapped.__getitems__([0])
    found = extract(BandStatistics(FusMAEConfig()), mapped, processor)
    assert found.values.shape == (len(mapped), 2 * 14)


@pytest.mark.parametrize("sensors", ["both", "sar", "optical"])
def test_features_are_those_of_the_encoder_for_the_sensors_asked_for(pairs, processor, sensors):
    model = make_model()
    expected = encode(model, pairs, processor, sensors)
    mean = extract(model, pairs, processor, sensors=sensors)
    np.testing.assert_allclose(mean.values, expected.pooler_output, atol=1e-5)
    token = extract(model, pairs, processor, sensors=sensors, pooling="class")
    np.testing.assert_allclose(token.values, expected.last_hidden_state[:, 0], atol=1e-5)
    assert mean.values.dtype == np.float32
    assert mean.values.shape == (12, 16)


def test_features_of_each_sensor_stand_side_by_side(pairs, processor):
    model = make_model()
    outputs = encode(model, pairs, processor, "both")
    expected = torch.cat([outputs.optical_hidden_state.mean(1), outputs.sar_hidden_state.mean(1)], dim=1)
    both = extract(model, pairs, processor, pooling="sensors")
    np.testing.assert_allclose(both.values, expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "class", "sensors"])
def test_features_are_read_at_the_depths_of_the_configuration(pairs, processor, pooling):
    model = make_model(feature_layers=[0, 1])
    found = extract(model, pairs, processor, pooling=pooling)
    last = extract(make_model(), pairs, processor, pooling=pooling)
    assert found.values.shape == (12, 64 if pooling == "sensors" else 32)
    columns = [*range(16, 32), *range(48, 64)] if pooling == "sensors" else range(16, 32)
    np.testing.assert_allclose(found.values[:, columns], last.values, atol=1e-6)


@pytest.mark.parametrize("sensors", ["both", "sar", "optical"])
def test_projections_are_of_each_sensor_alone_and_of_unit_length(pairs, processor, sensors):
    torch.manual_seed(0)
    model = FusMAEForPreTraining(FusMAEConfig(**SMALL, contrastive_loss_weight=0.1, contrastive_projection_size=8))
    found = extract(model, pairs, processor, kind="projected", sensors=sensors)
    batch = pairs.__getitems__(range(len(pairs)))
    vectors = []
    for sensor, suffix in (("sar", "_sar"), ("optical", "")):
        if sensors in ("both", sensor):
            name = f"pixel_values{suffix}"
            with torch.no_grad():
                pooled = model.fusmae(**{name: processor(**{sensor: batch[sensor]})[name]}).pooler_output
                vectors.append(getattr(model.contrast, sensor)(pooled))
    mean = torch.stack(vectors).mean(dim=0)
    np.testing.assert_allclose(found.values, mean / mean.norm(dim=1, keepdim=True), atol=1e-5)


def test_a_sensor_left_out_has_no_influence(tmp_path, processor):
    values = []
    for name, level in (("first", 300), ("second", 850)):
        optical = np.full((4, 8, 8), level, dtype=np.uint16)
        folder = write_shards(tmp_path / name, train=[make_pair(number, optical=optical) for number in range(4)])
        of_folder = load_pairs(folder, "train")
        values.append([extract(make_model(), of_folder, processor, sensors=s).values for s in ("sar", "both")])
    np.testing.assert_array_equal(values[0][0], values[1][0])
    assert np.abs(values[0][1] - values[1][1]).max() > 1e-3


def test_tokens_without_data_do_not_count_in_the_mean_of_a_sensor(tmp_path, processor):
    pairs = []
    for number in range(2):
        pair = make_pair(number)
        pair.sar[:, :4] = np.nan
        pairs.append(pair)
    opened = load_pairs(write_shards(tmp_path, train=pairs), "train")
    model = make_model()
    both = extract(model, opened, processor, pooling="sensors")
    outputs = encode(model, opened, processor, "both")
    np.testing.assert_allclose(both.values[:, 16:], outputs.sar_hidden_state[:, 2:].mean(1), atol=1e-5)
    np.testing.assert_allclose(both.values[:, :16], outputs.optical_hidden_state.mean(1), atol=1e-5)


def test_nothing_is_masked_and_the_mode_of_a_model_is_kept(pairs, processor):
    torch.manual_seed(0)
    model = FusMAEForPreTraining(FusMAEConfig(**SMALL, mask_ratio=0.75)).train()
    first, second = (extract(model, pairs, processor) for _ in range(2))
    np.testing.assert_array_equal(first.values, second.values)
    np.testing.assert_array_equal(first.values, extract(model.fusmae, pairs, processor).values)
    assert model.fusmae.training


def test_ids_and_labels_are_in_the_order_of_the_dataset(pairs, processor):
    found = extract(make_model(), pairs, processor)
    assert found.ids == [f"pair-{number:03d}" for number in range(12)]
    assert found.class_names == INFO.class_names
    assert class_indices(found.labels).tolist() == [0, 1] * 6
    assert len(found) == 12


def test_streamed_pairs_of_bands_of_several_resolutions_have_the_same_features(tmp_path, processor):
    coarse = dataclasses.replace(INFO, optical_factors=(1, 1, 1, 2))
    folder = write_shards(tmp_path, coarse)
    local, streamed = (load_pairs(folder, "train", streaming=streaming) for streaming in (False, True))
    model = make_model()
    first = extract(model, local, processor)
    np.testing.assert_array_equal(first.values, extract(model, streamed, processor).values)
    np.testing.assert_allclose(first.values, encode(model, local, processor, "both").pooler_output, atol=1e-5)
    assert not local.packed


def test_some_pairs_are_selected_by_id(pairs, processor):
    found = extract(make_model(), pairs, processor)
    some = found.select(["pair-007", "pair-002"])
    np.testing.assert_array_equal(some.values, found.values[[7, 2]])
    np.testing.assert_array_equal(some.labels, found.labels[[7, 2]])
    with pytest.raises(ValueError, match="no features of 1 of 2 pairs, such as 'pair-100'"):
        found.select(["pair-001", "pair-100"])


def test_a_pair_that_stands_in_for_a_damaged_one_is_left_out(tmp_path, processor):
    folder = write_shards(tmp_path)

    def damage(columns):
        columns["sar"][2] = bytes(len(columns["sar"][2]))

    edit_shard(folder / "data/train-00000-of-00002.parquet", damage, seal=False)
    pairs = load_pairs(folder, "train", on_bad_files="skip")
    found = extract(make_model(), pairs, processor, cache=tmp_path / "cache")
    assert found.ids == [f"pair-{number:03d}" for number in range(12) if number != 2]
    assert len(found.labels) == len(found.values) == 11
    assert extract(make_model(), pairs, processor, cache=tmp_path / "cache").ids == found.ids


def computed(monkeypatch) -> list[int]:
    """Grows by one whenever features are computed."""
    calls: list[int] = []
    original = features_module._compute
    monkeypatch.setattr(features_module, "_compute", lambda *args: calls.append(1) or original(*args))
    return calls


def test_features_are_computed_once_and_then_read(tmp_path, monkeypatch, pairs, processor):
    calls = computed(monkeypatch)
    first, second = (extract(make_model(), pairs, processor, cache=tmp_path / "cache") for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.values, second.values)
    assert first.ids == second.ids
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize(
    "change", ["weights", "config", "sensors", "pooling", "split", "processor", "pixels", "version"]
)
def test_features_of_anything_else_are_not_taken_for_these(tmp_path, monkeypatch, folder, pairs, processor, change):
    cache, options, model = tmp_path / "cache", {}, make_model()
    extract(model, pairs, processor, cache=cache)
    calls = computed(monkeypatch)
    if change == "weights":
        with torch.no_grad():
            model.layernorm.bias[3] += 1e-3
    elif change == "config":
        model.config.layer_norm_eps = 1e-3
    elif change == "sensors":
        options["sensors"] = "sar"
    elif change == "pooling":
        options["pooling"] = "class"
    elif change == "split":
        pairs = load_pairs(folder, "test")
    elif change == "processor":
        processor = FusMAEImageProcessor(optical_bands=INFO.optical_bands, statistics="reben")
    elif change == "pixels":
        other = [make_pair(number) for number in range(12)]
        other[5].sar[0, 0, 0] += 1
        pairs = load_pairs(write_shards(tmp_path / "other", train=other), "train")
    elif change == "version":
        monkeypatch.setattr(features_module.fusmae_hf, "__version__", "99")
    found = extract(model, pairs, processor, cache=cache, **options)
    assert len(calls) == 1
    assert found.ids == [pairs[row]["id"] for row in range(len(pairs))]


def test_labels_are_read_afresh(tmp_path, pairs, processor):
    extract(make_model(), pairs, processor, cache=tmp_path / "cache")
    relabelled = [make_pair(number, labels=["town"]) for number in range(12)]
    other = load_pairs(write_shards(tmp_path / "other", train=relabelled), "train")
    assert class_indices(extract(make_model(), other, processor, cache=tmp_path / "cache").labels).tolist() == [2] * 12


def test_a_damaged_cache_is_an_error(tmp_path, pairs, processor):
    extract(make_model(), pairs, processor, cache=tmp_path)
    (record,), (tensors,) = tmp_path.glob("*.json"), tmp_path.glob("*.safetensors")
    kept = load_file(tensors)
    save_file({"features": kept["features"], "rows": kept["rows"][:3]}, tensors)
    with pytest.raises(ValueError, match="12 features of 3 rows"):
        extract(make_model(), pairs, processor, cache=tmp_path)
    tensors.write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        extract(make_model(), pairs, processor, cache=tmp_path)
    record.write_text(json.dumps({"weights": "others"}))
    with pytest.raises(ValueError, match=r"is damaged .*of other settings or data"):
        extract(make_model(), pairs, processor, cache=tmp_path)


def test_the_hash_of_weights_tells_values_types_and_names():
    model = make_model()
    assert weights_hash(model) == weights_hash(make_model())
    assert weights_hash(model) != weights_hash(make_model(seed=1))
    assert weights_hash(model) != weights_hash(make_model().bfloat16())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sensors": "radar"}, "sensors is 'radar'"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"kind": "logits"}, "kind is 'logits'"),
        ({"kind": "projected"}, "this FusMAEModel does not have. Load the pretraining checkpoint with FusMAEForPre"),
        ({"kind": "projected", "pooling": "class"}, "pooling must be 'mean', not 'class'"),
        ({"pooling": "sensors", "sensors": "sar"}, "joins the tokens of both sensors"),
    ],
)
def test_what_cannot_be_extracted_is_refused(pairs, processor, options, message):
    with pytest.raises(ValueError, match=message):
        extract(make_model(), pairs, processor, **options)


def test_weights_that_diverged_are_an_error(pairs, processor):
    model = make_model()
    with torch.no_grad():
        model.layernorm.bias[0] = float("nan")
    with pytest.raises(ValueError, match="12 of 12 pairs have features that are NaN"):
        extract(model, pairs, processor)


def test_pairs_without_labels_have_features(tmp_path, processor):
    folder = write_shards(tmp_path / "none", train=[make_pair(number, labels=None) for number in range(3)])
    assert extract(make_model(), load_pairs(folder, "train"), processor).labels is None
    partly = [make_pair(0), make_pair(1, labels=None)]
    opened = load_pairs(write_shards(tmp_path / "partly", train=partly), "train")
    with pytest.raises(ValueError, match=r"1 of 2 pairs .* no labels, such as 'pair-001'"):
        read_scene_labels(opened)


def test_labels_become_numbers_by_the_order_of_the_class_names():
    matrix = label_matrix([["town", "water"], []], INFO.class_names)
    assert matrix.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(ValueError, match=r"\['sea'\] are none of the 3 classes"):
        label_matrix([["sea"]], INFO.class_names)
    with pytest.raises(ValueError, match="2 of 2 samples do not have exactly one class"):
        class_indices(matrix)


def test_simulated_pairs_have_features_and_labels(tmp_path):
    options = SimulationOptions(image_size=8, pairs_per_place=1)
    prepare(SimulatedPairs(12, options=options), tmp_path, progress=False)
    pairs = load_pairs(tmp_path, "train")
    model = make_model(optical_bands=pairs.info.optical_bands)
    found = extract(model, pairs, FusMAEImageProcessor())
    assert found.values.shape == (len(pairs), 16)
    assert found.labels.shape == (len(pairs), len(pairs.info.class_names))


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [3, 5, 12])
@pytest.mark.parametrize(
    ("sensors", "pooling"), [("both", "mean"), ("sar", "mean"), ("optical", "class"), ("both", "sensors")]
)
def test_images_that_patches_do_not_fill_are_padded_without_data(pairs, processor, patch_size, sensors, pooling):
    model = make_model(patch_size=patch_size, image_size=5 * patch_size)
    got = extract(model, pairs, processor, sensors=sensors, pooling=pooling)
    padding = FusMAEImageProcessor(optical_bands=INFO.optical_bands, do_pad=True, size_divisor=patch_size)
    expected = extract(model, pairs, padding, sensors=sensors, pooling=pooling)
    np.testing.assert_allclose(got.values, expected.values, rtol=1e-4, atol=1e-5)
    if pooling == "mean":
        by_hand = encode(model, pairs, padding, sensors).pooler_output
        np.testing.assert_allclose(got.values, by_hand, rtol=1e-4, atol=1e-5)


def test_statistics_of_bands_do_not_depend_on_the_patches(pairs, processor):
    fields = {"optical_bands": INFO.optical_bands, "image_size": 16}
    one, other = (BandStatistics(FusMAEConfig(patch_size=size, **fields)) for size in (8, 16))
    assert other.config.patch_size > 8
    np.testing.assert_allclose(
        extract(one, pairs, processor).values, extract(other, pairs, processor).values, rtol=1e-4, atol=1e-5
    )
