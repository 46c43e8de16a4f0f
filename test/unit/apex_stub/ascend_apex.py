"""Makes the stub Ascend's apex: an import adds what theirs has and NVIDIA's has not."""

import sys
import types

import apex
import torch
from apex import amp

_initialize = amp.initialize


def initialize(models, optimizers=None, enabled=True, opt_level="O1", cast_model_type=None,
               patch_torch_functions=None, keep_batchnorm_fp32=None, master_weights=None,
               loss_scale=None, cast_model_outputs=None, num_losses=1, verbosity=1,
               dynamic_init_scale=2. ** 16, scale_growth_factor=2., scale_backoff_factor=0.5,
               scale_window=2000, min_loss_scale=None, max_loss_scale=2. ** 24, combine_grad=None,
               combine_ddp=None, ddp_replica_count=4, user_cast_preferred=None,
               check_combined_tensors=None):
    amp._record("combine_grad", value=combine_grad)
    return _initialize(models, optimizers, opt_level=opt_level, loss_scale=loss_scale)


class NpuFusedSGD(torch.optim.SGD):
    """SGD's arithmetic under the fused one's arguments."""

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)

    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("NpuFusedSGD keeps its gradients: set_to_none must be False")
        for parameter in amp.master_params(self):
            if parameter.grad is not None:
                parameter.grad.detach_().zero_()


amp.initialize = initialize
apex.optimizers = types.ModuleType("apex.optimizers")
apex.optimizers.NpuFusedSGD = NpuFusedSGD
sys.modules["apex.optimizers"] = apex.optimizers
