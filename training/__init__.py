"""The training scripts of fusmae_hf and what they share."""

if __name__ != "fusmae_hf.training":
    raise ImportError(
        f"This folder is the package `fusmae_hf.training`; it was imported as `{__name__}`, which would make second "
        "copies of its modules. Install the checkout with `pip install -e .` and use `fusmae_hf.training`."
    )
