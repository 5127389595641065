"""Fus-MAE in the Auto classes of transformers, without importing transformers before the user does.

`register_with_transformers` registers at once in those modules of `transformers.models.auto` that are imported, and
hooks the import of the others: `import fusmae_hf` takes milliseconds, and `AutoModel` knows the model in either order
of the imports.
"""

import importlib
import sys
from collections.abc import Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto."

REGISTERED = {
    f"{AUTO}configuration_auto": {"AutoConfig": ("configuration_fusmae", "FusMAEConfig")},
    f"{AUTO}image_processing_auto": {"AutoImageProcessor": ("image_processing_fusmae", "FusMAEImageProcessor")},
    f"{AUTO}modeling_auto": {
        "AutoModel": ("modeling_fusmae", "FusMAEModel"),
        "AutoModelForPreTraining": ("modeling_fusmae", "FusMAEForPreTraining"),
        "AutoModelForImageClassification": ("modeling_fusmae", "FusMAEForImageClassification"),
        "AutoModelForSemanticSegmentation": ("modeling_fusmae", "FusMAEForSemanticSegmentation"),
        "AutoBackbone": ("modeling_fusmae", "FusMAEBackbone"),
    },
}
"""Auto classes by the module that defines them, each with the module and the name of the class that it learns of."""


NEEDED = ("transformers.modeling_layers",)
"""What this package's modules import from transformers and what itself imports `modeling_auto`: while Python is half
way through it, the classes cannot be imported."""

OWN = "fusmae_hf.modeling."


def register_with_transformers() -> None:
    """Register every class of `REGISTERED`, now or when transformers is imported."""
    hook = _AfterImport()
    sys.meta_path = [hook, *sys.meta_path]  # a new list, since other threads may be going through the old one
    hook.register()


class _AfterImport(MetaPathFinder):
    """Finds modules as the other finders do, with a loader that registers what is possible after the import.

    Attributes:
        waiting: names of modules whose import is to come or under way.
        due: modules of `REGISTERED` whose classes are not registered.
    """

    def __init__(self) -> None:
        own = {OWN + module for classes in REGISTERED.values() for module, _ in classes.values()}
        self.waiting = {name for name in (*REGISTERED, *NEEDED, *own) if name not in sys.modules}
        self.due = set(REGISTERED)

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.waiting or fullname in sys.modules:
            return None
        found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec

    def register(self, ended: str = "") -> None:
        """Register where both the Auto class and ours can be imported, now that the import of `ended` has ended."""
        self.waiting.discard(ended)
        under_way = {name for name in self.waiting if name in sys.modules}
        for name in [name for name in self.due if name in sys.modules and name not in self.waiting]:
            classes = REGISTERED[name]
            if under_way & {*NEEDED, *(OWN + module for module, _ in classes.values())}:
                continue
            self.due.discard(name)
            try:
                _register(sys.modules[name], classes)
            except ImportError:
                # A release of transformers that is too old must not fail to be imported because of this package, which
                # says what it needs when one of its classes is asked for.
                from fusmae_hf.requirements import unmet_libraries

                if not unmet_libraries():
                    raise
        if not self.due:
            sys.meta_path = [finder for finder in sys.meta_path if finder is not self]


def _register(auto: ModuleType, classes: Mapping[str, tuple[str, str]]) -> None:
    config = importlib.import_module(f"{OWN}configuration_fusmae").FusMAEConfig
    for auto_class, (module, own_class) in classes.items():
        known = getattr(importlib.import_module(OWN + module), own_class)
        key = config.model_type if known is config else config
        getattr(auto, auto_class).register(key, known, exist_ok=True)


class _Registering(Loader):
    def __init__(self, loader: Any, hook: _AfterImport) -> None:
        self.loader = loader
        self.hook = hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What the module keeps of its import is that of its own loader, as if nobody had hooked it.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.hook.register(module.__name__)
