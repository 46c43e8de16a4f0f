"""The network: torchvision's names, shapes and initial weights, and files of version 1."""

import pytest
import torch

import mnasnet

PARAMETERS = {"mnasnet0_5": 2218512, "mnasnet0_75": 3170208, "mnasnet1_0": 4383312, "mnasnet1_3": 6282256}
VERSION_1 = {0.5: 2220824, 0.75: 3170656, 1.3: 6279432}


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_parameters(arch):
    assert count(getattr(mnasnet, arch)()) == PARAMETERS[arch]


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_same_as_torchvision(arch):
    models = pytest.importorskip("torchvision.models.mnasnet", reason="this torchvision has no MNASNet")
    torch.manual_seed(1)
    ours = getattr(mnasnet, arch)(num_classes=10).eval()
    torch.manual_seed(1)
    theirs = getattr(models, arch)(num_classes=10).eval()
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
