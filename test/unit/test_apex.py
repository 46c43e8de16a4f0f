"""apex's amp, NVIDIA's and Ascend's: one that is installed and works here, else the stub of both.

With the stub (apex_stub) the runs see a card whose tensors are on the CPU, which apex refuses.
"""

import dataclasses
import importlib
import inspect
import itertools
import json
import math
import os
import signal
import sys
import types

import pytest
import torch

import main
import mnasnet
from helpers import (SMALL, STEADY, TORCH, UNIT, counts, differences, read_checkpoint,
                     read_metrics, run_main, several, the_error)

# Four steps an epoch, at a loss scale under which a new network's gradients don't overflow.
NEW_RUN = ["-b", "8", "--epochs", "2", "--loss-scale", "2"] + STEADY
MODULES = ("apex", "apex.amp", "apex.optimizers", "ascend_apex")
BACKEND_OF = {"nvidia": "gpu", "ascend": "npu"}


def put_first(monkeypatch, folder):
    """Has ``import apex`` read the one in a folder, as in a new process, until the test ends."""
    monkeypatch.syspath_prepend(str(folder))
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)  # notes what to restore
        del sys.modules[name]


def import_stub(monkeypatch, vendor):
    """The amp of a vendor's stub."""
    put_first(monkeypatch, UNIT / "apex_stub")
    importlib.import_module("ascend_apex" if vendor == "ascend" else "apex.amp")
    return sys.modules["apex.amp"]


def restore_torch():
    """Takes back what O1 of an installed apex patches in torch, for the whole process."""
    state = getattr(sys.modules.get("apex.amp._amp_state"), "_amp_state", None)
    if hasattr(state, "handle"):
        state.handle._deactivate()


def find_installed():
    """(amp, vendor, device) of an apex that this environment has and that works here, or None."""
    try:
        from apex import amp
        vendor = "ascend" if "combine_grad" in inspect.signature(amp.initialize).parameters \
            else "nvidia"
        backend = main.BACKENDS[BACKEND_OF[vendor]]
        found, _ = main.device_count(backend)
        device = torch.device(f"{backend.type}:0" if found else "cpu")
        # O0 changes nothing, but refuses tensors that are not on the card.
        amp.initialize(torch.nn.Linear(1, 1).to(device), opt_level="O0", verbosity=0)
    except Exception:
        return None
    return amp, vendor, device


INSTALLED = find_installed()


@dataclasses.dataclass
class Apex:
    """An apex, and the card that runs see."""

    amp: types.ModuleType
    vendor: str
    device: torch.device

    @property
    def is_stub(self):
        return hasattr(self.amp, "calls")

    @property
    def backend(self):
        return main.BACKENDS[BACKEND_OF[self.vendor]]

    def calls(self, name):
        """What the stub was called with."""
        return [arguments for called, arguments in self.amp.calls if called == name]

    def precision(self, *arguments, rank=0, level="O1"):
        flags = main.parse_args(["data", "--opt-level", level, *arguments])
        return main.Precision(flags, main.Runtime(self.backend, self.device, rank=rank))

    def prepare(self, precision):
        """A small model and its plain optimizer, prepared for training."""
        model = torch.nn.Linear(2, 2).to(self.device)
        return precision.initialize(model, torch.optim.SGD(precision.prepare(model), 0.1))

    def step(self, precision, model, optimizer, factor=1.0):
        """Takes a step on the sum of the outputs for ones, times a factor."""
        loss = model(torch.ones(1, 2, device=self.device)).float().sum() * factor
        precision.backward(loss, optimizer)
        precision.step(optimizer)

    def run(self, *arguments):
        """The status of a run in this process, small but for what the arguments say."""
        words = SMALL + ["--device", self.backend.name, "--workers", "0"]
        try:
            return main.main(words + [str(word) for word in arguments])
        finally:
            restore_torch()


