"""The order of the house: which folder imports which, and how large files and folders get.

Imports inside functions count; those for type checkers alone do not.
"""

import ast
import graphlib
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import fusmae_hf

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"modeling": "fusmae_hf.modeling", "training": "fusmae_hf.training", "fusmae_hf": "fusmae_hf"}

MOST_LINES = 420
LONGER = {
    "fusmae_hf.modeling.configuration_fusmae": 450,
    "fusmae_hf.modeling.image_processing_fusmae": 530,
    "fusmae_hf.modeling.modeling_fusmae": 1600,
}
"""One class each that is read from top to bottom, as in transformers."""
MOST_FILES = 11
"""About ten in a folder; those with a file a dataset, command or metric may hold more."""
LONGEST_CHAIN = 10

PUBLIC = set(fusmae_hf._LAZY.values())

EXCEPTIONS = {
    "fusmae_hf.registration": "a hook that waits for transformers, apart from the list of public names",
    "fusmae_hf.training.loop.upstream": "a list that its test holds against the installed transformers",
    "fusmae_hf.training.protocol.experiment": "it imports torch, which the parser of its command must not wait for",
    "fusmae_hf.simulation.sensors": "what sensors see of a scene, apart from where pairs lie: studies depend on both",
}
"""Modules that one other module imports and that stay a file of their own, with the reason."""


def name_of(path: Path) -> str:
    """Dotted name of a source file."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))}


def is_package(name: str) -> bool:
    return MODULES[name].name == "__init__.py"


def folder_of(name: str) -> str:
    return MODULES[name].relative_to(ROOT).parts[0]


def imports_of(name: str) -> set[str]:
    """Modules of the project that a module imports, anywhere in its file."""
    found = set()
    package = name if is_package(name) else name.rpartition(".")[0]

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(fusmae_hf._LAZY.get(alias.name, inner) if source == "fusmae_hf" else inner)
                found.add(source)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return {module for module in found if module in MODULES and (module == "fusmae_hf" or not is_package(module))} - {
        name
    }


IMPORTS = {name: imports_of(name) for name in MODULES}


def lines_of(name: str) -> int:
    return len(MODULES[name].read_text().splitlines())


def is_entry_point(name: str) -> bool:
    """Whether a module is there for users: a program, a command, a reader, a metric, a framework, or a public name."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = [groups["scripts"], *groups["entry-points"].values()]
    return (
        is_package(name)
        or name in PUBLIC
        or name in {value.partition(":")[0] for group in commands for value in group.values()}
        or name.startswith(
            (
                "fusmae_hf.modeling.",
                "fusmae_hf.cli.",
                "fusmae_hf.frameworks.",
                "fusmae_hf.readers.",
                "fusmae_hf.evaluation.metrics.",
                "fusmae_hf.training.run_",
            )
        )
    )


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_from_training_to_the_package_to_the_model(name):
    allowed = {
        "modeling": {"modeling"},
        "fusmae_hf": {"modeling", "fusmae_hf"},
        "training": {"modeling", "fusmae_hf", "training"},
    }
    wrong = sorted(module for module in IMPORTS[name] if folder_of(module) not in allowed[folder_of(name)])
    assert not wrong, f"{name} imports {', '.join(wrong)}"


def test_public_names_come_from_the_package_and_the_model():
    assert not [module for module in PUBLIC if folder_of(module) == "training"]


def test_no_module_imports_itself_through_others():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", [name for name in MODULES if not is_entry_point(name)])
def test_a_module_has_two_importers_or_would_be_too_long_as_a_part_of_its_only_one(name):
    importers = [module for module, imported in IMPORTS.items() if name in imported]
    if len(importers) == 1 and name not in EXCEPTIONS:
        together = lines_of(name) + lines_of(importers[0])
        assert together > MOST_LINES, f"only {importers[0]} imports {name}: make one module of {together} lines"
    assert importers or name in EXCEPTIONS, f"nothing imports {name}"


def test_exceptions_are_still_needed():
    for name in EXCEPTIONS:
        assert name in MODULES
        assert sum(name in imported for imported in IMPORTS.values()) <= 1


def test_no_chain_of_imports_is_long():
    @cache
    def chain(name: str) -> tuple[str, ...]:
        inner = [module for module in IMPORTS[name] if folder_of(module) == "fusmae_hf"]
        return (name, *max((chain(module) for module in inner), key=len, default=()))

    longest = max(map(chain, MODULES), key=len)
    longest = tuple(name for name in longest if folder_of(name) == "fusmae_hf")
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_read_in_one_sitting(name):
    assert lines_of(name) <= LONGER.get(name, MOST_LINES)


def test_a_folder_holds_about_ten_files():
    files = Counter(path.parent.relative_to(ROOT).as_posix() for path in MODULES.values() if path.name[0] != "_")
    exempt = {"modeling", "fusmae_hf/readers", "fusmae_hf/cli"}
    assert {folder: number for folder, number in files.items() if number > MOST_FILES and folder not in exempt} == {}


def test_public_names_are_listed_and_there():
    assert set(fusmae_hf.__all__) <= set(dir(fusmae_hf))
    for name in fusmae_hf.__all__:
        assert getattr(fusmae_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fusmae_hf.nothing
