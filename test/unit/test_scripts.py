"""The launch scripts, as a user runs them."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import mnasnet
from helpers import ROOT, TINY, finish, read_checkpoint, read_until, start

SCRIPTS = ["train_full_1p.sh", "train_full_8p.sh", "train_performance_1p.sh",
           "train_performance_8p.sh", "train_eval_8p.sh"]
slow = pytest.mark.slow
TRAINING = ["--device=cpu", "--workers=1", "--batch_size=8", "--lr=0.01"]


def script_command(clone, name, *arguments):
    return ["bash", str(clone / "test" / name), f"--python={sys.executable}"] + list(arguments)


def run_script(clone, name, *arguments, cwd, **environment):
    """Runs a script to its end: a CompletedProcess with stdout and stderr as text."""
    return subprocess.run(
        script_command(clone, name, *arguments), cwd=str(cwd), env=dict(os.environ, **environment),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=600)


def test_train_full_1p(clone, images, tmp_path):
    result = run_script(clone, "train_full_1p.sh", f"--data_path={images}", *TRAINING, "--epochs=2",
                        "--", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"--- Final result -+\nFinal Performance images/sec : [\d.]+\n"
                     r"Final Train Accuracy : [\d.]+\nE2E Training Duration sec : \d+\n$",
                     result.stdout)
    output = clone / "test" / "output" / "0"
    lines = (output / "MnasNet_for_PyTorch_bs8_1p_acc.log").read_text().splitlines()
    log = dict(line.split(" = ") for line in lines)
    assert log["RankSize"] == "1"
    step_time = 8000 / float(log["ActualFPS"])
    assert float(log["TrainingTime"]) == pytest.approx(step_time, abs=0.01)
    losses = (output / "train_MnasNet_for_PyTorch_bs8_1p_acc_loss.txt").read_text().split()
    assert len([float(loss) for loss in losses]) == 8


@slow
def test_train_performance_8p_with_two_cards(clone, images, tmp_path):
    result = run_script(clone, "train_performance_8p.sh", f"--data_path={images}", *TRAINING,
                        "--epochs=1", "--device_list=0,1", "--device_id=3", "--", *TINY,
                        cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    output = clone / "test" / "output" / "3"
    assert (output / "MnasNet_for_PyTorch_bs8_2p_perf.log").exists()


@slow
def test_train_eval_8p(clone, images, trained, tmp_path):
    """It evaluates ./checkpoint.pth.tar unless told otherwise."""
    shutil.copy(str(trained[0] / "checkpoint.pth.tar"), str(tmp_path))
    result = run_script(clone, "train_eval_8p.sh", f"--data_path={images}", "--device=cpu",
                        "--workers=1", "--batch_size=8", "--", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "=> 8 processes, rendezvous at" in result.stdout
    assert "of 31 images" in result.stdout and "Final Train Accuracy" in result.stdout


@pytest.mark.parametrize("arguments,words", [
    ([], "--data_path"), (["--data_path=nowhere"], "nowhere"), (["--what"], "unknown argument"),
    (["--data_path=.", "--batch_size=x"], "--batch_size")])
def test_mistakes_that_a_script_finds(clone, tmp_path, arguments, words):
    result = run_script(clone, SCRIPTS[0], *arguments, cwd=tmp_path)
    assert result.returncode != 0 and "Final" not in result.stdout
    assert words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def check_trainer_error(result, words):
    """A script whose trainer failed says why, and reports no figures."""
    errors = {line for line in result.stderr.splitlines() if line.startswith("main.py: error:")}
    assert result.returncode != 0 and len(errors) == 1, result.stdout + result.stderr
    assert words in errors.pop() and "Traceback" not in result.stderr, result.stderr
    assert "Final" not in result.stdout


def make_no_train_folder(folder, data):
    shutil.rmtree(str(data / "train"))


def make_no_val_folder(folder, data):
    shutil.rmtree(str(data / "val"))


def make_an_empty_class(folder, data):
    for path in (data / "val" / "class 1").iterdir():
        path.unlink()


def make_other_classes(folder, data):
    (data / "val" / "class 1").rename(data / "val" / "class 9")


def make_another_arch(folder, data):
    model = mnasnet.mnasnet1_3(num_classes=4)
    torch.save(model.state_dict(), str(folder / "other.pth"))


@pytest.mark.parametrize("spoil,script_argument,main_arguments,words", [
    (make_no_train_folder, "--device=cpu", [], "no folder"),
    (None, "--device=cpu", ["--lr", "fast"], "--lr"),
    pytest.param(make_no_val_folder, "--device=cpu", [], "no folder", marks=slow),
    pytest.param(make_an_empty_class, "--device=cpu", [], "holds no image", marks=slow),
    pytest.param(make_other_classes, "--device=cpu", [], "only in one of them", marks=slow),
    pytest.param(make_another_arch, "--resume=other.pth", [], "does not fit", marks=slow),
    pytest.param(None, "--device=npu", [], "--device npu is not available", marks=slow)])
def test_mistakes_that_the_trainer_finds(clone, images, tmp_path, spoil, script_argument,
                                         main_arguments, words):
    data = tmp_path / "data"
    shutil.copytree(str(images), str(data))
    if spoil:
        spoil(tmp_path, data)
    result = run_script(clone, SCRIPTS[0], f"--data_path={data}", *TRAINING, script_argument,
                        "--device_id=7", "--", *TINY, *main_arguments, cwd=tmp_path)
    check_trainer_error(result, words)


@slow
@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_the_other_scripts_report_mistakes_too(clone, trained, tmp_path, name):
    result = run_script(clone, name, cwd=tmp_path)
    assert result.returncode == 2 and "no --data_path=DIR given" in result.stderr
    # Which the evaluation takes.
    shutil.copy(str(trained[0] / "checkpoint.pth.tar"), str(tmp_path))
    ranks = ["--device_list=0,1"] if "8p" in name else []
    result = run_script(clone, name, "--data_path=.", "--device=cpu", "--device_id=7", *ranks,
                        cwd=tmp_path)
    check_trainer_error(result, "no folder")


@slow
def test_a_stopped_script_saves_and_resumes(clone, images, tmp_path):
    def command(epochs):
        return script_command(clone, "train_full_1p.sh", f"--data_path={images}", *TRAINING,
                              f"--epochs={epochs}", "--device_id=5", "--resume=auto", "--", *TINY)

    run = start(command(epochs=10000), tmp_path)  # so that it can't end before the signal
    read_until(run, r"^Epoch: \[1\]")
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=300)[0]
    assert run.returncode == 143, out
    epoch = read_checkpoint(tmp_path)["epoch"]
    out = finish([start(command(epochs=epoch + 1), tmp_path)])[0]
    assert f"resumed from ./checkpoint.pth.tar: epoch {epoch}" in out
    losses = clone / "test" / "output" / "5" / "train_MnasNet_for_PyTorch_bs8_1p_acc_loss.txt"
    assert len(losses.read_text().split()) == 4 * (epoch + 1)
    folder = tmp_path / "without a checkpoint"
    folder.mkdir()
    finish([start(command(epochs=1), folder)])
    assert len(losses.read_text().split()) == 4


def test_the_quick_start_saves_where_its_evaluation_looks(clone, tmp_path):
    result = run_script(clone, "quickstart.sh", "--", "--output-dir", "elsewhere", cwd=tmp_path)
    assert result.returncode == 2 and "--output-dir is not applicable" in result.stderr


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    scripts = [str(path) for path in (ROOT / "test").glob("*.sh")] + [str(ROOT / ".ci" / "run")]
    subprocess.run(["shellcheck", "-x"] + scripts, cwd=str(ROOT), check=True)


FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" >arguments
echo "Result: Acc@1 1 Acc@5 2 images/sec 3 loss 4"
"""


@pytest.mark.parametrize("name,arguments,expected", [
    ("train_full_1p.sh", [], ["--recipe=modelzoo", "--lr=0.7"]),
    ("train_full_8p.sh", ["--lr=2"], ["--recipe=modelzoo", "--lr=2"]),
    ("train_full_8p.sh", ["--recipe=strong"], ["--recipe=strong"]),
    ("train_full_8p.sh", ["--lr=2", "--recipe=strong", "--epochs=9"],
     ["--recipe=strong", "--epochs=9", "--lr=2"]),
    ("train_performance_8p.sh", [], ["--recipe=modelzoo", "--epochs=6", "--lr=1.4"]),
    ("train_performance_1p.sh", ["--recipe=rmsprop"], ["--recipe=rmsprop", "--epochs=6"])])
def test_what_a_script_passes_on(clone, tmp_path, name, arguments, expected):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    result = run_script(clone, name, f"--python={python}", f"--data_path={tmp_path}", *arguments,
                        cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    passed = (tmp_path / "arguments").read_text().split("\n")
    assert [word for word in passed if re.match("--(recipe|epochs|lr)=", word)] == expected
