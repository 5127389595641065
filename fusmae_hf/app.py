"""The demo: a page on which a pretrained model fills in what is hidden of a pair. `fusmae app` serves it."""

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .data.inputs import PairInputs
from .data.loading import load_pairs
from .data.pairs import Pair, PairError, PairsInfo
from .data.plotting import new_figure
from .data.simulation import SimulatedPairs, SimulationOptions
from .evaluation.interpolation import visible_pixels
from .modeling.image_processing_fusmae import FusMAEImageProcessor
from .modeling.modeling_fusmae import FusMAECrossAttention, FusMAEForPreTraining
from .visualization import plot_reconstructions

if TYPE_CHECKING:
    import gradio
    from matplotlib.figure import Figure

HIDE = {"patches of both sensors": None, "all of SAR": "sar", "all of optical": "optical"}
"""What the page offers to hide."""

SAMPLES_OFFERED = 24
LARGEST_SIDE = 256
"""Px: attention maps grow with the fourth power of the side."""


@dataclass
class Samples:
    """Pairs to choose from.

    Attributes:
        names: shown to the user, in order.
        info: what holds for all of them.
        read: gives the pair at an index.
    """

    names: list[str]
    info: PairsInfo
    read: Callable[[int], Pair]


@dataclass
class Completion:
    """What a model made of one pair.

    Attributes:
        pictures: as `visualization.reconstruct_images` gives them: by sensor `original` and `reconstruction`
            `(1, bands, height, width)` in digital numbers or dB, and `visible` `(1, height, width)` bool.
        errors: by sensor, absolute error averaged over the bands `(height, width)`, NaN where a pixel was visible or
            holds no data.
        rmse: by sensor, root mean squared error of the hidden pixels that hold data; NaN where there is none.
        attention: by name, `(rows, columns)` share of the attention that each patch of the grid gets, averaged over
            heads and visible queries. Empty where no sensor can attend to the other.
        assumed_levels: brightness of the patches was assumed, not predicted (`norm_pix_loss`).
    """

    pictures: dict[str, dict[str, np.ndarray]]
    errors: dict[str, np.ndarray]
    rmse: dict[str, float]
    attention: dict[str, np.ndarray]
    assumed_levels: bool


def simulated_samples(image_size: int, seed: int = 7) -> Samples:
    """Made-up pairs, `image_size` px a side."""
    pairs = SimulatedPairs(SAMPLES_OFFERED, seed, SimulationOptions(image_size=image_size))
    return Samples(list(pairs.ids), pairs.info, pairs.read)


def shard_samples(folder: str | os.PathLike[str], split: str) -> Samples:
    """Pairs spread evenly over one split of a prepared folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no such split, or a shard is damaged.
    """
    dataset = load_pairs(folder, split, streaming=True)
    rows = np.unique(np.linspace(0, len(dataset) - 1, SAMPLES_OFFERED).round().astype(int)).tolist()

    def read(index: int) -> Pair:
        item = dataset[rows[index]]
        return Pair(item["id"], sar=item["sar"].numpy(), optical=item["optical"].numpy())

    return Samples([f"{split} {row}" for row in rows], dataset.info, read)


