"""The recipes, and each of their pieces beside its source."""

import re
import types

import numpy as np
import pytest
import torch
from torchvision import transforms

import main
from helpers import (
    SMALL, STEADY, TORCH, counts, cpu_runtime, differences, losses, needs_bf16, parse,
    read_checkpoint, read_metrics, run_main, several, the_error)

try:
    import timm
except ImportError:
    timm = None
try:
    from torchvision.transforms import v2
except ImportError:
    v2 = None
try:
    from torch.optim.swa_utils import AveragedModel
except ImportError:
    AveragedModel = None
needs_timm = pytest.mark.skipif(timm is None, reason="timm is not installed")
needs_erasing = pytest.mark.skipif(
    not hasattr(transforms, "RandomErasing"), reason="torchvision has RandomErasing since 0.3")
needs_policies = pytest.mark.skipif(TORCH < (2, 0), reason="torchvision has them since 0.12")
RECIPES = pytest.mark.parametrize("recipe", [
    pytest.param(name, marks=needs_policies if "auto_augment" in values else [])
    for name, values in sorted(main.RECIPES.items())])
# What makes a recipe small enough for a test.
SHORT = SMALL + STEADY + ["--epochs", "2", "--warmup", "0", "--lr-base-size", "8"]
CPU = cpu_runtime()


# Recipes


@pytest.mark.parametrize("recipe", sorted(main.RECIPES))
def test_a_recipe_sets_flags_and_the_command_line_wins(recipe):
    values = main.RECIPES[recipe]
    flags = main.parse_args(["data", "--recipe", recipe])
    assert {name: getattr(flags, name) for name in values} == values
    flags = main.parse_args(["--lr", "7", "data", "--recipe", recipe, "--epochs=3"])
    assert (flags.lr, flags.epochs, flags.data) == (7, 3, "data")


@pytest.mark.parametrize("name,value,words", [
    ("no_such_flag", 1, "--no-such-flag=1"), ("dropout", 2, "found 2, expected 0 to 1")])
def test_a_recipe_that_can_not_be_is_an_error(monkeypatch, capsys, name, value, words):
    monkeypatch.setitem(main.RECIPES, "small", {name: value})
    with pytest.raises(SystemExit):
        main.parse_args(["data", "--recipe", "small"])
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.parse_args(["data", "--recipe", "none"])
    assert "modelzoo" in capsys.readouterr().err


def test_the_log_and_the_checkpoint_say_what_is_in_force(images, run_here, tmp_path):
    result = run_here(images, "--recipe", "small", "--epochs", 1, "--lr", 0.005)
    assert len(losses(result)) == 4
    said = re.search(r"=> recipe small: (?:.*=.*\n)+", result.stdout).group()
    assert "epochs=1, lr=0.005, " in said and "warmup=1" in said
    flags = read_checkpoint(tmp_path)["flags"]
    assert flags["epochs"] == 1 and flags["lr"] == 0.005 and flags["dropout"] == 0


def test_the_rate_scales_with_the_images_of_a_step(images, run_here, tmp_path):
    result = run_here(images, "--epochs", 1, "--lr", 0.01, "--lr-base-size", 2)
    assert len(losses(result)) == 4
    assert read_checkpoint(tmp_path)["flags"]["lr"] == 0.04


O0, O1, O2 = (["--opt-level", level] for level in ("O0", "O1", "O2"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe,extra", [
    pytest.param("modelzoo", O0, id="modelzoo, O0"),
    pytest.param("rmsprop", O0, id="rmsprop, O0"),
    pytest.param("rmsprop", O2 + several(2), id="rmsprop, O2, 2 processes", marks=needs_bf16),
    pytest.param("strong", O0, id="strong, O0", marks=needs_policies),
    pytest.param("strong", O1, id="strong, O1", marks=needs_bf16),
    pytest.param("strong", O2 + several(2), id="strong, O2, 2 processes", marks=needs_bf16),
    pytest.param("small", O1, id="small, O1", marks=needs_bf16)])
