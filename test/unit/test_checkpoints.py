"""Checkpoints: what may be read, what is kept, and runs that resume from them."""

import argparse
import hashlib
import json
import pickle
import re
import shutil
import signal
import time

import pytest
import torch

import main
import mnasnet
from helpers import (STEADY, cpu_runtime, differences, final_loss, folders_differ, losses,
                     parse, read_checkpoint, read_until, run_main, several, start_main, the_error)


class Code:
    def __reduce__(self):
        return open, ("ran", "w")


def save_by_torch(value, path):
    torch.save(value, path)


def save_by_pickle(value, path):
    with open(path, "wb") as file:
        pickle.dump(value, file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [save_by_torch, save_by_pickle])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"state_dict": Code()}, "bad.pth")
    with pytest.raises(main.UserError, match="bad.pth") as raised:
        main.read_checkpoint("bad.pth")
    error = str(raised.value)
    assert "io.open)" in error or save is save_by_pickle  # whose protocol torch refuses first
    assert "weights_only" not in error and error.count("\n") == 0
    assert not (tmp_path / "ran").exists()


def test_older_files_are_kept(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "a-1", "a-2")]
    for content in (b"first", b"second", b"third", b"fourth"):
        main.write_file(content, paths[0], paths[1:])
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert contents == {"a": b"fourth", "a-1": b"third", "a-2": b"second"}


@pytest.fixture
def optimizer():
    """SGD over one weight that lies in channels_last."""
    flags, runtime = parse("--lr", "1"), cpu_runtime()
    weight = torch.ones(8, 4, 1, 1).contiguous(memory_format=torch.channels_last)
    parameters = [torch.nn.Parameter(weight)]
    return main.build_optimizer(flags, runtime, main.Precision(flags, runtime), parameters)


def options(optimizer):
    return {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}


def saved_by_another_torch(optimizer, **state):
    """A state dict that names its parameter otherwise, and has the other kind of SGD."""
    fused = not options(optimizer).get("fused")
    return {"state": {7: state}, "param_groups": [{"params": [7], "lr": 5, "fused": fused}]}


def test_an_optimizer_takes_its_state_from_another_torch_and_keeps_its_options(optimizer):
    before = dict(options(optimizer), lr=5)
    momentum = torch.randn(8, 4, 1, 1)
    saved = saved_by_another_torch(optimizer, momentum_buffer=momentum)
    main.load_optimizer_state(optimizer, saved)
    weight, = main.optimizer_parameters(optimizer)
    assert options(optimizer) == before
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)


@pytest.mark.parametrize("name,channels,parameters", [
    ("exp_avg", 8, 1), ("momentum_buffer", 3, 1), ("momentum_buffer", 8, 2)])
def test_the_state_of_another_optimizer_is_refused(optimizer, name, channels, parameters):
    saved = saved_by_another_torch(optimizer, **{name: torch.randn(channels, 4, 1, 1)})
    saved["param_groups"][0]["params"] *= parameters
    with pytest.raises(ValueError):
        main.load_optimizer_state(optimizer, saved)


def test_sgd_does_not_resume_as_rmsprop():
    optimizer = main.RMSpropTF([torch.nn.Parameter(torch.ones(8))], 0.1, 0.9, 0)
    saved = saved_by_another_torch(optimizer, momentum_buffer=torch.ones(8))
    with pytest.raises(ValueError):
        main.load_optimizer_state(optimizer, saved)


@pytest.mark.parametrize("signum,extra", [
    pytest.param(signal.SIGTERM, [], id="1 process, SIGTERM"),
    pytest.param(signal.SIGKILL, several(2), id="2 processes, SIGKILL"),
    pytest.param(signal.SIGTERM, several(4), id="4 processes, SIGTERM")])
@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
        images, tmp_path, monkeypatch, signum, extra):
    monkeypatch.delenv("OMP_NUM_THREADS")  # as many threads as a user gets
    arguments = [images, "--epochs", 4, "--seed", 4, "--save-freq", 3, "--resume", "auto"]
    arguments += STEADY + extra
    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    for folder in (whole, interrupted):
        folder.mkdir()
    losses(run_main(*arguments, cwd=whole))
    run = start_main(*arguments, cwd=interrupted)
    read_until(run, r"^Epoch: \[1\]\[1/")
    run.send_signal(signum)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == (143 if signum == signal.SIGTERM else -signum), output
    result = run_main(*arguments, cwd=interrupted)
    assert len(losses(result)) < 16 and "resumed from" in result.stdout
    assert folders_differ(whole, interrupted) == []


