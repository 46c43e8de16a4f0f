"""MnasNet-B1, -A1 and -small: Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for
Mobile", 2018, arXiv 1807.11626.

B1 has torchvision's module names and initialisation: each loads the other's state dicts, and the
same seed gives the same weights. Only a classifier of other than 1,000 classes differs: it has the
initial range of 1,000, as torchvision's gives 10 classes a first loss of 14.

The end of the file is about speed on a CPU: ``optimize_for_cpu`` and ``keep_freed_memory`` for
training, ``fold_batchnorm`` for evaluation. None changes names, parameters or results.
"""

import contextlib
import copy
import ctypes
import functools
import math
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

ARCHITECTURES = ["mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "mnasnet_a1_0_5",
                 "mnasnet_a1_0_75", "mnasnet_a1", "mnasnet_a1_1_4", "mnasnet_small"]
__all__ = ["MNASNet", *ARCHITECTURES, "ARCHITECTURES", "WEIGHTS", "rename_from_timm",
           "optimize_for_cpu", "keep_freed_memory", "fold_batchnorm"]

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])

# torchvision's published weights. A file's name ends in the first digits of its SHA-256.
WEIGHTS = {
    "mnasnet0_5": "https://download.pytorch.org/models/mnasnet0.5_top1_67.823-3ffadce67e.pth",
    "mnasnet0_75": "https://download.pytorch.org/models/mnasnet0_75-7090bc5f.pth",
    "mnasnet1_0": "https://download.pytorch.org/models/mnasnet1.0_top1_73.512-f206786ef8.pth",
    "mnasnet1_3": "https://download.pytorch.org/models/mnasnet1_3-a4c69d6f.pth",
}

# Of each network, the channels of the stem's two convolutions, and its stacks of blocks: kernel,
# stride, expansion, repeats, output channels, and whether they have squeeze-and-excitation.
_NETWORKS = {
    "b1": ((32, 16), (  # the paper's first version, figure 7
        (3, 2, 3, 3, 24, False),
        (5, 2, 3, 3, 40, False),
        (5, 2, 6, 3, 80, False),
        (3, 1, 6, 2, 96, False),
        (5, 2, 6, 4, 192, False),
        (3, 1, 6, 1, 320, False),
    )),
    "a1": ((32, 16), (  # its third version, figure 7
        (3, 2, 6, 2, 24, False),
        (5, 2, 3, 3, 40, True),
        (3, 2, 6, 4, 80, False),
        (3, 1, 6, 2, 112, True),
        (5, 2, 6, 3, 160, True),
        (3, 1, 6, 1, 320, False),
    )),
    "small": ((8, 8), (  # mnasnet_models.py of the authors
        (3, 2, 3, 1, 16, False),
        (3, 2, 6, 2, 16, False),
        (5, 2, 6, 4, 32, True),
        (3, 1, 6, 3, 32, True),
        (5, 2, 6, 3, 88, True),
        (3, 1, 6, 1, 144, False),
    )),
}
_FEATURES = 1280  # channels of the head; alpha does not scale them

