"""apex.amp's names, signatures, rules and state format, on any device, in fp32.

What it keeps of apex: ``initialize`` comes once, before DistributedDataParallel, with an optimizer
over the model's own fp32 parameters; every loss goes through ``scale_loss``, which unscales the
gradients, skips the step after an overflow and moves the scale; under O2 the model's weights
(BatchNorm's excepted) have float16's precision, and the optimizer steps fp32 copies that are made
of them at the first use. What it leaves out are the casts.

``calls`` lists what was called, in order; with APEX_STUB_LOG each call is also written to that
file, as a line of JSON.
"""

import contextlib
import json
import math
import os
import types
from collections import OrderedDict

import torch

calls = []
_scalers = []


def _record(name, **what):
    calls.append((name, what))
    if "APEX_STUB_LOG" in os.environ:
        with open(os.environ["APEX_STUB_LOG"], "a") as file:
            file.write(json.dumps([name, what]) + "\n")


class _Scaler:
    def __init__(self, scale, low, high):
        self.dynamic = scale == "dynamic"
        self.low, self.high = low or 0.0, high
        self.scale = min(high, 2.0 ** 16) if self.dynamic else float(scale)
        self.unskipped = 0

    def update(self, overflow):
        self.unskipped = 0 if overflow and self.dynamic else self.unskipped + 1
        if overflow and self.dynamic:
            self.scale = max(self.low, self.scale / 2)
        elif self.dynamic and self.unskipped == 2000:
            self.scale, self.unskipped = min(self.high, self.scale * 2), 0


def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
               patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None,
               loss_scale=None, cast_model_outputs=None, num_losses=1, verbosity=1,
               min_loss_scale=None, max_loss_scale=2. ** 24):
    if _scalers:
        raise RuntimeError("amp.initialize was called before")
    if isinstance(models, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("amp.initialize takes a model before DistributedDataParallel wraps it")
    parameters = list(models.parameters())
    if {p.dtype for p in parameters} != {torch.float32}:
        raise RuntimeError("amp.initialize takes fp32 parameters")
    if [id(p) for p in master_params(optimizers)] != [id(p) for p in parameters]:
        raise RuntimeError("the optimizer's parameters are not the model's")
    for _ in range(num_losses):
        _scalers.append(_Scaler(loss_scale or "dynamic", min_loss_scale, max_loss_scale))
    device = str(parameters[0].device)
    _record("initialize", opt_level=opt_level, loss_scale=loss_scale, device=device)
    _patch(optimizers, _round(models) if opt_level == "O2" else [])
    return models, optimizers


def _half(tensor):
    return tensor.half().float()


def _round(model):
    """Gives weights float16's precision, and returns them."""
    rounded = [parameter for module in model.modules()
               if not isinstance(module, torch.nn.BatchNorm2d)
               for parameter in module.parameters(recurse=False)]
    for parameter in rounded:
        parameter.data.copy_(_half(parameter.data))
    return rounded


def _patch(optimizer, rounded):
    """Puts fp32 copies of the ``rounded`` weights into the optimizer, at its first use."""
    rounded = {id(p) for p in rounded}
    optimizer._amp_pairs = None

    def lazy_init(self):
        if self._amp_pairs is not None:
            return
        self._amp_pairs = []
        for group in self.param_groups:
            for position, parameter in enumerate(group["params"]):
                if id(parameter) in rounded:
                    master = parameter.detach().clone().requires_grad_()
                    group["params"][position] = master
                    if parameter in self.state:
                        # What apex's cast of the state to the weight's type leaves of it.
                        self.state[master] = {
                            name: _half(value) if torch.is_tensor(value) else value
                            for name, value in self.state.pop(parameter).items()}
                    self._amp_pairs.append((parameter, master))

    step = optimizer.step

    def new_step(self, closure=None):
        if closure is not None:
            raise RuntimeError("amp takes no closure")
        step()
        for parameter, master in self._amp_pairs:
            parameter.data.copy_(_half(master.data))
            master.grad = None

    def new_zero_grad(self):
        self._amp_lazy_init()
        pairs = dict((id(master), parameter) for parameter, master in self._amp_pairs)
        for stepped in master_params(self):
            parameter = pairs.get(id(stepped), stepped)
            if parameter.grad is not None:
                # As apex does, which DDP's views of its buckets don't allow.
                parameter.grad.detach_()
                parameter.grad.zero_()

    optimizer._amp_lazy_init = types.MethodType(lazy_init, optimizer)
    optimizer.step = types.MethodType(new_step, optimizer)
    optimizer.zero_grad = types.MethodType(new_zero_grad, optimizer)


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False,
               delay_overflow_check=False):
    if not _scalers:
        raise RuntimeError("amp.scale_loss before amp.initialize")
    scaler = _scalers[loss_id]
    _record("scale_loss", scale=scaler.scale)
    optimizers._amp_lazy_init()
    yield loss.float() * scaler.scale
    for parameter, master in optimizers._amp_pairs:
        master.grad = parameter.grad.clone()
    overflow = False
    for parameter in master_params(optimizers):
        parameter.grad.div_(scaler.scale)
        overflow = overflow or not math.isfinite(parameter.grad.abs().sum().item())
    scaler.update(overflow)
    if overflow:
        step = optimizers.step

        def skip(self, closure=None):
            self.step = step

        optimizers.step = types.MethodType(skip, optimizers)


def master_params(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter


def state_dict(destination=None):
    destination = OrderedDict() if destination is None else destination
    for number, scaler in enumerate(_scalers):
        state = {"loss_scale": scaler.scale, "unskipped": scaler.unskipped}
        destination[f"loss_scaler{number}"] = state
    return destination


def load_state_dict(state_dict):
    for scaler, name in zip(_scalers, state_dict):
        state = state_dict[name]
        if set(state) != {"loss_scale", "unskipped"} or not name.startswith("loss_scaler"):
            raise RuntimeError(f"{name}: {state} is not amp's state")
        scaler.scale, scaler.unskipped = state["loss_scale"], state["unskipped"]
    _record("load_state_dict", **state_dict)