def test_a_run_stopped_between_its_last_step_and_the_evaluation_resumes(images, trained, tmp_path):
    folder = trained[0]
    shutil.copy(str(folder / "checkpoint-1.pth.tar"), str(tmp_path / "checkpoint.pth.tar"))
    shutil.copy(str(folder / "model_best.pth.tar"), str(tmp_path))
    arguments = [images, "--epochs", 2, "--seed", 1, "--resume", "auto", *STEADY]
    result = run_main(*arguments, cwd=tmp_path)
    assert losses(result) == []  # no step was left
    assert "resumed from ./checkpoint.pth.tar: epoch 1, 32 images into it" in result.stdout
    assert folders_differ(folder, tmp_path) == []


def test_a_finished_run_resumes_to_its_metrics_and_result(images, trained, run_here, tmp_path):
    arguments = [images, "--epochs", 2, "--resume", trained[0] / "checkpoint.pth.tar"]
    result = run_here(*arguments)
    assert losses(result) == [] and final_loss(result) == final_loss(trained[1])
    assert (tmp_path / "metrics.csv").read_text() == (trained[0] / "metrics.csv").read_text()


def test_a_reference_checkpoint_resumes(images, trained, run_here, tmp_path):
    state = read_checkpoint(trained[0])["state_dict"]
    prefixed = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 1, "state_dict": prefixed, "best_acc1": 1.0}, "reference.pth")
    level = ["--opt-level", "O2"] if main.TORCH >= (1, 10) else []
    losses(run_here(images, "--resume", "reference.pth", "--epochs", 2, "--lr", 0, *level))
    resumed = read_checkpoint(tmp_path)["state_dict"]
    for name in (name for name, _ in mnasnet.mnasnet0_5(num_classes=4).named_parameters()):
        assert torch.equal(resumed[name], state[name]), name


def test_a_checkpoint_of_another_network_is_refused(images, trained, run_here):
    path = trained[0] / "checkpoint.pth.tar"
    error = the_error(run_here(images, "-e", "--resume", path, "-a", "mnasnet1_3"))
    assert "does not fit" in error and "mnasnet0_5" in error


def test_a_checkpoint_of_other_classes_is_refused(images, trained, run_here, tmp_path):
    shutil.copytree(str(images), str(tmp_path / "data"))
    for split in ("train", "val"):
        (tmp_path / "data" / split / "class 1").rename(tmp_path / "data" / split / "class 9")
    for purpose in ([], ["-e"]):
        path = trained[0] / "checkpoint.pth.tar"
        error = the_error(run_here("data", "--resume", path, *purpose))
        assert "was trained on 4 other classes" in error


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {}], ids=["a list", "empty"])
def test_a_file_without_a_state_dict_is_refused(run_here, content):
    torch.save(content, "file.pth")
    error = the_error(run_here("--synthetic", 16, "--resume", "file.pth"))
    assert "file.pth is not a MnasNet checkpoint" in error


@pytest.mark.parametrize("classes,note", [
    (list("abcdefg"), "7 classes there, 4 here"), (list("abcd"), "4 other classes there, 4 here")])
def test_pretrained_weights_of_other_classes_train(images, run_here, classes, note):
    state = mnasnet.mnasnet0_5(num_classes=len(classes)).state_dict()
    torch.save({"state_dict": state, "classes": classes}, "other.pth")
    result = run_here(images, "--epochs", 1, "--pretrained", "--weights", "other.pth", "--lr", 0)
    assert len(losses(result)) == 4
    assert f"other.pth: {note}, the classifier is re-initialised" in result.stdout
    trained = main.read_checkpoint("checkpoint.pth.tar")["state_dict"]
    assert torch.equal(trained["layers.0.weight"], state["layers.0.weight"])
    assert not torch.equal(trained["classifier.1.weight"], state["classifier.1.weight"][:4])
    evaluated = run_here(images, "-e", "--pretrained", "--weights", "other.pth")
    assert f"other.pth was trained on {note.split(' there')[0]}" in the_error(evaluated)
    missing = run_here(images, "--pretrained", "--weights", "none.pth")
    assert "no checkpoint 'none.pth'" in the_error(missing)


@pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.running_var"])
def test_weights_that_are_not_finite_are_refused(images, trained, run_here, name):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["state_dict"][name][0] = float("nan")
    torch.save(checkpoint, "nan.pth")
    for purpose in (["-e", "--resume"], ["--resume"], ["--pretrained", "--weights"]):
        error = the_error(run_here(images, "--epochs", 3, *purpose, "nan.pth"))
        assert f"nan.pth holds values that are not finite ({name})" in error


def test_an_evaluation_whose_loss_is_not_finite_is_an_error(images, trained, run_here):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["state_dict"]["classifier.1.bias"][0] = 3e38
    checkpoint["state_dict"]["classifier.1.weight"] *= 1e38
    torch.save(checkpoint, "large.pth")
    result = run_here(images, "-e", "--resume", "large.pth")
    assert "the loss is" in the_error(result) and "Result:" not in result.stdout


def test_a_model_that_is_not_finite_is_not_saved(images, run_here, tmp_path):
    """Where the statistics of BatchNorm became infinite, though no loss was."""
    state = mnasnet.mnasnet0_5(num_classes=4).state_dict()
    state["layers.0.weight"] *= 1e25
    torch.save(state, "huge.pth")
    error = the_error(run_here(images, "--epochs", 1, "--lr", 0, "--pretrained", "--weights",
                               "huge.pth"))
    assert "the model holds values that are not finite" in error
    assert not list(tmp_path.glob("*.pth.tar"))


@pytest.mark.parametrize("name,value", [
    ("epoch", "two"), ("images", [1]), ("best_acc1", {}), ("history", [{"epoch": 0}]),
    ("history", 5), ("seed", "x"), ("running_stats", torch.zeros(1, 3)), ("totals", 1),
    ("optimizer", [1]), ("amp", 7), ("flags", "none"), ("state_dict", {"classifier.1.weight": 1})])
def test_values_of_other_types_are_refused(images, trained, run_here, name, value):
    checkpoint = read_checkpoint(trained[0])
    checkpoint[name] = value
    torch.save(checkpoint, "odd.pth")
    assert "odd.pth" in the_error(run_here(images, "--epochs", 3, "--resume", "odd.pth"))