def fake_card(monkeypatch, name):
    """Makes the CPU look like a card to main.py."""
    backend = dataclasses.replace(main.BACKENDS[name], type="cpu")
    prefetch, build_model = main.prefetch, main.build_model

    def prefetch_int64(*arguments):  # under an old torch an npu gets int32, which the CPU refuses
        for images, targets, unreadable in prefetch(*arguments):
            yield images, targets.long(), unreadable

    def build_model_for_cpu(*arguments):
        model = build_model(*arguments)
        if TORCH < (2, 0):  # these versions' own convolutions are slow
            mnasnet.optimize_for_cpu(model, torch.float32)
        return model

    monkeypatch.setattr(main, "prefetch", prefetch_int64)
    monkeypatch.setattr(main, "build_model", build_model_for_cpu)
    monkeypatch.setitem(main.BACKENDS, name, backend)
    monkeypatch.setattr(main, "device_count", lambda backend: (1, ""))
    monkeypatch.setattr(
        main, "open_device", lambda flags, backend: main.Runtime(backend, torch.device("cpu")))
    return backend


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """For runs in this process: the current folder is theirs."""
    handlers = {signum: signal.getsignal(signum) for signum in main.SIGNALS}
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only get in each other's way on images this small
    yield
    torch.set_num_threads(threads)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def open_apex(monkeypatch, vendor):
    """The apex of a vendor: the installed one, or the stub, which takes the CPU's tensors."""
    amp, installed, device = INSTALLED or (None, vendor, torch.device("cpu"))
    if installed != vendor:
        pytest.skip(f"the installed apex is that of {installed}")
    if device.type == "cpu":
        fake_card(monkeypatch, BACKEND_OF[vendor])
    if not INSTALLED:
        amp = import_stub(monkeypatch, vendor)
        amp.device_types.add("cpu")
    return Apex(amp, vendor, device)


@pytest.fixture(params=["nvidia", pytest.param("ascend", marks=pytest.mark.slow)])
def apex(request, in_process, monkeypatch):
    yield open_apex(monkeypatch, request.param)
    restore_torch()


@pytest.fixture
def ascend(in_process, monkeypatch):
    yield open_apex(monkeypatch, "ascend")
    restore_torch()


@pytest.fixture
def stub(in_process, monkeypatch):
    """A function that imports a vendor's stub, for what an installed apex can't show."""
    return lambda vendor: import_stub(monkeypatch, vendor)


@pytest.fixture
def gpu(in_process, monkeypatch):
    return fake_card(monkeypatch, "gpu")


def spoil_losses(monkeypatch, is_spoiled):
    """Makes infinite the losses of the steps that ``is_spoiled(number)`` names, from 0 on."""
    steps, right = itertools.count(), main.smoothed_cross_entropy

    def spoiled(*arguments):
        loss = right(*arguments)
        return loss * math.inf if is_spoiled(next(steps)) else loss

    monkeypatch.setattr(main, "smoothed_cross_entropy", spoiled)


# What apex does, and the stub with it


@pytest.mark.parametrize("name", ["nvidia", "ascend"])
def test_the_stub_refuses_the_cpu(stub, name):
    amp, model = stub(name), torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="weight is torch.FloatTensor"):
        amp.initialize(model)
    amp.device_types.add("cpu")
    model, optimizer = amp.initialize(model, torch.optim.SGD(model.parameters(), 0.1))
    amp.device_types.remove("cpu")
    with pytest.raises(TypeError, match="parameter is torch.FloatTensor"):
        with amp.scale_loss(model(torch.ones(1, 2)).sum(), optimizer):
            pass


def test_an_installed_apex_refuses_the_cpu(apex):
    if apex.device.type == "cpu":
        pytest.skip("takes an apex on a card")
    with pytest.raises(RuntimeError):
        apex.amp.initialize(torch.nn.Linear(2, 2), opt_level="O2", verbosity=0)


def test_an_optimizer_is_prepared_once(apex):
    model, optimizer = apex.prepare(apex.precision())
    restore_torch()
    with pytest.raises(RuntimeError):
        apex.amp.initialize(model, optimizer, opt_level="O1", verbosity=0)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_apex_lets_a_fixed_scale_overflow(apex, level):
    """The reason why main.py has apex use a dynamic scale that can't move instead."""
    model = torch.nn.Linear(2, 2).to(apex.device)
    model, optimizer = apex.amp.initialize(model, torch.optim.SGD(model.parameters(), 0.1),
                                           opt_level=level, loss_scale=128.0, verbosity=0)
    loss = model(torch.ones(1, 2, device=apex.device)).float().sum() * math.inf
    with apex.amp.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
    assert not torch.isfinite(model.weight.float()).any()
    assert apex.amp.state_dict()["loss_scaler0"] == {"loss_scale": 128.0, "unskipped": 1}