def _scale_channels(channels, alpha):
    """Returns ``channels * alpha`` rounded to a multiple of 8, up where that loses over a tenth."""
    scaled = channels * alpha
    nearest = max(8, int(scaled + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * scaled else nearest + 8

def _conv_bn(in_channels, out_channels, kernel, stride=1, groups=1, relu=True):
    """Returns the modules of a convolution without bias, its BatchNorm and, by default, a ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2,
                     groups=groups, bias=False)
    modules = [conv, nn.BatchNorm2d(out_channels)]
    return modules + [nn.ReLU(inplace=True)] if relu else modules

def _average_pool(images):
    """Returns the mean of each channel of [N, C, H, W] as [N, C, 1, 1]."""
    if images.requires_grad and images.device.type == "cpu":
        # The gradient of a mean is expanded before it is divided, which is slow.
        return images.sum([2, 3], keepdim=True) / (images.shape[2] * images.shape[3])
    return images.mean([2, 3], keepdim=True)

class _SqueezeExcitation(nn.Module):
    """Scales each channel by a gate that depends on the means of all (Hu et al., 2017, arXiv
    1709.01507)."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(_average_pool(x)))))

class _InvertedResidual(nn.Module):
    """1x1 convolution to ``expansion`` times the channels, depthwise convolution, 1x1 projection.

    The input is added to the output where their shapes are the same. An expansion of 1 has no
    first convolution. Squeeze-and-excitation goes to a quarter of the input's channels.
    """

    def __init__(self, in_channels, out_channels, kernel, stride, expansion, squeeze=False):
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        layers = _conv_bn(in_channels, hidden, 1) if expansion > 1 else []
        layers += _conv_bn(hidden, hidden, kernel, stride, groups=hidden)
        if squeeze:  # in one module with the ReLU, so that layers are numbered as in B1
            layers[-1] = nn.Sequential(layers[-1], _SqueezeExcitation(hidden, in_channels // 4))
        self.layers = nn.Sequential(*layers, *_conv_bn(hidden, out_channels, 1, relu=False))

    def forward(self, x):
        return self.layers(x) + x if self.residual else self.layers(x)

def _stack(in_channels, out_channels, kernel, stride, expansion, repeats, squeeze):
    """Returns ``repeats`` blocks; the first has the stride and changes the number of channels."""
    blocks = [_InvertedResidual(in_channels, out_channels, kernel, stride, expansion, squeeze)]
    for _ in range(1, repeats):
        blocks.append(_InvertedResidual(out_channels, out_channels, kernel, 1, expansion, squeeze))
    return nn.Sequential(*blocks)

class MNASNet(nn.Module):
    """MnasNet.

    Args:
        alpha: width multiplier; scales every number of channels but the head's.
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the classifier.
        bn_momentum: weight of a new batch in BatchNorm's running statistics. (With torchvision's
            0.0003 they lag for about ten epochs at batch size 4096; the published Ascend results
            were trained with 0.1.)
        bn_eps: what BatchNorm adds to the variance.
        variant: "b1"; "a1", with squeeze-and-excitation; or "small".

    ``forward`` takes float images [N, 3, H, W] and returns logits [N, num_classes].

    The stem of a version 1 state dict does not scale with alpha. A model that loads one takes that
    stem, with a warning, and saves version 1 from then on.

    Raises:
        ValueError: alpha is not positive.
    """

    _version = 2

    def __init__(self, alpha, num_classes=1000, dropout=0.2, bn_momentum=0.1, bn_eps=1e-5,
                 variant="b1"):
        super().__init__()
        if not alpha > 0:
            raise ValueError(f"alpha is the width multiplier, a number above 0, not {alpha!r}")
        self.alpha = alpha
        self.num_classes = num_classes
        self.bn_momentum = bn_momentum
        self.bn_eps = bn_eps
        self.variant = variant
        stem, stacks = _NETWORKS[variant]
        stem, channels = (_scale_channels(c, alpha) for c in stem)
        layers = self._stem(stem, channels)
        for kernel, stride, expansion, repeats, depth, squeeze in stacks:
            out_channels = _scale_channels(depth, alpha)
            layers.append(
                _stack(channels, out_channels, kernel, stride, expansion, repeats, squeeze))
            channels = out_channels
        layers += _conv_bn(channels, _FEATURES, 1)
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_FEATURES, num_classes))
        self._set_batchnorm()
        self.apply(_initialize)

    def forward(self, x):
        return self.classifier(_average_pool(self.layers(x)).flatten(1))

    def _stem(self, channels, out_channels):
        """Returns modules 0 to 7: a 3x3 convolution of stride 2, then a depthwise separable one."""
        layers = _conv_bn(3, channels, 3, stride=2)
        if self.variant == "small":  # whose separable convolution is a block
            block = _InvertedResidual(channels, out_channels, 3, stride=1, expansion=1)
            return layers + [block] + [nn.Identity() for _ in range(4)]
        return (layers + _conv_bn(channels, channels, 3, groups=channels)
                + _conv_bn(channels, out_channels, 1, relu=False))

    def _set_batchnorm(self):
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = self.bn_momentum
                module.eps = self.bn_eps

    def _rebuild_version_1_stem(self):
        stem, stacks = _NETWORKS["b1"]
        kernel, stride, expansion, repeats, depth, squeeze = stacks[0]
        first_stack = _stack(stem[1], _scale_channels(depth, self.alpha), kernel, stride,
                             expansion, repeats, squeeze)
        like = self.classifier[1].weight
        for index, module in enumerate(self._stem(*stem) + [first_stack]):
            module.to(device=like.device, dtype=like.dtype).train(self.training)
            self.layers[index] = module
        self._set_batchnorm()
        self._version = 1

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        version = local_metadata.get("version")
        stem = state_dict.get(prefix + "layers.0.weight")
        # A file that was rewritten as a plain dictionary has lost its version: the shape tells.
        width = _NETWORKS["b1"][0][0]
        unscaled = self.variant == "b1" and stem is not None and stem.shape[0] == width
        if version in (None, 1) and unscaled and _scale_channels(width, self.alpha) != width:
            if self._version == 2:
                warnings.warn("a version 1 state dict: its stem does not scale with alpha, and "
                              "this model takes that stem", UserWarning)
                self._rebuild_version_1_stem()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

def _initialize(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:  # of squeeze-and-excitation
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = math.sqrt(3) * (1 / math.sqrt(1000))  # kaiming_uniform_ for 1,000 classes
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)

# timm's names of these modules, of the parts of the stem, and of those of a block in the stacks.
_TIMM = {"conv_stem": "layers.0", "bn1": "layers.1", "conv_head": "layers.14", "bn2": "layers.15",
         "classifier": "classifier.1"}
_TIMM_STEM = {"conv_dw": 0, "bn1": 1, "conv_pw": 3, "bn2": 4}
_TIMM_BLOCK = {"conv_pw": "0", "bn1": "1", "conv_dw": "3", "bn2": "4", "conv_pwl": "6", "bn3": "7",
               "se.conv_reduce": "5.1.reduce", "se.conv_expand": "5.1.expand"}

def rename_from_timm(state_dict):
    """Returns the tensors of one of timm's ``mnasnet_*`` or ``semnasnet_*`` under the names that
    they have here."""
    small = len(state_dict["conv_stem.weight"]) == _NETWORKS["small"][0][0]
    renamed = {}
    for name, tensor in state_dict.items():
        module, kind = name.rsplit(".", 1)
        if module.startswith("blocks.0.0."):
            number = _TIMM_STEM[module[len("blocks.0.0."):]]
            module = f"layers.3.layers.{number}" if small else f"layers.{3 + number}"
        elif module not in _TIMM:
            _, stack, block, part = module.split(".", 3)
            module = f"layers.{7 + int(stack)}.{block}.layers.{_TIMM_BLOCK[part]}"
        renamed[f"{_TIMM.get(module, module)}.{kind}"] = tensor
    return renamed

# Name, width multiplier; parameters, GMACs at 224 px, and Acc@1 of torchvision's weights.
mnasnet0_5 = functools.partial(MNASNet, 0.5)  # 2.2 M, 0.10, 67.734
mnasnet0_75 = functools.partial(MNASNet, 0.75)  # 3.2 M, 0.22, 71.180
mnasnet1_0 = functools.partial(MNASNet, 1.0)  # 4.4 M, 0.31, 73.456
mnasnet1_3 = functools.partial(MNASNet, 1.3)  # 6.3 M, 0.53, 76.506
mnasnet_a1_0_5 = functools.partial(MNASNet, 0.5, variant="a1")  # 2.1 M, 0.10
mnasnet_a1_0_75 = functools.partial(MNASNet, 0.75, variant="a1")  # 2.9 M, 0.22
mnasnet_a1 = functools.partial(MNASNet, 1.0, variant="a1")  # 3.9 M, 0.31, the paper's: 75.2 Acc@1
mnasnet_a1_1_4 = functools.partial(MNASNet, 1.4, variant="a1")  # 6.1 M, 0.59
mnasnet_small = functools.partial(MNASNet, 1.0, variant="small")  # 2.0 M, 0.07


# --- Speed on a CPU -------------------------------------------------------------------------------

def optimize_for_cpu(model, dtype):
    """Replaces how the depthwise convolutions of a model compute; ``dtype`` is what they run in.

    torch 1.5 and 1.8 get correct gradients, later versions faster ones.
    """
    if TORCH < (2, 0):  # wrong weight gradients at stride 2 (pytorch issue 50042)
        forward = padded_depthwise_conv2d
    elif has_fast_depthwise(dtype):
        forward = functools.partial(depthwise_conv2d, dtype)
    else:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = functools.partial(forward, module)

def padded_depthwise_conv2d(conv, images):
    """Computes ``conv`` on images padded beforehand, where gradients are correct, by the operator
    itself: ``F.conv2d`` of torch 1.8 would loop over the channels."""
    padded = F.pad(images, [conv.padding[0]] * 4).contiguous()
    return torch.mkldnn_convolution(padded, conv.weight, conv.bias, (0, 0), conv.stride,
                                    conv.dilation, conv.groups)

def has_fast_depthwise(dtype):
    """Whether ``depthwise_conv2d`` is available: torch 2.x, on a CPU that has ``dtype``."""
    return TORCH >= (2, 0) and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())

def depthwise_conv2d(dtype, conv, images):
    """Computes ``conv`` in ``dtype`` with the gradients of ``DepthwiseConv2d``."""
    if not torch.is_grad_enabled():
        return nn.Conv2d.forward(conv, images)
    return DepthwiseConv2d.apply(images.to(dtype), conv.weight.to(dtype), conv.stride, conv.padding)

class DepthwiseConv2d(torch.autograd.Function):
    """A depthwise convolution of images [N, C, H, W] and weights [C, 1, K, K], float32 or bfloat16.

    oneDNN computes some gradients slowly. Here that of images is a convolution of ``grad_output``,
    at stride 2 with zeros between its pixels, with the flipped weights (in float32 only at stride
    1), and that of 5x5 weights is put together from those of two halves of 5x3.
    """

    @staticmethod
    def forward(ctx, images, weight, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx, grad_output):
        images, weight = ctx.saved_tensors
        stride, padding, groups = ctx.stride, ctx.padding, len(weight)
        # Any other layout is slow.
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
        if stride[0] > 1 and images.dtype == torch.float32:
            grad_images = conv2d_input(
                images.shape, weight, grad_output, stride, padding, 1, groups)
        else:
            spread = grad_output
            if stride[0] > 1:
                spread = torch.zeros_like(images)
                spread[..., ::stride[0], ::stride[1]] = grad_output
            grad_images = F.conv2d(spread, weight.flip(2, 3), None, 1, padding, 1, groups)
        if min(images.shape[2:]) < weight.shape[3]:  # too small for oneDNN's fast kernels
            images, padding = F.pad(images, [padding[0]] * 4), (0, 0)
        grad_weight = torch.empty_like(weight)  # DistributedDataParallel asks for its strides
        if weight.shape[3] == 3:
            grad_weight.copy_(conv2d_weight(
                images, weight.shape, grad_output, stride, padding, 1, groups))
            return grad_images, grad_weight, None, None
        width = stride[1] * (grad_output.shape[3] - 1) + 3  # what a kernel 3 wide covers
        for first in (0, 2):
            left = padding[1] - first
            shifted = F.pad(images, (left, width - left - images.shape[3]))
            grad_weight[..., first:first + 3] = conv2d_weight(
                shifted, (groups, 1, 5, 3), grad_output, stride, (padding[0], 0), 1, groups)
        return grad_images, grad_weight, None, None

def keep_freed_memory(processes):
    """Makes glibc keep freed memory, in huge pages, for one of ``processes`` on this machine: each
    page that the kernel has to give again costs a training step a page fault."""
    trim_threshold, mmap_max, madv_hugepage = -1, -4, 14  # from malloc.h and mman.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)
        # Extends the heap to what a large batch may need: only addresses, until it is written to.
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // processes
        libc.malloc.restype = ctypes.c_void_p
        block = libc.malloc(ctypes.c_size_t(memory))
        if block:
            offset = -block % 2 ** 21
            libc.madvise(ctypes.c_void_p(block + offset), ctypes.c_size_t(memory - offset),
                         madv_hugepage)
            libc.free(ctypes.c_void_p(block))

def fold_batchnorm(model):
    """Returns a copy of ``model`` for evaluation, each BatchNorm folded into its convolution: equal
    logits up to rounding."""
    model = copy.deepcopy(model).eval()
    for layers in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm2d):
                layers[index - 1] = nn.utils.fuse_conv_bn_eval(layers[index - 1], layer)
                layers[index] = nn.Identity()
    return model