def test_an_interrupted_recipe_ends_as_an_uninterrupted_one(
        images, run_here, tmp_path, recipe, extra):
    def run(folder, *more):
        arguments = [images, "--recipe", recipe, *SHORT, "--seed", 1, "--save-freq", 3, *extra,
                     "--output-dir", folder, *more]
        return run_here(*arguments) if len(extra) == 2 else run_main(*arguments, cwd=tmp_path)

    whole, again = tmp_path / "whole", tmp_path / "again"
    assert len(losses(run(whole))) == 8
    again.mkdir()
    # After step 6 of 8: in the second epoch.
    (again / "checkpoint.pth.tar").write_bytes((whole / "checkpoint-1.pth.tar").read_bytes())
    resumed = run(again, "--resume", "auto")
    assert len(losses(resumed)) == 2 and "bit-identical" not in resumed.stdout
    assert not differences(read_checkpoint(whole), read_checkpoint(again))


@pytest.mark.slow
@RECIPES
def test_a_recipe_trains_on_npu(npu, images, tmp_path, recipe):
    level = "O1" if recipe in ("modelzoo", "small") else "O2"
    result = run_main(images, "--recipe", recipe, *SHORT, "--device", "npu", "--loss-scale", 1,
                      "--opt-level", level, "--epochs", 1, cwd=tmp_path, small=False, **npu)
    assert len(losses(result)) == 4 and "npu:0" in result.stdout


# Optimizer and schedule


@needs_timm
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_rmsprop_is_that_of_timm(dtype, tolerance):
    from timm.optim import RMSpropTF
    flags = main.parse_args(["data", "--recipe", "rmsprop"])
    torch.manual_seed(1)
    inputs, targets = torch.randn(16, 8).to(dtype), torch.randint(3, (16,))
    results = []
    for kind in ("ours", "timm's"):
        torch.manual_seed(2)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
        model.to(dtype)
        if kind == "ours":
            optimizer = main.build_optimizer(flags, CPU, None, list(model.parameters()))
        else:
            optimizer = RMSpropTF(model.parameters(), lr=flags.lr, alpha=0.9, eps=1e-3,
                                  momentum=flags.momentum, weight_decay=flags.wd)
        for step in range(200):
            for group in optimizer.param_groups:
                group["lr"] = main.learning_rate(flags, step / 20)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*results, rtol=tolerance, atol=tolerance)
    assert results[0].abs().max() > 0.5  # it has moved


@needs_timm
@pytest.mark.parametrize("recipe", ["modelzoo", "rmsprop", "strong"])
def test_the_schedules_are_those_of_timm(recipe):
    from timm.scheduler import CosineLRScheduler, StepLRScheduler
    flags = main.parse_args(["data", "--recipe", recipe])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=flags.lr)
    warmup = {"warmup_t": flags.warmup, "warmup_lr_init": flags.lr * flags.lr_warmup_decay}
    if flags.schedule == "cosine":
        schedule = CosineLRScheduler(optimizer, t_initial=flags.epochs - flags.warmup,
                                     warmup_prefix=True, **warmup)
    else:
        schedule = StepLRScheduler(optimizer, decay_t=2.4, decay_rate=0.97, warmup_prefix=False,
                                   **warmup)
    for epoch in range(flags.epochs):
        schedule.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert main.learning_rate(flags, epoch) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_weight_decay_of_norms_and_biases():
    model = main.mnasnet.mnasnet_a1(num_classes=3)
    flags = parse("--wd", 3, "--norm-weight-decay", 2, "--bias-weight-decay", 1)
    groups = main.parameter_groups(model, list(model.parameters()), flags)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1 if name.endswith("bias") else 2 if parameter.dim() == 1 else 3
        assert decays[id(parameter)] == expected, name
    optimizer = main.build_optimizer(flags, CPU, None, groups)
    in_order = zip(main.optimizer_parameters(optimizer), model.parameters())
    assert all(one is other for one, other in in_order)
    groups = main.parameter_groups(model, list(model.parameters()), parse("--wd", 3))
    assert [group["weight_decay"] for group in groups] == [3]


def test_a_run_resumes_with_other_weight_decays(images, trained, run_here):
    folder, _ = trained
    result = run_here(images, "--resume", folder / "checkpoint.pth.tar", "--epochs", 3,
                      "--norm-weight-decay", 0, "--bias-weight-decay", 0, *STEADY)
    assert len(losses(result)) == 4
    assert "norm weight decay None, now 0.0" in result.stdout


