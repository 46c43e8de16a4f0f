"""The networks: torchvision's names, shapes and weights, version 1 files, CPU optimizations."""

import hashlib
import math
from collections import OrderedDict

import pytest
import torch

import mnasnet

try:
    from torchvision.models import mnasnet as published
except ImportError:
    published = None
try:
    import timm
except ImportError:
    timm = None
needs_published = pytest.mark.skipif(
    published is None, reason="torchvision 0.2.2, that of torch 1.5, has no MNASNet")

PARAMETERS = {"mnasnet0_5": 2218512, "mnasnet0_75": 3170208,
              "mnasnet1_0": 4383312, "mnasnet1_3": 6282256}
# Of torchvision 0.29's networks after manual_seed(1): the start of the sha256 of the names and
# shapes, and the sum of the magnitudes of all numbers.
SEEDED = {"mnasnet0_5": ("987ea38ccc5b344e", 119699.8979509982),
          "mnasnet0_75": ("0145b2a3e9499071", 180170.34492691344),
          "mnasnet1_0": ("79072ef7458a242e", 243929.7795910451),
          "mnasnet1_3": ("965b9a7f4d14c672", 335361.35278970306)}
# Of timm 1.0.31's networks: parameters, and multiplications at 224 px.
FROM_TIMM = {"mnasnet_a1_0_5": ("semnasnet_050", 2082006, 103162992),
             "mnasnet_a1_0_75": ("semnasnet_075", 2912278, 223448480),
             "mnasnet_a1": ("semnasnet_100", 3887038, 311579072),
             "mnasnet_a1_1_4": ("semnasnet_140", 6105992, 586317952),
             "mnasnet_small": ("mnasnet_small", 2030264, 68339184)}
VERSION_1 = {0.5: 2220824, 0.75: 3170656, 1.3: 6279432}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def seeded(models, arch):
    torch.manual_seed(1)
    return getattr(models, arch)().eval()


@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_parameters_shapes_and_seeded_weights(arch):
    assert count(getattr(mnasnet, arch)()) == PARAMETERS[arch]
    state = seeded(mnasnet, arch).state_dict()
    shapes = repr([(name, tuple(tensor.shape)) for name, tensor in state.items()])
    assert hashlib.sha256(shapes.encode()).hexdigest().startswith(SEEDED[arch][0])
    # torch 1.5's generator rounds the last bit of some numbers otherwise
    total = sum(tensor.double().abs().sum().item() for tensor in state.values())
    assert total == pytest.approx(SEEDED[arch][1], rel=1e-10)


@needs_published
@pytest.mark.parametrize("arch", sorted(PARAMETERS))
def test_same_as_torchvision(arch):
    ours, theirs = seeded(mnasnet, arch), seeded(published, arch)
    expected, state = theirs.state_dict(), ours.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def multiplications(model, images):
    """Returns those of the convolutions and the classifier."""
    counts = []

    def count_one(module, inputs, output):
        counts.append(output[0].numel() * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count_one)
    with torch.no_grad():
        model.eval()(images)
    return sum(counts)


@pytest.mark.parametrize("arch", sorted(FROM_TIMM))
def test_a1_and_small_have_the_published_size(arch):
    model = getattr(mnasnet, arch)()
    expected = FROM_TIMM[arch][1:]
    assert (count(model), multiplications(model, torch.zeros(1, 3, 224, 224))) == expected


@pytest.mark.skipif(timm is None, reason="timm is not installed")
@pytest.mark.parametrize("arch", sorted(FROM_TIMM))
def test_a1_and_small_compute_what_timm_does(arch):
    theirs = timm.create_model(FROM_TIMM[arch][0])
    give_statistics(theirs)
    ours = getattr(mnasnet, arch)()
    ours.load_state_dict(mnasnet.rename_from_timm(theirs.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
        assert close(mnasnet.fold_batchnorm(ours)(images), ours(images).double(), 1e-4)


@pytest.mark.skipif(mnasnet.TORCH < (2, 0), reason="this torch has no bfloat16 network on the CPU")
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_folded_networks_compute_the_same_in_bfloat16(level):
    model = mnasnet.mnasnet_a1(num_classes=10)
    give_statistics(model)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        exact = model.eval()(images).double()
    if level == "O2":
        images = images.bfloat16()
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.bfloat16()
    folded = mnasnet.fold_batchnorm(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=level == "O1"):
        assert close(model(images), exact, 0.05)
        assert close(folded(images), exact, 0.05)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_the_first_loss_of_few_classes_is_about_that_of_a_guess(num_classes):
    torch.manual_seed(1)
    model = mnasnet.mnasnet1_0(num_classes=num_classes)
    with torch.no_grad():
        logits = model(torch.randn(16, 3, 64, 64))
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(16) % num_classes).item()
    assert loss < 2 * math.log(num_classes) + 1


def version_1_state(alpha):
    """A state dict of version 1: its stem, and what its first block reads, do not scale."""
    state = mnasnet.MNASNet(alpha).state_dict()
    unscaled = mnasnet.MNASNet(1.0).state_dict()
    for name in state:
        stem = name.startswith("layers.") and int(name.split(".")[1]) < 8
        expansion = name.startswith("layers.8.0.layers.") and int(name.split(".")[4]) < 6
        if stem or expansion:
            state[name] = unscaled[name]
    channels = len(state["layers.8.0.layers.6.weight"])
    state["layers.8.0.layers.6.weight"] = torch.randn(channels, 48, 1, 1)
    state._metadata[""]["version"] = 1
    return state


@pytest.mark.parametrize("versioned", [True, False], ids=["versioned", "plain dictionary"])
@pytest.mark.parametrize("alpha", sorted(VERSION_1))
def test_version_1_loads(alpha, versioned):
    state = version_1_state(alpha)
    model = mnasnet.MNASNet(alpha)
    with pytest.warns(UserWarning, match="version 1"):
        model.load_state_dict(state if versioned else OrderedDict(state.items()))
    loaded = model.state_dict()
    assert count(model) == VERSION_1[alpha] and loaded._metadata[""]["version"] == 1
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@needs_published
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("alpha", sorted(VERSION_1))
def test_version_1_computes_what_torchvision_does(alpha):
    state, images, found = version_1_state(alpha), torch.randn(1, 3, 32, 32), []
    for models in (mnasnet, published):
        model = models.MNASNet(alpha)
        model.load_state_dict(state)
        with torch.no_grad():
            found.append(model.eval()(images))
    assert torch.equal(*found)


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="above 0"):
        mnasnet.MNASNet(0)