def read_upload(
    sar: str | None, optical: str | None, sar_bands: str, optical_bands: str, offset: str | None
) -> tuple[Pair, PairsInfo]:
    """The pair in two uploaded files, as its user describes it: nothing is guessed.

    Args:
        sar: GeoTIFF or `.npy` `(bands, height, width)` in dB.
        optical: the same in digital numbers.
        sar_bands: names of the bands in the order of the file, separated by commas.
        optical_bands: the same.
        offset: what to subtract from the digital numbers.

    Raises:
        ValueError: something is not given, or does not fit the files.
        ImportError: a GeoTIFF was given, but rasterio is not installed.
    """
    if not sar or not optical:
        given = " and ".join(name for name, path in (("SAR", sar), ("optical", optical)) if path) or "no file"
        raise ValueError(f"Given: {given}. Expected: a SAR file and an optical file of the same place. Upload both.")
    if offset is None or not offset.strip():
        raise ValueError(
            "Given: no offset. Expected: what to subtract from the digital numbers, 1000 for products of processing "
            "baseline 04.00 and later that still carry it, otherwise 0. Write it into the field."
        )
    try:
        subtracted = float(offset)
    except ValueError:
        raise ValueError(f"Given: offset {offset!r}. Expected: a number such as 0 or 1000. Correct it.") from None
    images, grids = {}, {}
    for sensor, path, bands in (("SAR", sar, sar_bands), ("optical", optical, optical_bands)):
        images[sensor], grids[sensor] = _read_image(Path(path), np.nan if sensor == "SAR" else 0)
        names = _names(bands)
        if not names or len(names) != len(images[sensor]) or len(set(names)) != len(names):
            raise ValueError(
                f"Given: {len(names)} names {list(names)} for the {sensor} file, which has {len(images[sensor])} "
                "bands. Expected: one name a band, none twice, in the order of the file. Correct the names."
            )
    if images["SAR"].shape[1:] != images["optical"].shape[1:]:
        shapes = " and ".join(f"{name} {image.shape[1:]}" for name, image in images.items())
        raise ValueError(
            f"Given: (height, width) {shapes}. Expected: one grid. Resample one file to the other's grid."
        )
    if None not in grids.values() and grids["SAR"] != grids["optical"]:
        raise ValueError(
            "Given: two GeoTIFFs whose coordinate systems or corners differ. Expected: the same place on the same "
            "grid. Resample one file to the other's grid."
        )
    info = PairsInfo(
        name="upload",
        source="uploaded",
        license="unknown",
        sar_bands=_names(sar_bands),
        optical_bands=_names(optical_bands),
        optical_offset=subtracted,
    )
    return Pair("upload", sar=images["SAR"], optical=images["optical"]), info


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _read_image(path: Path, no_data: float) -> tuple[np.ndarray, tuple[Any, Any] | None]:
    """Image `(bands, height, width)` of a file, and of a GeoTIFF its coordinate system and transform."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        try:
            image = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"Given: {path.name}, which is no sound .npy file ({error}). Save it anew.") from None
        _check_shape(path.name, image.shape)
        if not np.issubdtype(image.dtype, np.number) or np.issubdtype(image.dtype, np.complexfloating):
            raise ValueError(f"Given: {path.name} of {image.dtype}. Expected: real numbers. Save it as such.")
        return np.array(image), None
    if suffix not in (".tif", ".tiff"):
        raise ValueError(f"Given: {path.name}. Expected: a GeoTIFF (.tif, .tiff) or .npy file. Convert it.")
    try:
        import rasterio
    except ImportError as error:
        raise ImportError("Reading GeoTIFFs needs rasterio: `pip install fusmae_hf[data]`.") from error
    try:
        with rasterio.open(path, driver="GTiff") as file:
            _check_shape(path.name, (file.count, file.height, file.width))
            image = file.read(masked=True)
            grid = None if file.crs is None else (file.crs, file.transform)
    except rasterio.errors.RasterioError as error:
        raise ValueError(f"Given: {path.name}, which is no sound GeoTIFF ({error}). Save it anew.") from None
    if np.isnan(no_data):
        image = image.astype(np.float32)
    return image.filled(no_data), grid


def _check_shape(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or not all(1 <= side <= LARGEST_SIDE for side in shape):
        raise ValueError(
            f"Given: {name} of shape {shape}. Expected: (bands, height, width), at most {LARGEST_SIDE} px a side. "
            "Crop it, or move its bands to the front."
        )


@torch.no_grad()
def complete(
    model: FusMAEForPreTraining,
    processor: FusMAEImageProcessor,
    pair: Pair,
    info: PairsInfo,
    mask_ratio: float,
    hide: str | None = None,
    seed: int = 0,
) -> Completion:
    """Hide some of a pair and have the model fill it in.

    Args:
        model: in eval mode with eager attention, which alone gives maps.
        processor: of the same checkpoint.
        pair: what to look at.
        info: its bands, units and offset.
        mask_ratio: share of the patches to hide of each sensor that is not hidden entirely, in [0, 1).
        hide: `"sar"` or `"optical"` to hide all of it, or None.
        seed: of the hidden patches.

    Raises:
        ValueError: the pair does not fit the model, or nothing would be visible.
    """
    size = model.config.patch_size
    height, width = pair.optical.shape[1:]
    if height % size or width % size:
        raise ValueError(
            f"Given: images of {height} x {width} px. Expected: sides that the model's patch size of {size} px "
            "divides. Crop them."
        )
    arrays = {"optical": torch.from_numpy(pair.optical)[None], "sar": torch.from_numpy(pair.sar)[None]}
    inputs = PairInputs(processor, info)(arrays)
    rows, columns = height // size, width // size
    generator = torch.Generator().manual_seed(int(seed))
    hidden = {}
    for sensor in ("optical", "sar"):
        noise = torch.rand(1, rows * columns, generator=generator)
        number = rows * columns if sensor == hide else int(rows * columns * mask_ratio)
        hidden[sensor] = noise.argsort(dim=1).argsort(dim=1) < number
    with _AttentionRecorder(model) as recorder:
        outputs = model.reconstruct(**inputs, mask=hidden["optical"], mask_sar=hidden["sar"])
    images = processor.post_process_reconstruction(outputs)
    pictures, errors, rmse = {}, {}, {}
    for sensor, suffix in (("optical", ""), ("sar", "_sar")):
        original = processor.denormalize(inputs[f"pixel_values{suffix}"], sensor).cpu().numpy()
        reconstruction = images[sensor].cpu().numpy()
        visible = visible_pixels(hidden[sensor].long(), height, width, size).cpu().numpy()
        valid = inputs.get(f"pixel_mask{suffix}")
        counted = ~visible if valid is None else ~visible & valid.numpy()
        difference = reconstruction[0] - original[0]
        pictures[sensor] = {"original": original, "reconstruction": reconstruction, "visible": visible}
        errors[sensor] = np.where(counted[0], np.abs(difference).mean(axis=0), np.nan)
        rmse[sensor] = float(np.sqrt(np.square(difference[:, counted[0]]).mean())) if counted.any() else float("nan")
    shown = {sensor: (~mask[0]).numpy() for sensor, mask in hidden.items()}
    return Completion(pictures, errors, rmse, recorder.maps((rows, columns), shown), bool(outputs.assumed_levels))


class _AttentionRecorder:
    """Keeps the weights of every cross-attention of a model while it is open."""

    def __init__(self, model: FusMAEForPreTraining):
        self.model, self.weights, self.hooks = model, dict[str, torch.Tensor](), list[Any]()

    def __enter__(self) -> "_AttentionRecorder":
        for name, module in self.model.named_modules():
            if isinstance(module, FusMAECrossAttention):
                self.hooks.append(module.register_forward_hook(self._keeper(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, arguments: Any, outputs: Any) -> None:
            if outputs[1] is not None:
                self.weights[name] = outputs[1][0].float().mean(dim=0)

        return keep

    def maps(self, grid: tuple[int, int], visible: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Attention that each patch gets, by direction; `visible` `(rows * columns,)` bool by sensor."""
        maps = {}
        num_patches = grid[0] * grid[1]
        for name, weights in self.weights.items():
            stage, queries = _place_of(name)
            keys = "sar" if queries == "optical" else "optical"
            rows = visible[queries] if stage == "encoder" or self.model.config.feature_fusion == "latent" else None
            if not visible[keys].any() or (rows is not None and not rows.any()):
                continue
            given = weights.cpu().numpy()[:, :num_patches]  # the other sensor's tokens come first
            received = (given if rows is None else given[rows]).mean(axis=0)
            words = {"optical": "optical", "sar": "SAR"}
            title = f"{stage}: {words[queries]} looks at {words[keys]}"
            maps[title] = np.where(visible[keys], received, np.nan).reshape(grid)
        return maps


