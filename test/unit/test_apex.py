"""apex's amp, through a stub of it (apex_stub). amp refuses the cpu, so the runs are told that they have a gpu."""

import dataclasses
import importlib
import json
import shutil
import signal
import sys
import types

import pytest
import torch

import main
from conftest import SMALL, UNIT, checkpoint, refused, run_main

FEW = ["--device", "gpu", "-a", "mnasnet0_5", "-b", "16", "--train-crop-size", "32", "--val-resize-size", "32",
       "--val-crop-size", "32", "--lr", "0.01", "--workers", "0", "--epochs", "2"]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A "gpu" whose tensors are the cpu's."""
    handlers = {signum: signal.getsignal(signum) for signum in main.SIGNALS}
    monkeypatch.setitem(main.KINDS, "gpu", dataclasses.replace(main.KINDS["gpu"], module=""))
    monkeypatch.setattr(main, "cards_present", lambda kind: (1, ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on images this small
    yield main.KINDS["gpu"]
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def fresh(monkeypatch, *names):
    """Imports modules of the stub anew, each run being a process of its own for apex; the last of them."""
    monkeypatch.syspath_prepend(str(UNIT / "apex_stub"))
    for name in ("apex", "apex.amp", "apex.optimizers", "ascend_apex"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return [importlib.import_module(name) for name in names][-1]


@pytest.fixture
def amp(monkeypatch):
    yield fresh(monkeypatch, "apex.amp")
    for name in ("apex", "apex.amp", "apex.optimizers", "ascend_apex"):
        sys.modules.pop(name, None)


def called(amp, name):
    return [what for called, what in amp.calls if called == name]


@pytest.mark.parametrize("found", [None, types.ModuleType("apex")], ids=["none", "without amp"])
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_no_apex_amp(gpu, monkeypatch, capsys, found, level):
    monkeypatch.setitem(sys.modules, "apex", found)
    assert main.main(["--synthetic", "8", "--amp-backend", "apex", "--opt-level", level] + FEW) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "removed" in error and "2025" in error and "--amp-backend native" in error
    assert main.find_apex(main.parse_args(["somewhere"]), gpu) is None  # what auto makes of it


def test_not_on_the_cpu(amp, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--synthetic", "8", "--amp-backend", "apex"] + FEW + ["--device", "cpu"]) == 1
    assert "does not run on the cpu" in capsys.readouterr().err


@pytest.mark.parametrize("level,scale,more", [("O1", "dynamic", ["--amp-backend", "apex"]), ("O2", "dynamic", []),
                                              ("O2", 128.0, ["--loss-scale", "128"])])
def test_train_and_resume(gpu, amp, images, monkeypatch, tmp_path, level, scale, more):
    order, ddp = [], main.wrap_for_training
    optimizer, initialize = main.build_optimizer, amp.initialize
    monkeypatch.setattr(main, "build_optimizer", lambda *a: order.append("optimizer") or optimizer(*a))
    monkeypatch.setattr(amp, "initialize", lambda *a, **k: order.append("initialize") or initialize(*a, **k))
    monkeypatch.setattr(main, "wrap_for_training", lambda *a: order.append("ddp") or ddp(*a))
    arguments = [str(images), "--opt-level", level] + more + FEW
    assert main.main(arguments) == 0
    assert order == ["optimizer", "initialize", "ddp"]
    assert called(amp, "initialize") == [{"opt_level": level, "loss_scale": scale, "device": "cpu"}]
    assert len(called(amp, "scale_loss")) == 4  # two steps an epoch
    start = 2.0 ** 16 if scale == "dynamic" else scale
    whole = checkpoint(tmp_path)
    assert whole["amp"] == {"loss_scaler0": {"loss_scale": start, "unskipped": 4}}
    assert {t.dtype for t in whole["state_dict"].values()} == {torch.float32, torch.int64}
    weight = whole["state_dict"]["layers.0.weight"]
    assert not torch.equal(weight, weight.half().float())  # fp32 weights under O2, too

    # From the first epoch's checkpoint, in what is a new process for apex, to the same end.
    amp = fresh(monkeypatch, "apex.amp")
    (tmp_path / "resumed").mkdir()
    shutil.copy(str(tmp_path / "checkpoint-1.pth.tar"), str(tmp_path / "first"))
    assert main.main(arguments + ["--resume", str(tmp_path / "first"), "--output-dir", str(tmp_path / "resumed")]) == 0
    assert called(amp, "load_state_dict") == [{"loss_scaler0": {"loss_scale": start, "unskipped": 2}}]
    resumed = checkpoint(tmp_path / "resumed")
    assert resumed["amp"] == whole["amp"]
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_an_overflow_takes_no_step(gpu, amp):
    model = torch.nn.Linear(2, 2)
    precision = main.Precision(main.parse_args(["d", "--opt-level", "O1"]), main.Runtime(gpu, torch.device("cpu")))
    model, optimizer = precision.initialize(model, torch.optim.SGD(precision.prepare(model), 0.1))
    before = model.weight.detach().clone()
    precision.backward_and_step(model(torch.ones(1, 2)).sum() * float("inf"), model, optimizer)
    assert torch.equal(model.weight, before)
    assert precision.state_dict()["loss_scaler0"] == {"loss_scale": 2.0 ** 15, "unskipped": 0}
    precision.backward_and_step(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert torch.allclose(model.weight, before - 0.1) and model.weight.grad.abs().sum() == 0


def test_ascends_apex(amp, monkeypatch):
    """combine_grad, and the fused optimiser."""
    ascend = fresh(monkeypatch, "apex.amp", "ascend_apex")
    runtime = main.Runtime(dataclasses.replace(main.KINDS["npu"], module=""), torch.device("cpu"))
    flags = main.parse_args(["somewhere", "--opt-level", "O2"])
    precision, model = main.Precision(flags, runtime), torch.nn.Linear(2, 2)
    optimizer = main.build_optimizer(flags, runtime, precision, precision.prepare(model))
    assert type(optimizer) is ascend.NpuFusedSGD
    model, optimizer = precision.initialize(model, optimizer)
    assert called(ascend.amp, "combine_grad") == [{"value": True}]
    before = model.weight.detach().clone()
    precision.backward_and_step(model(torch.ones(1, 2)).sum(), model, optimizer)
    assert not torch.equal(model.weight, before)


@pytest.fixture
def native(monkeypatch):
    """torch's own scaler, which does nothing where there is no card; a Precision with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "apex", None)
    flags = main.parse_args(["somewhere", "--opt-level", "O1"])
    return lambda: main.Precision(flags, main.Runtime(main.KINDS["gpu"], torch.device("cpu")))


def test_the_state_of_apex_in_native(native):
    if not hasattr(torch.cuda.amp, "autocast"):  # torch 1.5
        with pytest.raises(main.Fault, match="--opt-level O0, or install an apex that has amp"):
            native()
        return
    precision = native()
    assert "native, float16" in str(precision)
    precision.load_state_dict({"loss_scaler0": {"loss_scale": 512.0, "unskipped": 7}})
    state = precision.state_dict()
    assert state["scale"] == 512 and state["_growth_tracker"] == 7 and state["growth_interval"] == 2000
    other = native()
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize("state", [{"scale": 512.0, "growth_factor": 2.0, "backoff_factor": 0.5,
                                    "growth_interval": 2000, "_growth_tracker": 7},
                                   {"loss_scaler0": {"loss_scale": 512.0, "unskipped": 7}}], ids=["native", "apex"])
def test_a_state_in_apex(gpu, amp, state):
    model = torch.nn.Linear(2, 2)
    precision = main.Precision(main.parse_args(["d", "--opt-level", "O1"]), main.Runtime(gpu, torch.device("cpu")))
    precision.initialize(model, torch.optim.SGD(precision.prepare(model), 0.1))
    precision.load_state_dict(state)
    assert precision.state_dict() == {"loss_scaler0": {"loss_scale": 512.0, "unskipped": 7}}
    precision.loss_scale = 64.0  # --loss-scale 64 at the resume
    precision.load_state_dict(state)
    assert precision.state_dict()["loss_scaler0"]["loss_scale"] == 64
    precision.loss_scale = "dynamic"
    precision.load_state_dict(state)
    precision.load_state_dict({})  # of a run in fp32 or bfloat16: the scale stays
    assert precision.state_dict()["loss_scaler0"]["loss_scale"] == 512


@pytest.mark.slow
def test_two_cards(npu, images, tmp_path):
    """The stub refuses a model that is wrapped, and DDP's views of its buckets as gradients."""
    if refused(npu, tmp_path):
        return
    log = tmp_path / "calls"
    variables = dict(npu, PYTHONPATH="{}:{}".format(npu["PYTHONPATH"], UNIT / "apex_stub"), APEX_STUB_LOG=str(log))
    result = run_main(images, *SMALL[2:], "--device", "npu", "--opt-level", "O2", "--epochs", 1, "-b", 16,
                      "--multiprocessing-distributed", "--device-list", "0,1", cwd=tmp_path, small=False, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(what["device"] for name, what in calls if name == "initialize") == ["npu:0", "npu:1"]
    assert len([name for name, _ in calls if name == "scale_loss"]) == 2 * 2
    assert checkpoint(tmp_path)["amp"] == {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 2}}
