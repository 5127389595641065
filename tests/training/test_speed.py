from dataclasses import dataclass

import pytest
import torch

from fusmae_hf.flops import pretraining_flops
from fusmae_hf.training.arguments import RunArguments
from fusmae_hf.training.loop import speed
from fusmae_hf.training.loop.speed import SpeedCallback, emulates_bf16, matrix_peak, peak_memory
from fusmae_hf.training.loop.trainer import PairTrainer

PEAK = 1e9
CPU = torch.device("cpu")


@dataclass
class FakeTime:
    """Seconds that things take; nothing else takes any."""

    reading: float = 0.0
    training: float = 0.0
    evaluating: float = 0.0
    saving: float = 0.0
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def spend_on(self, monkeypatch, kind, owner, name):
        """Let a method take some time."""
        original = getattr(owner, name)

        def slow(*args, **kwargs):
            self.now += getattr(self, kind)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, slow)

    def rule(self, monkeypatch, trainer):
        """Hold for a trainer."""
        monkeypatch.setattr(trainer.speed, "clock", self)
        self.spend_on(monkeypatch, "reading", type(trainer.pairs), "__getitems__")
        self.spend_on(monkeypatch, "training", trainer, "training_step")
        self.spend_on(monkeypatch, "evaluating", trainer, "evaluate")
        self.spend_on(monkeypatch, "saving", trainer, "_save_checkpoint")


@pytest.fixture(autouse=True)
def known_peak(monkeypatch):
    monkeypatch.setattr(speed, "matrix_peak", lambda device, dtype: PEAK)


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_pairs_are_counted_over_the_time_of_training_and_loading_alone(
    tmp_path, monkeypatch, make_trainer, shards, streaming, accumulation
):
    """30 pairs in batches of 4, two epochs."""
    trainer = make_trainer(
        tmp_path,
        streaming=streaming,
        gradient_accumulation_steps=accumulation,
        held_out=make_trainer(tmp_path).pairs,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
    )
    FakeTime(reading=3, training=1, evaluating=1000, saving=10_000).rule(monkeypatch, trainer)
    trainer.train()
    batches = 7 // accumulation * accumulation
    steps = 2 * batches // accumulation
    logs = logged(trainer)
    assert [entry["step"] for entry in logs] == list(range(2, steps + 1, 2))
    # accelerate reads one batch ahead, so that a log may hold the reading of one batch more or less.
    seconds = [4 * 2 * accumulation / entry["pairs_per_second"] for entry in logs]
    assert {round(of_log - 2 * accumulation) % 3 for of_log in seconds} == {0}
    of_run = trainer.speed.report_run()
    assert of_run["pairs_per_second"] == pytest.approx(4 / (3 + 1))
    assert of_run["data_wait_share"] == pytest.approx(3 / (3 + 1))
    flops = 4 * pretraining_flops(trainer.model.config, 16, 16)
    assert of_run["mfu"] == pytest.approx(flops / 4 / PEAK)
    assert of_run["matrix_peak_tflops"] == PEAK / 1e12
    assert trainer.state.total_flos == pytest.approx(2 * batches * flops)


@pytest.mark.parametrize(
    ("times", "share"),
    [({"reading": 99, "training": 1}, 0.99), ({"training": 1}, 0.0), ({"reading": 1}, 1.0)],
    ids=["slow", "instant", "nothing but reading"],
)
def test_waiting_for_data_is_the_time_in_the_loader(tmp_path, monkeypatch, make_trainer, times, share):
    trainer = make_trainer(tmp_path, logging_strategy="epoch")
    FakeTime(**times).rule(monkeypatch, trainer)
    trainer.train()
    assert [entry["data_wait_share"] for entry in logged(trainer)] == pytest.approx([share, share])


def test_steps_after_the_last_log_belong_to_the_run(tmp_path, monkeypatch, make_trainer):
    trainer = make_trainer(tmp_path, num_train_epochs=1, logging_steps=5)
    FakeTime(reading=3, training=1).rule(monkeypatch, trainer)
    trainer.train()
    trainer.speed.clock.now += 1000
    assert [entry["step"] for entry in logged(trainer)] == [5]
    assert trainer.speed.report_run()["pairs_per_second"] == pytest.approx(4 / (3 + 1))


