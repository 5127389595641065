"""Entry point of a Space: the checkpoint is named by the variable FUSMAE_CHECKPOINT of the Space."""

import os

from fusmae_hf.app.page import build, launch

if "FUSMAE_CHECKPOINT" not in os.environ:
    raise SystemExit("Set the variable FUSMAE_CHECKPOINT to a pretraining checkpoint: a folder or a Hub id.")

launch(build(os.environ["FUSMAE_CHECKPOINT"]), host="0.0.0.0", port=7860)
