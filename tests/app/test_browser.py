"""The demo in a real browser: what somebody sees who uses the page."""

import threading
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

from fusmae_hf import FusMAEConfig, FusMAEForPreTraining, FusMAEImageProcessor
from fusmae_hf.app import page as app
from fusmae_hf.simulation.pairs import SimulatedPairs
from tests.app.chromium import NAMES, PICTURES, chromium, executable, picture, reconstruct

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[app]'")
playwright_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[test]'")
expect = playwright_api.expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(executable() is None, reason=f"needs a browser: none of {', '.join(NAMES)} is on the PATH"),
]

PAIRS = SimulatedPairs(1)
PAIR, INFO = PAIRS.read(0), PAIRS.info
PATIENCE = 60_000
"""ms: for what takes a second on an idle machine."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = FusMAEConfig.from_preset("tiny", num_hidden_layers=1, decoder_num_hidden_layers=1)
    FusMAEForPreTraining(config).save_pretrained(folder)
    FusMAEImageProcessor().save_pretrained(folder)
    served = app.build(folder)
    yield app.launch(served, block=False)
    served.close()


@pytest.fixture(scope="module")
def browser(address):
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, address):
    """The page, freshly loaded. It must ask nothing of other hosts and write no error to the console."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(PATIENCE)
    page.hosts, complaints = [], []
    page.on("request", lambda request: page.hosts.append(urlsplit(request.url).netloc))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Reconstruct", exact=True).wait_for()
    yield page
    page.close()
    assert len(page.hosts) > 10
    assert set(page.hosts) <= {urlsplit(address).netloc, ""}  # without a host: data: and blob:
    assert complaints == []


def expect_pictures(page):
    for beginning in PICTURES:
        shown = picture(page, beginning)
        expect(shown).to_be_visible(timeout=PATIENCE)
        page.wait_for_function("image => image.complete && image.naturalWidth", arg=shown.element_handle())
        width, height, drawn = shown.evaluate(
            "i => [i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width]"
        )
        assert 1000 < width < 2000
        assert 400 < height < 1500
        assert drawn > 700


def summary_row(page, sensor):
    """Of the table above the pictures, whatever the case of `sensor`."""
    return page.locator("#summary tr").filter(has_text=sensor)


def failure(page):
    return page.get_by_role("alert")


def describe_upload(page, sar, optical, sar_bands="VV, VH", offset="0"):
    page.get_by_label("upload", exact=True).check()
    page.get_by_label("SAR bands").fill(sar_bands)
    page.get_by_label("Optical bands").fill(", ".join(INFO.optical_bands))
    page.get_by_label("Offset").fill(offset)
    for number, path in enumerate((sar, optical)):
        page.locator("input[type=file]").first.set_input_files(path)  # an input goes once it has its file
        expect(page.locator("input[type=file]")).to_have_count(1 - number)


@pytest.fixture
def files(tmp_path):
    """A pair in two files, as `.npy` or as GeoTIFF."""

    def write(suffix, sar=PAIR.sar, optical=PAIR.optical):
        for name, image in (("sar", sar), ("optical", optical)):
            if suffix == ".npy":
                np.save(tmp_path / f"{name}.npy", image)
                continue
            rasterio = pytest.importorskip("rasterio")
            profile = {"driver": "GTiff", "dtype": image.dtype, "crs": "EPSG:32632"}
            profile |= dict(zip(("count", "height", "width"), image.shape, strict=True))
            transform = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
            with rasterio.open(tmp_path / f"{name}.tif", "w", transform=transform, **profile) as file:
                file.write(image)
        return tmp_path / f"sar{suffix}", tmp_path / f"optical{suffix}"

    return write


def test_a_sample_is_reconstructed(page):
    expect(page.locator("#summary")).to_contain_text("Choose a pair")
    reconstruct(page)
    expect_pictures(page)
    expect(summary_row(page, "optical")).to_contain_text("75%")
    expect(summary_row(page, "SAR")).to_contain_text("dB")
    expect(page.locator("#summary")).to_contain_text("simulated")


def test_another_sample_gives_other_pictures(page):
    reconstruct(page)
    expect_pictures(page)
    before = [picture(page, beginning).get_attribute("src") for beginning in PICTURES]
    page.get_by_label("Simulated pair").click()
    page.get_by_role("option").nth(2).click()
    reconstruct(page)
    for beginning, source in zip(PICTURES, before, strict=True):
        expect(picture(page, beginning)).not_to_have_attribute("src", source, timeout=PATIENCE)
    expect_pictures(page)


@pytest.mark.parametrize(("sensor", "other"), [("SAR", "optical"), ("optical", "SAR")])
def test_a_sensor_is_hidden_entirely(page, sensor, other):
    page.get_by_label(f"all of {sensor}").check()
    reconstruct(page)
    expect_pictures(page)
    expect(summary_row(page, sensor)).to_contain_text("100%")
    expect(summary_row(page, other)).to_contain_text("75%")


def test_progress_is_shown(page, monkeypatch):
    seen, complete = threading.Event(), app.complete

    def wait_until_seen(*arguments):
        assert seen.wait(PATIENCE / 1000)
        return complete(*arguments)

    monkeypatch.setattr(app, "complete", wait_until_seen)
    reconstruct(page)
    expect(page.locator("#summary")).to_contain_text("reconstructing - 30.0%", timeout=PATIENCE)
    seen.set()
    expect_pictures(page)
    expect(page.locator("#summary")).not_to_contain_text("reconstructing")


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_an_uploaded_pair_is_reconstructed(page, files, suffix):
    describe_upload(page, *files(suffix))
    reconstruct(page)
    expect_pictures(page)
    expect(page.locator("#summary")).not_to_contain_text("simulated")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset": ""}, "Given: no offset."),
        ({"sar_bands": "VV, HH"}, "sar: bands ['VH'] are needed but were not given."),
        ({"sar_bands": "<img src=x onerror=alert(1)>, VH"}, "given: ['<img src=x onerror=alert(1)>', 'VH']"),
        ({"sar_bands": "${6*7}{{value}}, VH"}, "given: ['${6*7}{{value}}', 'VH']"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said_in_the_page(page, files, given, message):
    describe_upload(page, *files(".npy"), **given)
    reconstruct(page)
    expect(failure(page)).to_contain_text(message, timeout=PATIENCE)
    expect(failure(page)).to_contain_text("This cannot be reconstructed.")
    expect(failure(page)).to_be_in_viewport()
    assert failure(page).locator("img").count() == 0


def test_an_error_takes_the_place_of_the_pictures_and_goes_once_it_is_mended(page):
    reconstruct(page)
    expect_pictures(page)
    page.get_by_label("Patch row").fill("99")
    reconstruct(page)
    expect(failure(page)).to_contain_text("Given: patch row 99", timeout=PATIENCE)
    for beginning in PICTURES:
        expect(picture(page, beginning)).not_to_be_visible()
    expect(page.locator("#summary tr")).to_have_count(0)
    page.get_by_label("Patch row").fill("0")
    reconstruct(page)
    expect_pictures(page)
    expect(failure(page)).not_to_be_visible()