def test_the_gradient_is_clipped_at_its_norm():
    flags = parse("--lr", 1, "--momentum", 0, "--wd", 0, "--clip-grad", 0.5)
    precision = main.Precision(flags, CPU)
    weights = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1))]
    optimizer = main.build_optimizer(flags, CPU, precision, weights)
    for factor, norm in ((100.0, 0.5), (0.1, 0.2)):
        before = torch.cat([w.detach().clone() for w in weights])
        precision.backward(factor * sum(w.sum() for w in weights), optimizer)
        precision.step(optimizer)
        moved = torch.cat([w.detach() for w in weights]) - before
        assert moved.norm().item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    pytest.param([], id="O0"), pytest.param(several(2), id="2 processes"),
    pytest.param(["--opt-level", "O1"], id="O1", marks=needs_bf16)])
def test_a_step_in_parts_is_the_step(images, tmp_path, extra):
    weights = []
    for parts in (1, 3):
        folder = tmp_path / str(parts)
        result = run_main(images, "--epochs", 1, "--seed", 1, "--freeze", "bn", "--dropout", 0,
                          "--accumulate", parts, "--output-dir", folder, *extra, cwd=tmp_path)
        assert len(losses(result)) == 4
        weights.append(read_checkpoint(folder)["state_dict"])
    tolerance = 1e-2 if "O1" in extra else 1e-5
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor.float(), weights[1][name].float(), atol=tolerance), name


# Exponential moving average


@pytest.mark.skipif(TORCH < (2, 0), reason="this torch's AveragedModel leaves out the buffers")
def test_ema_is_that_of_torch():
    decay, updates = 0.9, 0

    def average(averaged, value, count):
        current = min(decay, (1 + updates) / (10 + updates))
        return current * averaged + (1 - current) * value

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    flags = parse("--lr", 0.1)
    optimizer = main.build_optimizer(flags, CPU, None, list(model.parameters()))
    ema = main.EMA(model, decay, steps=2)
    ema.track(model.state_dict())
    expected = AveragedModel(model, avg_fn=average, use_buffers=True)
    expected.n_averaged += 1  # else its first update would copy the model
    for step in range(1, 101):
        model(torch.randn(2, 3, 8, 8) + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        if step % 2 == 0:
            updates += 1
            expected.update_parameters(model)
    wanted = expected.module.state_dict()
    for name, tensor in ema.model.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, wanted[name], atol=1e-6), name
            assert not torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("extra", [
    pytest.param([], id="O0"),
    pytest.param(["--opt-level", "O2"], id="O2", marks=[needs_bf16, pytest.mark.slow]),
    pytest.param([*several(3), "-b", 24], id="3 processes", marks=pytest.mark.slow)])
def test_the_best_averaged_model_is_kept(images, run_here, tmp_path, extra):
    result = run_main(images, "--epochs", 2, "--ema", 0.99, *STEADY, *extra, cwd=tmp_path)
    assert losses(result)
    rows = read_metrics(tmp_path)
    found = re.findall(r"\* Acc@1 (\S+)", result.stdout)  # of each epoch, EMA and raw
    assert [float(value) for value in found] == pytest.approx(
        [float(row[name]) for row in rows for name in ("ema_acc1", "acc1")], abs=1e-3)
    best = max(float(row["ema_acc1"]) for row in rows)
    assert result.stdout.count("=> EMA:\n") == 2
    saved = read_checkpoint(tmp_path, "model_best_ema.pth.tar")["state_dict"]
    raw = read_checkpoint(tmp_path, "model_best.pth.tar")["state_dict"]
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int64}
    assert not torch.equal(saved["layers.0.weight"], raw["layers.0.weight"])
    evaluated = run_here(images, "-e", "--resume", "model_best_ema.pth.tar")
    assert 100 * int(counts(evaluated)[0]) / 31 == pytest.approx(best, abs=1e-3)


def test_ema_starts_from_a_checkpoint_that_has_none(images, trained, run_here, tmp_path):
    folder, _ = trained
    result = run_here(images, "--resume", folder / "checkpoint.pth.tar", "--epochs", 3,
                      "--ema", 0.9, *STEADY)
    assert len(losses(result)) == 4 and "ema None, now 0.9" in result.stdout
    first, last = read_metrics(tmp_path)[0], read_metrics(tmp_path)[-1]
    assert first["ema_acc1"] == "nan" and 0 <= float(last["ema_acc1"]) <= 100


# Augmentation


class Draws:
    """What ``mix_batch`` draws, in the same order."""

    def __init__(self, share, x=0, y=0):
        self.whole = [x, y]
        self.betavariate = lambda a, b: share
        self.random = lambda: 0.1

    def randrange(self, limit):
        return self.whole.pop(0)


