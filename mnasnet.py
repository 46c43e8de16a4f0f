"""MNASNet-B1 (Tan et al., "MnasNet: Platform-Aware Neural Architecture Search for Mobile", arXiv 1807.11626).

The modules are named and initialised as torchvision names and initialises them, so that weights move between the
two freely, and the same seed gives the same network.
"""

import warnings

from torch import nn

__all__ = ["MNASNet", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3", "WEIGHTS"]

# The weights that torchvision published. A file's name ends in the first digits of its SHA-256.
WEIGHTS = {
    "mnasnet0_5": "https://download.pytorch.org/models/mnasnet0.5_top1_67.823-3ffadce67e.pth",
    "mnasnet0_75": "https://download.pytorch.org/models/mnasnet0_75-7090bc5f.pth",
    "mnasnet1_0": "https://download.pytorch.org/models/mnasnet1.0_top1_73.512-f206786ef8.pth",
    "mnasnet1_3": "https://download.pytorch.org/models/mnasnet1_3-a4c69d6f.pth",
}

_STEM = (32, 16)
_STACKS = (  # kernel, stride, expansion, repeats, output channels: table 1 and figure 7 of the paper
    (3, 2, 3, 3, 24),
    (5, 2, 3, 3, 40),
    (5, 2, 6, 3, 80),
    (3, 1, 6, 2, 96),
    (5, 2, 6, 4, 192),
    (3, 1, 6, 1, 320),
)
_FEATURES = 1280  # channels of the head; alpha does not scale them


def _scaled(channels, alpha):
    """``channels * alpha`` as the nearest multiple of 8, or the next one up where that loses over a tenth."""
    wanted = channels * alpha
    nearest = max(8, int(wanted + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * wanted else nearest + 8


def _conv_bn(inputs, outputs, kernel, momentum, stride=1, groups=1, relu=True):
    """The modules of one convolution: without bias, padded to keep the size at stride 1, then BatchNorm, then ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs, momentum=momentum)] + ([nn.ReLU(inplace=True)] if relu else [])


class _InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the channels, depthwise ``kernel``, 1x1 down; plus the input where shapes allow."""

    def __init__(self, inputs, outputs, kernel, stride, expansion, momentum):
        super().__init__()
        middle = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *_conv_bn(inputs, middle, 1, momentum),
            *_conv_bn(middle, middle, kernel, momentum, stride, groups=middle),
            *_conv_bn(middle, outputs, 1, momentum, relu=False)
        )

    def forward(self, x):
        return self.layers(x) + x if self.residual else self.layers(x)


def _stack(inputs, outputs, kernel, stride, expansion, repeats, momentum):
    """``repeats`` blocks, of which the first has the stride and changes the channels."""
    first = _InvertedResidual(inputs, outputs, kernel, stride, expansion, momentum)
    rest = [_InvertedResidual(outputs, outputs, kernel, 1, expansion, momentum) for _ in range(1, repeats)]
    return nn.Sequential(first, *rest)


class MNASNet(nn.Module):
    """MNASNet-B1.

    Args:
        alpha: width; every channel count but the head's is scaled by it.
        num_classes: outputs of the classifier.
        dropout: probability of zeroing a feature before the classifier.
        bn_momentum: weight of a new batch in BatchNorm's running statistics. (torchvision's 0.0003 makes them lag
            for about ten epochs at batch 4096; the Ascend results were trained with 0.1.)

    ``forward`` takes float images [N, 3, H, W] and gives logits [N, num_classes].

    ``version`` of a state dict: 1 had a stem that alpha did not scale. Loading such a file gives this model the old
    stem, with a warning, and its own files are of version 1 from then on.

    Raises:
        ValueError: alpha is not positive.
    """

    _version = 2

    def __init__(self, alpha, num_classes=1000, dropout=0.2, bn_momentum=0.1):
        super().__init__()
        if not alpha > 0:
            raise ValueError("alpha is the width multiplier, a number above 0, not {!r}".format(alpha))
        self.alpha, self.num_classes, self.bn_momentum = alpha, num_classes, bn_momentum
        stem, inputs = (_scaled(c, alpha) for c in _STEM)
        layers = self._stem(stem, inputs)
        for kernel, stride, expansion, repeats, channels in _STACKS:
            outputs = _scaled(channels, alpha)
            layers.append(_stack(inputs, outputs, kernel, stride, expansion, repeats, bn_momentum))
            inputs = outputs
        layers += _conv_bn(inputs, _FEATURES, 1, bn_momentum)
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_FEATURES, num_classes))
        self.apply(_initialise)

    def forward(self, x):
        return self.classifier(self.layers(x).mean([2, 3]))

    def _stem(self, channels, outputs):
        """Modules 0 to 7: a 3x3 convolution of stride 2, then a depthwise separable one."""
        momentum = self.bn_momentum
        return (_conv_bn(3, channels, 3, momentum, stride=2)
                + _conv_bn(channels, channels, 3, momentum, groups=channels)
                + _conv_bn(channels, outputs, 1, momentum, relu=False))

    def _take_version_1_stem(self):
        stem, outputs = _STEM
        kernel, stride, expansion, repeats, channels = _STACKS[0]
        first = _stack(outputs, _scaled(channels, self.alpha), kernel, stride, expansion, repeats, self.bn_momentum)
        like = self.classifier[1].weight
        for place, module in enumerate(self._stem(stem, outputs) + [first]):
            self.layers[place] = module.to(device=like.device, dtype=like.dtype).train(self.training)
        self._version = 1

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        version = local_metadata.get("version")
        stem = state_dict.get(prefix + "layers.0.weight")
        # The shape decides, too: a version gets lost where a file was rewritten as a plain dictionary.
        old = version in (None, 1) and stem is not None and stem.shape[0] == _STEM[0] != _scaled(_STEM[0], self.alpha)
        if old and self._version == 2:
            warnings.warn("a version 1 state dict: its stem does not scale with alpha, and this model takes that stem",
                          UserWarning)
            self._take_version_1_stem()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _initialise(module):
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
        nn.init.zeros_(module.bias)


def mnasnet0_5(**kwargs):
    """2.2 M parameters, 0.10 GMACs at 224 px; torchvision's weights reach 67.734 Acc@1."""
    return MNASNet(0.5, **kwargs)


def mnasnet0_75(**kwargs):
    """3.2 M parameters, 0.22 GMACs at 224 px; torchvision's weights reach 71.180 Acc@1."""
    return MNASNet(0.75, **kwargs)


def mnasnet1_0(**kwargs):
    """4.4 M parameters, 0.31 GMACs at 224 px; torchvision's weights reach 73.456 Acc@1."""
    return MNASNet(1.0, **kwargs)


def mnasnet1_3(**kwargs):
    """6.3 M parameters, 0.53 GMACs at 224 px; torchvision's weights reach 76.506 Acc@1."""
    return MNASNet(1.3, **kwargs)
