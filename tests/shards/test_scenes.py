"""What differs from scene to scene: offsets, units, sensors that are absent; and shards of the format before."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor, load_pairs
from fusmae_hf.data.inputs import PairInputs
from fusmae_hf.preparation.inspection import inspect_shards
from fusmae_hf.preparation.statistics import band_statistics
from fusmae_hf.preparation.verification import verify_shards
from fusmae_hf.shards.dataset_info import read_dataset_info
from fusmae_hf.training.run_pretrain import PretrainingCollator
from tests.small_shards import INFO, SIZE, make_pair, write_shards

FORMAT_2 = Path(__file__).with_name("format_2")
COARSE = replace(INFO, optical_factors=(1, 1, 1, 2))
BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True])


def pairs_of(info, absent):
    """Twelve pairs, some of which lack a sensor: `{number: sensor}`."""
    return [make_pair(number, info, **({absent[number]: None} if number in absent else {})) for number in range(12)]


def processor_of(info=INFO):
    return FusMAEImageProcessor(
        sar_bands=info.sar_bands, optical_bands=info.optical_bands, optical_offset=info.optical_offset
    )


@BOTH_WAYS
def test_format_2_is_read_as_it_was_written(streaming):
    pairs = load_pairs(FORMAT_2, "train", streaming=streaming)
    assert pairs.dataset_info.format_version == 2
    for number, item in enumerate(pairs[row] for row in range(4)):
        generator = np.random.default_rng(number)
        sar = (-15 + 3 * generator.standard_normal((2, 8, 8))).astype("float32")
        sar[:, 0, 0] = np.nan
        optical = generator.integers(1100, 4000, (4, 8, 8)).astype("uint16")
        np.testing.assert_array_equal(item["sar"].numpy(), sar)
        np.testing.assert_array_equal(item["optical"][:3].numpy(), optical[:3])
        assert item["id"] == f"pair{number}"
        assert item["optical_offset"] == 1000


def test_format_2_is_sound_and_can_be_looked_at():
    assert verify_shards(FORMAT_2).errors == []
    assert "4 of 4 pairs" in str(band_statistics(FORMAT_2))
    assert "format_2" in str(inspect_shards(str(FORMAT_2)))


@BOTH_WAYS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("info", [INFO, COARSE], ids=["one grid", "coarse bands"])
def test_a_batch_says_which_sensors_are_there(tmp_path, streaming, packed, info):
    written = pairs_of(info, {2: "sar", 5: "optical"})
    pairs = load_pairs(write_shards(tmp_path, info, train=written), streaming=streaming)
    pairs.packed = packed
    assert pairs.lacking == ("sar", "optical")
    batch = pairs.__getitems__([1, 2, 5])
    assert batch["sar_available"].tolist() == [True, False, True]
    assert batch["optical_available"].tolist() == [True, True, False]
    assert batch["sar"][1].isnan().all()
    assert not batch["optical"][2].int().any()
    np.testing.assert_array_equal(batch["sar"][0].numpy(), written[1].sar)
    if not packed:
        np.testing.assert_array_equal(batch["optical"][1].numpy(), written[2].optical)
    whole = pairs.__getitems__([0, 1])
    assert whole["sar_available"].all()
    assert whole.keys() == batch.keys()


@BOTH_WAYS
@pytest.mark.parametrize("sensor", ["sar", "optical"])
def test_a_whole_batch_without_a_sensor_keeps_its_tensors(tmp_path, streaming, sensor):
    written = pairs_of(COARSE, {2: sensor, 3: sensor})
    pairs = load_pairs(write_shards(tmp_path, COARSE, train=written), streaming=streaming)
    batch, other = pairs.__getitems__([2, 3]), pairs.__getitems__([0, 1])
    assert not batch[f"{sensor}_available"].any()
    assert batch[sensor].shape == other[sensor].shape
    assert batch[sensor].dtype == other[sensor].dtype


def test_an_empty_patch_is_absent_unless_both_are_required(tmp_path):
    from fusmae_hf.errors import PairError
    from fusmae_hf.shards.writing import ShardWriter

    nothing = {"sar": np.full((2, SIZE, SIZE), np.nan, "float32"), "optical": np.zeros((4, SIZE, SIZE), "uint16")}
    for sensor, pixels in nothing.items():
        with ShardWriter(INFO, tmp_path, "data/train-00000-of-00001.parquet") as shard:
            shard.add(make_pair(0))
            shard.add(make_pair(1, **{sensor: pixels}))
        assert shard.record.absent[sensor] == 1
        assert shard.record.no_data_pixels == {"sar": 0, "optical": 0}
        with (
            ShardWriter(INFO, tmp_path, "data/test-00000-of-00001.parquet", require_both=True) as strict,
            pytest.raises(PairError, match=f"pair-001: {sensor}"),
        ):
            strict.add(make_pair(1, **{sensor: pixels}))


def test_an_empty_patch_of_wrong_units_is_refused(tmp_path):
    from fusmae_hf.errors import PairError
    from fusmae_hf.shards.writing import write_shard

    info = replace(INFO, sar_units="linear")
    with pytest.raises(PairError, match="looks like dB"):
        write_shard([make_pair(0)], info, tmp_path, "data/train-00000-of-00001.parquet")


def test_verify_inspect_and_statistics_know_what_is_absent(tmp_path):
    folder = write_shards(tmp_path, COARSE, train=pairs_of(COARSE, {2: "sar", 5: "optical", 6: "optical"}))
    assert verify_shards(folder).errors == []
    text = str(inspect_shards(str(folder)))
    assert "without: SAR" in text
    assert text.split("\ntrain")[1].split("\n")[0].split()[-2:] == ["1", "2"]
    bands = {band.band: band for band in band_statistics(folder).bands}
    assert bands["VV"].valid == 11 * SIZE**2
    assert bands["B02"].valid == 10 * SIZE**2


@pytest.mark.parametrize(
    "changes", [{}, {"optical_factors": (1, 1, 1, 2)}, {"optical_offset": 1000.0}], ids=["plain", "coarse", "+1000"]
)
def test_what_was_measured_while_writing_is_what_a_pass_over_the_shards_finds(tmp_path, changes):
    info = replace(INFO, statistics=None, **changes)
    pairs = pairs_of(info, {2: "sar", 5: "optical"})
    pairs[1].sar[:, 2:4] = np.nan
    pairs[3].optical[:, :2, :2] = 0
    folder = write_shards(tmp_path, info, train=pairs, test=[make_pair(20, info)])
    measured = read_dataset_info(folder).statistics
    for band in band_statistics(folder).bands:
        number, mean, std = measured[f"{band.sensor}/{band.band}"]
        assert number == band.valid
        assert (mean, std) == pytest.approx((band.mean, band.std), rel=1e-12)


def with_offsets(units=False):
    info = replace(
        INFO, statistics=None, per_scene=("optical_offset", "optical_units") if units else ("optical_offset",)
    )
    pairs = []
    for number in range(12):
        pair, odd = make_pair(number, info), number % 2
        pair.optical = (pair.optical + 1000 * odd).astype("uint16")
        pair.optical_offset = 1000.0 if odd else None
        if units:
            pair.optical = (pair.optical / np.float32(10_000 if odd else 1)).astype("float32")
            pair.optical_units = "reflectance" if odd else None
        pairs.append(pair)
    return info, pairs


@BOTH_WAYS
@pytest.mark.parametrize("units", [False, True], ids=["offsets", "offsets and units"])
def test_offsets_and_units_of_scenes_are_undone(tmp_path, streaming, units):
    info, written = with_offsets(units)
    pairs = load_pairs(write_shards(tmp_path / "a", info, train=written), streaming=streaming)
    plain = load_pairs(write_shards(tmp_path / "b", INFO, train=[make_pair(number) for number in range(12)]))
    assert [float(pairs[row]["optical_offset"]) for row in range(4)] == [0, 1000, 0, 1000]
    got = PairInputs(processor_of(), pairs.info)(pairs.__getitems__([0, 1, 3, 4]))
    expected = PairInputs(processor_of(), plain.info)(plain.__getitems__([0, 1, 3, 4]))
    torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got["pixel_values_sar"], expected["pixel_values_sar"])
    assert verify_shards(tmp_path / "a").errors == []
    ours, theirs = band_statistics(tmp_path / "a"), band_statistics(tmp_path / "b")
    measured = read_dataset_info(tmp_path / "a").statistics
    for band, other in zip(ours.bands, theirs.bands, strict=True):
        assert (band.mean, band.std) == pytest.approx((other.mean, other.std), rel=1e-5)
        assert band.percentiles[50] == pytest.approx(other.percentiles[50], rel=2e-2)
        assert measured[f"{band.sensor}/{band.band}"][1:] == pytest.approx((other.mean, other.std), rel=1e-5)


def test_the_processor_takes_an_offset_for_each_sample():
    processor, images = processor_of(), np.full((2, 4, 8, 8), 2000, "uint16")
    images[1] += 1000
    one = processor(optical=images[:1])["pixel_values"]
    for given in ([0, 1000], torch.tensor([0.0, 1000.0])):
        both = processor(optical=images, optical_offset=given)["pixel_values"]
        torch.testing.assert_close(both, one.expand(2, -1, -1, -1))
    some = processor(optical=[images[0], None, images[1]], optical_offset=[0, 5, 1000])["pixel_values"]
    torch.testing.assert_close(some[[0, 2]], one.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="3 values"):
        processor(optical=images, optical_offset=[0, 1, 2])


@pytest.mark.parametrize("sensor", ["sar", "optical"])
@pytest.mark.parametrize("rows", [[1, 2, 3], [2, 3]], ids=["some", "all"])
def test_every_parameter_has_a_gradient_whatever_a_batch_lacks(tmp_path, sensor, rows):
    pairs = load_pairs(write_shards(tmp_path, train=pairs_of(INFO, {2: sensor, 3: sensor})))
    config = FusMAEConfig(
        sar_bands=INFO.sar_bands, optical_bands=INFO.optical_bands, image_size=SIZE, patch_size=4, hidden_size=32,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, decoder_hidden_size=32,
        decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    batch = PretrainingCollator(4)(pairs.__getitems__(rows))
    inputs = PairInputs(processor_of(), pairs.info, pixel_masks=False)(batch)
    torch.manual_seed(0)
    model = FusMAEForPreTraining(config).train()
    loss = model(**inputs, noise=batch["noise"], noise_sar=batch["noise_sar"]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_sets_that_differ_in_their_offset_alone_are_merged(tmp_path):
    from tests.small_shards import run_command

    plain, carrying = replace(INFO, statistics=None), replace(INFO, statistics=None, optical_offset=1000.0)
    write_shards(tmp_path / "a", plain, train=[make_pair(number, plain) for number in range(4)])
    write_shards(tmp_path / "b", carrying, train=[make_pair(number, carrying) for number in range(4, 8)])
    run_command("merge", tmp_path / "out", tmp_path / "a", tmp_path / "b")
    pairs = load_pairs(tmp_path / "out")
    assert pairs.info.per_scene == ("optical_offset",)
    assert [float(pairs[row]["optical_offset"]) for row in range(8)] == [0] * 4 + [1000] * 4
    assert verify_shards(tmp_path / "out").errors == []
    write_shards(tmp_path / "whole", plain, train=[make_pair(number, plain) for number in range(8)])
    merged, whole = (read_dataset_info(tmp_path / name).statistics for name in ("out", "whole"))
    for band, figures in whole.items():
        assert merged[band] == pytest.approx(figures, rel=1e-9)


def test_sets_that_differ_in_more_or_share_pairs_are_not_merged(tmp_path):
    from fusmae_hf.preparation.state import merge_sets

    pairs = [make_pair(number) for number in range(4)]
    for name, info in (("a", INFO), ("b", INFO), ("c", replace(INFO, license="other"))):
        write_shards(tmp_path / name, info, train=pairs)
    with pytest.raises(ValueError, match="differ in license"):
        merge_sets(tmp_path / "out", [tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match="one split only"):
        merge_sets(tmp_path / "out", [tmp_path / "a", tmp_path / "b"])