@pytest.mark.skipif(v2 is None, reason="torchvision has MixUp and CutMix since 0.16")
@pytest.mark.parametrize("x,y", [(0, 0), (17, 30), (39, 12)])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_mixing_is_that_of_torchvision(monkeypatch, share, x, y):
    images, targets = torch.randn(6, 3, 32, 40), torch.randint(5, (6,))
    for name, kind in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)):
        mix = kind(num_classes=5)
        mix._dist = types.SimpleNamespace(sample=lambda shape: torch.tensor(share).double())
        drawn = [torch.tensor([x]), torch.tensor([y])]
        monkeypatch.setattr(torch, "randint", lambda *args, **options: drawn.pop(0))
        expected = mix(images, targets)
        flags = parse(f"--{name}", 1)
        found = main.mix_batch(images.clone(), targets, 5, flags, Draws(share, x, y))
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert torch.allclose(found[1], expected[1].float(), atol=1e-6)
        monkeypatch.undo()


def test_the_loss_of_mixed_targets_is_that_of_their_parts():
    logits, targets = torch.randn(8, 5), torch.randint(5, (8,))
    one_hot = torch.nn.functional.one_hot(targets, 5).float()
    expected = main.smoothed_cross_entropy(logits, targets, 0.1)
    assert torch.allclose(main.smoothed_cross_entropy(logits, one_hot, 0.1), expected)
    others = targets.roll(1, 0)
    mixed = 0.3 * one_hot + 0.7 * one_hot.roll(1, 0)
    expected = 0.3 * expected + 0.7 * main.smoothed_cross_entropy(logits, others, 0.1)
    assert torch.allclose(main.smoothed_cross_entropy(logits, mixed, 0.1), expected)


def test_what_is_mixed_depends_on_seed_epoch_and_step(images, run_here, tmp_path):
    arguments = [images, "--epochs", 1, "--seed", 1, "--mixup", 0.2, "--cutmix", 1]
    mixed = losses(run_here(*arguments))
    assert mixed == losses(run_here(*arguments))
    assert mixed != losses(run_here(images, "--epochs", 1, "--seed", 1))


AUGMENTATIONS = [
    pytest.param(["--color-jitter", 0.4], id="color jitter"),
    pytest.param(["--random-erasing", 1], id="erasing", marks=needs_erasing),
    pytest.param(["--auto-augment", "ra"], id="RandAugment", marks=needs_policies),
    pytest.param(["--auto-augment", "ta"], id="TrivialAugment", marks=needs_policies)]


@pytest.mark.parametrize("arguments", AUGMENTATIONS)
def test_what_is_done_to_an_image_depends_on_seed_epoch_and_index(images, arguments):
    folder = main.ImageFolder(str(images / "train"))
    indices = np.arange(len(folder))

    def load(flags, epoch, order, seed=1):
        batches = main.ImageBatches(folder, flags, seed, len(order), slots=1)
        batches[0, epoch, order]
        return batches.ring[0].copy()

    flags = parse(*arguments)
    found = load(flags, 0, indices)
    torch.manual_seed(5)  # of no consequence
    assert np.array_equal(found, load(flags, 0, indices[::-1])[::-1])
    assert not np.array_equal(found, load(flags, 1, indices))
    assert not np.array_equal(found, load(flags, 0, indices, seed=2))
    plain = load(parse(), 0, indices)
    changed = (found != plain).any(axis=(1, 2, 3)).mean()
    assert changed > 0.5
    evaluated = load(flags, 0, indices, seed=None)
    assert np.array_equal(evaluated, load(parse(), 0, indices, seed=None))


@pytest.mark.skipif(TORCH >= (2, 0), reason="this torchvision has all of them")
def test_a_transform_that_torchvision_lacks_is_named(images, run_here):
    error = the_error(run_here(images, "--auto-augment", "ta"))
    assert "TrivialAugmentWide" in error and "0.12" in error


@needs_erasing
def test_erased_parts_have_the_mean_colour():
    erase = main.build_augmentation(parse("--random-erasing", 1))
    torch.manual_seed(1)
    crop = erase(np.zeros((32, 32, 3), np.uint8))
    colours = {tuple(pixel) for pixel in crop.reshape(-1, 3).tolist()}
    assert colours == {(0, 0, 0), tuple(int(255 * mean) for mean in main.MEAN)}
