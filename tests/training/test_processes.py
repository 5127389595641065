"""Several processes on the CPU: what they learn is what one process learns, and none waits for one that is gone.

The launches are those of the documentation, with the configurations that are shipped. See `process_scenarios.py` for
what the processes do.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fusmae_hf import FusMAEForPreTraining
from fusmae_hf.training.arguments import RunArguments
from fusmae_hf.training.loop.processes import fork_workers_from_a_server

from . import process_scenarios
from .labelled_pairs import write_labelled
from .started_programs import free_port, start, start_two, wait_for

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "accelerate"

pytestmark = pytest.mark.slow

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
"""Of weights after six steps at a learning rate of 1e-3, which moved some by 2e-3. Measured: DDP 0, FSDP2 3e-8."""

DDP = (
    "whole", "resumed", "streamed_whole", "streamed_resumed", "resumed_from_one_process", "other_global_batch",
    "other_settings", "a_file_missing_for_one", "turns", "modality_dropout", "without_a_sensor", "fine_tuned",
    "fine_tuned_on_sar", "plain_whole", "plain_resumed", "plain_too_few_files",
    "contrastive",
)  # fmt: skip
FSDP = ("whole", "resumed", "streamed_whole", "streamed_resumed", "fine_tuning_sharded", "contrastive")


def launch(configuration: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / configuration)]
    return [*command, *arguments]


def run_scenarios(configuration: str, folder: Path, names: tuple[str, ...]) -> None:
    command = launch(configuration, "--module", "tests.training.process_scenarios", str(folder), *names)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


class Results:
    """What the scenarios of a launch left in its folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def of(self, name: str, process: int = 0) -> dict:
        return json.loads((self.folder / f"{name}-{process}.json").read_text())

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def seen(self, name: str) -> list[str]:
        """Ids in the order of the sampler: the processes take batches in turn."""
        by_process = [self.of(name, process)["seen"] for process in range(self.of(name)["processes"])]
        return [pair for batches in zip(*by_process, strict=True) for _, _, ids in batches for pair in ids]


def folder_with_data(folder: Path, shards: Path, checkpoint: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "shards").symlink_to(shards)
    (folder / "checkpoint").symlink_to(checkpoint)
    write_labelled(folder / "labelled", "single_label_classification")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, shards, checkpoint) -> Results:
    """One process, here in this one, with the same global batches: as two accumulated batches."""
    folder = folder_with_data(tmp_path_factory.mktemp("one"), shards, checkpoint)
    result = process_scenarios.train(folder, "one", gradient_accumulation_steps=2)
    (folder / "one-0.json").write_text(json.dumps(result))
    return Results(folder)


@pytest.fixture(scope="module")
def ddp(one) -> Results:
    """Two processes, a copy of the model in each."""
    run_scenarios("cpu-ddp.yaml", one.folder, DDP)
    return one


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory, shards, checkpoint) -> Results:
    """Two processes, the model sharded over them."""
    folder = folder_with_data(tmp_path_factory.mktemp("fsdp"), shards, checkpoint)
    run_scenarios("cpu-fsdp2.yaml", folder, FSDP)
    return Results(folder)


