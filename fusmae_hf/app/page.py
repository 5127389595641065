"""The demo: a page on which a pretrained model fills in what is hidden of a pair. `fusmae app` serves it."""

import html
import io
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

from fusmae_hf.app.pairs import Samples, read_upload, shard_samples, simulated_samples
from fusmae_hf.app.pictures import complete, draw, summary
from fusmae_hf.errors import USER_ERRORS
from fusmae_hf.hub.checkpoint_loading import load_checkpoint
from fusmae_hf.modeling.image_processing_fusmae import FusMAEImageProcessor
from fusmae_hf.modeling.modeling_fusmae import FusMAEForPreTraining

if TYPE_CHECKING:
    import gradio
    from matplotlib.figure import Figure

HIDE = {"patches of both sensors": None, "all of SAR": "sar", "all of optical": "optical"}
"""What the page offers to hide."""

INTRODUCTION = """# Fus-MAE
Hide some of a Sentinel-1 / Sentinel-2 pair: a masked autoencoder fills it in from what is left of either sensor."""

ATTENTION = """**Cross-attention of the decoders:** where the framed patch of one sensor looks in the other while it is
filled in. *Patch row* and *Patch column* choose it. White patches were hidden: there is nothing to look at."""

TO_THE_ANSWER = """(...inputs) => {
    document.getElementById("answer").scrollIntoView({block: "nearest"});
    return inputs;
}"""
"""Shows progress, result or error to those who had to scroll down to the button."""

UNITS = {"db": "dB", "linear": "linear power", "dn": "digital numbers", "reflectance": "reflectance", "raw": "raw"}
"""How the page calls the units of `PairsInfo`."""


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            'The demo needs gradio: install it with `pip install -e ".[app]"` in a clone of the repository.'
        ) from error
    return gradio


def serve_app(
    checkpoint: str | os.PathLike[str],
    shards: str | os.PathLike[str] | None = None,
    split: str = "test",
    host: str = "127.0.0.1",
    port: int | None = None,
) -> None:
    """Serve the demo page until interrupted: `build`, then `launch`, where arguments and errors are told."""
    launch(build(checkpoint, shards, split), host, port)


