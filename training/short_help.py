"""What the training programs print for `--help`: the arguments that people need, before torch is imported."""

import signal
import sys
import textwrap

from fusmae_hf.requirements import require_libraries

_DATA = {
    "--data SHARDS": "folder of shards, or dataset repository on the Hub",
    "--streaming true": "read shards when they are needed, from a folder or a URL",
    "--statistics NAME|FOLDER": "statistics to normalise with, where the shards hold none",
}

_RUN = {
    "--output_dir FOLDER": "where everything is written",
    "--num_train_epochs N": "passes through the pairs; or --max_steps N",
    "--per_device_train_batch_size N": "pairs of a step on each device",
    "--base_learning_rate X": "for a batch of 256 pairs; or --learning_rate X as it is",
    "--bf16 true": "bfloat16 autocast",
    "--dataloader_num_workers N": "processes that read pairs",
    "--seed N": "seed of weights, order, masks and views",
    "--resume_from_checkpoint auto": "go on from the newest checkpoint of the output folder",
    "--report_to NAME": "tensorboard, wandb, ... or none",
    "--push_to_hub true": "push the checkpoint, with --hub_model_id NAME",
}

_MODEL = {
    "--preset NAME": "size of a fresh model: nano, tiny, small, base or large",
    "--config JSON": "fields of FusMAEConfig that differ from the preset",
}

PRETRAIN = {
    **_DATA,
    **_MODEL,
    "--model CHECKPOINT": "go on from a pretraining checkpoint instead",
    "--objective NAME": "fusmae (the paper's) or fusmae_contrastive (with a contrastive loss between the sensors)",
    **_RUN,
}

FINETUNE = {
    "--model CHECKPOINT": "checkpoint to start from; or --from_scratch true with --preset and --config",
    **_DATA,
    "--task TASK": "single_label_classification, multi_label_classification, semantic_segmentation or regression",
    "--sensors both|sar|optical": "what training sees",
    "--modality_dropout X": "share of the steps that show one sensor alone, for each sensor",
    "--window N": "pixels to the side of the random windows that training sees",
    "--label_fraction X": "share of the training labels to use, such as 0.01",
    "--freeze encoder": "let only the head learn; or --lora_rank N for adapters",
    "--seeds N": "train so many times",
    **_RUN,
}

PROBE = {
    "--model CHECKPOINT": "encoder to measure; or --from_scratch true with --preset and --config",
    **_DATA,
    "--task TASK": "single_label_classification or multi_label_classification",
    "--output_dir FOLDER": "where everything is written",
    "--probes linear,knn": "which probes",
    "--features encoder|bands": "`bands`: mean and deviation of each band, which a model has to beat",
    "--sensors both,sar,optical": "each with a probe of its own",
    "--label_fraction X": "share of the training labels to use, such as 0.01",
    "--seeds N": "probe so many times",
    "--batch_size N": "pairs that the encoder is shown at a time",
    "--num_workers N": "processes that read pairs",
}


def answer_early(description: str | None, arguments: dict[str, str]) -> None:
    """End the process with a short help where the command line asks for it, or if a library is of an unfit release.

    `--help-all` is left to the parser. Ctrl-C ends the process at once from here on, until somebody handles it: what
    is being imported may take it for a missing package.

    Args:
        description: what the program does.
        arguments: what to list, with what each means.
    """
    if not {"-h", "--help"} & set(sys.argv[1:]):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            return require_libraries()
        except ImportError as error:
            raise SystemExit(f"Error: {error}") from None
    print(f"usage: {sys.argv[0].rsplit('/')[-1]} [config.yaml] [--name value ...]\n\n{(description or '').strip()}\n")
    for name, meaning in arguments.items():
        text = textwrap.wrap(meaning, 80)
        print(f"  {name:<34}" + f"\n{'':36}".join(text))
    print("\n--help-all lists all arguments, those of transformers' TrainingArguments among them.")
    raise SystemExit(0)