def test_files_that_are_no_checkpoints_are_called_what_they_are(run_here, tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    for name, words in [("text.pth", "can't be read as a checkpoint: it starts with b'no'"),
                        ("folder", "no checkpoint 'folder' (Is a directory)")]:
        error = the_error(run_here("--synthetic", 16, "-e", "--resume", name))
        assert words in error and "weights_only" not in error


def test_a_run_from_scratch_sets_older_results_aside(images, trained, run_here, tmp_path):
    for name in ("model_best.pth.tar", "checkpoint.pth.tar", "metrics.csv"):
        shutil.copy(str(trained[0] / name), str(tmp_path))
    (tmp_path / "other.pth.tar").write_text("of someone else")
    result = run_here(images, "--epochs", 1)
    folder, = tmp_path.glob("previous-*")
    assert f"=> the results of an earlier run are now in ./{folder.name}" in result.stdout
    for name in ("model_best.pth.tar", "checkpoint.pth.tar", "metrics.csv"):
        assert (folder / name).read_bytes() == (trained[0] / name).read_bytes()
    assert folder.stat().st_mode == tmp_path.stat().st_mode
    assert (tmp_path / "other.pth.tar").exists() and read_checkpoint(tmp_path)["epoch"] == 1
    losses(run_here(images, "--epochs", 2, "--resume", "auto"))
    assert list(tmp_path.glob("previous-*")) == [folder]  # a resumed run moves nothing


@pytest.mark.parametrize("extra,status", [
    (["--resume", "auto", "--freeze", "features"], 1), (["--epochs", 1, "--run-prof"], 0)])
def test_the_results_of_a_run_stay_where_another_fails_or_profiles(
        images, trained, run_here, tmp_path, extra, status):
    for name in ("checkpoint.pth.tar", "metrics.csv", "args.json"):
        shutil.copy(str(trained[0] / name), str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run_here(images, *extra, "-b", 3).returncode == status
    assert not list(tmp_path.glob("previous-*"))
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())


def test_a_run_waits_for_the_checkpoint_of_the_one_before(images, trained, tmp_path):
    with main.lock_folder(str(tmp_path)):  # as a run does until it has saved
        run = start_main(images, "--epochs", 3, "--resume", "auto", cwd=tmp_path)
        time.sleep(6)
        shutil.copy(str(trained[0] / "checkpoint.pth.tar"), str(tmp_path))
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and "=> resumed from ./checkpoint.pth.tar: epoch 2" in output


def test_what_a_resumed_run_changes_is_said(images, trained, run_here):
    path = trained[0] / "checkpoint-1.pth.tar"  # a batch of 8, in the middle of an epoch
    result = run_here(images, "--resume", path, "--epochs", 3, "-b", 4, "--wd", 0.5, "--lr", 0.2)
    line = next(line for line in result.stdout.splitlines() if "no longer bit-identical" in line)
    for change in ("epochs 2, now 3", "batch size 8, now 4", "wd 0.0001, now 0.5",
                   "lr 0.001, now 0.2", "bn momentum 0.9, now 0.1"):
        assert change in line
    assert "workers" not in line and "print freq" not in line


def test_the_training_accuracy_counts_images(images, trained, run_here, tmp_path):
    """Also where a run resumed in the middle of an epoch with another batch size."""
    checkpoint = read_checkpoint(trained[0], "checkpoint-1.pth.tar")
    checkpoint["images"] = 16  # of 32, two steps of 8, of which half the images were correct
    checkpoint["totals"] = torch.tensor([[16 * 1.5, 16, 8, 16, 16, 0.]])
    torch.save(checkpoint, "half.pth")
    losses(run_here(images, "--resume", "half.pth", "--epochs", 2, "-b", 2, "--lr", 0))
    row = read_checkpoint(tmp_path)["history"][-1]
    correct = row["train_acc1"] / 100 * 32
    assert abs(correct - round(correct)) < 1e-4 and 8 <= round(correct) <= 24


@pytest.mark.slow
def test_an_evaluation_needs_no_flag_of_the_training(images, run_here, tmp_path):
    level = "O1" if main.TORCH >= (1, 10) else "O0"
    sizes = ["--train-crop-size", 64, "--val-resize-size", 72, "--val-crop-size", 64]
    losses(run_here(images, "--epochs", 1, *sizes, "--opt-level", level, "--seed", 3, *STEADY))
    expected = read_checkpoint(tmp_path)["history"][-1]
    alone = [images, "-e", "--device", "cpu", "--resume", "model_best.pth.tar"]
    for processes in ([], several(3)):
        result = run_main(*alone, *processes, cwd=tmp_path, small=False)
        assert float(re.search(r"Acc@1 (\S+)", result.stdout).group(1)) == pytest.approx(
            expected["acc1"], abs=1e-3)
        assert final_loss(result) == pytest.approx(expected["val_loss"], rel=1e-3)
        assert ("with --arch=mnasnet0_5 --val-resize-size=72 --val-crop-size=64"
                in result.stdout.replace(f" --opt-level={level}", ""))
    larger = run_main(*alone, "--val-crop-size", 72, cwd=tmp_path, small=False)
    assert "--val-crop-size" not in larger.stdout and final_loss(larger) != expected["val_loss"]
    flags = json.loads((tmp_path / "args.json").read_text())
    assert (flags["train_crop_size"], flags["seed"], flags["opt_level"]) == (64, 3, level)


def save_as_torchvision_trains(state, path):
    torch.save({"model": state, "args": argparse.Namespace(lr=0.5), "epoch": 3}, path)


def save_as_ddp(state, path):
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


@pytest.mark.parametrize("save", [save_as_torchvision_trains, save_as_ddp, torch.save])
def test_weights_from_elsewhere_load(tmp_path, save):
    if save is save_as_torchvision_trains and (1, 13) <= main.TORCH < (2, 4):
        pytest.skip("these versions of torch read no flags beside weights")
    state = mnasnet.mnasnet0_5(num_classes=3).state_dict()
    save(state, str(tmp_path / "weights.pth"))
    model = mnasnet.mnasnet0_5(num_classes=3)
    flags = parse("--pretrained", "--weights", tmp_path / "weights.pth")
    main.load_pretrained(model, flags, ["a", "b", "c"])
    assert differences(dict(model.state_dict()), dict(state)) == []


def test_timm_names_are_understood():
    """The names of timm 1.0's mnasnet_050, in an order of their own."""
    model = mnasnet.mnasnet0_5(num_classes=3)
    parts = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
    modules = ["conv_stem", "bn1", "blocks.0.0.conv_dw", "blocks.0.0.bn1", "blocks.0.0.conv_pw",
               "blocks.0.0.bn2"]
    modules += [f"blocks.{stack}.{block}.{part}" for stack, repeats in
                enumerate((3, 3, 3, 2, 4, 1), 1) for block in range(repeats) for part in parts]
    modules += ["conv_head", "bn2", "classifier"]
    ours = list(dict.fromkeys(name.rsplit(".", 1)[0] for name in model.state_dict()))
    assert len(ours) == len(modules)
    state = {f"{dict(zip(ours, modules))[name.rsplit('.', 1)[0]]}.{name.rsplit('.', 1)[1]}": tensor
             for name, tensor in model.state_dict().items()}
    renamed = mnasnet.rename_from_timm(dict(sorted(state.items())))
    assert differences(renamed, dict(model.state_dict())) == []


def test_networks_of_timm_give_the_same_logits(tmp_path):
    timm = pytest.importorskip("timm")
    for name, arch in [("mnasnet_050", "mnasnet0_5"), ("mnasnet_100", "mnasnet1_0")]:
        theirs = timm.create_model(name, num_classes=3).eval()
        torch.save(theirs.state_dict(), str(tmp_path / "weights.pth"))
        ours = getattr(mnasnet, arch)(num_classes=3).eval()
        flags = parse("--pretrained", "--weights", tmp_path / "weights.pth", "-a", arch)
        main.load_pretrained(ours, flags, ["a", "b", "c"])
        images = torch.randn(2, 3, 64, 64)
        assert torch.allclose(ours(images), theirs(images), atol=1e-6)


def test_pretrained_weights_evaluate(images, trained, run_here):
    torch.save(read_checkpoint(trained[0])["state_dict"], "four.pth")
    result = run_here(images, "-e", "--pretrained", "--weights", "four.pth")
    expected = read_checkpoint(trained[0])["history"][-1]["val_loss"]
    assert final_loss(result) == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_of_weights_takes_the_flags_of_their_training(images, trained, run_here):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["flags"]["bn_eps"] = 0.5
    torch.save(checkpoint, "other.pth")
    results = [run_here(images, "-e", *words, "other.pth")
               for words in (["--resume"], ["--pretrained", "--weights"])]
    assert final_loss(results[0]) == final_loss(results[1])
    assert all("with --bn-eps=0.5" in result.stdout for result in results)
    note = "trained with --bn-eps 0.5, now 1e-05"
    words = ["--pretrained", "--weights", "other.pth", "--lr", 0]
    assert note in run_here(images, "--epochs", 1, *words).stdout


def test_published_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    state = mnasnet.mnasnet0_5(num_classes=3).state_dict()
    torch.save(state, str(tmp_path / "weights"))
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:10]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    model, flags = mnasnet.mnasnet0_5(num_classes=3), parse("--pretrained")
    classes = ["a", "b", "c"]

    def publish(name):
        shutil.copy(str(tmp_path / "weights"), str(tmp_path / name))
        monkeypatch.setitem(mnasnet.WEIGHTS, "mnasnet0_5", (tmp_path / name).as_uri())

    publish("net-0000000000.pth")
    with pytest.raises(main.UserError, match="--weights FILE"):
        main.load_pretrained(model, flags, classes)
    publish(f"net-{digest}.pth")
    main.load_pretrained(model, flags, classes)
    (tmp_path / f"net-{digest}.pth").unlink()
    main.load_pretrained(model, flags, classes)
    assert differences(dict(model.state_dict()), dict(state)) == []