def _place_of(module: str) -> tuple[str, str]:
    """Stage and querying sensor of a cross-attention by the name of its module."""
    for sensor in ("optical", "sar"):
        if f"{sensor}_decoder" in module:
            return "decoder", sensor
        if f"{sensor}_attention" in module:
            return "encoder", sensor
    raise ValueError(f"{module} is no cross-attention of Fus-MAE.")


def summary(completion: Completion, info: PairsInfo) -> str:
    """Markdown: how far the reconstruction is from what was hidden."""
    units = {
        "optical": "" if info.optical_units == "raw" else " digital numbers",
        "sar": "" if info.sar_units == "raw" else " dB",
    }
    lines = []
    for sensor, name in (("optical", "Optical"), ("sar", "SAR")):
        share = float((~completion.pictures[sensor]["visible"]).mean())
        error = completion.rmse[sensor]
        words = "nothing to compare" if np.isnan(error) else f"root mean squared error {error:.4g}{units[sensor]}"
        lines.append(f"- **{name}**: {share:.0%} of the pixels hidden; {words}.")
    if info.simulated:
        lines.append("- The pair is simulated: made-up scenes, no satellite data.")
    if completion.assumed_levels:
        lines.append("- The model predicts patches without brightness and contrast; those of the visible stand in.")
    return "\n".join(lines)


