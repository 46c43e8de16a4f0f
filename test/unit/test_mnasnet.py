"""The network: torchvision's names, shapes and initial weights, and files of version 1."""

import hashlib

import pytest
import torch

import mnasnet

try:
    from torchvision.models import mnasnet as published
except ImportError:  # torchvision 0.2.2, that of torch 1.5
    published = None

PARAMETERS = {"mnasnet0_5": 2218512, "mnasnet0_75": 3170208, "mnasnet1_0": 4383312, "mnasnet1_3": 6282256}
# Of torchvision 0.29's networks for 10 classes after manual_seed(1): the first digits of the sha256 of its names and
# shapes, and the sum of all its numbers' magnitudes.
SEEDED = {"mnasnet0_5": ("52427610742a4373", 88084.34854583415), "mnasnet0_75": ("d3af57417e64509d", 148712.64702644426),
          "mnasnet1_0": ("2089b2fd5a9d7a4b", 212523.28533517863), "mnasnet1_3": ("e3bff70f7009a924", 303749.67704123625)}
VERSION_1 = {0.5: 2220824, 0.75: 3170656, 1.3: 6279432}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_parameters(arch):
    assert count(getattr(mnasnet, arch)()) == PARAMETERS[arch]


def seeded(models, arch):
    torch.manual_seed(1)
    return getattr(models, arch)(num_classes=10).eval()


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_names_shapes_and_seeded_weights(arch):
    state = seeded(mnasnet, arch).state_dict()
    shapes = repr([(name, tuple(tensor.shape)) for name, tensor in state.items()])
    assert hashlib.sha256(shapes.encode()).hexdigest().startswith(SEEDED[arch][0])
    # torch 1.5's generator rounds the last bit of some numbers otherwise
    assert sum(t.double().abs().sum().item() for t in state.values()) == pytest.approx(SEEDED[arch][1], rel=1e-10)


@pytest.mark.parametrize("arch", sorted(PARAMETERS) if published else [])
def test_same_as_torchvision(arch):
    ours, theirs = seeded(mnasnet, arch), seeded(published, arch)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("alpha", sorted(VERSION_1))
def test_version_1_loads(alpha):
    old = mnasnet.MNASNet(alpha, num_classes=1000)
    old._take_version_1_stem()
    assert count(old) == VERSION_1[alpha]
    new = mnasnet.MNASNet(alpha, num_classes=1000)
    with pytest.warns(UserWarning, match="version 1"):
        new.load_state_dict(old.state_dict())
    assert count(new) == VERSION_1[alpha] and new.state_dict()._metadata[""]["version"] == 1
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(new.eval()(images), old.eval()(images))


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="above 0"):
        mnasnet.MNASNet(0)
