"""apex's amp, through a stub of it (apex_stub). amp refuses the CPU: the runs see a "gpu"."""

import dataclasses
import importlib
import json
import os
import signal
import sys
import types

import pytest
import torch

import main
from helpers import SMALL, TORCH, UNIT, read_checkpoint, run_main, several

ON_GPU = SMALL + ["--device", "gpu", "-b", "16", "--workers", "0", "--epochs", "2"]
MODULES = ("apex", "apex.amp", "apex.optimizers", "ascend_apex")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A backend "gpu" whose tensors are on the CPU, and the runs' folder as the current one."""
    handlers = {signum: signal.getsignal(signum) for signum in main.SIGNALS}
    monkeypatch.setitem(main.BACKENDS, "gpu", dataclasses.replace(main.BACKENDS["gpu"], module=""))
    monkeypatch.setattr(main, "device_count", lambda backend: (1, ""))
    monkeypatch.setattr(
        main, "open_device", lambda flags, backend: main.Runtime(backend, torch.device("cpu")))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on images this small
    yield main.BACKENDS["gpu"]
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def import_again(monkeypatch, wanted):
    """Imports a module of the stub as a new process would."""
    monkeypatch.syspath_prepend(str(UNIT / "apex_stub"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(wanted)


@pytest.fixture
def amp(monkeypatch):
    yield import_again(monkeypatch, "apex.amp")
    for name in MODULES:
        sys.modules.pop(name, None)


def calls_of(amp, name):
    return [arguments for called, arguments in amp.calls if called == name]


def make_precision(backend, *arguments):
    flags = main.parse_args(["data", "--opt-level", "O1"] + list(arguments))
    return main.Precision(flags, main.Runtime(backend, torch.device("cpu")))


def initialize(precision):
    """A small model and its optimizer, prepared for training."""
    model = torch.nn.Linear(2, 2)
    return precision.initialize(model, torch.optim.SGD(precision.prepare(model), 0.1))


@pytest.mark.parametrize("level", ["O0", "O2"])
@pytest.mark.parametrize("found", [None, types.ModuleType("apex")], ids=["none", "without amp"])
def test_no_apex_amp(gpu, monkeypatch, capsys, found, level):
    monkeypatch.setitem(sys.modules, "apex", found)
    arguments = ["--synthetic", "8", "--amp-backend", "apex", "--opt-level", level]
    assert main.main(arguments + ON_GPU) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2025" in error and "--amp-backend native" in error
    assert main.find_apex(main.parse_args(["data"]), gpu) is None  # what auto makes of it


def test_apex_is_not_for_the_cpu(gpu, amp, capsys):
    arguments = ["--synthetic", "8", "--amp-backend", "apex"] + ON_GPU + ["--device", "cpu"]
    assert main.main(arguments) == 1
    assert "apex needs a card" in capsys.readouterr().err


@pytest.mark.parametrize("level,scale,more", [
    ("O1", "dynamic", ["--amp-backend", "apex"]), ("O2", "dynamic", []),
    ("O2", 128.0, ["--loss-scale", "128"])])
def test_train_and_resume(gpu, amp, images, monkeypatch, tmp_path, level, scale, more):
    arguments = [str(images)] + ON_GPU + ["--opt-level", level] + more
    assert main.main(arguments) == 0
    assert calls_of(amp, "initialize") == [
        {"opt_level": level, "loss_scale": scale, "device": "cpu"}]
    assert len(calls_of(amp, "scale_loss")) == 4  # two steps an epoch
    first_scale = 2.0 ** 16 if scale == "dynamic" else scale
    whole = read_checkpoint(tmp_path)
    assert whole["amp"] == {"loss_scaler0": {"loss_scale": first_scale, "unskipped": 4}}
    assert {tensor.dtype for tensor in whole["state_dict"].values()} == {torch.float32, torch.int64}
    weight = whole["state_dict"]["layers.0.weight"]
    assert not torch.equal(weight, weight.half().float())  # fp32 weights under O2, too

    amp = import_again(monkeypatch, "apex.amp")
    (tmp_path / "resumed").mkdir()
    resume = ["--resume", "checkpoint-1.pth.tar", "--output-dir", "resumed"]
    assert main.main(arguments + resume) == 0
    resumed = read_checkpoint(tmp_path / "resumed")
    assert resumed["amp"]["loss_scaler0"]["loss_scale"] == first_scale
    if scale == "dynamic":
        state = {"loss_scale": first_scale, "unskipped": 2}
        assert calls_of(amp, "load_state_dict") == [{"loss_scaler0": state}]
        assert resumed["amp"] == whole["amp"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_an_overflow_takes_no_step(gpu, amp):
    precision = make_precision(gpu)
    model, optimizer = initialize(precision)
    before = model.weight.detach().clone()
    loss = model(torch.ones(1, 2)).sum()
    precision.backward_and_step(loss * float("inf"), model, optimizer)
    assert torch.equal(model.weight, before)
    assert precision.state_dict()["loss_scaler0"] == {"loss_scale": 2.0 ** 15, "unskipped": 0}
    precision.backward_and_step(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert torch.allclose(model.weight, before - 0.1) and model.weight.grad.abs().sum() == 0


def test_apex_of_ascend(amp, monkeypatch):
    """It gets combine_grad, and has the fused optimizer."""
    ascend = import_again(monkeypatch, "ascend_apex")
    backend = dataclasses.replace(main.BACKENDS["npu"], module="")
    runtime = main.Runtime(backend, torch.device("cpu"))
    flags = main.parse_args(["data", "--opt-level", "O2"])
    precision, model = main.Precision(flags, runtime), torch.nn.Linear(2, 2)
    optimizer = main.build_optimizer(flags, runtime, precision, precision.prepare(model))
    assert type(optimizer) is ascend.NpuFusedSGD
    model, optimizer = precision.initialize(model, optimizer)
    assert calls_of(ascend.amp, "combine_grad") == [{"value": True}]
    before = model.weight.detach().clone()
    precision.backward_and_step(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert not torch.equal(model.weight, before)


# The loss scale of a checkpoint


def apex_state(scale):
    return {"loss_scaler0": {"loss_scale": scale, "unskipped": 7}}


NATIVE_STATE = {"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                "growth_interval": 2000, "_growth_tracker": 7}


@pytest.fixture
def native(monkeypatch):
    """Makes a Precision with torch's own scaler, which does nothing where there is no card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    return lambda *arguments: make_precision(main.BACKENDS["gpu"], *arguments)


@pytest.mark.skipif(TORCH >= (1, 6), reason="this torch has autocast for the GPU")
def test_native_needs_autocast(native):
    with pytest.raises(main.UserError, match="--opt-level O0, or install an apex that has amp"):
        native()


def test_apex_takes_the_scale_of_apex(gpu, amp):
    precision = make_precision(gpu)
    initialize(precision)
    assert precision.load_state_dict(apex_state(512.0))
    assert precision.state_dict() == apex_state(512.0)
    assert precision.load_state_dict({})  # of a run in fp32 or bfloat16: the scale stays
    assert precision.state_dict() == apex_state(512.0)


def test_a_given_loss_scale_stays(gpu, amp):
    precision = make_precision(gpu, "--loss-scale", "64")
    initialize(precision)
    assert precision.load_state_dict(apex_state(512.0))
    assert precision.state_dict()["loss_scaler0"]["loss_scale"] == 64


@pytest.mark.skipif(TORCH < (1, 6), reason="torch 1.5 has no loss scale of its own")
def test_torch_takes_the_scale_of_torch(native):
    precision = native()
    assert "O1 (float16)" == str(precision)
    assert precision.load_state_dict(NATIVE_STATE)
    assert precision.state_dict() == NATIVE_STATE
    assert not precision.load_state_dict(apex_state(64.0))
    assert precision.state_dict() == NATIVE_STATE
    precision = native("--loss-scale", "64")
    assert precision.load_state_dict(NATIVE_STATE)
    assert precision.state_dict()["scale"] == 64


def test_the_scale_of_torch_is_not_for_apex(gpu, amp, images, trained, tmp_path, capsys):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["amp"] = NATIVE_STATE
    torch.save(checkpoint, "native")
    assert main.main([str(images)] + ON_GPU + ["--epochs", "3", "--resume", "native"]) == 0
    assert ("=> the loss scale of native is of another --amp-backend: it is re-initialised"
            in capsys.readouterr().out)
    state = {"loss_scale": 65536.0, "unskipped": 2}
    assert read_checkpoint(tmp_path)["amp"] == {"loss_scaler0": state}


@pytest.mark.slow
def test_two_cards(npu, images, tmp_path):
    """The stub refuses a model that is wrapped, and DDP's views of its buckets as gradients."""
    log = tmp_path / "calls"
    path = os.pathsep.join([npu["PYTHONPATH"], str(UNIT / "apex_stub")])
    result = run_main(images, *ON_GPU, "--device", "npu", "--opt-level", "O2", "--epochs", 1,
                      *several(2), cwd=tmp_path,
                      **dict(npu, PYTHONPATH=path, APEX_STUB_LOG=str(log)))
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    devices = [arguments["device"] for name, arguments in calls if name == "initialize"]
    assert sorted(devices) == ["npu:0", "npu:1"]
    assert len([name for name, _ in calls if name == "scale_loss"]) == 2 * 2
    state = {"loss_scale": 65536.0, "unskipped": 2}
    assert read_checkpoint(tmp_path)["amp"] == {"loss_scaler0": state}
