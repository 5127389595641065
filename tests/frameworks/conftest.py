"""torchvision beside a torch that it was not built for, which the frameworks import and these tests never call."""

import contextlib
import importlib.util
import re
from pathlib import Path

import torch


def _define_operators() -> list[torch.library.Library]:
    """Declare the operators of torchvision where its own library cannot be loaded, so that it can be imported."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    folder, names = Path(spec.origin).parent, set()
    with contextlib.suppress(OSError):
        for library in folder.glob("_C*.so"):
            torch.ops.load_library(library)
            return []
    for file in (folder / "_meta_registrations.py", *(folder / "ops").glob("*.py")):
        names |= set(re.findall(r"torchvision(?:::|\.)(\w+)|register_meta\(\"(\w+)\"", file.read_text()))
    library = torch.library.Library("torchvision", "DEF")
    for name in {name for pair in names for name in pair if name}:
        library.define(f"{name}(Tensor x) -> Tensor")
    return [library]


OPERATORS = _define_operators()
"""Kept, since operators vanish with the library that declares them."""