@pytest.mark.parametrize("streaming", [False, True], ids=["local", "streaming"])
def test_a_resumed_run_does_not_count_the_batches_that_it_skips(tmp_path, monkeypatch, make_trainer, streaming):
    settings = {"streaming": streaming, "save_strategy": "steps", "save_steps": 5, "logging_strategy": "epoch"}
    make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    clock = FakeTime(reading=3, training=1)
    clock.rule(monkeypatch, trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert [entry["step"] for entry in logged(trainer)] == [7, 14]
    assert [entry["pairs_per_second"] for entry in logged(trainer)] == pytest.approx([1, 1])
    assert clock.now == (2 + 7) * (3 + 1)


def test_a_run_that_has_finished_reports_nothing(tmp_path, make_trainer):
    settings = {"save_strategy": "epoch", "num_train_epochs": 1}
    make_trainer(tmp_path, **settings).train()
    trainer = make_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert trainer.speed.report_run() == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_those_of_a_run_that_is_not_measured(tmp_path, monkeypatch, make_trainer, workers):
    monkeypatch.setattr(speed, "matrix_peak", matrix_peak)  # the real one, which makes random matrices
    measured = make_trainer(tmp_path, dataloader_num_workers=workers, logging_steps=3)
    measured.train()
    assert all(entry["pairs_per_second"] > 0 for entry in logged(measured))
    plain = make_trainer(tmp_path, dataloader_num_workers=workers, logging_steps=3)
    monkeypatch.delattr(PairTrainer, "get_batch_samples")
    monkeypatch.setattr(plain.speed, "report", dict)
    plain.remove_callback(SpeedCallback)
    plain.train()
    assert "pairs_per_second" not in logged(plain)[0]
    expected = plain.model.state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in measured.model.state_dict().items())


def test_several_processes_add_their_pairs_and_wait_for_the_slowest(tmp_path, monkeypatch, make_trainer):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    FakeTime(reading=1, training=1).rule(monkeypatch, trainer)
    other = {"pairs": 28, "flops": 14e9, "seconds": 28.0, "waited": 21.0}
    gathered = {tuple: (other, 3 * PEAK, 2**50), float: 3 * PEAK}
    monkeypatch.setattr(speed, "gather_object", lambda mine: [*mine, gathered[type(mine[0])]])
    trainer.train()
    figures = trainer.speed.report_run()
    own_flops = 28 * pretraining_flops(trainer.model.config, 16, 16)
    assert figures == {
        "pairs_per_second": (28 + 28) / 28,
        "mfu": pytest.approx((14e9 + own_flops) / 28 / (4 * PEAK)),
        "data_wait_share": 0.75,
        "peak_memory_gib": 2**20,
        "matrix_peak_tflops": 4 * PEAK / 1e12,
    }


def test_fine_tuning_logs_its_speed_without_a_share_of_the_peak(tmp_path, make_tuner):
    tuner = make_tuner(tmp_path, num_train_epochs=1)
    tuner.train()
    (entry,) = logged(tuner)
    assert entry["pairs_per_second"] > 0
    assert 0 <= entry["data_wait_share"] <= 1
    assert entry["peak_memory_gib"] > 0
    assert "mfu" not in entry


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_measured_without_drawing_random_numbers_of_the_run(dtype):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert matrix_peak(CPU, dtype) > 0
    assert torch.equal(torch.rand(4), expected)


def test_memory_of_the_process_is_known_on_the_cpu():
    block = torch.ones(2**26)
    assert peak_memory(CPU) > block.nbytes


@pytest.mark.parametrize(
    ("emulates", "asked", "computes"),
    [
        (True, {"bf16": True}, False),
        (True, {"bf16": True, "emulate_bf16": True}, True),
        (False, {"bf16": True}, True),
        (True, {}, False),
    ],
)
def test_a_cpu_that_emulates_bf16_computes_in_float32_unless_asked_twice(
    tmp_path, monkeypatch, capsys, emulates, asked, computes
):
    monkeypatch.setattr("fusmae_hf.training.arguments.emulates_bf16", lambda: emulates)
    arguments = RunArguments(str(tmp_path), use_cpu=True, **asked)
    assert arguments.bf16 == computes
    assert ("computing in float32 (--emulate_bf16 true)" in capsys.readouterr().out) == (
        asked.get("bf16", False) and not computes
    )


@pytest.mark.parametrize(("times", "emulates"), [(60, True), (3, True), (1, False), (0.5, False)])
def test_bf16_is_emulated_where_it_is_slower_than_float32(monkeypatch, times, emulates):
    clock = iter(range(1000))
    seconds = {torch.float32: 1.0, torch.bfloat16: float(times)}
    passed, dtype = [0.0], [torch.float32]
    ones = torch.ones

    def chosen(*size, **options):
        dtype[0] = options["dtype"]
        return ones(*size, **options)

    def now():
        passed[0] += seconds[dtype[0]] * (next(clock) % 2)
        return passed[0]

    monkeypatch.setattr(torch, "ones", chosen)
    monkeypatch.setattr("fusmae_hf.training.loop.speed.time.process_time", now)
    assert emulates_bf16.__wrapped__() == emulates
