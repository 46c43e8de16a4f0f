"""apex.amp's names, signatures, rules and state format, as far as main.py meets them.

What it keeps of apex: ``initialize`` takes a model before DistributedDataParallel wraps it, with
fp32 tensors on the card, and at most one optimizer, once. O2 makes the parameters float16, except
those of BatchNorm; the model then takes and returns fp32, its state_dict is in fp32, and the
optimizer updates fp32 masters, made at its first use. Every loss goes through ``scale_loss``, which
unscales the gradients (here at once, also with delay_unscale). Only a dynamic scale looks for an
overflow, skips the step and moves. A fixed scale of 1 without masters does nothing at all. Messages
are printed unless verbosity is 0.

What it leaves out: the casts of O1; the arithmetic of O2 in float16 (weights, gradients, images and
logits are float16, but the network computes in fp32, as old versions of torch have no float16
convolution on the CPU); lists of models and of optimizers, closures and the other levels; the
overflow flag of an Ascend card: it looks at the gradients. One rule is its own: the optimizer's
parameters have to be the model's.

``device_types`` holds the types of device whose tensors it takes; a test adds "cpu". ``calls``
lists what was called, in order; with APEX_STUB_LOG each call is also written to that file, as a
line of JSON.
"""

import contextlib
import itertools
import json
import math
import os
from collections import OrderedDict

import torch

device_types = {"cuda"}
calls = []
_scalers = []
_verbosity = 1


def record(name, **what):
    calls.append((name, what))
    if "APEX_STUB_LOG" in os.environ:
        with open(os.environ["APEX_STUB_LOG"], "a") as file:
            file.write(json.dumps([name, what]) + "\n")


def _say(text):
    if _verbosity:
        print(text)


class Scaler:
    def __init__(self, scale, low, high):
        self.dynamic = scale == "dynamic"
        self.low, self.high = low or 0.0, high
        self.scale = min(high, 2.0 ** 16) if self.dynamic else float(scale)
        self.unskipped = 0

    def overflows(self, gradients):
        sums = (gradient.float().sum().item() for gradient in gradients)
        return self.dynamic and not all(math.isfinite(value) for value in sums)

    def update(self, overflow):
        self.unskipped = 0 if overflow else self.unskipped + 1
        if overflow:
            self.scale = max(self.low, self.scale / 2)
        elif self.dynamic and self.unskipped == 2000:
            self.scale, self.unskipped = min(self.high, self.scale * 2), 0


class Stash:
    """What apex keeps of an optimizer: ``halves`` and their fp32 ``masters``, and ``floats``, the
    parameters that it updates as they are."""

    def __init__(self, optimizer, has_masters):
        if hasattr(optimizer, "_amp_stash"):
            raise RuntimeError("amp.initialize takes an optimizer once")
        self.optimizer, self.has_masters = optimizer, has_masters
        self.halves, self.masters, self.floats = [], [], []
        self.initialized = False
        self.optimizer_step = optimizer.step
        optimizer._amp_stash = self
        if has_masters:
            optimizer.step = self.step_masters
            optimizer.zero_grad = self.zero_grad

    def lazy_init(self):
        if self.initialized:
            return
        self.initialized = True
        for group in self.optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter.device.type not in device_types:
                    raise TypeError(f"an optimizer's parameter is {parameter.type()}")
                if parameter.dtype == torch.float16:
                    group["params"][position] = self.add_master(parameter)
                else:
                    self.floats.append(parameter)
        if self.has_masters:
            for parameter in self.masters + self.floats:
                parameter.grad = None
            # Casts the state to the type of the masters.
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def add_master(self, parameter):
        master = parameter.detach().clone().float().requires_grad_()
        if parameter in self.optimizer.state:
            self.optimizer.state[master] = self.optimizer.state.pop(parameter)
        self.halves.append(parameter)
        self.masters.append(master)
        return master

    def before_backward(self):
        self.lazy_init()
        self.earlier = [parameter.grad for parameter in self.floats]
        for parameter in self.halves + self.floats:
            parameter.grad = None

    def after_backward(self, scaler):
        """Unscales the gradients, adds those that there were before, and returns whether they
        overflowed; then they are of no use."""
        if scaler.overflows([parameter.grad for parameter in self.halves + self.floats]):
            return True
        for half, master in zip(self.halves, self.masters):
            earlier = 0 if master.grad is None else master.grad
            master.grad = half.grad.float() / scaler.scale + earlier
        for parameter, earlier in zip(self.floats, self.earlier):
            parameter.grad.div_(scaler.scale)
            if earlier is not None:
                parameter.grad.add_(earlier)
        return False

    def step_masters(self, closure=None):
        self.optimizer_step()
        for half, master in zip(self.halves, self.masters):
            half.data.copy_(master.data)
        self.clear_masters()

    def clear_masters(self):
        for master in self.masters:
            master.grad = None

    def zero_grad(self):
        self.lazy_init()
        for parameter in self.halves + self.floats:
            if parameter.grad is not None:
                parameter.grad.detach_()  # which DDP's views of its buckets don't allow
                parameter.grad.zero_()
        self.clear_masters()