def test_apex_does_nothing_at_a_fixed_scale_of_one(apex):
    model = torch.nn.Linear(2, 2).to(apex.device)
    model, optimizer = apex.amp.initialize(model, torch.optim.SGD(model.parameters(), 0.1),
                                           opt_level="O1", loss_scale=1.0, verbosity=0)
    loss = model(torch.ones(1, 2, device=apex.device)).float().sum()
    with apex.amp.scale_loss(loss, optimizer) as scaled_loss:
        assert scaled_loss is loss
        scaled_loss.backward()
    assert torch.equal(model.weight.grad.cpu(), torch.ones(2, 2))
    assert apex.amp.state_dict()["loss_scaler0"] == {"loss_scale": 1.0, "unskipped": 0}


def test_o2_of_apex(apex):
    """Weights are float16, but for BatchNorm's; images, logits and state_dict are fp32."""
    precision = apex.precision(level="O2")
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
              torch.nn.Linear(16, 2)]
    model = torch.nn.Sequential(*layers).to(apex.device)
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, optimizer = precision.initialize(
        model, torch.optim.SGD(precision.prepare(model), 0.1, momentum=0.9))
    assert [p.dtype for p in model.parameters()] == \
        [torch.float16] * 2 + [torch.float32] * 2 + [torch.float16] * 2
    assert model(torch.ones(2, 3, 4, 4, device=apex.device)).dtype == torch.float32
    state = model.state_dict()
    assert state["0.weight"].dtype == state["3.bias"].dtype == torch.float32
    assert torch.equal(state["0.weight"], exact["0.weight"].half().float())
    masters = main.optimizer_parameters(optimizer)
    assert [p.dtype for p in masters] == [torch.float32] * 6
    assert torch.equal(masters[0], exact["0.weight"])  # not what is left of it in float16


# Which apex


def fake_native(monkeypatch):
    """Lets a Precision be made where torch has no autocast for the card that is imitated."""
    monkeypatch.setattr(main, "find_native_amp", lambda *_: (object, lambda **options: None))


def log_line(backend, *arguments):
    """What the log says of the precision of a run."""
    flags = main.parse_args(["data", *arguments])
    return str(main.Precision(flags, main.Runtime(backend, torch.device("cpu"))))


