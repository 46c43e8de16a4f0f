"""Functions of main.py that need no process of their own."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image

import main
import mnasnet


def flags(*arguments):
    return main.parse_args(["somewhere"] + list(arguments))


def test_learning_rate_warms_up_and_falls_to_zero():
    f = flags("--lr", "1", "--epochs", "10", "--warmup", "2")
    rates = [main.learning_rate(f, e / 10) for e in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[20] == pytest.approx(1) and rates[60] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0) and rates[:21] == sorted(rates[:21])


def test_smoothed_cross_entropy_is_the_cross_entropy_against_smoothed_targets():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 1, 2, 6, 3])
    target = torch.full((5, 7), 0.1 / 7)
    target[range(5), labels] += 0.9
    expected = -(target * torch.log_softmax(logits, 1)).sum(1).mean()
    assert main.smoothed_cross_entropy(logits, labels, 0.1).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_first_step_that_overflows_changes_nothing():
    runtime = main.Runtime(main.KINDS["cpu"], torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(4, 64))
    optimizer = main.build_optimizer(flags("--lr", "1"), runtime, main.Precision(flags(), runtime), [weight])
    if not main.has_fused_sgd(runtime.device):  # nothing to go wrong: the scaler leaves the step out
        assert not optimizer.state
        return
    scaler = main.find_scaler(runtime.kind)(init_scale=2.0)
    memory = [torch.full_like(weight, float("nan")) for _ in range(20)]
    del memory  # what the allocator hands out next
    for gradient, expected in ((float("inf"), 1.0), (0.5, 1 - 1.9 * (0.5 + 1e-4))):  # Nesterov's first step
        scaler.scale((weight * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.allclose(weight, torch.full_like(weight, expected))


def test_the_momentum_of_another_torch_is_taken_and_not_what_its_sgd_was():
    runtime = main.Runtime(main.KINDS["cpu"], torch.device("cpu"))
    weight = torch.nn.Parameter(torch.ones(8, 4, 1, 1).contiguous(memory_format=torch.channels_last))
    optimizer = main.build_optimizer(flags("--lr", "1"), runtime, main.Precision(flags(), runtime), [weight])
    before = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    before["lr"] = 5
    momentum = torch.randn(8, 4, 1, 1)
    main.load_momentum(optimizer, {"state": {7: {"momentum_buffer": momentum}},
                                   "param_groups": [{"params": [7], "lr": 5, "fused": not before.get("fused")}]})
    assert {name: value for name, value in optimizer.param_groups[0].items() if name != "params"} == before
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)
    for wrong in ({7: {"exp_avg": momentum}}, {7: {"momentum_buffer": momentum[:3]}}):
        with pytest.raises((KeyError, RuntimeError)):
            main.load_momentum(optimizer, {"state": wrong, "param_groups": [{"params": [7], "lr": 5}]})


def test_master_weights_keep_the_memory_of_their_gradients():
    """Ascend's fused SGD goes on reading the memory where the first gradients lay."""
    f = flags("--opt-level", "O2", "-a", "mnasnet0_5")
    runtime = main.Runtime(main.KINDS["cpu"], torch.device("cpu"))
    if not hasattr(torch, "autocast"):
        with pytest.raises(main.Fault):
            main.Precision(f, runtime)
        return
    precision = main.Precision(f, runtime)
    model = main.build_model(f, runtime, 4, precision.conv_dtype)
    optimizer, places = torch.optim.SGD(precision.prepare(model), 0.1), []
    clear = optimizer.zero_grad
    optimizer.zero_grad = lambda: clear(set_to_none=False)
    for _ in range(2):
        loss = model(torch.randn(2, 3, 32, 32).bfloat16()).float().square().mean()
        precision.backward_and_step(loss, model, optimizer)
        places.append([parameter.grad.data_ptr() for parameter in main.stepped_parameters(optimizer)])
    assert places[0] == places[1]


