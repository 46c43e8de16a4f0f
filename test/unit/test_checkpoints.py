"""Checkpoints: what may be read, what is kept, and runs that resume from them."""

import hashlib
import pickle
import shutil
import signal

import pytest
import torch

import main
import mnasnet
from helpers import (STEADY, cpu_runtime, differences, final_loss, folders_differ, losses,
                     needs_bf16, parse, read_checkpoint, read_until, run_main, several, start_main,
                     the_error)


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
    with pytest.raises(main.UserError, match="bad.pth"):
        main.read_checkpoint("bad.pth")
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


@pytest.mark.parametrize("signum,extra", [
    pytest.param(signal.SIGTERM, [], id="1 process, SIGTERM"),
    pytest.param(signal.SIGKILL, ["--opt-level", "O2"], id="1 process, SIGKILL, O2",
                 marks=needs_bf16),
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
        assert "was trained on other classes" in error


@pytest.mark.parametrize("content", [{"state_dict": [1]}, {}], ids=["a list", "empty"])
def test_a_file_without_a_state_dict_is_refused(run_here, content):
    torch.save(content, "file.pth")
    error = the_error(run_here("--synthetic", 16, "--resume", "file.pth"))
    assert "file.pth is not a MnasNet checkpoint" in error


def test_pretrained_weights_of_other_classes_train(images, run_here):
    torch.save(mnasnet.mnasnet0_5(num_classes=7).state_dict(), "seven.pth")
    result = run_here(images, "--epochs", 1, "--pretrained", "--weights", "seven.pth")
    assert len(losses(result)) == 4
    note = "seven.pth: 7 classes there, 4 here, the classifier is re-initialised"
    assert note in result.stdout
    missing = run_here(images, "--pretrained", "--weights", "none.pth")
    assert "no checkpoint 'none.pth'" in the_error(missing)


def test_pretrained_weights_evaluate(images, trained, run_here):
    torch.save(read_checkpoint(trained[0])["state_dict"], "four.pth")
    result = run_here(images, "-e", "--pretrained", "--weights", "four.pth")
    expected = read_checkpoint(trained[0])["history"][-1]["val_loss"]
    assert final_loss(result) == pytest.approx(expected, rel=1e-4)


def test_published_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    state = mnasnet.mnasnet0_5(num_classes=3).state_dict()
    torch.save(state, str(tmp_path / "weights"))
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:10]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    model, flags = mnasnet.mnasnet0_5(num_classes=3), parse("--pretrained")

    def publish(name):
        shutil.copy(str(tmp_path / "weights"), str(tmp_path / name))
        monkeypatch.setitem(mnasnet.WEIGHTS, "mnasnet0_5", (tmp_path / name).as_uri())

    publish("net-0000000000.pth")
    with pytest.raises(main.UserError, match="--weights FILE"):
        main.load_pretrained(model, flags)
    publish(f"net-{digest}.pth")
    main.load_pretrained(model, flags)
    (tmp_path / f"net-{digest}.pth").unlink()
    main.load_pretrained(model, flags)
    assert differences(dict(model.state_dict()), dict(state)) == []
