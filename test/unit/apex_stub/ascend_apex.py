"""Makes the stub Ascend's apex: an import changes what theirs does otherwise than NVIDIA's.

It works on npu tensors only, and ``initialize`` takes ``combine_grad``: the gradients of a backward
pass, once there are some, move into one block of memory for each type, which stays theirs. With
NpuFusedSGD the weights and, at its first step, the momentum do so too, and steps see the blocks
only: a tensor that is put in the place of a gradient is ignored. One rule is the stub's own: a
backward pass whose gradients are not in their blocks is an error. Left out are the padding between
the tensors of a block, and what else theirs can do.
"""

import sys
import types

import apex
import torch
from apex import amp

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def combine(tensors):
    """Moves tensors into one block, which is returned; each becomes a view of its part."""
    if not tensors:
        return None
    block, start = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]), 0
    for tensor in tensors:
        tensor.data = block[start:start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return block


def is_fused(optimizer):
    return isinstance(optimizer, NpuFusedSGD)


class CombinedStash(amp.Stash):
    """Gradients in blocks: ``half_grads``, ``master_grads`` and ``float_grads``. ``weights`` holds
    what NpuFusedSGD updates: groups, their parameters, their block and that of the gradients."""

    def __init__(self, optimizer, has_masters):
        super().__init__(optimizer, has_masters)
        self.combined, self.weights = False, []
        self.optimizer_zero_grad = optimizer.zero_grad
        optimizer.zero_grad = self.zero_blocks

    def combine(self):
        if self.combined:
            return
        self.combined = True
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        self.half_places = [parameter.grad for parameter in self.halves]
        self.half_grads = combine(self.half_places)
        self.master_grads = combine([parameter.grad for parameter in self.masters])
        self.float_grads = combine([parameter.grad for parameter in self.floats])
        for everything, grads in ((self.masters, self.master_grads),
                                  (self.floats, self.float_grads)):
            self.add_weights(everything, grads)

    def add_weights(self, everything, grads):
        """Divides a block of gradients among the groups, in whose order it lies."""
        ids, start = {id(parameter) for parameter in everything}, 0
        for group in self.optimizer.param_groups if is_fused(self.optimizer) else ():
            own = [parameter for parameter in group["params"] if id(parameter) in ids]
            end = start + sum(parameter.numel() for parameter in own)
            if own:
                self.weights.append((group, own, combine(own), grads[start:end]))
            start = end

    def blocks(self):
        return [block for block in (self.half_grads, self.master_grads, self.float_grads)
                if block is not None]

    def check_places(self):
        for parameters, block in ((self.halves, self.half_grads), (self.floats, self.float_grads)):
            for parameter in parameters:
                offset = parameter.grad.data_ptr() - block.data_ptr()
                if not 0 <= offset < block.numel() * block.element_size():
                    raise RuntimeError("a gradient has left its block, which apex doesn't notice")

    def before_backward(self):
        if not self.combined:
            super().before_backward()
            return
        self.earlier_floats = None if self.float_grads is None else self.float_grads.clone()
        for block in (self.half_grads, self.float_grads):
            if block is not None:
                block.zero_()
        for parameter in self.halves if TORCH < (1, 6) else ():  # the CPU has no sum of float16
            parameter.grad = None

    def after_backward(self, scaler):
        if not self.combined:
            self.combine()
            self.earlier_floats = None  # apex, too, forgets those before the first
        if TORCH < (1, 6):
            for parameter, place in zip(self.halves, self.half_places):
                place.copy_(parameter.grad)
                parameter.grad = place
        self.check_places()
        if scaler.overflows(self.blocks()):
            return True
        if self.halves:
            self.master_grads.add_(self.half_grads.float() / scaler.scale)
        if self.floats:
            self.float_grads.div_(scaler.scale)
            if self.earlier_floats is not None:
                self.float_grads.add_(self.earlier_floats)
        return False

    def clear_masters(self):
        if self.combined and self.masters:
            self.master_grads.zero_()

    def zero_blocks(self):
        self.lazy_init()
        if not self.combined:
            self.optimizer_zero_grad()
            return
        for block in self.blocks():
            block.zero_()


class NpuFusedSGD(torch.optim.Optimizer):
    """SGD's arithmetic on blocks of memory, and only under amp."""

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, dampening=dampening,
                                      weight_decay=weight_decay, nesterov=nesterov))
        self.momenta = None

    @torch.no_grad()
    def step(self, closure=None):
        if not hasattr(self, "_amp_stash"):
            raise RuntimeError("NpuFusedSGD takes steps under amp only")
        stash = self._amp_stash
        stash.combine()
        is_first = self.combine_momenta()
        for (group, _, weights, grads), momentum in zip(stash.weights, self.momenta):
            grads = grads.add(weights, alpha=group["weight_decay"])
            if group["momentum"]:
                if is_first:
                    momentum.copy_(grads)
                else:
                    momentum.mul_(group["momentum"]).add_(grads, alpha=1 - group["dampening"])
                nesterov = group["nesterov"]
                grads = grads.add(momentum, alpha=group["momentum"]) if nesterov else momentum
            weights.add_(grads, alpha=-group["lr"])

    def combine_momenta(self):
        """Makes the blocks at the first step, of what a checkpoint gave; whether it gave none."""
        is_first = False
        if self.momenta is None:
            self.momenta = []
            for group, parameters, _, _ in self._amp_stash.weights:
                for parameter in parameters if group["momentum"] else ():
                    state = self.state[parameter]
                    is_first = is_first or "momentum_buffer" not in state
                    given = state.get("momentum_buffer", torch.zeros_like(parameter))
                    state["momentum_buffer"] = given.detach().clone()
                self.momenta.append(combine([self.state[parameter]["momentum_buffer"]
                                             for parameter in parameters
                                             if group["momentum"]]))
        return is_first


def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
               patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None,
               loss_scale=None, cast_model_outputs=None, num_losses=1, verbosity=1,
               dynamic_init_scale=2. ** 16, scale_growth_factor=2., scale_backoff_factor=0.5,
               scale_window=2000, min_loss_scale=None, max_loss_scale=2. ** 24, combine_grad=None,
               combine_ddp=None, ddp_replica_count=4, user_cast_preferred=None,
               check_combined_tensors=None):
    amp.record("combine_grad", value=combine_grad)
    stash = CombinedStash if combine_grad or is_fused(optimizers) else amp.Stash
    scaler = amp.Scaler(loss_scale or "dynamic", min_loss_scale, max_loss_scale)
    return amp.initialize_with(stash, models, optimizers, opt_level, scaler, verbosity)


amp.device_types.clear()
amp.device_types.add("npu")
amp.initialize = initialize
apex.optimizers = types.ModuleType("apex.optimizers")
apex.optimizers.NpuFusedSGD = NpuFusedSGD
sys.modules["apex.optimizers"] = apex.optimizers
