"""The job templates: they parse, name arguments that exist, and go back into the queue when they should."""

import os
import shlex
import stat
import subprocess
import tomllib

import pytest
import yaml

from fusmae_hf.training.arguments import DataArguments, ModelArguments, PretrainingArguments, parse_arguments
from fusmae_hf.training.loop.signals import EXIT_CODE


@pytest.fixture
def templates(pytestconfig):
    return pytestconfig.rootpath / "training" / "cluster"


def check_arguments(arguments):
    _, model, run = parse_arguments((DataArguments, ModelArguments, PretrainingArguments), arguments)
    assert model.preset == "base"
    assert run.resume_from_checkpoint == "auto"
    assert run.save_steps == 1000
    assert run.enable_jit_checkpoint


def run_batch_script(path, folder, code, restarts=0):
    """Run the script with stand-ins for Slurm's commands, of which srun starts two tasks that end with `code`."""
    commands = {
        "srun": """shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" || code=$?
done
exit ${code:-0}
""",
        "scontrol": 'if [ "$1" = show ]; then echo node-7; echo node-8; else echo "$@" >> requeued; fi\n',
        "python": f'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*" >> started\nexit {code}\n',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}")
        (folder / name).chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": "/home/someone",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NTASKS": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return subprocess.run(["bash", str(path)], cwd=folder, env=environment, timeout=60, check=False).returncode


def test_the_batch_script_parses_and_starts_every_task_with_its_rank(tmp_path, templates):
    path = templates / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert run_batch_script(path, tmp_path, 0) == 0
    started = [shlex.split(line) for line in (tmp_path / "started").read_text().splitlines()]
    assert [line[:4] for line in started] == [["0/2", "0", "node-7", "23456"], ["1/2", "1", "node-7", "23456"]]
    assert started[0][4:6] == ["-m", "fusmae_hf.training.run_pretrain"]
    check_arguments(started[0][6:])


@pytest.mark.parametrize(
    ("code", "restarts", "again"), [(EXIT_CODE, 3, True), (EXIT_CODE, 200, False), (1, 0, False), (0, 0, False)]
)
def test_only_a_run_that_was_told_to_end_goes_back_into_the_queue(tmp_path, templates, code, restarts, again):
    assert run_batch_script(templates / "slurm.sbatch", tmp_path, code, restarts) == code
    requeued = tmp_path / "requeued"
    assert (requeued.read_text() if requeued.exists() else None) == ("requeue 123456\n" if again else None)


def test_slurm_signals_what_training_listens_to(templates):
    lines = (templates / "slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert "--signal=USR1@300" in options
    assert "--requeue" in options


def test_the_job_of_kubernetes_parses_and_ignores_what_was_told_to_end(templates):
    job = yaml.safe_load((templates / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "Ignore"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [EXIT_CODE]}
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    assert container["command"] == ["python", "-m", "fusmae_hf.training.run_pretrain"]
    check_arguments(container["args"])
    claims = {volume["name"] for volume in pod["volumes"]}
    assert claims == {mount["name"] for mount in container["volumeMounts"]}


def test_the_templates_are_shipped(pytestconfig):
    project = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())
    assert "cluster/*" in project["tool"]["setuptools"]["package-data"]["fusmae_hf.training"]