def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
               patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None,
               loss_scale=None, cast_model_outputs=None, num_losses=1, verbosity=1,
               min_loss_scale=None, max_loss_scale=2. ** 24):
    scaler = Scaler(loss_scale or "dynamic", min_loss_scale, max_loss_scale)
    return initialize_with(Stash, models, optimizers, opt_level, scaler, verbosity)


def initialize_with(stash, model, optimizer, opt_level, scaler, verbosity):
    global _verbosity
    _verbosity = verbosity
    parameters = list(model.parameters())
    record("initialize", opt_level=opt_level, device=str(parameters[0].device),
           verbosity=verbosity, optimizer=optimizer is not None)
    _say(f"apex prepares a model for {opt_level}")
    _check(model)
    if optimizer and {id(p) for p in master_params(optimizer)} != {id(p) for p in parameters}:
        raise RuntimeError("the optimizer's parameters are not the model's")
    if opt_level == "O2":
        _convert(model)
        if optimizer:
            # Casts the state to the type of the parameters.
            optimizer.load_state_dict(optimizer.state_dict())
    _scalers[:] = [scaler]
    if optimizer is None:
        return model
    stash(optimizer, has_masters=opt_level == "O2")
    return model, optimizer


def _check(model):
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("amp.initialize takes a model before DistributedDataParallel wraps it")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            if tensor.device.type not in device_types or tensor.dtype == torch.float16:
                raise RuntimeError(f"{name} is {tensor.type()}: apex takes fp32 on its card")


def _convert(model):
    """Makes the parameters float16, except BatchNorm's, and the model take and return fp32."""
    halves = []
    for module in model.modules():
        module._register_state_dict_hook(_state_dict_in_fp32)
        if not isinstance(module, torch.nn.BatchNorm2d):
            halves += [(module._parameters, name, parameter)
                       for name, parameter in module._parameters.items() if parameter is not None]
    for _, _, parameter in halves:
        parameter.data = parameter.data.half()
    forward = model.forward

    def forward_in_fp32(images):
        for parameters, name, parameter in halves:
            parameters[name] = parameter.float()
        try:
            return forward(images.half().float()).half().float()
        finally:
            for parameters, name, parameter in halves:
                parameters[name] = parameter

    model.forward = forward_in_fp32


def _state_dict_in_fp32(module, state_dict, prefix, local_metadata):
    for name, tensor in state_dict.items():
        if tensor.dtype == torch.float16:
            state_dict[name] = tensor.float()


@contextlib.contextmanager
def scale_loss(loss, optimizers, loss_id=0, model=None, delay_unscale=False,
               delay_overflow_check=False):
    if not _scalers:
        raise RuntimeError("amp.scale_loss before amp.initialize")
    scaler, stash = _scalers[loss_id], optimizers._amp_stash
    record("scale_loss", scale=scaler.scale)
    if scaler.scale == 1 and not scaler.dynamic and not stash.has_masters:
        yield loss.float()
        return
    stash.before_backward()
    yield loss.float() * scaler.scale
    overflow = stash.after_backward(scaler)
    if not delay_unscale:  # of the parts of a step the last moves the scale
        scaler.update(overflow)
    if overflow:
        step = optimizers.step

        def skip(closure=None):
            _say(f"apex skips a step: an overflow, the loss scale is now {scaler.scale}")
            stash.clear_masters()
            optimizers.step = step

        optimizers.step = skip


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
    unexpected = [name for name in state_dict if "loss_scaler" not in name]
    if unexpected:
        raise RuntimeError(f"{', '.join(unexpected)} is not of amp's state")
    for scaler, name in zip(_scalers, state_dict):
        state = state_dict[name]
        scaler.scale, scaler.unskipped = state["loss_scale"], state["unskipped"]
    record("load_state_dict", **state_dict)
