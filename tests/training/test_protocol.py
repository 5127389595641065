"""`fusmae protocol`: one table of probes and fine-tuning, gone on with where it was cut, on the right data alone."""

import json
import re
from dataclasses import replace

import pytest

from fusmae_hf.cli.main import main
from fusmae_hf.evaluation import probes
from fusmae_hf.training import run_finetune, run_probe
from fusmae_hf.training.protocol import experiment as protocols

from .conftest import QUICK as QUICK_RUN
from .labelled_pairs import INFOS, write_labelled

QUICK = [*QUICK_RUN, "--dataloader_num_workers", "0"]

NINETEEN = tuple(f"class {number}" for number in range(16))
PROGRAMS = {
    "fusmae_hf.training.run_probe": run_probe.main,
    "fusmae_hf.training.run_finetune": run_finetune.main,
}


@pytest.fixture(scope="module")
def bigearthnet(tmp_path_factory):
    """Small shards with 19 classes, of which three occur."""
    info = INFOS["multi_label_classification"]
    info = replace(info, class_names=(*info.class_names, *NINETEEN))
    return write_labelled(tmp_path_factory.mktemp("bigearthnet"), "multi_label_classification", info=info)


@pytest.fixture
def started(monkeypatch):
    """Runs steps in this process; names of those that were started."""
    names = []

    def run_step(step):
        names.append(step.name)
        module = step.command.index("-m") + 1
        PROGRAMS[step.command[module]](list(step.command[module + 1 :]))

    monkeypatch.setattr(protocols, "run_step", run_step)
    return names


@pytest.fixture
def protocol(tmp_path, bigearthnet, checkpoint):
    """Runs `fusmae protocol bigearthnet` into `out`; gives the exit code."""

    def run(*arguments, data=bigearthnet, name="bigearthnet"):
        places = ["--data", str(data), "--model", str(checkpoint), "--output_dir", str(tmp_path / "out")]
        return main(["protocol", name, *places, *map(str, arguments)])

    return run


def content_of(tmp_path):
    return json.loads((tmp_path / "out" / "protocol.json").read_text())