@pytest.mark.parametrize("level", ["O0", "O2"])
@pytest.mark.parametrize("found", [None, types.ModuleType("apex")], ids=["none", "without amp"])
def test_no_apex_amp(gpu, monkeypatch, capsys, found, level):
    monkeypatch.setitem(sys.modules, "apex", found)
    monkeypatch.delitem(sys.modules, "apex.amp", raising=False)
    arguments = SMALL + ["--device", "gpu", "--synthetic", "8"]
    assert main.main(arguments + ["--amp-backend", "apex", "--opt-level", level]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "2025" in error and "--amp-backend native" in error
    assert main.find_apex(main.parse_args(["data"]), gpu) == (None, "")  # what auto makes of it


@pytest.mark.parametrize("vendor", ["nvidia", "ascend"])
def test_apex_is_not_for_the_cpu(stub, capsys, vendor):
    stub(vendor)
    arguments = ["--synthetic", "8", "--amp-backend", "apex", "--device", "cpu"]
    assert main.main(SMALL + arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the installed apex is" in error
    assert log_line(main.BACKENDS["cpu"], "--opt-level", "O0") == "O0 (fp32)"


@pytest.mark.parametrize("vendor,name,owner", [
    ("nvidia", "npu", "NVIDIA's"), ("ascend", "gpu", "Ascend's")])
def test_apex_is_for_its_own_card(stub, monkeypatch, capsys, vendor, name, owner):
    """auto takes native and says why; apex is an error of one line."""
    stub(vendor)
    backend = fake_card(monkeypatch, name)
    amp, reason = main.find_apex(main.parse_args(["data"]), backend)
    assert amp is None and f"the installed apex is {owner}" in reason
    fake_native(monkeypatch)
    assert log_line(backend) == f"O1 (float16; {reason})"
    arguments = ["--device", name, "--synthetic", "8", "--amp-backend", "apex"]
    assert main.main(SMALL + arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error and "--amp-backend native" in error


@pytest.mark.parametrize("error", [
    "No module named 'torch._six'", "No module named 'apex_C'", "libcudart.so.11.0: no such file",
    "cannot import name 'container_abcs' from 'torch._six'"])
def test_an_apex_that_does_not_import(gpu, monkeypatch, tmp_path, capsys, error):
    """As one does that was built for another torch: it is reported with its own reason."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(f'raise ImportError("{error}")\n')
    put_first(monkeypatch, tmp_path)
    reason = f"apex does not import ({error})"
    fake_native(monkeypatch)
    assert log_line(gpu) == f"O1 (float16; {reason})"
    arguments = ["--device", "gpu", "--synthetic", "8", "--amp-backend", "apex"]
    assert main.main(SMALL + arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and reason in said and "2025" not in said


@pytest.mark.slow
def test_nvidias_apex_on_npu(npu, images, tmp_path):
    """The log of a whole run says why it is native."""
    variables = dict(npu, PYTHONPATH=os.pathsep.join([npu["PYTHONPATH"], str(UNIT / "apex_stub")]))
    arguments = [images, *NEW_RUN, "--epochs", 1, "--device", "npu"]
    result = run_main(*arguments, cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "O1 (float16; the installed apex is NVIDIA's" in result.stdout.splitlines()[0]
    assert "scale" in read_checkpoint(tmp_path)["amp"]  # of torch's scaler
    result = run_main(*arguments, "--amp-backend", "apex", cwd=tmp_path, **variables)
    assert "the installed apex is NVIDIA's" in the_error(result)


# Training


@pytest.fixture
def start(trained, tmp_path):
    """A checkpoint two epochs into a run whose loss scale, not fixed, is 2."""
    checkpoint = read_checkpoint(trained[0])
    checkpoint["amp"] = {"loss_scaler0": {"loss_scale": 2.0, "unskipped": 3}}
    torch.save(checkpoint, str(tmp_path / "start"))
    return "start"


# Gradients in parts, several groups of parameters, and what is done to the gradients and weights.
PIECES = ["--accumulate", 2, "--norm-weight-decay", 0, "--clip-grad", 1, "--ema", 0.9]


@pytest.mark.parametrize("level,scale,unskipped,more", [
    ("O1", "dynamic", 3, []), ("O2", "dynamic", 3, []), ("O2", "2", 0, []),
    pytest.param("O1", "dynamic", 3, PIECES, marks=pytest.mark.slow),
    pytest.param("O2", "dynamic", 3, PIECES, marks=pytest.mark.slow)])
def test_train_and_resume(apex, images, start, tmp_path, level, scale, unskipped, more):
    arguments = [images, *NEW_RUN, "--epochs", 4, "--seed", 1, "--opt-level", level,
                 "--loss-scale", scale, *more]
    assert apex.run(*arguments, "--resume", start) == 0
    whole, before = read_checkpoint(tmp_path), read_checkpoint(tmp_path, start)
    assert whole["amp"] == {"loss_scaler0": {"loss_scale": 2.0, "unskipped": unskipped + 8}}
    assert {tensor.dtype for tensor in whole["state_dict"].values()} == {torch.float32, torch.int64}
    weight = whole["state_dict"]["layers.0.weight"]
    assert not torch.equal(weight, weight.half().float())  # fp32 weights under O2, too
    assert not torch.allclose(weight, before["state_dict"]["layers.0.weight"])

    (tmp_path / "resumed").mkdir()
    resume = ["--resume", "checkpoint-1.pth.tar", "--output-dir", "resumed"]
    assert apex.run(*arguments, *resume) == 0
    resumed = read_checkpoint(tmp_path / "resumed")
    assert resumed["amp"]["loss_scaler0"]["loss_scale"] == 2.0
    assert scale != "dynamic" or resumed["amp"] == whole["amp"]
    assert differences(whole["state_dict"], resumed["state_dict"]) == []
    assert differences(whole["optimizer"], resumed["optimizer"]) == []
    assert differences(whole.get("ema"), resumed.get("ema")) == []


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("scale", ["dynamic", "2"])
def test_how_apex_is_called(apex, images, start, level, scale):
    if not apex.is_stub:
        pytest.skip("only the stub records what it is called with")
    arguments = [images, *NEW_RUN, "--epochs", 3, "--opt-level", level, "--loss-scale", scale]
    assert apex.run(*arguments, "--amp-backend", "apex", "--resume", start) == 0
    assert apex.calls("initialize") == [
        {"opt_level": level, "device": "cpu", "verbosity": 1, "optimizer": True}]
    assert apex.calls("combine_grad") == ([{"value": True}] if apex.vendor == "ascend" else [])
    assert apex.calls("scale_loss") == [{"scale": 2.0}] * 4
    unskipped = 3 if scale == "dynamic" else 0
    state = {"loss_scaler0": {"loss_scale": 2.0, "unskipped": unskipped}}
    assert apex.calls("load_state_dict") == [state]


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("scale,less", [("dynamic", 2.0 ** 15), ("128", 128.0), ("1", 1.0)])
def test_an_overflow_takes_no_step(apex, level, scale, less):
    precision = apex.precision("--loss-scale", scale, level=level)
    model, optimizer = apex.prepare(precision)
    before = [p.detach().clone() for p in main.optimizer_parameters(optimizer)]
    rounded = [p.detach().clone() for p in model.parameters()]
    apex.step(precision, model, optimizer, factor=math.inf)
    for now, then in zip(main.optimizer_parameters(optimizer), before):
        assert torch.equal(now, then)
    for now, then in zip(model.parameters(), rounded):
        assert torch.equal(now.float(), then.float())
    assert precision.state_dict()["loss_scaler0"] == {"loss_scale": less, "unskipped": 0}
    apex.step(precision, model, optimizer)
    for now, then in zip(main.optimizer_parameters(optimizer), before):
        assert torch.allclose(now, then - 0.1, atol=1e-6)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.float().abs().sum() == 0


@pytest.mark.parametrize("scale,images,epoch,step", [
    ("dynamic", 8, 4, 3), ("128", 8, 4, 3), ("128", 48, 0, 19)])
def test_losses_that_stay_infinite_end_the_run(
        apex, monkeypatch, tmp_path, capsys, scale, images, epoch, step):
    """After 20 in a row, also where an epoch has four steps only."""
    spoil_losses(monkeypatch, lambda number: True)
    arguments = ["--synthetic", images, "-b", 2, "--epochs", 9, "--opt-level", "O2"]
    assert apex.run(*arguments, "--loss-scale", scale) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not finite for 20 steps" in error
    assert f"the loss is inf at epoch {epoch} step {step} " in error
    assert (tmp_path / "checkpoint.pth.tar").exists() == (epoch > 0)
    for path in tmp_path.glob("*.pth.tar"):
        checkpoint = main.read_checkpoint(str(path))
        tensors = list(checkpoint["state_dict"].values()) + [
            value for state in checkpoint["optimizer"]["state"].values() for value in state.values()
            if torch.is_tensor(value)]
        assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_an_epoch_in_which_every_gradient_overflows_is_an_error(apex, tmp_path, capsys):
    arguments = ["--synthetic", 48, "-b", 2, "--epochs", 1, "--opt-level", "O2"]
    assert apex.run(*arguments, "--loss-scale", "1e30") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no step of epoch 0 has changed the weights" in error
    assert not list(tmp_path.glob("*.pth.tar"))


def test_a_finite_loss_ends_the_row(apex, monkeypatch):
    spoil_losses(monkeypatch, lambda number: number != 15)  # rows of 15 and 16
    arguments = ["--synthetic", 16, "-b", 2, "--epochs", 4, "--loss-scale", 128, "--seed", 1]
    assert apex.run(*arguments) == 0


@pytest.mark.parametrize("scale,last", [("dynamic", 1.0), ("2", 2.0)])
def test_a_skipped_loss_is_not_in_the_mean(
        apex, images, start, monkeypatch, tmp_path, capsys, scale, last):
    spoil_losses(monkeypatch, lambda number: number == 1)
    arguments = [images, *NEW_RUN, "--epochs", 3, "--loss-scale", scale]
    assert apex.run(*arguments, "--resume", start) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch:")]
    losses = [line.split("Loss ")[1].split()[0] for line in lines]
    assert losses[1] == "inf" and len(losses) == 4
    finite = [float(loss) for loss in losses if loss != "inf"]
    row = read_metrics(tmp_path)[-1]
    assert float(row["train_loss"]) == pytest.approx(sum(finite) / 3, abs=1e-3)
    state = {"loss_scale": last, "unskipped": 2}
    assert read_checkpoint(tmp_path)["amp"] == {"loss_scaler0": state}


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_evaluate(apex, images, tmp_path, capsys, level):
    """Its figures are those of the training run's own evaluation, of the same weights."""
    arguments = [images, *NEW_RUN, "--epochs", 1, "--opt-level", level]
    assert apex.run(*arguments) == 0
    trained = types.SimpleNamespace(returncode=0, stdout=capsys.readouterr().out, stderr="")
    if apex.is_stub:
        apex.amp.calls.clear()
    assert apex.run(*arguments, "-e", "--resume", "checkpoint.pth.tar") == 0
    evaluated = types.SimpleNamespace(returncode=0, stdout=capsys.readouterr().out, stderr="")
    assert counts(evaluated) == counts(trained)
    assert f"{level} (apex)" in evaluated.stdout
    [row] = read_checkpoint(tmp_path)["history"]
    assert evaluated.stdout.rstrip().endswith(f"loss {row['val_loss']:.4f}")
    if apex.is_stub:
        assert apex.calls("initialize") == [
            {"opt_level": level, "device": "cpu", "verbosity": 1, "optimizer": False}]
        assert apex.calls("scale_loss") == []


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_only_the_first_rank_prints(apex, capsys, level):
    for rank in (0, 1):
        precision = apex.precision(rank=rank, level=level)
        capsys.readouterr()
        model, optimizer = apex.prepare(precision)
        assert bool(capsys.readouterr().out) == (rank == 0)
        apex.step(precision, model, optimizer, factor=math.inf)
        assert bool(capsys.readouterr().out) == (rank == 0)  # an overflow
        precision.initialize(torch.nn.Linear(2, 2).to(apex.device))  # for an evaluation
        assert bool(capsys.readouterr().out) == (rank == 0)
        restore_torch()


# Ascend's fused optimizer


def fused(apex, level="O2"):
    """(precision, model, optimizer) with the fused optimizer, prepared for training."""
    precision = apex.precision("--loss-scale", "2", level=level)
    model = torch.nn.Linear(2, 2).to(apex.device)
    flags = main.parse_args(["data", "--lr", "0.1", "--wd", "0.01"])
    runtime = main.Runtime(apex.backend, apex.device)
    optimizer = main.build_optimizer(flags, runtime, precision, precision.prepare(model))
    assert type(optimizer).__name__ == "NpuFusedSGD"
    assert not isinstance(optimizer, torch.optim.SGD)
    return (precision, *precision.initialize(model, optimizer))


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_fused_optimizer_steps_each_group_with_its_weight_decay(ascend, level):
    flags = main.parse_args(["data", "--lr", "0.1", "--wd", "0.5", "--bias-weight-decay", "0"])
    precision = ascend.precision("--loss-scale", "2", level=level)
    model = torch.nn.Linear(2, 2).to(ascend.device)
    groups = main.parameter_groups(model, precision.prepare(model), flags)
    assert len(groups) == 2
    runtime = main.Runtime(ascend.backend, ascend.device)
    optimizer = main.build_optimizer(flags, runtime, precision, groups)
    assert type(optimizer).__name__ == "NpuFusedSGD"
    model, optimizer = precision.initialize(model, optimizer)
    parameters = main.optimizer_parameters(optimizer)
    assert [parameter.dim() for parameter in parameters] == [2, 1]
    before = [parameter.detach().clone() for parameter in parameters]
    ascend.step(precision, model, optimizer)
    for now, then, decay in zip(parameters, before, (0.5, 0)):
        expected = then - 0.1 * 1.9 * (1 + decay * then)  # the first step of Nesterov's momentum
        assert torch.allclose(now, expected, atol=1e-3), now


def test_the_fused_optimizer_needs_amp(ascend):
    model = torch.nn.Linear(2, 2).to(ascend.device)
    from apex.optimizers import NpuFusedSGD
    optimizer = NpuFusedSGD(list(model.parameters()), lr=0.1)
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_fused_optimizer_moves_tensors(ascend, level):
    """Weights, gradients and momentum move to one block each, and it reads the blocks only."""
    precision, model, optimizer = fused(ascend, level)
    ascend.step(precision, model, optimizer)
    parameters = main.optimizer_parameters(optimizer)
    momenta = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
    for tensors in (parameters, momenta, [parameter.grad for parameter in parameters]):
        distance = tensors[1].data_ptr() - tensors[0].data_ptr()
        assert 16 <= distance <= 16 + 64 * 4  # a real one pads each
    before = parameters[0].detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100)  # not what it will read
    optimizer.step()
    assert (parameters[0] - before).abs().max() < 1


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_the_fused_optimizer_computes_sgd(ascend, images, monkeypatch, tmp_path, level):
    """An overflow before its first step included."""
    spoil_losses(monkeypatch, lambda number: number % 4 == 0)
    arguments = [images, *NEW_RUN, "--seed", 1, "--opt-level", level]
    for folder in ("fused", "plain"):
        (tmp_path / folder).mkdir()
        assert ascend.run(*arguments, "--output-dir", folder) == 0
        monkeypatch.delattr(sys.modules["apex.optimizers"], "NpuFusedSGD", raising=False)
    one, other = (read_checkpoint(tmp_path / folder) for folder in ("fused", "plain"))
    assert one["amp"] == other["amp"]
    for name, tensor in one["state_dict"].items():
        assert torch.allclose(tensor, other["state_dict"][name], atol=1e-5), name
    for number, state in one["optimizer"]["state"].items():
        momentum = other["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.allclose(state["momentum_buffer"], momentum, atol=1e-4), number


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
    runtime = main.Runtime(main.BACKENDS["gpu"], torch.device("cpu"))
    return lambda *arguments: main.Precision(
        main.parse_args(["data", "--opt-level", "O1", *arguments]), runtime)


@pytest.mark.skipif(TORCH >= (1, 6), reason="this torch has autocast for the GPU")
def test_native_needs_autocast(native):
    with pytest.raises(main.UserError, match="--opt-level O0, or install an apex that has amp"):
        native()


def test_apex_takes_the_scale_of_apex(apex):
    precision = apex.precision()
    apex.prepare(precision)
    assert precision.load_state_dict(apex_state(512.0))
    assert precision.state_dict() == apex_state(512.0)
    assert precision.load_state_dict({})  # of a run in fp32 or bfloat16: the scale stays
    assert precision.state_dict() == apex_state(512.0)
    assert not precision.load_state_dict(NATIVE_STATE)
    assert precision.state_dict() == apex_state(512.0)


@pytest.mark.parametrize("scale", [64.0, 2.0 ** 20])  # below and above where a dynamic one begins
def test_a_given_loss_scale_stays(apex, scale):
    precision = apex.precision("--loss-scale", str(scale))
    model, optimizer = apex.prepare(precision)
    assert precision.load_state_dict(apex_state(512.0))
    assert precision.state_dict()["loss_scaler0"]["loss_scale"] == scale
    apex.step(precision, model, optimizer, factor=math.inf)
    assert precision.state_dict()["loss_scaler0"]["loss_scale"] == scale


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


def test_the_scale_of_torch_is_not_for_apex(apex, images, trained, tmp_path, capsys):
    checkpoint = read_checkpoint(trained[0])
    checkpoint["amp"] = NATIVE_STATE
    torch.save(checkpoint, "native")
    arguments = [images, *NEW_RUN, "--epochs", 3, "--loss-scale", "dynamic"]
    assert apex.run(*arguments, "--resume", "native") == 0
    assert ("=> the loss scale of native is of another --amp-backend: "
            in capsys.readouterr().out)
    scale = read_checkpoint(tmp_path)["amp"]["loss_scaler0"]["loss_scale"]
    assert scale >= 2.0 ** 12  # 2 ** 16, halved in at most four steps


@pytest.mark.slow
def test_two_cards(npu, images, tmp_path):
    """The stub refuses a model that is wrapped, and DDP's views of its buckets as gradients."""
    log = tmp_path / "calls"
    path = os.pathsep.join([npu["PYTHONPATH"], str(UNIT / "apex_stub")])
    result = run_main(images, *NEW_RUN, "--device", "npu", "--opt-level", "O2", "--epochs", 1,
                      "--loss-scale", 0.125, *several(2), cwd=tmp_path,
                      **dict(npu, PYTHONPATH=path, APEX_STUB_LOG=str(log),
                             APEX_STUB_VENDOR="ascend"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("apex prepares a model") == 1  # the other rank is silent
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    devices = [arguments["device"] for name, arguments in calls if name == "initialize"]
    assert sorted(devices) == ["npu:0", "npu:1"]
    assert len([name for name, _ in calls if name == "scale_loss"]) == 2 * 4
    state = {"loss_scale": 0.125, "unskipped": 4}
    assert read_checkpoint(tmp_path)["amp"] == {"loss_scaler0": state}