def plot_errors(completion: Completion) -> "Figure":
    """Absolute error of the hidden pixels, a panel for each sensor; visible pixels stay grey."""
    units = {"optical": "digital numbers", "sar": "dB"}
    return _panels(
        {f"{'SAR' if name == 'sar' else name} error": image for name, image in completion.errors.items()},
        [units[name] for name in completion.errors],
        "Absolute error of hidden pixels, mean over the bands",
    )


def plot_attention(completion: Completion) -> "Figure | None":
    """Where the cross-attention of encoder and decoders looks; None where one sensor has nobody to look at."""
    if not completion.attention:
        return None
    labels = ["share of the attention"] * len(completion.attention)
    return _panels(completion.attention, labels, "Cross-attention that each visible patch gets")


def _panels(images: dict[str, np.ndarray], labels: Sequence[str], title: str) -> "Figure":
    """Images `(height, width)` side by side, each with its own scale."""
    figure = new_figure(3.5 * len(images), 3.5)
    axes = figure.subplots(1, len(images), squeeze=False)[0]
    for axis, (name, image), label in zip(axes, images.items(), labels, strict=True):
        axis.set_facecolor("0.8")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(name, fontsize=9)
        if np.isfinite(image).any():
            shown = axis.imshow(image, cmap="viridis", vmin=0)
            figure.colorbar(shown, ax=axis, shrink=0.8, label=label)
        else:
            axis.text(0.5, 0.5, "nothing hidden", ha="center", va="center", transform=axis.transAxes)
    figure.suptitle(title, fontsize=10)
    return figure


