"""main.py in processes of its own: training, evaluation, several processes, stopping and going on."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import chaos
import main
import mnasnet
from conftest import ROOT, SMALL, checkpoint, free_port, run_main, the_error, torchrun

TWO, FOUR = (["--multiprocessing-distributed", "--device-list", cards] for cards in ("0,1", "0,1,2,3"))
BF16 = hasattr(torch, "autocast")  # what O1 and O2 need on the cpu


def losses(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return [float(x) for x in re.findall(r"^Epoch:.*?Loss +(\S+)", result.stdout, re.M)]


def counts(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r"\* Acc@1 (\S+) Acc@5 (\S+)", result.stdout)[-1]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = run_main(images, "--epochs", 2, "--seed", 1, cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


def test_what_a_run_leaves(trained):
    folder, result = trained
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-1.pth.tar", "checkpoint.pth.tar", "metrics.csv", "model_best.pth.tar"]
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["0", "1"] and tuple(rows[0]) == main.COLUMNS
    assert checkpoint(folder)["best_acc1"] == max(row["acc1"] for row in checkpoint(folder)["rows"])
    assert re.search(r"^Result: Acc@1 \S+ Acc@5 \S+ images/sec \S+ loss \S+$", result.stdout, re.M)


def test_the_reference_way_of_reading_the_log(trained):
    lines = trained[1].stdout.splitlines()
    fps = [line for line in lines if "FPS" in line][-1].split()[-2]
    accuracy = [line for line in lines if "* Acc@1" in line][-1].split("Acc@1")[1].split()[0]
    loss = [line.split("Loss")[1].split()[0] for line in lines if "Epoch:" in line]
    assert float(fps) > 0 and 0 <= float(accuracy) <= 100 and len([float(x) for x in loss]) == 8


def test_the_result_does_not_depend_on_the_workers(images, trained, tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "main.py"), str(images), "--epochs", "2", "--seed", "1"] + SMALL
                            + ["--workers", "0"], cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True)
    assert result.returncode == 0 and not chaos.differences(checkpoint(trained[0]), checkpoint(tmp_path))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_counts_do_not_depend_on_the_processes(images, trained, processes):
    path = trained[0] / "model_best.pth.tar"
    expected = [row for row in checkpoint(trained[0], "model_best.pth.tar")["rows"]][-1]
    several = ["--multiprocessing-distributed", "--device-list", ",".join(map(str, range(processes)))]
    result = run_main(images, "-e", "--resume", path, *(several if processes > 1 else []), cwd=trained[0])
    assert counts(result)[0] == "{:.3f}".format(expected["acc1"])
    assert "of 31 images" in result.stdout


@pytest.mark.slow
def test_two_processes_train_as_one_does(images, tmp_path):
    arguments = [images, "--epochs", 1, "--seed", 2, "--freeze-bn", "--dropout", 0]
    one = run_main(*arguments, cwd=tmp_path)
    two = run_main(*arguments, *TWO, cwd=tmp_path)
    # the log shows the first process's half of each batch; metrics.csv holds the mean over both
    losses(one), losses(two)
    rows = [checkpoint(tmp_path, name)["rows"][0] for name in ("checkpoint-1.pth.tar", "checkpoint.pth.tar")]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-4)


def test_started_from_outside(images, tmp_path):
    port = str(free_port())
    commands = [[sys.executable, str(ROOT / "main.py"), str(images), "--epochs", "1", "--seed", "3",
                 "--local_rank", rank, "--world-size", "1", "--rank", "0", "--dist-url",
                 "tcp://127.0.0.1:" + port] + TWO + SMALL for rank in "01"]
    runs = [subprocess.Popen(c, cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True) for c in commands]
    out = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and "Result:" in out[0] and "Result:" not in out[1]


def test_torchrun(images, tmp_path):
    command = torchrun(2) + [str(images), "--epochs", "1", "--seed", "3"] + SMALL
    done = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True, timeout=200)
    assert done.returncode == 0 and done.stdout.count("Result:") == 1, done.stdout


def stop(arguments, cwd, signum, lines):
    """Sends a signal after so many log lines of training; (exit status, seconds it took)."""
    process = subprocess.Popen([sys.executable, str(ROOT / "main.py")] + [str(a) for a in arguments] + SMALL,
                               cwd=str(cwd), stdout=subprocess.PIPE, universal_newlines=True)
    for line in process.stdout:
        lines -= line.startswith("Epoch:")
        if not lines:
            break
    process.send_signal(signum)
    begin, limit = time.time(), threading.Timer(60, process.kill)
    limit.start()
    process.stdout.read()
    limit.cancel()
    return process.wait(), time.time() - begin


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], TWO, FOUR] + ([["--opt-level", "O2"]] if BF16 else []),
                         ids=lambda e: "_".join(e) or "1")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_an_interrupted_run_ends_as_one_that_was_not(images, tmp_path, extra, signum):
    arguments = [images, "--epochs", 2, "--seed", 4, "--save-freq", 3, "--resume", "auto"] + extra
    folders = [tmp_path / "whole", tmp_path / "broken"]
    for folder in folders:
        folder.mkdir()
    losses(run_main(*arguments, cwd=folders[0]))
    status, seconds = stop(arguments, folders[1], signum, 6)
    assert status == (143 if signum == signal.SIGTERM else -9) and seconds < 30
    result = run_main(*arguments, cwd=folders[1])
    losses(result)
    assert "resumed from" in result.stdout
    assert not chaos.differences(checkpoint(folders[0]), checkpoint(folders[1]))


@pytest.mark.slow
def test_a_run_stopped_between_its_last_step_and_the_evaluation_goes_on(images, tmp_path):
    arguments = [images, "--epochs", 1, "--seed", 4, "--save-freq", 1, "--keep", 99]
    losses(run_main(*arguments, cwd=tmp_path))
    (tmp_path / "again").mkdir()
    shutil.copy(str(tmp_path / "checkpoint-1.pth.tar"), str(tmp_path / "again" / "checkpoint.pth.tar"))
    assert checkpoint(tmp_path, "checkpoint-1.pth.tar")["epoch"] == 0
    assert losses(run_main(*arguments, "--resume", "auto", cwd=tmp_path / "again")) == []  # no step was left
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        assert not chaos.differences(checkpoint(tmp_path, name), checkpoint(tmp_path / "again", name))


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_low_precision(images, tmp_path, level):
    result = run_main(images, "--epochs", 1, "--seed", 1, "--opt-level", level, cwd=tmp_path)
    if not BF16:
        assert "--opt-level O0" in the_error(result)
        return
    losses(result)
    assert {t.dtype for t in checkpoint(tmp_path)["state_dict"].values()} == {torch.float32, torch.int64}


@pytest.mark.slow
def test_bad_images_are_named_and_replaced(images, tmp_path):
    data = tmp_path / "data"
    subprocess.check_call(["cp", "-r", str(images), str(data)])
    for split in ("train", "val"):
        (data / split / "class 1" / "0 bad.jpg").write_bytes(b"<html>")
    result = run_main(data, "--epochs", 1, "--seed", 1, cwd=tmp_path)  # one image of 33 is left over, here a good one
    losses(result)
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 2 and "of 32 images" in result.stdout
    limited = run_main(data, "--epochs", 1, "--seed", 1, "--max-bad", 0, cwd=tmp_path)
    assert "--max-bad 0" in the_error(limited)
    checked = run_main(data, "--check-data", cwd=tmp_path)
    assert checked.returncode == 1 and checked.stdout.count("bad:") == 2 and "2 bad image(s)" in checked.stdout


@pytest.mark.parametrize("arguments,words", [
    (["-e", "--resume", "auto"], "no checkpoint in '.' to evaluate"),
    (["--epochs", "2", "--start-epoch", "5"], "the next epoch is 5, and --epochs 2"),
    (["--dist-backend", "nccl"] + TWO, "give gloo"), (["--resume", "list.pth"], "state_dict is a list")])
def test_arguments_that_can_not_be_met(tmp_path, arguments, words):
    torch.save({"state_dict": [1]}, str(tmp_path / "list.pth"))
    assert words in the_error(run_main("--synthetic", 16, cwd=tmp_path, after=arguments))


@pytest.mark.parametrize("change,words", [
    ("no folder", "no folder"), ("no val", "no folder"), ("empty class", "holds no image"),
    ("other classes", "only in one of them"), ("no checkpoint", "no checkpoint"), ("no card", "is not there"),
    ("small set", "lower --batch-size")])
def test_mistakes_get_one_line(images, tmp_path, change, words):
    data, extra = tmp_path / "data", []
    if change != "no folder":
        subprocess.check_call(["cp", "-r", str(images), str(data)])
    if change == "no val":
        subprocess.check_call(["rm", "-r", str(data / "val")])
    if change == "empty class":
        subprocess.check_call(["rm", "-r", str(data / "val" / "class 1")])
        (data / "val" / "class 1").mkdir()
    if change == "other classes":
        (data / "val" / "class 1").rename(data / "val" / "class 9")
    if change == "no checkpoint":
        extra = ["--resume", "nowhere.pth"]
    command = [sys.executable, str(ROOT / "main.py"), str(data)] + SMALL + extra
    command += {"no card": ["--device", "npu"], "small set": ["-b", "64"]}.get(change, [])
    result = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True)
    assert words in the_error(result)


def test_a_checkpoint_of_another_arch(images, trained):
    result = run_main(images, "-e", "--resume", "checkpoint.pth.tar", "-a", "mnasnet1_3", cwd=trained[0], small=False)
    assert "mnasnet0_5" in the_error(result)


def test_reference_and_plain_checkpoints_evaluate(images, trained, tmp_path):
    state = checkpoint(trained[0])["state_dict"]
    torch.save(state, str(tmp_path / "plain.pth"))
    prefixed = {"module." + name: value for name, value in state.items()}
    torch.save({"epoch": 2, "state_dict": prefixed, "amp": {}, "best_acc1": 1.0}, str(tmp_path / "reference.pth"))
    found = {counts(run_main(images, "-e", "--resume", tmp_path / name, cwd=tmp_path))
             for name in ("plain.pth", "reference.pth")}
    assert len(found) == 1


def test_a_reference_checkpoint_resumes(images, trained, tmp_path):
    state = {"module." + name: value for name, value in checkpoint(trained[0])["state_dict"].items()}
    torch.save({"epoch": 1, "state_dict": state, "best_acc1": 1.0}, str(tmp_path / "reference.pth"))
    level = ["--opt-level", "O2"] if BF16 else []
    losses(run_main(images, "--resume", "reference.pth", "--epochs", 2, *(SMALL + level), "--lr", 0, cwd=tmp_path,
                    small=False))
    for name, value in checkpoint(tmp_path)["state_dict"].items():
        assert "running" in name or "num_" in name or torch.equal(value, state["module." + name]), name


def test_synthetic(tmp_path):
    losses(run_main("--synthetic", 32, "--epochs", 1, cwd=tmp_path))


@pytest.mark.slow
def test_two_nodes_of_two_processes(images, tmp_path):
    address = "tcp://127.0.0.1:{}".format(free_port())
    commands = [[sys.executable, str(ROOT / "main.py"), str(images), "--epochs", "1", "--seed", "3", "--world-size",
                 "2", "--rank", node, "--dist-url", address] + TWO + SMALL for node in "01"]
    runs = [subprocess.Popen(c, cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True) for c in commands]
    out = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and "Result:" in out[0] and "Result:" not in out[1]
    assert "4 processes met at " + address in out[0] and "of 31 images" in out[0]


@pytest.mark.slow
def test_counts_of_500_images(tmp_path):
    data = np.load(str(ROOT / "test" / "data" / "fashion_mnist_2500.npz"))
    for i, (image, label) in enumerate(zip(data["val_images"], data["val_labels"])):
        for split in ("train", "val"):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            if split == "val" or not list(folder.iterdir()):
                Image.fromarray(image).save(str(folder / "{}.jpg".format(i)), quality=95)
    torch.manual_seed(0)
    model = mnasnet.mnasnet0_5(num_classes=10).eval()
    torch.save(model.state_dict(), str(tmp_path / "model.pth"))
    # BatchNorm's fresh statistics keep the logits apart enough for every image to have a clear first choice
    found = set()
    for processes, batch in ((1, 64), (1, 7), (2, 34), (3, 100), (8, 24)):
        several = ["--multiprocessing-distributed", "--device-list", ",".join(map(str, range(processes)))]
        result = run_main(tmp_path, "-e", "--resume", "model.pth", *(several if processes > 1 else []), cwd=tmp_path,
                          after=["-b", batch])
        assert result.returncode == 0, result.stdout + result.stderr
        found.add(re.search(r"\* Acc@1 .*\((\d+) and (\d+) of 500 images\)", result.stdout).groups())
    assert len(found) == 1, found
    expected = counts_of_the_classic_pipeline(model, tmp_path / "val", 32)
    assert all(abs(int(ours) - theirs) <= 1 for ours, theirs in zip(found.pop(), expected))


def counts_of_the_classic_pipeline(model, folder, size):
    """Right at the first guess, and within five: Pillow's decoding and resizing, and the network as it is."""
    top1 = top5 = 0
    mean, std = (np.array(v, np.float32) for v in (main.MEAN, main.STD))
    for label, place in enumerate(sorted(folder.iterdir())):
        pixels = np.stack([np.asarray(Image.open(str(path)).convert("RGB").resize((size, size), Image.BILINEAR))
                           for path in place.iterdir()])
        images = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            guesses = model(images).topk(5, 1)[1]
        top1, top5 = top1 + int((guesses[:, 0] == label).sum()), top5 + int((guesses == label).sum())
    return top1, top5


