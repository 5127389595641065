"""Imports transformers' own test mixins from its source distribution, unmodified.

`make conformance` unpacks the tests of the installed version into `.cache/transformers-tests`; nothing of them is kept
in this repository. The distribution carries the mixins but not all modules that they import; those are stood in for
here by what the mixins take from them: the base classes of tests that no model without text generation has, and the
common keywords with which `ConfigTester` fills a configuration.
"""

import importlib
import importlib.util
import sys
import types
from importlib.metadata import version
from pathlib import Path

PACKAGE = "transformers_tests"
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / f"transformers-tests-{version('transformers')}" / "tests"

COMMON_CONFIG_KEYWORDS = {
    "architectures": ["FusMAEModel"],
    "chunk_size_feed_forward": 5,
    "dtype": "float16",
    "id2label": {0: "water"},
    "label2id": {"water": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def _stand_in(name: str, **contents: object) -> None:
    module = types.ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(contents)
    parent = f"{PACKAGE}.{name.rpartition('.')[0]}"
    sys.modules.setdefault(parent, types.ModuleType(parent))
    sys.modules[module.__name__] = module


def available() -> bool:
    """Whether the tests of the installed transformers version lie in the cache."""
    return (FOLDER / "test_modeling_common.py").is_file()


def upstream(module: str) -> types.ModuleType:
    """Import `module` (`"test_modeling_common"`, for example) from the unpacked tests."""
    if PACKAGE not in sys.modules:
        (FOLDER / "__init__.py").touch()  # imported by path by the mixins; the distribution lacks it
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(FOLDER)]
        sys.modules[PACKAGE] = package
        _stand_in("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
        _stand_in("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
        _stand_in("utils.test_configuration_utils", config_common_kwargs=COMMON_CONFIG_KEYWORDS)
    return importlib.import_module(f"{PACKAGE}.{module}")
