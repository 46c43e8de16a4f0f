"""The launch scripts, as a user runs them."""

import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import mnasnet
from conftest import ROOT

SCRIPTS = ["train_full_1p.sh", "train_full_8p.sh", "train_performance_1p.sh", "train_performance_8p.sh",
           "train_eval_8p.sh"]
TINY = ["-a", "mnasnet0_5", "--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32",
        "--print-freq", "1"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The repository in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a clone") / "of it"
    folder.mkdir()
    for name in ("main.py", "mnasnet.py"):
        shutil.copy(str(ROOT / name), str(folder))
    (folder / "test").mkdir()
    for path in (ROOT / "test").glob("*.sh"):
        shutil.copy(str(path), str(folder / "test"))
    return folder


def script(clone, name, *arguments, cwd):
    return subprocess.run(["bash", str(clone / "test" / name), "--python=" + sys.executable] + [str(a) for a in arguments],
                          cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=300, stdin=subprocess.DEVNULL)


def test_train_and_evaluate(clone, images, tmp_path):
    common = ["--data_path={}".format(images), "--device=cpu", "--workers=1"]
    result = script(clone, "train_full_1p.sh", *common, "--epochs=2", "--batch_size=8", "--lr=0.01", "--", *TINY,
                    cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    final = result.stdout[result.stdout.index("--- Final result ---"):]
    assert re.search(r"Final Performance images/sec : [\d.]+\nFinal Train Accuracy : [\d.]+\n"
                     r"E2E Training Duration sec : \d+\n$", final)
    output = clone / "test" / "output" / "0"
    log = dict(line.split(" = ") for line in
               (output / "MnasNet_for_PyTorch_bs8_1p_acc.log").read_text().splitlines())
    assert log["RankSize"] == "1" and float(log["TrainingTime"]) == pytest.approx(8000 / float(log["ActualFPS"]), abs=.01)
    assert len((output / "train_MnasNet_for_PyTorch_bs8_1p_acc_loss.txt").read_text().split()) == 8

    result = script(clone, "train_eval_8p.sh", *common, "--batch_size=8", "--", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 processes met" in result.stdout and "of 31 images" in result.stdout


def test_two_cards(clone, images, tmp_path):
    result = script(clone, "train_performance_8p.sh", "--data_path={}".format(images), "--device=cpu", "--epochs=1",
                    "--device_list=0,1", "--batch_size=8", "--lr=0.01", "--workers=1", "--device_id=3", "--", *TINY,
                    cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (clone / "test" / "output" / "3" / "MnasNet_for_PyTorch_bs8_2p_perf.log").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_mistakes(clone, images, tmp_path, name):
    for arguments, words in [([], "--data_path"), (["--data_path=nowhere"], "nowhere"), (["--what"], "unknown argument"),
                             (["--data_path={}".format(images), "--batch_size=x"], "--batch_size")]:
        result = script(clone, name, *arguments, cwd=tmp_path)
        assert result.returncode != 0 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
        assert "Final" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_mistakes_that_the_trainer_finds(clone, images, tmp_path, name):
    for broken, words in [("no train", "no folder"), ("no val", "no folder"), ("empty class", "holds no image"),
                          ("other classes", "only in one of them"), ("no device", "is not there"),
                          ("another arch", "does not fit"), ("bad flag", "--lr")]:
        data, main_args, arguments = tmp_path / broken, list(TINY), ["--device=cpu"]
        shutil.copytree(str(images), str(data))
        torch.save(mnasnet.mnasnet1_3(num_classes=4).state_dict(), str(tmp_path / "other.pth"))
        arguments.append("--resume=other.pth")
        if broken.startswith("no t") or broken.startswith("no v"):
            shutil.rmtree(str(data / broken.split()[1]))
        elif broken == "empty class":
            shutil.rmtree(str(data / "val" / "class 1"))
            (data / "val" / "class 1").mkdir()
        elif broken == "other classes":
            (data / "val" / "class 1").rename(data / "val" / "class 9")
        elif broken == "no device":
            arguments[0] = "--device=npu"
        elif broken == "bad flag":
            main_args += ["--lr", "fast"]
        result = script(clone, name, "--data_path={}".format(data), *arguments, "--batch_size=8", "--device_id=7",
                        *(["--device_list=0,1"] if "8p" in name else []), "--", *main_args, cwd=tmp_path)
        errors = {line for line in result.stderr.splitlines() if line.startswith("main.py: error:")}
        assert result.returncode != 0 and len(errors) == 1 and words in errors.pop(), result.stdout + result.stderr
        assert "Final" not in result.stdout and "Traceback" not in result.stderr
        shutil.rmtree(str(data))


def test_a_failed_training_is_reported(clone, images, tmp_path):
    shutil.copytree(str(images / "train"), str(tmp_path / "data" / "train"))
    result = script(clone, "train_full_1p.sh", "--data_path=data", "--device=cpu", cwd=tmp_path)
    assert result.returncode == 1 and "Final" not in result.stdout and "no folder" in result.stderr


@pytest.mark.slow
def test_a_stopped_script_saves_and_goes_on(clone, images, tmp_path):
    command = ["bash", str(clone / "test" / "train_full_1p.sh"), "--python=" + sys.executable, "--device=cpu",
               "--data_path={}".format(images), "--epochs=3", "--batch_size=8", "--lr=0.01", "--workers=1",
               "--device_id=5", "--resume=auto", "--"] + TINY
    process = subprocess.Popen(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               universal_newlines=True)
    for line in process.stdout:
        if line.startswith("Epoch: [1]"):
            break
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait() == 143
    done = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout + done.stderr


def test_shellcheck():
    if shutil.which("shellcheck"):
        scripts = [str(p) for p in (ROOT / "test").glob("*.sh")] + [str(ROOT / ".ci" / "run")]
        subprocess.run(["shellcheck", "-x"] + scripts, cwd=str(ROOT), check=True)
