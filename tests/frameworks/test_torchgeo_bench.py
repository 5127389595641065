"""Fus-MAE as a model of torchgeo-bench."""

from pathlib import Path

import pytest
import torch

from fusmae_hf import FusMAEImageProcessor, FusMAEModel

REASON = "torchgeo-bench is not installed"
benv2 = pytest.importorskip("torchgeo_bench.datasets.benv2", reason=REASON, exc_type=ImportError)

from fusmae_hf.frameworks.torchgeo_bench import FusMAEBench  # noqa: E402

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "fusmae-tiny"


def raw():
    """Optical bands, then VV and VH, as the bands of benv2 are called."""
    sar = torch.tensor([-12.0, -19.0])[:, None, None] + torch.randn(2, 2, 120, 120)
    return torch.cat([torch.rand(2, 12, 120, 120) * 3000 + 1, sar], dim=1)


def test_statistics_are_the_checkpoints_and_not_those_of_benv2():
    bands, images = benv2.BENV2.bands, raw()
    of_benv2 = {band.name: band.mean for band in bands}
    assert of_benv2["vv"] < -19 < of_benv2["vh"]  # exchanged: mend the page once this fails
    processor = FusMAEImageProcessor.from_pretrained(CHECKPOINT)
    model = FusMAEModel.from_pretrained(CHECKPOINT).eval()
    with torch.no_grad():
        got = FusMAEBench(bands, CHECKPOINT)(images)
        expected = model(**processor(sar=images[:, 12:], optical=images[:, :12])).pooler_output
        exchanged = images[:, [*range(12), 13, 12]]
        named = FusMAEBench(bands, CHECKPOINT, names={"vv": "VH", "vh": "VV"})(exchanged)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(named, expected)


def test_exchanged_polarisations_are_warned_of_and_foreign_bands_refused():
    with pytest.warns(UserWarning, match=r"mean VH .* exceeds mean VV"):
        FusMAEBench(benv2.BENV2.bands, CHECKPOINT)(raw()[:, [*range(12), 13, 12]])
    aerial = type(benv2.BENV2.bands[0])("aerial", "red", "R", 0, 1, 0, 1)
    with pytest.raises(ValueError, match=r"but not \['red'\]"):
        FusMAEBench([aerial], CHECKPOINT)


@pytest.mark.parametrize("kept", [slice(0, 12), slice(12, 14)])
def test_one_sensor_alone_gives_features(kept):
    with torch.no_grad():
        assert FusMAEBench(benv2.BENV2.bands[kept], CHECKPOINT)(raw()[:, kept]).isfinite().all()
