"""The command `fusmae doctor`: what an installation can do, and what it lacks."""

import argparse
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fusmae_hf.cli.command import add_command
from fusmae_hf.requirements import LIBRARIES, PACKAGE, installed_version, missing_requirements

EXAMPLE_PAIRS = "bigearthnet-common==2.8.0"
"""Carries six pairs of BigEarthNet v1; its own requirements stay out."""


def add_doctor(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add `fusmae doctor`."""
    command = add_command(
        commands,
        parents,
        "doctor",
        "show versions, devices and what is missing",
        "Print versions, devices, attention back ends, cache folders and missing packages. The exit code\n"
        "is 1 where a required package is missing or of an unsupported version, or attention does not run on the CPU.",
    )
    command.set_defaults(run=_doctor, any_release=True)


def attention_kernels(device: str) -> dict[str, list[str]]:
    """Kernels of scaled dot-product attention that run on a device such as `"cuda:0"`, in float32 and bfloat16."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels: dict[str, list[str]] = {"float32": [], "bfloat16": []}
    for name, backend in SDPBackend.__members__.items():
        if name in ("ERROR", "OVERRIDEABLE"):
            continue
        for dtype, working in kernels.items():
            try:
                tokens = torch.randn(1, 2, 16, 64, device=device, dtype=getattr(torch, dtype))
                with torch.no_grad(), sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            except RuntimeError:
                continue
            working.append(name.lower())
    return kernels


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be written in a folder, or in its nearest parent that exists; None where it can."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _doctor(_: argparse.Namespace) -> int:
    missing = missing_requirements()
    print(f"{'python':<16}{platform.python_version()} on {platform.platform()}")
    print(f"{PACKAGE:<16}{installed_version(PACKAGE) or 'not installed: a checkout'}")
    for name in LIBRARIES:
        print(f"{name:<16}{installed_version(name) or 'not installed'}")
    print()
    try:
        broken = _print_devices()
        _print_folders()
    except Exception as error:
        # A library of the wrong release is named below: it fails in its own way, and libraries blame each other.
        broken = [] if missing[""] else [f"a library fails ({type(error).__name__}: {' '.join(str(error).split())})"]
    print()
    for extra, lines in missing.items():
        title = f"extra `{extra}`" if extra else "required packages"
        print(f"{title}: {'complete' if not lines else ', '.join(lines)}")
        if lines:
            print(f'  pip install -e ".[{extra}]"' if extra else "  pip install -e .", "in a clone of the repository")
    pairs = installed_version("bigearthnet-common")
    print(f"six real pairs: {'installed' if pairs else 'not installed'}")
    if not pairs:
        print(f"  pip install --no-deps {EXAMPLE_PAIRS}")
    broken += missing[""]
    print(f"\nBroken: {'; '.join(broken)}." if broken else "\nEverything required works.")
    return 1 if broken else 0


def _print_devices() -> list[str]:
    """Print devices and attention back ends; returns what is broken."""
    import torch
    from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

    broken = []
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = "native" if native else "emulated or none"
        devices[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, bf16 {bf16}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    for device, description in devices.items():
        print(f"{device:<16}{description}")
        kernels = attention_kernels(device)
        for dtype, names in kernels.items():
            print(f"  sdpa in {dtype}: {', '.join(names) or 'none'}")
        if device == "cpu" and not kernels["float32"]:
            broken.append("scaled dot-product attention does not run on the CPU")
    print(f"{'flex_attention':<16}{'available' if is_torch_flex_attn_available() else 'not available'}")
    flash = is_flash_attn_2_available()
    print(f"{'flash attention':<16}{'available' if flash else 'not available (package flash-attn and a GPU)'}")
    return broken


def _print_folders() -> None:
    """Print where caches lie, whether they can be written, and the free disk in GiB."""
    import datasets
    from huggingface_hub import constants

    folders = {
        "hub cache": constants.HF_HUB_CACHE,
        "datasets cache": datasets.config.HF_DATASETS_CACHE,
        "temporary files": tempfile.gettempdir(),
        "this folder": ".",
    }
    for name, folder in folders.items():
        path = Path(folder).absolute()
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        problem = why_not_writable(path)
        access = "writable" if problem is None else f"NOT writable ({problem})"
        print(f"{name:<16}{path}: {access}, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free")