def build(
    checkpoint: str | os.PathLike[str], shards: str | os.PathLike[str] | None = None, split: str = "test"
) -> "gradio.Blocks":
    """The page.

    Args:
        checkpoint: pretraining checkpoint with its processor, a folder or a Hub id.
        shards: prepared folder or dataset repository to choose samples from; simulated pairs where None.
        split: of the shards.

    Raises:
        ImportError: gradio is not installed.
        OSError: there is no such checkpoint.
        FileNotFoundError: there are no such shards.
        ValueError: the checkpoint cannot reconstruct, or the shards cannot be read.
    """
    gr = _gradio()
    model, processor = load_checkpoint(checkpoint, decoders=True, attn_implementation="eager")
    samples = shard_samples(shards, split) if shards else simulated_samples(min(model.config.image_height_width))
    rows, columns = (side // model.config.patch_size for side in model.config.image_height_width)
    with gr.Blocks(title="Fus-MAE", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=1, min_width=340):
                inputs = [*_pair_inputs(gr, processor, samples), *_mask_inputs(gr, rows, columns)]
                button = gr.Button("Reconstruct", variant="primary")
            with gr.Column(scale=3):
                outputs, text = _outputs(gr)
        button.click(
            _answerer(gr, model, processor, samples),
            inputs,
            outputs,
            concurrency_limit=1,
            api_name="reconstruct",
            show_progress_on=text,
            js=TO_THE_ANSWER,
        )
    return page


def _answerer(
    gr: Any, model: FusMAEForPreTraining, processor: FusMAEImageProcessor, samples: Samples
) -> Callable[..., tuple[Any, ...]]:
    """What the button does: from the values of `_pair_inputs` and `_mask_inputs` to those of `_outputs`."""

    def answer(
        source: str,
        sample: int,
        sar: str | None,
        sar_bands: str,
        sar_units: str,
        optical: str | None,
        optical_bands: str,
        optical_units: str,
        offset: str | None,
        hide: str,
        mask_ratio: float,
        seed: int | None,
        row: int | None,
        column: int | None,
        progress: Any = gr.Progress(),  # noqa: B008 - how gradio recognises it
    ) -> tuple[Any, ...]:
        shown, hidden = gr.update(visible=True), gr.update(visible=False)
        try:
            progress(0.1, desc="reading the pair")
            if source == "upload":
                described = (sar_bands, optical_bands, sar_units, optical_units, offset)
                pair, info = read_upload(sar, optical, *described)
            else:
                pair, info = samples.read(sample), samples.info
            patch = _whole("patch row", row), _whole("patch column", column)
            progress(0.3, desc="reconstructing")
            completion = complete(model, processor, pair, info, mask_ratio, HIDE[hide], _whole("seed", seed), patch)
            progress(0.6, desc="drawing")
            of_optical, of_sar, of_attention = map(_picture, draw(completion, processor, pair, info))
        except USER_ERRORS as error:
            message = f'<div role="alert"><b>This cannot be reconstructed.</b> {html.escape(str(error))}</div>'
            return gr.update(value=message, visible=True), "", hidden, None, None, hidden, None
        words = summary(completion, processor, info)
        return hidden, words, shown, of_optical, of_sar, shown if of_attention else hidden, of_attention

    return answer


def _pair_inputs(gr: Any, processor: FusMAEImageProcessor, samples: Samples) -> list[Any]:
    """Where the pair comes from, and the description of an uploaded one."""
    source = gr.Radio(["sample", "upload"], value="sample", label="Pair")
    choices = [(name, index) for index, name in enumerate(samples.names)]
    label = "Simulated pair" if samples.info.simulated else f"Pair of {samples.info.name}"
    sample = gr.Dropdown(choices, value=0, label=label)
    with gr.Column(visible=False) as upload:
        file: dict[str, Any] = {"file_types": [".tif", ".tiff", ".npy"], "type": "filepath", "height": 140}
        listed: dict[str, Any] = {"info": "in the order of the file", "min_width": 150, "scale": 3}
        sar = gr.File(label="SAR (GeoTIFF or .npy)", **file)
        with gr.Row():
            sar_bands = gr.Textbox(label="SAR bands", placeholder=", ".join(processor.sar_bands), **listed)
            sar_units = _units(gr, "SAR units", processor.sar_units, ("db", "linear"))
        optical = gr.File(label="Optical (GeoTIFF or .npy)", **file)
        optical_bands = gr.Textbox(label="Optical bands", placeholder=", ".join(processor.optical_bands), **listed)
        with gr.Row():
            offset = gr.Textbox(label="Offset", info="subtracted", placeholder="0, 1000", min_width=110)
            optical_units = _units(gr, "Optical units", processor.optical_units, ("dn", "reflectance"))
    source.change(
        lambda chosen: (gr.update(visible=chosen == "sample"), gr.update(visible=chosen == "upload")),
        source,
        [sample, upload],
        api_visibility="private",
    )
    return [source, sample, sar, sar_bands, sar_units, optical, optical_bands, optical_units, offset]


def _units(gr: Any, label: str, units: str, physical: tuple[str, str]) -> Any:
    """A choice of the units that the processor can turn into its own."""
    choices = [(UNITS[name], name) for name in (("raw",) if units == "raw" else physical)]
    return gr.Dropdown(choices, value=choices[0][1], label=label, min_width=110, scale=2)


def _mask_inputs(gr: Any, rows: int, columns: int) -> list[Any]:
    """What to hide, and the patch whose attention is shown: the middle one of the training images at first."""
    whole: dict[str, Any] = {"precision": 0, "min_width": 120}
    hide = gr.Radio(list(HIDE), value=next(iter(HIDE)), label="Hide")
    ratio = gr.Slider(0, 0.95, value=0.75, step=0.05, label="Mask ratio", info="of what is not hidden entirely")
    seed = gr.Number(0, label="Seed", info="draws the hidden patches", **whole)
    with gr.Row():
        row = gr.Number(rows // 2, label="Patch row", **whole)
        column = gr.Number(columns // 2, label="Patch column", **whole)
    return [hide, ratio, seed, row, column]


def _outputs(gr: Any) -> tuple[list[Any], Any]:
    """Error, summary, and pictures with what surrounds them; and the summary, in whose place progress is shown."""
    with gr.Column(elem_id="answer"):
        failure = gr.HTML(visible=False, elem_id="failure")
        text = gr.Markdown("Choose a pair and press **Reconstruct**.", elem_id="summary", min_height=110)
    picture: dict[str, Any] = {
        "type": "pil",
        "format": "png",
        "interactive": False,
        "show_label": False,
        "buttons": ["fullscreen", "download"],
    }
    with gr.Column(visible=False) as results:
        of_optical = gr.Image(alt_text="Optical: input, masked, reconstruction, error", **picture)
        of_sar = gr.Image(alt_text="SAR: input, masked, reconstruction, error", **picture)
        with gr.Column() as attention:
            gr.Markdown(ATTENTION)
            of_attention = gr.Image(alt_text="Cross-attention of one patch", **picture)
    return [failure, text, results, of_optical, of_sar, attention, of_attention], text


def _whole(name: str, number: int | None) -> int:
    if number is None or not 0 <= number < 2**53:
        raise ValueError(f"Given: {name} {number}. Expected: a whole number from 0 on. Write one.")
    return number


def _picture(figure: "Figure | None") -> Image.Image | None:
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return Image.open(buffer)


def launch(page: "gradio.Blocks", host: str = "127.0.0.1", port: int | None = None, *, block: bool = True) -> str:
    """Serve a page without telemetry and with the fonts of the browser; its address.

    Args:
        page: what `build` gives.
        host: address to listen on.
        port: the first free one from 7860 on where None.
        block: serve until interrupted.

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    gr = _gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            css="#failure [role=alert] {border-left: 4px solid #dc2626; padding: 0.5em 1em}",
            prevent_thread_lock=True,
            share=False,
            max_file_size="16mb",
            footer_links=[],
            ssr_mode=False,
            quiet=True,
        )
    except OSError as error:
        place = f"{host}, port {port}" if port else f"{host}, ports 7860 to 7959"
        raise OSError(f"Cannot serve at {place}: taken, or no address of this machine. Name another port.") from error
    if block:
        print(f"Serving the page, until Ctrl-C, at\n{address}", flush=True)
        page.block_thread()
    return address
