"""The schedule, the loss, and what a training run does, prints and leaves."""

import dataclasses
import importlib.util
import json
import re
import sys
import types

import pytest
import torch

import main
import mnasnet
from helpers import (STEADY, TORCH, differences, losses, needs_bf16, parse, read_checkpoint,
                     read_metrics, run_main, several, the_error)

try:
    from torch.utils._python_dispatch import TorchDispatchMode
except ImportError:
    TorchDispatchMode = object


def test_the_learning_rate_warms_up_and_falls_to_zero():
    flags = parse("--lr", "1", "--epochs", "10", "--warmup", "2")
    rates = [main.learning_rate(flags, tenths / 10) for tenths in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == pytest.approx(1)
    assert rates[60] == pytest.approx(0.5) and rates[100] == pytest.approx(0)
    assert rates[:21] == sorted(rates[:21])


def test_smoothed_cross_entropy_is_the_cross_entropy_against_smoothed_targets():
    logits, targets = torch.randn(5, 7), torch.tensor([0, 1, 2, 6, 3])
    smoothed = torch.full((5, 7), 0.1 / 7)
    smoothed[range(5), targets] += 0.9
    expected = -(smoothed * torch.log_softmax(logits, 1)).sum(1).mean()
    found = main.smoothed_cross_entropy(logits, targets, 0.1)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("classes,expected", [(10, (1, 2)), (4, (1, 3))])
def test_topk_correct_counts_the_first_and_the_first_five(classes, expected):
    logits = torch.arange(float(classes)).expand(4, classes)  # the last class is the first guess
    targets = torch.tensor([classes - 1, classes - 3, 0, -1])
    assert tuple(count.item() for count in main.topk_correct(logits, targets)) == expected


def test_what_a_run_leaves(trained):
    folder, result = trained
    names = ["args.json", "checkpoint-1.pth.tar", "checkpoint.pth.tar", "metrics.csv",
             "model_best.pth.tar"]
    assert sorted(path.name for path in folder.iterdir()) == names
    rows, checkpoint = read_metrics(folder), read_checkpoint(folder)
    assert [row["epoch"] for row in rows] == ["0", "1"] and tuple(rows[0]) == main.COLUMNS
    assert checkpoint["best_acc1"] == max(row["acc1"] for row in checkpoint["history"])
    assert re.search(r"^Result: Acc@1 \S+ Acc@5 \S+ images/sec \S+ loss \S+$", result.stdout, re.M)


def test_the_log_can_be_read_as_the_reference_reads_it(trained):
    lines = trained[1].stdout.splitlines()
    fps = [line for line in lines if "FPS" in line][-1].split()[-2]
    accuracy = [line for line in lines if "* Acc@1" in line][-1].split("Acc@1")[1].split()[0]
    loss = [float(line.split("Loss")[1].split()[0]) for line in lines if "Epoch:" in line]
    assert float(fps) > 0 and 0 <= float(accuracy) <= 100 and len(loss) == 8


def test_the_log_names_the_rate_and_both_losses_and_is_at_most_120_columns_wide(trained):
    lines = trained[1].stdout.splitlines()
    assert all(len(line) <= 120 for line in lines), max(lines, key=len)
    steps = [line.split("\t") for line in lines if line.startswith("Epoch:")]
    names = ["Epoch:", "Time", "Data", "Loss", "Acc@1", "LR", "ETA", "FPS"]
    assert all([column.split()[0] for column in step] == names for step in steps)
    rates = [main.learning_rate(parse("--epochs", 2, *STEADY), step / 4) for step in range(8)]
    assert [float(step[5].split()[1]) for step in steps] == pytest.approx(rates, rel=1e-3)
    epochs = [re.findall(r"(?:loss|Acc@1|best) (\S+?)[,)\s]", line) for line in lines
              if line.startswith("=> epoch")]
    best = 0
    for row, found in zip(read_metrics(trained[0]), epochs):
        best = max(best, float(row["acc1"]))
        expected = [row["train_loss"], row["train_acc1"], row["val_loss"], row["acc1"], best]
        assert [float(value) for value in found] == pytest.approx(
            [float(value) for value in expected], rel=1e-5, abs=6e-3)


class Recorder:
    """In place of a SummaryWriter: the (tag, step) that it was given."""

    def __init__(self, folder):
        self.points = []

    def add_scalar(self, tag, value, step):
        self.points.append((tag, int(step)))

    def flush(self):
        pass


def test_the_tags_of_tensorboard(images, run_here, monkeypatch):
    writers = []
    monkeypatch.setattr(main, "open_tensorboard",
                        lambda folder: writers.append(Recorder(folder)) or writers[-1])
    losses(run_here(images, "--epochs", 2, "-p", 2, "--tensorboard", "events"))
    steps = [(f"train/{name}", step) for step in (0, 2, 4, 6)
             for name in ("loss", "acc1", "lr", "fps")]
    values = [(f"val/{name}", epoch) for epoch in (0, 1) for name in ("loss", "acc1", "acc5")]
    assert sorted(writers[0].points) == sorted(steps + values)

class NoHostCopy(TorchDispatchMode):
    """Fails where a value is read back from the device: its operators are the same on a card."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(operator), "a step reads a value back"
        return operator(*args, **(kwargs or {}))


@pytest.mark.skipif(TORCH < (2, 0), reason="this torch has no TorchDispatchMode")
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_a_step_waits_for_nothing(images, monkeypatch, run_here, level):
    steps = []
    for name in ("train_step", "mix_batch"):
        def watched(*args, function=getattr(main, name), **kwargs):
            with NoHostCopy():
                steps.append(name)
                return function(*args, **kwargs)
        monkeypatch.setattr(main, name, watched)
    update = main.EpochMeter.update

    def watched_update(*args):
        with NoHostCopy():
            update(*args)

    monkeypatch.setattr(main.EpochMeter, "update", watched_update)
    result = run_here(images, "--epochs", 1, "--opt-level", level, "--ema", 0.9, "--mixup", 0.2,
                      "--cutmix", 1, "--clip-grad", 1, "--accumulate", 2)
    assert len(losses(result)) == 4 and len(steps) == 8
    with pytest.raises(AssertionError), NoHostCopy():
        torch.ones(1).item()


@pytest.mark.slow
def test_two_processes_train_as_one_does(images, tmp_path):
    arguments = [images, "--epochs", 1, "--seed", 2, "--freeze", "bn", "--dropout", 0]
    for folder, extra in (("one", []), ("two", several(2))):
        losses(run_main(*arguments, *extra, "--output-dir", folder, cwd=tmp_path))
    # The log shows the first process's half of each batch, metrics.csv the mean over both.
    one, two = [read_checkpoint(tmp_path / folder)["history"][0]["train_loss"]
                for folder in ("one", "two")]
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.parametrize("extra", [
    [], pytest.param(["--opt-level", "O2", "--ema", 0.9], marks=needs_bf16), several(2)])
@pytest.mark.slow
def test_frozen_features_stay_as_they_were(images, trained, tmp_path, extra):
    start = trained[0] / "checkpoint.pth.tar"
    arguments = [images, "--epochs", 2, "--freeze", "features", "--seed", 1, *extra]
    weights = ["--pretrained", "--weights", start, "--save-freq", 3]
    losses(run_main(*arguments, *weights, cwd=tmp_path))
    before, after = [read_checkpoint(path)["state_dict"] for path in (trained[0], tmp_path)]
    for name, tensor in before.items():
        if name.startswith("classifier"):
            assert not torch.equal(tensor, after[name]), name
        else:
            assert torch.equal(tensor, after[name]), name
    losses(run_main(*arguments, "--resume", "checkpoint-1.pth.tar", cwd=tmp_path))
    assert differences(read_checkpoint(tmp_path)["state_dict"], after) == []


def test_generated_images_on_all_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert len(losses(run_main("--synthetic", 32, "--epochs", 1, cwd=tmp_path))) == 4
    evaluate = ["-e", "--resume", "model_best.pth.tar", "-b", 64]
    assert "of 32 images" in run_main("--synthetic", 32, *evaluate, cwd=tmp_path).stdout


@pytest.mark.slow  # torch 1.8 takes a minute over its table
def test_profiling(images, run_here, tmp_path):
    result = run_here(images, "--run-prof", "-b", 4)
    assert result.returncode == 0 and "conv" in result.stdout and "Self CPU" in result.stdout
    assert json.loads((tmp_path / "trace.json").read_text())
    assert "lower --batch-size" in the_error(run_here(images, "--run-prof"))


class NpuProfiler:
    """In place of torch_npu.profiler.profile, which makes no table."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def export_chrome_trace(self, path):
        with open(path, "w") as file:
            file.write("of torch_npu")


def test_profiling_on_an_npu_is_torch_npus(images, run_here, tmp_path, monkeypatch):
    torch_npu = types.SimpleNamespace(profiler=types.SimpleNamespace(profile=NpuProfiler))
    monkeypatch.setitem(sys.modules, "torch_npu", torch_npu)
    npu = dataclasses.replace(main.BACKENDS["cpu"], type="npu")
    profile = main.profile

    def profile_as_on_an_npu(run):
        run.runtime = dataclasses.replace(run.runtime, backend=npu)
        profile(run)

    monkeypatch.setattr(main, "profile", profile_as_on_an_npu)
    result = run_here(images, "--run-prof", "-b", 4)
    assert result.returncode == 0 and "5 steps profiled" in result.stdout
    assert (tmp_path / "trace.json").read_text() == "of torch_npu"


has_tensorboard = importlib.util.find_spec("tensorboard") is not None


@pytest.mark.skipif(not has_tensorboard, reason="tensorboard is not installed")
def test_tensorboard(images, run_here, tmp_path):
    losses(run_here(images, "--epochs", 1, "--tensorboard", "events"))
    assert list((tmp_path / "events").iterdir())


def test_a_folder_that_tensorboard_can_not_write_to_is_named(monkeypatch):
    def refuse(folder):
        raise PermissionError(13, "Permission denied", folder)

    package = types.SimpleNamespace(SummaryWriter=refuse)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    with pytest.raises(main.UserError, match="can't write to --tensorboard 'a': Permission denied"):
        main.open_tensorboard("a")


@pytest.mark.skipif(has_tensorboard, reason="tensorboard is installed")
def test_tensorboard_is_refused_where_it_is_not_installed(images, run_here):
    error = the_error(run_here(images, "--epochs", 1, "--tensorboard", "events"))
    assert "pip install tensorboard" in error


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 0), reason="torch.compile came with torch 2.0")
def test_compile(images, tmp_path):
    losses(run_main(images, "--epochs", 1, "--seed", 1, "--compile", cwd=tmp_path))
    names = list(mnasnet.mnasnet0_5(num_classes=4).state_dict())
    assert list(read_checkpoint(tmp_path)["state_dict"]) == names
    resumed = run_main(images, "--epochs", 2, "--seed", 1, "--resume", "auto", cwd=tmp_path)
    assert len(losses(resumed)) == 4  # without --compile


@pytest.mark.skipif(TORCH >= (2, 0), reason="this torch has torch.compile")
def test_compile_is_refused_where_torch_lacks_it(images, run_here):
    assert "--compile needs torch 2.0 or later" in the_error(run_here(images, "--compile"))