@pytest.fixture(params=["ddp", "fsdp"])
def two(request) -> Results:
    return request.getfixturevalue(request.param)


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert not different


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        if name.endswith("k_proj.bias"):
            continue  # the loss does not depend on it: its gradient is rounding, which Adam scales up to full steps
        torch.testing.assert_close(
            got[name], expected[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the same as one process ---------------------------------------------------------------------------------------


def test_the_shipped_configurations_start_two_processes_of_their_kind(ddp, fsdp):
    assert (ddp.of("whole", 1)["processes"], ddp.of("whole", 1)["sharded"]) == (2, False)
    assert (fsdp.of("whole", 1)["processes"], fsdp.of("whole", 1)["sharded"]) == (2, True)
    assert fsdp.of("whole")["kind"] == "DistributedType.FSDP"


def test_two_processes_see_in_each_step_the_pairs_that_one_sees(two, one):
    assert two.seen("whole") == one.seen("one")
    for process in (0, 1):
        assert [step for step, _, _ in two.of("whole", process)["seen"]] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["whole", "streamed_whole"])
def test_each_pair_is_seen_at_most_once_an_epoch_over_both_processes(two, name):
    for epoch in (0, 1):
        seen = [
            pair for process in (0, 1) for _, of, ids in two.of(name, process)["seen"] if of == epoch for pair in ids
        ]
        assert len(seen) == len(set(seen)) == 24  # of 30: three whole global batches of 8


def test_two_processes_learn_what_one_learns(two, one):
    assert two.of("whole")["losses"] == pytest.approx(one.of("one")["losses"], rel=1e-5)
    assert_close(two.weights("whole"), one.weights("one"))


def test_two_processes_contrast_each_pair_with_those_of_both_as_one_does(two, tmp_path, shards, checkpoint):
    folder = folder_with_data(tmp_path / "one", shards, checkpoint)
    expected = process_scenarios.contrastive(folder, batch_size=8)
    assert two.of("contrastive")["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert_close(two.weights("contrastive"), Results(folder).weights("contrastive"))


def test_held_out_losses_count_each_pair_once(two, one):
    """9 held-out pairs in batches of 2 for each of 2 processes: the last ones are filled up."""
    assert two.of("whole")["metrics"] == pytest.approx(one.of("one")["metrics"], rel=1e-4)


def test_fine_tuning_on_two_processes_measures_each_pair_once_and_the_same(ddp, tmp_path, checkpoint):
    import pyarrow.parquet as pq

    (tmp_path / "checkpoint").symlink_to(checkpoint)
    (tmp_path / "labelled").symlink_to(ddp.folder / "labelled")
    process_scenarios._fine_tune(tmp_path, "one", 8)
    alone, together = (
        json.loads((f / "metrics.json").read_text()) for f in (tmp_path / "one", ddp.folder / "fine_tuned")
    )
    assert together["sensors"].keys() == alone["sensors"].keys()
    for sensors, metrics in alone["sensors"].items():
        for name, value in metrics.items():
            assert together["sensors"][sensors][name] == pytest.approx(value, rel=1e-3), name
    tables = [pq.read_table(f / "predictions.parquet") for f in (tmp_path / "one", ddp.folder / "fine_tuned")]
    assert tables[0]["id"] == tables[1]["id"]


# --- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", ["", "streamed_"], ids=["local", "streaming"])
def test_a_run_resumed_on_two_processes_ends_with_the_same_weights_bit_for_bit(two, streamed):
    assert_same(two.weights(f"{streamed}resumed"), two.weights(f"{streamed}whole"))
    assert two.seen(f"{streamed}resumed") == two.seen(f"{streamed}whole")[4 * 8 :]


def test_a_stream_of_datasets_is_divided_resumed_exactly_and_refused_where_it_has_too_few_files(ddp):
    seen = ddp.seen("plain_whole")
    for epoch in (seen[:24], seen[24:]):
        assert len(set(epoch)) == 24
    assert ddp.seen("plain_resumed") == seen[4 * 8 :]
    assert_same(ddp.weights("plain_resumed"), ddp.weights("plain_whole"))
    message = ddp.of("plain_too_few_files", 1)["message"]
    assert "3 files of split 'train', too few for 2 processes x 2 workers" in message
    assert "fusmae prepare --rows-per-shard 7" in message


def test_a_sharded_run_leaves_checkpoints_that_load_in_one_process_and_carry_the_code_of_the_model(fsdp):
    for folder in (fsdp.folder / "whole", fsdp.folder / "whole" / "checkpoint-4"):
        _, report = FusMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values())
        assert (folder / "modeling_fusmae.py").is_file()
        named = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForPreTraining"]
        assert named == "modeling_fusmae.FusMAEForPreTraining"
    assert_same(fsdp.weights("whole"), fsdp.weights("whole/checkpoint-6"))


def test_two_processes_go_on_from_a_checkpoint_of_one(ddp):
    assert ddp.seen("resumed_from_one_process") == ddp.seen("one")[4 * 8 :]
    assert_close(ddp.weights("resumed_from_one_process"), ddp.weights("one"))


def test_one_process_goes_on_from_a_checkpoint_of_two(ddp):
    result = process_scenarios.train(
        ddp.folder, "resumed_by_one_process", "whole/checkpoint-4", gradient_accumulation_steps=2
    )
    (ddp.folder / "resumed_by_one_process-0.json").write_text(json.dumps(result))
    assert ddp.seen("resumed_by_one_process") == ddp.seen("whole")[4 * 8 :]
    assert_close(ddp.weights("resumed_by_one_process"), ddp.weights("whole"))


def test_another_global_batch_is_refused_by_every_process(ddp):
    for process in (0, 1):
        assert "had global batch 8, this one has global batch 4" in ddp.of("other_global_batch", process)["message"]


def test_a_stream_is_resumed_by_another_number_of_processes_where_its_order_is_the_same_and_refused_otherwise(ddp):
    changes = {"streaming": True, "gradient_accumulation_steps": 2}
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"processes x workers 2, .* this one has .*processes x workers 1"):
            process_scenarios.train(
                ddp.folder, "refused", "streamed_whole/checkpoint-4", dataloader_num_workers=workers, **changes
            )
    result = process_scenarios.train(
        ddp.folder, "stream_of_one", "streamed_whole/checkpoint-4", dataloader_num_workers=2, **changes
    )
    (ddp.folder / "stream_of_one-0.json").write_text(json.dumps(result))
    assert ddp.seen("stream_of_one") == ddp.seen("streamed_whole")[4 * 8 :]
    assert_close(ddp.weights("stream_of_one"), ddp.weights("streamed_whole"))


def test_a_sharded_checkpoint_is_refused_by_a_run_that_is_not_sharded(fsdp):
    with pytest.raises(ValueError, match="only supported when using PyTorch FSDP"):
        process_scenarios.train(fsdp.folder, "refused", "whole/checkpoint-4", gradient_accumulation_steps=2)


# --- agreement -----------------------------------------------------------------------------------------------------