def test_folded_batchnorm_changes_nothing_but_rounding():
    runtime = main.Runtime(main.KINDS["cpu"], torch.device("cpu"))
    model = main.build_model(flags("-a", "mnasnet0_5"), runtime, 10)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.normal_()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, found = model.eval()(images), main.fold_batchnorm(model)(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("kernel,stride,side", [(3, 1, 8), (3, 2, 8), (3, 2, 7), (5, 1, 7), (5, 2, 8), (5, 2, 5), (5, 2, 1)])
def test_fast_depthwise_has_the_gradients_of_float64(kernel, stride, side, dtype, tolerance):
    if not hasattr(torch, "autocast"):  # torch 1.5 and 1.8 can't ask for one gradient alone
        assert main.has_fast_depthwise(dtype) is False
        return
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(24, 24, kernel, stride, kernel // 2, groups=24, bias=False).to(dtype)
    images = torch.randn(2, 24, side, side).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (images, conv.weight)]
    expected = torch.nn.functional.conv2d(*exact, stride=stride, padding=kernel // 2, groups=24)
    found = main.fast_depthwise(dtype, conv, images)
    toward = torch.randn_like(found)
    found.backward(toward)
    expected.backward(toward.double())
    for ours, theirs in ((found, expected), (images.grad, exact[0].grad), (conv.weight.grad, exact[1].grad)):
        assert ours.dtype == dtype and (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["as it is", "one number in many places"])
def test_fast_relu_has_the_numbers_of_relu(dtype, layout):
    if not main.has_fast_depthwise(dtype):
        assert not hasattr(torch, "autocast") or dtype == torch.bfloat16
        return
    model = torch.nn.Sequential(torch.nn.ReLU(inplace=True))
    main.replace_relu(model)
    images = torch.tensor([-2.0, -0.0, 0.0, 3.0, float("nan"), float("inf")], dtype=dtype, requires_grad=True)
    found, expected = model(images * 1), torch.relu(images)
    assert found.tolist()[:4] == expected.tolist()[:4] and torch.isnan(found[4]) and found[5] == float("inf")
    toward = torch.tensor([5.0, 6, 7, 8, 9, 10] if layout == "as it is" else [5.0], dtype=dtype).expand(6)
    gradients = [torch.autograd.grad(result, images, toward.clone() if layout == "as it is" else toward)[0].tolist()
                 for result in (found, expected)]
    assert gradients[0] == gradients[1] and gradients[0][2:4] == [0, toward[3]]


@pytest.mark.parametrize("side", [7, 8])
def test_depthwise_convolutions_have_the_gradients_of_float64(side):
    runtime = main.Runtime(main.KINDS["cpu"], torch.device("cpu"))
    model = main.build_model(flags("-a", "mnasnet0_5"), runtime, 10)
    convs = {(m.kernel_size, m.stride): m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1}
    for conv in convs.values():
        images = torch.randn(2, conv.groups, side, side, requires_grad=True)
        exact = [t.detach().double().requires_grad_() for t in (images, conv.weight)]
        expected = torch.nn.functional.conv2d(*exact, stride=conv.stride, padding=conv.padding, groups=conv.groups)
        found = conv(images)
        toward = torch.randn_like(found)
        found.backward(toward)
        expected.backward(toward.double())
        for ours, theirs in ((found, expected), (images.grad, exact[0].grad), (conv.weight.grad, exact[1].grad)):
            assert (ours.double() - theirs).abs().max() < 1e-4 * theirs.abs().max(), conv


@pytest.mark.parametrize("world,batch", [(1, 10), (2, 3), (3, 7), (8, 4)])
def test_evaluation_takes_every_image_once(world, batch):
    seen, steps = [], set()
    for rank in range(world):
        order = main.BatchOrder(31, batch, main.Runtime(main.KINDS["cpu"], torch.device("cpu"), rank, world_size=world))
        taken = list(order)
        steps.add(len(order))
        assert len(taken) <= len(order)
        seen += [i for _, indices in taken for i in indices]
    assert sorted(seen) == list(range(31)) and len(steps) == 1


def test_the_order_of_training_goes_on_in_the_middle_and_splits_over_processes():
    def epoch(world, batch, first=0):
        runs = []
        for rank in range(world):
            place = main.Runtime(main.KINDS["cpu"], torch.device("cpu"), rank, world_size=world)
            order = main.BatchOrder(40, batch, place, seed=3)
            order.epoch, order.first = 5, first
            runs.append([list(indices) for _, indices in order])
        return [sum(step, []) for step in zip(*runs)]

    assert epoch(1, 8) == epoch(2, 4) == epoch(4, 2)
    assert epoch(1, 8)[2:] == epoch(2, 4, first=16)


def classic(image, plan, size):
    """Crop, then resize, then crop again: the usual Pillow steps, one after the other."""
    (left, top, w, h), resized, (x, y) = plan(*image.size)
    image = image.convert("RGB").crop((left, top, left + w, top + h)).resize(resized, Image.BILINEAR)
    return np.asarray(image.crop((x, y, x + size, y + size)), dtype=np.float32)


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (230, 230), (1600, 1200), (40, 300)])
def test_images_are_those_of_the_classic_pipeline(tmp_path, shape):
    small = np.random.RandomState(0).randint(0, 256, (shape[1] // 20 + 2, shape[0] // 20 + 2, 3)).astype(np.uint8)
    path = str(tmp_path / "a.jpg")
    Image.fromarray(small).resize(shape, Image.BICUBIC).save(path, quality=90)
    for seed in range(4):
        plans = [main.train_plan(64, 0.3, random.Random(seed)) for _ in range(2)] + [main.val_plan(72, 64)] * 2
        for ours, theirs in (plans[:2], plans[2:]):
            found = main.read_image(path, ours, 64).astype(np.float32)
            assert np.abs(found - classic(Image.open(path), theirs, 64)).mean() < 2


def read(path):
    return main.read_image(str(path), main.val_plan(32, 32), 32)


def test_odd_images_are_read(tmp_path):
    grey = Image.fromarray(np.full((40, 40), 100, np.uint8))
    for name, image, expected in [
            ("cmyk.jpg", Image.new("CMYK", (40, 40), (0, 0, 0, 155)), 100), ("palette.png", grey.convert("P"), 100),
            ("grey.jpg", grey, 100), ("sixteen.png", Image.fromarray(np.full((40, 40), 25700, np.uint16)), 100),
            ("clear.png", Image.new("RGBA", (40, 40), (0, 0, 0, 0)), 255)]:
        image.save(str(tmp_path / name))
        assert np.abs(read(tmp_path / name).astype(int) - expected).max() <= 3, name
    grey.save(str(tmp_path / "really.png"))
    (tmp_path / "really.png").rename(tmp_path / "a.JPEG")
    assert read(tmp_path / "a.JPEG").mean() == 100


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\xff\xd8\xff\xe0 no image", b"\x89PNG\r\n\x1a\n"])
def test_broken_images_are_refused(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read(tmp_path / "a.jpg")


def test_a_cut_image_is_refused(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (90, 90, 3)).astype(np.uint8)).save(str(path))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises((OSError, ValueError)):
        read(path)


class Payload:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize("save", [lambda value, path: torch.save(value, path), None])
def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    if save:
        save({"state_dict": Payload()}, "bad.pth")
    else:
        (tmp_path / "bad.pth").write_bytes(pickle.dumps({"state_dict": Payload()}))
    with pytest.raises(main.Fault, match="bad.pth"):
        main.read_checkpoint("bad.pth")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_is_found_out(tmp_path):
    path = str(tmp_path / "c.pth.tar")
    value = {"weights": torch.arange(5000.0), "epoch": 3}
    main.write_file(main.serialise(value), path)
    assert torch.equal(main.read_checkpoint(path)["weights"], value["weights"])
    whole = (tmp_path / "c.pth.tar").read_bytes()
    rng = random.Random(0)
    for _ in range(20):
        (tmp_path / "c.pth.tar").write_bytes(whole[:rng.randrange(len(whole))])
        with pytest.raises(main.Fault):
            main.read_checkpoint(path)
        at = rng.randrange(len(whole))
        (tmp_path / "c.pth.tar").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
        try:  # a bit of the zip file's padding changes nothing
            assert torch.equal(main.read_checkpoint(path)["weights"], value["weights"])
        except main.Fault:
            pass


def test_older_checkpoints_are_kept(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "a-1", "a-2")]
    for epoch in range(4):
        main.write_file(main.serialise({"epoch": epoch}), paths[0], paths[1:])
    assert [main.read_checkpoint(p)["epoch"] for p in paths] == [3, 2, 1]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_index_of_a_large_folder_is_kept_until_the_folder_changes(tmp_path, monkeypatch):
    for label in "ab":
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "1.jpg").write_bytes(b"")
    monkeypatch.setattr(main, "LARGE", 1)
    open_folder = lambda: main.Folder(str(tmp_path / "data"), str(tmp_path / "index.npz"))
    assert open_folder().paths.tolist() == [b"a/1.jpg", b"b/1.jpg"] and (tmp_path / "index.npz").exists()
    scan = main.scan
    monkeypatch.setattr(main, "scan", lambda *a: pytest.fail("scanned again"))
    again = open_folder()
    assert again.paths.tolist() == [b"a/1.jpg", b"b/1.jpg"] and again.labels.tolist() == [0, 1]
    monkeypatch.setattr(main, "scan", scan)
    (tmp_path / "data" / "b" / "2.jpg").write_bytes(b"")
    assert open_folder().paths.tolist() == [b"a/1.jpg", b"b/1.jpg", b"b/2.jpg"]
    (tmp_path / "index.npz").write_bytes(b"rubbish")
    assert len(open_folder()) == 3


