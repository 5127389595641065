"""Which versions of other packages this one works with, as pyproject.toml states, and which are installed."""

from importlib import metadata

from packaging.requirements import Requirement

PACKAGE = "fusmae_hf"

LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "numpy", "pyarrow")
"""Libraries of which another release than the required ones fails somewhere deep within."""


def require_libraries() -> None:
    """Refuse releases of `LIBRARIES` that this package does not work with, before one of them fails to be imported.

    Raises:
        ImportError: a library is missing, or of a version that is not supported.
    """
    if unmet := unmet_libraries():
        wanted = " ".join(f"'{line.split(' (')[0]}'" for line in unmet)
        raise ImportError(
            f"fusmae_hf needs {', '.join(unmet)}. Install what fits: `pip install {wanted}`; "
            "`fusmae doctor` checks all requirements."
        )


def unmet_libraries() -> list[str]:
    """What is required of `LIBRARIES`, and what is there instead; empty where all is well."""
    return [line for line in missing_requirements()[""] if Requirement(line.split(" (")[0]).name in LIBRARIES]


def missing_requirements() -> dict[str, list[str]]:
    """Requirements of the installed package that are not met, such as `"peft<1,>=0.17 (not installed)"`.

    Returns:
        Lists by extra, in the order of pyproject.toml; the key `""` holds what is always required. Empty where this is
        a checkout that is not installed, which states nothing.
    """
    if installed_version(PACKAGE) is None:
        return {"": []}
    extras = ["", *(metadata.metadata(PACKAGE).get_all("Provides-Extra") or [])]
    missing: dict[str, list[str]] = {extra: [] for extra in extras}
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        wanted = [extra for extra in extras if marker is None or marker.evaluate({"extra": extra})]
        # A marker that holds without any extra holds with each.
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            problem = "not installed" if version is None else f"{version} is installed"
            for extra in wanted[:1] if "" in wanted else wanted:
                missing[extra].append(f"{requirement.name}{requirement.specifier} ({problem})")
    return missing


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
