"""The Fus-MAE model, its configuration and its processor: everything a Hub repository carries as remote code."""

if __name__ != "fusmae_hf.modeling":
    raise ImportError(
        f"This folder is the package `fusmae_hf.modeling`; it was imported as `{__name__}`, which would make second "
        "copies of its classes. Install the checkout with `pip install -e .` and use `from fusmae_hf import ...`."
    )
