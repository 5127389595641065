"""Results beside a card, in the form from which the Hub takes them today; the model-index in the card is older."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER


def write_eval_results(folder: Path, results: Sequence[EvalResult]) -> None:
    """Write `.eval_results/results.yaml` into the folder of a checkpoint; remove it where there are no results."""
    entries = [
        EvalResultEntry(
            dataset_id=result.dataset_type,
            task_id=result.task_type,
            value=result.metric_value,
            notes=f"{result.metric_name}; {result.dataset_name}",
        )
        for result in results
    ]
    path = folder / EVAL_RESULTS_FOLDER / "results.yaml"
    if not entries:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
