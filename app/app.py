"""Entry point of a Space: the checkpoint is named by the variable FUSMAE_CHECKPOINT of the Space."""

import os

from fusmae_hf import serve_app

if "FUSMAE_CHECKPOINT" not in os.environ:
    raise SystemExit("Set the variable FUSMAE_CHECKPOINT to a pretraining checkpoint: a folder or a Hub id.")

serve_app(os.environ["FUSMAE_CHECKPOINT"], host="0.0.0.0", port=7860)