def _picture(figure: "Figure | None") -> Image.Image | None:
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer)


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise ImportError("The demo needs gradio: install it with `pip install fusmae_hf[app]`.") from error
    return gradio


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
        ValueError: the checkpoint or the shards cannot be read.
    """
    gr = _gradio()
    model = FusMAEForPreTraining.from_pretrained(checkpoint, attn_implementation="eager").eval()
    processor = FusMAEImageProcessor.from_pretrained(checkpoint)
    size = model.config.image_size
    samples = (
        shard_samples(shards, split) if shards else simulated_samples(size if isinstance(size, int) else min(size))
    )

    def run(
        source: str,
        sample: int,
        sar: str | None,
        optical: str | None,
        sar_bands: str,
        optical_bands: str,
        offset: str | None,
        hide: str,
        mask_ratio: float,
        seed: float,
        progress: Any = gr.Progress(),  # noqa: B008 - how gradio recognises it
    ) -> tuple[Any, ...]:
        try:
            progress(0.1, desc="reading the pair")
            if source == "upload":
                pair, info = read_upload(sar, optical, sar_bands, optical_bands, offset)
            else:
                pair, info = samples.read(sample), samples.info
            progress(0.3, desc="reconstructing")
            if seed is None or not 0 <= seed < 2**63:
                raise ValueError(f"Given: seed {seed}. Expected: a whole number from 0 on. Write one.")
            completion = complete(model, processor, pair, info, mask_ratio, HIDE[hide], int(seed))
            progress(0.6, desc="drawing")
            figures = (
                plot_reconstructions(completion.pictures, processor, info.name),
                plot_errors(completion),
                plot_attention(completion),
            )
            return (summary(completion, info), *map(_picture, figures))
        except (ValueError, OSError, ImportError, PairError) as error:
            raise gr.Error(
                str(error), duration=None, title="This cannot be reconstructed", print_exception=False
            ) from error

    with gr.Blocks(title="Fus-MAE", analytics_enabled=False) as page:
        gr.Markdown(
            "# Fus-MAE\nA masked autoencoder of Sentinel-1 and Sentinel-2 pairs fills in what is hidden of a pair, "
            "from what is left of either sensor."
        )
        with gr.Row():
            with gr.Column(scale=1):
                source = gr.Radio(["sample", "upload"], value="sample", label="Pair")
                choices = [(name, index) for index, name in enumerate(samples.names)]
                label = "Simulated pair" if samples.info.simulated else f"Pair of {samples.info.name}"
                sample = gr.Dropdown(choices, value=0, label=label)
                with gr.Column(visible=False) as upload:
                    types = [".tif", ".tiff", ".npy"]
                    sar = gr.File(label="SAR in dB (GeoTIFF or .npy)", file_types=types, type="filepath")
                    sar_bands = gr.Textbox(label="SAR bands in the order of the file", placeholder="VV, VH")
                    optical = gr.File(label="Optical in digital numbers", file_types=types, type="filepath")
                    optical_bands = gr.Textbox(
                        label="Optical bands in the order of the file", placeholder=", ".join(processor.optical_bands)
                    )
                    offset = gr.Textbox(
                        label="Offset to subtract from the digital numbers",
                        info="1000 for processing baseline 04.00 and later where it is still in, otherwise 0.",
                    )
                hide = gr.Radio(list(HIDE), value=next(iter(HIDE)), label="Hide")
                mask_ratio = gr.Slider(
                    0, 0.95, value=0.75, step=0.05, label="Mask ratio", info="Of each sensor not hidden entirely."
                )
                seed = gr.Number(value=0, precision=0, minimum=0, label="Seed")
                button = gr.Button("Reconstruct", variant="primary")
            with gr.Column(scale=3):
                text = gr.Markdown(elem_id="summary")
                options: dict[str, Any] = {"type": "pil", "format": "png", "interactive": False}
                reconstruction = gr.Image(label="Reconstruction", elem_id="reconstruction", **options)
                error = gr.Image(label="Error", elem_id="error", **options)
                attention = gr.Image(
                    label="Cross-attention (empty where the sensors cannot see each other)",
                    elem_id="attention",
                    **options,
                )
        source.change(
            lambda chosen: (gr.update(visible=chosen == "sample"), gr.update(visible=chosen == "upload")),
            source,
            [sample, upload],
            api_visibility="private",
        )
        button.click(
            run,
            [source, sample, sar, optical, sar_bands, optical_bands, offset, hide, mask_ratio, seed],
            [text, reconstruction, error, attention],
            concurrency_limit=1,
            api_name="reconstruct",
        )
    return page


def launch(page: "gradio.Blocks", host: str = "127.0.0.1", port: int | None = None, *, block: bool = True) -> str:
    """Serve a page without telemetry and with the fonts of the browser; its address.

    Args:
        page: what `build` gives.
        host: address to listen on.
        port: the first free one from 7860 on where None.
        block: serve until interrupted.

    Raises:
        OSError: the port is taken.
    """
    gr = _gradio()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        prevent_thread_lock=not block,
        share=False,
        max_file_size="64mb",
        footer_links=[],
        ssr_mode=False,
        quiet=not block,
    )
    return address