@pytest.mark.slow
def test_profile(images, tmp_path):
    result = run_main(images, "--run-prof", cwd=tmp_path, after=["-b", "4"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.load((tmp_path / "trace.json").open())
    assert re.search(r"conv", result.stdout) and "Self CPU" in result.stdout
    assert "lower --batch-size" in the_error(run_main(images, "--run-prof", cwd=tmp_path))


def test_tensorboard(images, tmp_path):
    result = run_main(images, "--epochs", 1, "--tensorboard", "events", cwd=tmp_path)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        assert "pip install tensorboard" in the_error(result)
    else:
        losses(result)
        assert list((tmp_path / "events").iterdir())


@pytest.mark.slow
def test_pretrained_weights(images, tmp_path):
    torch.save(mnasnet.mnasnet0_5(num_classes=7).state_dict(), str(tmp_path / "seven.pth"))
    torch.save(mnasnet.mnasnet0_5(num_classes=4).state_dict(), str(tmp_path / "four.pth"))
    fresh = run_main(images, "--epochs", 1, "--pretrained", "--weights", "seven.pth", cwd=tmp_path)
    losses(fresh)
    assert "7 classes in seven.pth, 4 here: the classifier starts fresh" in fresh.stdout
    same_as_resumed = [counts(run_main(images, "-e", *model, cwd=tmp_path))
                       for model in (["--pretrained", "--weights", "four.pth"], ["--resume", "four.pth"])]
    assert same_as_resumed[0] == same_as_resumed[1]
    assert "no checkpoint" in the_error(run_main(images, "--pretrained", "--weights", "none.pth", cwd=tmp_path))


@pytest.mark.slow
def test_compile(images, tmp_path):
    result = run_main(images, "--epochs", 1, "--seed", 1, "--compile", cwd=tmp_path)
    if not hasattr(torch, "compile"):
        assert "--compile needs torch 2.0 or later" in the_error(result)
        return
    losses(result)
    names = list(mnasnet.mnasnet0_5(num_classes=4).state_dict())
    assert list(checkpoint(tmp_path)["state_dict"]) == names
    losses(run_main(images, "--epochs", 2, "--seed", 1, "--resume", "auto", cwd=tmp_path))  # goes on without it