def close(found, expected, tolerance):
    return (found.double() - expected).abs().max() < tolerance * expected.abs().max()


def give_statistics(model):
    """Running statistics as after some training."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.1)


def test_a_model_optimized_for_the_cpu_computes_what_float64_does():
    torch.manual_seed(0)
    exact = mnasnet.mnasnet0_5(num_classes=10).eval()
    give_statistics(exact)
    fast = mnasnet.mnasnet0_5(num_classes=10).eval()
    fast.load_state_dict(exact.state_dict())
    mnasnet.optimize_for_cpu(fast, torch.float32)
    images = torch.randn(2, 3, 48, 48)
    expected, found = exact.double()(images.double()), fast(images)
    assert close(found, expected, 1e-4)
    (expected ** 2).sum().backward()
    (found ** 2).sum().backward()
    for (name, ours), theirs in zip(fast.named_parameters(), exact.parameters()):
        assert close(ours.grad, theirs.grad, 1e-3), name


@DTYPES
@pytest.mark.parametrize("kernel,stride,side", [
    (3, 1, 8), (3, 2, 8), (3, 2, 7), (3, 1, 2), (5, 1, 7), (5, 1, 3), (5, 2, 8), (5, 2, 5),
    (5, 2, 1)])
def test_a_depthwise_convolution_has_the_gradients_of_float64(kernel, stride, side, dtype):
    fast = mnasnet.has_fast_depthwise(dtype)
    if dtype == torch.bfloat16 and not fast:
        pytest.skip("this torch, or this processor, has no fast gradients in bfloat16")
    torch.manual_seed(0)
    layout = torch.channels_last if fast else torch.contiguous_format
    conv = torch.nn.Conv2d(32, 32, kernel, stride, kernel // 2, groups=32, bias=False)
    conv.to(dtype=dtype, memory_format=layout)
    images = torch.randn(2, 32, side, side).to(dtype).contiguous(memory_format=layout)
    images.requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (images, conv.weight)]
    expected = torch.nn.functional.conv2d(
        *exact, stride=stride, padding=kernel // 2, groups=32)
    mnasnet.optimize_for_cpu(torch.nn.Sequential(conv), dtype)
    found = conv(images)
    grad_output = torch.randn(found.shape).to(dtype)
    found.backward(grad_output)
    expected.backward(grad_output.double())
    assert conv.weight.grad.stride() == conv.weight.stride()  # else DDP warns
    pairs = [(found, expected), (images.grad, exact[0].grad), (conv.weight.grad, exact[1].grad)]
    for ours, theirs in pairs:
        assert ours.dtype == dtype and close(ours, theirs, 1e-4 if dtype == torch.float32 else 0.02)


@DTYPES
@pytest.mark.parametrize("expanded", [False, True], ids=["a gradient each", "one gradient for all"])
def test_relu_of_an_optimized_model(dtype, expanded):
    if dtype == torch.bfloat16 and mnasnet.TORCH < (1, 10):
        pytest.skip("this torch has no ReLU in bfloat16 on the CPU")
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True))
    mnasnet.optimize_for_cpu(model, dtype)
    numbers = [-2.0, -0.0, 0.0, 3.0, float("nan"), float("inf")]
    images = torch.tensor(numbers, dtype=dtype, requires_grad=True)
    found = model(images * 1)
    assert found[:4].tolist() == [0, 0, 0, 3] and found[5] == float("inf")
    assert torch.isnan(found[4])
    gradient = torch.tensor([5.0] if expanded else [5.0, 6, 7, 8, 9, 10], dtype=dtype).expand(6)
    of_images, = torch.autograd.grad(found, images, gradient)
    assert of_images[:4].tolist() == [0, 0, 0, gradient[3]] and of_images[5] == gradient[5]


def test_folded_batchnorm_changes_nothing_but_rounding():
    torch.manual_seed(0)
    model = mnasnet.mnasnet0_5(num_classes=10).eval()
    give_statistics(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model(images), mnasnet.fold_batchnorm(model)(images)
    assert close(found, expected.double(), 1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