def test_processes_that_find_other_files_stop_before_training_and_name_the_file(ddp):
    for process in (0, 1):
        message = ddp.of("a_file_missing_for_one", process)["message"]
        assert "differ in the files left out of split train for training" in message
        assert "process 0 has [], process 1 has ['data/train-00001" in message


def test_processes_started_with_other_arguments_stop_before_training(ddp):
    for process in (0, 1):
        assert "differ in seed: process 0 has 5, process 1 has 6" in ddp.of("other_settings", process)["message"]


def test_modality_dropout_needs_no_search_for_unused_parameters(ddp):
    assert len(ddp.of("modality_dropout")["losses"]) == 2


def test_a_missing_sensor_is_an_error_that_names_the_argument_and_works_with_it(ddp):
    for process in (0, 1):
        messages = ddp.of("without_a_sensor", process)
        assert "find_unused_parameters=True" in messages["False"]
        assert messages["True"] is None
    assert ddp.of("fine_tuned_on_sar")["ended"]


def test_what_one_process_makes_the_others_find(ddp):
    assert [ddp.of("turns", process)["found"] for process in (0, 1)] == [[], ["made-by-0"]]


def test_fine_tuning_is_refused_where_the_model_is_sharded(fsdp):
    assert "ddp.yaml" in fsdp.of("fine_tuning_sharded")["message"]


# --- ends ----------------------------------------------------------------------------------------------------------

ENDLESS = (
    "--config", json.dumps(process_scenarios.SMALL), "--per_device_train_batch_size", "4", "--max_steps", "1000000",
    "--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "1", "--eval_strategy", "no",
    "--num_reconstructions", "0", "--report_to", "none", "--disable_tqdm", "1",
)  # fmt: skip
"""Arguments of a run that ends only when it is made to."""


@pytest.fixture
def ended():
    """Kills what a test adds to it and is still there when the test ends."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_where_one_process_is_killed_the_other_says_so_and_the_launcher_ends(tmp_path, shards, ended, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = launch("cpu-ddp.yaml", "training/run_pretrain.py", "--data", str(shards), *ENDLESS)
    output, log = tmp_path / "run", tmp_path / "log"
    launcher = start([*command, "--output_dir", str(output)], log, PYTHONPATH=str(ROOT))
    ended.append(launcher)
    wait_for(lambda: any(output.glob("checkpoint-*")), launcher, log, 240)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    assert launcher.wait(120) != 0
    for said in ("lost another process of this run", "--resume_from_checkpoint auto", "Signal 9 (SIGKILL)"):
        assert said in log.read_text()
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_where_one_process_is_stuck_the_other_ends_after_the_timeout(tmp_path, shards, ended):
    """Started as by `srun`, without a launcher that would end the other."""
    run = [sys.executable, "-m", "fusmae_hf.training.run_pretrain", "--data", str(shards), *ENDLESS]
    output, logs = tmp_path / "run", [tmp_path / "log-0", tmp_path / "log-1"]
    one, other = start_two([*run, "--output_dir", str(output), "--ddp_timeout", "10"], logs)
    ended += [one, other]
    wait_for(lambda: any(output.glob("checkpoint-*")), one, logs[0], 240)
    other.send_signal(signal.SIGSTOP)
    assert one.wait(120) != 0
    assert "in vain for longer than `ddp_timeout`" in logs[0].read_text()
    assert "Timed out waiting" in logs[0].read_text()


# --- several machines ----------------------------------------------------------------------------------------------


def test_two_launches_that_meet_train_as_one_does(ddp, tmp_path, ended, monkeypatch):
    """As on two machines, here on one, with the processes counted as it has them."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "shards").symlink_to(ddp.folder / "shards")
    meeting = ("--main_process_ip", "127.0.0.1", "--main_process_port", free_port())
    here = ("--num_processes", "2", "--mixed_precision", "no", *meeting)
    program = ("--module", "tests.training.process_scenarios", str(tmp_path), "whole")
    for rank in ("0", "1"):
        command = launch("multi-node.yaml", "--machine_rank", rank, *here, *program)
        ended.append(start(command, tmp_path / f"log-{rank}", PYTHONPATH=str(ROOT)))
    assert [launcher.wait(400) for launcher in ended] == [0, 0], (tmp_path / "log-0").read_text()
    both = Results(tmp_path)
    assert both.of("whole", 1)["processes"] == 2
    assert_same(both.weights("whole"), ddp.weights("whole"))


@pytest.mark.skipif(
    "dataloader_multiprocessing_context" not in RunArguments.__dataclass_fields__,
    reason="this release of transformers starts workers as torch does",
)
@pytest.mark.parametrize(
    ("workers", "chosen", "expected"), [(2, None, "forkserver"), (2, "spawn", "spawn"), (0, None, None)]
)
def test_workers_are_forked_from_a_server_unless_the_user_chose(tmp_path, workers, chosen, expected):
    arguments = RunArguments(str(tmp_path), dataloader_num_workers=workers, dataloader_multiprocessing_context=chosen)
    fork_workers_from_a_server(arguments, "fusmae_hf.training.run_pretrain")
    assert arguments.dataloader_multiprocessing_context == expected
