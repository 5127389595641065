"""Private names of other packages that `fusmae_hf.training` overrides, calls or reads.

They may change with any release: `tests/training/test_upstream.py` compares this list with what is installed, and with
what the code uses.
"""

UPSTREAM = {
    # Overridden to write checkpoints aside, and to push them once they are in place.
    "transformers.Trainer._get_output_dir": ("trial",),
    "transformers.Trainer._save_checkpoint": ("model", "trial"),
    "transformers.Trainer._push_from_checkpoint": ("checkpoint_folder",),
    # Overridden: called between the clipping of the gradients, which gives their norm, and the optimiser's step.
    "transformers.Trainer._get_grad_norm": ("model", "grad_norm"),
    # Overridden to leave a finished run alone, and to keep its last checkpoint.
    "transformers.Trainer._run_epoch": None,
    "transformers.Trainer._finalize_training": None,
    # Called to make up for an evaluation that was cut short.
    "transformers.Trainer._load_rng_state": ("checkpoint",),
    "transformers.Trainer._evaluate": ("trial", "ignore_keys_for_eval"),
    "transformers.Trainer._determine_best_metric": ("metrics", "trial"),
    # The sum of the losses to log, and the batch size, which `auto_find_batch_size` changes.
    "transformers.Trainer._tr_loss": None,
    "transformers.Trainer._train_batch_size": None,
    # A fresh model with a choice of attention.
    "transformers.PreTrainedModel._from_config": ("config",),
    # Set to make accelerate shard models on the CPU.
    "accelerate.PartialState._shared_state": None,
    # The names of all arguments, for mistyped ones in a file.
    "argparse.ArgumentParser._actions": None,
}
"""Parameters by name of a method, in the order in which they are passed or taken. None for an attribute, and for a
method that is handed whatever comes."""