def test_each_method_start_and_share_of_labels_is_a_row(protocol, started, tmp_path, capsys):
    wanted = ("--fractions", "0.5,1", "--seeds", 2, "--compare_scratch", "--methods", "linear,finetune")
    assert protocol(*wanted, "--", *QUICK) == 0
    rows = [f"{method}-{start}-both" for method in ("linear", "finetune") for start in ("checkpoint", "scratch")]
    assert started == [f"{row}-{fraction}" for row in rows for fraction in ("0.5", "1")]
    content, table = content_of(tmp_path), (tmp_path / "out" / "protocol.md").read_text()
    assert [row["training_pairs"] for row in content["rows"]] == [12, 24] * 4
    assert all(row["finished"] for row in content["rows"])
    tuned = content["rows"][4]
    seeds = [tmp_path / "out" / tuned["folder"] / f"seed-{seed}" for seed in content["seeds"]]
    scores = [json.loads((seed / "metrics.json").read_text())["sensors"]["both"] for seed in seeds]
    found = tuned["scores"]["average_precision_micro"]
    assert list(found["values"].values()) == [score["average_precision_micro"] for score in scores]
    assert found["value"] == pytest.approx(sum(found["values"].values()) / 2)
    shown = f"| fine-tuning | `{content['model']}` | both sensors | 50 % | 12 | {found['value']:.4f} ["
    assert shown in table
    assert "| linear probe | random encoder | both sensors | 100 % | 24 | " in table
    drawn = [tmp_path / "out" / f"{method}-checkpoint-both-0.5" / "seed-42" for method in ("linear", "finetune")]
    first, second = (json.loads((folder / "label_fraction.json").read_text())["ids"] for folder in drawn)
    assert first == second
    for text in (content["statement"], table):
        assert "reconstruction of the protocol" in text
    assert "finetune-classification.yaml" in table
    assert "--num_train_epochs 1" in table
    assert content["data"]["content"]["test"] in table
    assert str(table) in capsys.readouterr().out
    config = json.loads((seeds[0] / "config.json").read_text())
    scratch = json.loads((tmp_path / "out" / "finetune-scratch-both-1" / "seed-42" / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "patch_size", "optical_bands", "sar_bands", "id2label")
    assert {name: scratch[name] for name in names} == {name: config[name] for name in names}


def test_finished_steps_are_kept_and_the_cut_one_is_done_again(protocol, started, tmp_path, capsys, monkeypatch):
    wanted = ("--fractions", "0.25,0.5,1", "--seeds", 1, "--methods", "linear")
    with monkeypatch.context() as cut:
        fit = probes.linear_probe

        def cut_short(train, *rest):
            if len(train) == 12:
                raise KeyboardInterrupt
            return fit(train, *rest)

        cut.setattr(probes, "linear_probe", cut_short)
        assert protocol(*wanted) == 130
    assert "Finished steps are kept" in capsys.readouterr().err
    assert [row["finished"] for row in content_of(tmp_path)["rows"]] == [True, False, False]
    assert "| not finished |" in (tmp_path / "out" / "protocol.md").read_text()
    assert protocol(*wanted) == 0
    names = [f"linear-checkpoint-both-{fraction}" for fraction in ("0.25", "0.5", "1")]
    assert started == [*names[:2], *names[1:]]
    before = content_of(tmp_path)
    assert all(row["finished"] for row in before["rows"])
    assert protocol(*wanted, "--sensors", "both,sar", "--fractions", "1") == 0  # another row is added
    assert started[4:] == ["linear-checkpoint-sar-1"]
    assert content_of(tmp_path)["rows"][0]["scores"] == before["rows"][2]["scores"]


def test_a_cut_training_goes_on_from_its_newest_checkpoint(protocol, started, tmp_path, monkeypatch, capsys):
    quick = [*QUICK, "--num_train_epochs", "3"]
    wanted = ("--fractions", "1", "--seeds", 1, "--methods", "finetune", "--", *quick)
    with monkeypatch.context() as cut:

        def interrupted(*arguments):
            raise KeyboardInterrupt

        cut.setattr(run_finetune, "evaluate_sensors", interrupted)
        assert protocol(*wanted) == 130
    assert protocol(*wanted) == 0
    assert re.search(r"Resuming from \S+checkpoint-9, the newest", capsys.readouterr().out)
    (row,) = content_of(tmp_path)["rows"]
    assert row["finished"]


def test_results_of_other_settings_are_not_mixed_in(protocol, started, capsys):
    wanted = ("--fractions", "1", "--seeds", 1, "--methods", "knn")
    assert protocol(*wanted) == 0
    assert protocol(*wanted, "--seed", 7) == 2
    assert "holds results of other settings" in " ".join(capsys.readouterr().err.split())


def test_an_interval_of_one_run_stands_in_the_table(protocol, started, tmp_path):
    assert protocol("--fractions", "1", "--seeds", 1, "--methods", "knn", "--bootstrap", 20) == 0
    (row,) = content_of(tmp_path)["rows"]
    found = row["scores"]["average_precision_macro"]
    table = (tmp_path / "out" / "protocol.md").read_text()
    assert f" {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}] |" in table
    assert "20 bootstrap resamples" in table


def test_scene_classes_are_measured_by_accuracy_without_a_validation_split(tmp_path, protocol, started):
    data = write_labelled(tmp_path / "sen12ms", "single_label_classification", validation=0)
    wanted = ("--fractions", "1", "--seeds", 1, "--methods", "linear")
    assert protocol(*wanted, data=data, name="sen12ms") == 0
    table = (tmp_path / "out" / "protocol.md").read_text()
    assert "| training pairs | accuracy |" in table
    assert "There is no validation split" in table


def test_simulated_pairs_need_neither_data_nor_a_checkpoint(tmp_path, started):
    wanted = ["--simulated_pairs", "30", "--fractions", "1", "--seeds", "1", "--methods", "knn"]
    assert main(["protocol", "simulated", "--output_dir", str(tmp_path / "out"), *wanted]) == 0
    (row,) = content_of(tmp_path)["rows"]
    assert (row["start"], row["finished"]) == ("scratch", True)
    assert "**The imagery is simulated.**" in (tmp_path / "out" / "protocol.md").read_text()


@pytest.mark.slow
def test_steps_are_programs_of_their_own(protocol, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # no accelerate configuration of whoever runs the tests
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert protocol("--fractions", "1", "--seeds", 1, "--", *QUICK) == 0
    assert [row["finished"] for row in content_of(tmp_path)["rows"]] == [True, True]
    log = (tmp_path / "out" / "finetune-checkpoint-both-1" / "log.txt").read_text()
    assert log.startswith("$ accelerate launch -m fusmae_hf.training.run_finetune ")
    assert "| both sensors | " in log


def test_a_step_that_fails_ends_the_protocol_with_its_command_and_its_last_words(protocol, tmp_path, capsys):
    assert protocol("--fractions", "1", "--methods", "finetune", "--", "--layer_decya", "0.5") == 1
    told = capsys.readouterr().err
    assert "The step finetune-checkpoint-both-1 failed with exit code" in told
    assert "accelerate launch -m fusmae_hf.training.run_finetune " in told
    assert "there is no argument --layer_decya. Did you mean `layer_decay`?" in told
    assert "log.txt" in told
    assert not (tmp_path / "out" / "protocol.json").exists()


@pytest.mark.parametrize(
    ("name", "numbers", "task", "message"),
    [
        ("bigearthnet", {}, "multi_label_classification", "it has 3 scene classes, not 19"),
        ("bigearthnet", {"test": 0}, "multi_label_classification", "but not ['test']"),
        ("bigearthnet", {}, "unlabelled", "it has 0 scene classes, not 19"),
        ("sen12ms", {}, "multi_label_classification", "has 2 labels"),
        ("sen12ms", {}, "unlabelled", "made-up has no labels"),
    ],
)
def test_data_of_something_else_is_refused(tmp_path, protocol, started, capsys, name, numbers, task, message):
    data = write_labelled(tmp_path / "data", task, **numbers)
    assert protocol(data=data, name=name) == 2
    told = re.sub(r"\s+", " ", capsys.readouterr().err)
    assert f"made-up is not the data of the protocol {name}" in told
    assert message in told
    assert not started


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bigearthnet"], "Name the shards of bigearthnet with --data."),
        (["bigearthnet", "--data", "somewhere"], "Name a pretraining checkpoint"),
        (["simulated", "--data", "somewhere"], "leave --data out"),
        (["simulated", "--methods", "linear,svm"], "--methods must be among linear,knn,finetune, not linear,svm."),
        (["simulated", "--sensors", "radar"], "--sensors must be among both,sar,optical, not radar."),
        (["simulated", "--fractions", "0,1"], "--fractions must be shares above 0"),
        (["simulated", "--seeds", "0"], "--seeds must be at least 1, not 0."),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["protocol", *arguments]) == 2
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_shares_that_are_no_numbers_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["protocol", "simulated", "--fractions", "few"])
    assert "'few' is not a list of shares such as 0.01,0.1,1" in capsys.readouterr().err


def test_a_checkpoint_without_weights_is_refused(tmp_path, bigearthnet, capsys):
    places = ["--data", str(bigearthnet), "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(["protocol", "bigearthnet", *places]) == 2
    assert "holds no weights" in capsys.readouterr().err