@pytest.mark.parametrize("arguments,words", [
    ([], "no data folder"), (["d", "--epochs", "none"], "whole number"), (["d", "-b", "0"], "at least 1"),
    (["d", "--device", "tpu"], "npu"), (["d", "--device-list", "0,0"], "different card numbers"),
    (["d", "-e"], "--resume"), (["d", "--val-crop-size", "300"], "--val-resize-size"), (["d", "--lr", "nan"], "number"),
    (["d", "--rank", "2", "--world-size", "2"], "--world-size"),
    (["--synthetic", "9", "--check-data"], "no data folder")])
def test_flags_that_can_not_be(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main.parse_args(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_reference_command_line_is_understood():
    f = flags(*"--device npu --device-list 0,1,2,3,4,5,6,7 -a mnasnet1_0 -j 16 --epochs 300 --start-epoch 1 -b 4096 "
              "--ls 0.1 --learning-rate 1.4 --momentum 0.9 --weight-decay 1e-5 -p 20 --world-size 1 --rank 0 --npu 3 "
              "--dist-url env:// --dist-backend hccl --seed 49 --warmup 5 --local_rank 2 --run-prof "
              "--multiprocessing-distributed".split())
    assert f.device_list == list(range(8)) and (f.lr, f.wd, f.label_smoothing, f.local_rank) == (1.4, 1e-5, 0.1, 2)


def test_published_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    state = mnasnet.mnasnet0_5(num_classes=3).state_dict()
    torch.save(state, str(tmp_path / "weights"))
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:10]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    model, f = mnasnet.mnasnet0_5(num_classes=3), flags("-a", "mnasnet0_5", "--pretrained")
    for name, good in (("net-{}.pth".format("0" * 10), False), ("net-{}.pth".format(digest), True)):
        (tmp_path / name).write_bytes((tmp_path / "weights").read_bytes())
        monkeypatch.setitem(mnasnet.WEIGHTS, "mnasnet0_5", (tmp_path / name).as_uri())
        if good:
            main.load_pretrained(model, f)
            (tmp_path / name).unlink()
            main.load_pretrained(model, f)
        else:
            with pytest.raises(main.Fault, match="--weights FILE"):
                main.load_pretrained(model, f)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
