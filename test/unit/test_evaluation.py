"""-e: exact counts, whatever the processes, the batches and the kind of file."""

import numpy as np
import pytest
import torch
from PIL import Image

import main
import mnasnet
from helpers import ROOT, counts, final_loss, read_checkpoint, run_main, several


@pytest.fixture(scope="module")
def five_hundred(tmp_path_factory):
    """(a folder with 500 validation images of 10 classes, a network with fresh weights for them).

    BatchNorm's first statistics keep the logits apart enough for every image to have a clear guess.
    """
    folder = tmp_path_factory.mktemp("500 images")
    data = np.load(str(ROOT / "test" / "data" / "fashion_mnist_2500.npz"))
    for index, (image, label) in enumerate(zip(data["val_images"], data["val_labels"])):
        for split in ("train", "val"):
            class_folder = folder / split / str(label)
            class_folder.mkdir(parents=True, exist_ok=True)
            if split == "val" or not list(class_folder.iterdir()):
                Image.fromarray(image).save(str(class_folder / f"{index}.jpg"), quality=95)
    torch.manual_seed(0)
    model = mnasnet.mnasnet0_5(num_classes=10).eval()
    torch.save(model.state_dict(), str(folder / "model.pth"))
    return folder, model


def counts_of_the_usual_pipeline(model, folder, size):
    """Correct at the first guess, and within five: by Pillow alone, and the network as defined."""
    top1 = top5 = 0
    mean, std = (np.array(values, np.float32) for values in (main.MEAN, main.STD))
    for label, class_folder in enumerate(sorted(folder.iterdir())):
        images = [Image.open(str(path)).convert("RGB") for path in class_folder.iterdir()]
        images = [image.resize((size, size), Image.BILINEAR) for image in images]
        pixels = (np.stack([np.asarray(image, np.float32) for image in images]) / 255 - mean) / std
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        guesses = logits.topk(5, 1)[1]
        top1 += int((guesses[:, 0] == label).sum())
        top5 += int((guesses == label).sum())
    return top1, top5


def test_counts_are_those_of_the_usual_pipeline_for_any_batch_size(five_hundred, run_here):
    folder, model = five_hundred
    found = {counts(run_here(folder, "-e", "--resume", folder / "model.pth", "-b", batch))
             for batch in (7, 64, 500)}
    assert len(found) == 1
    top1, top5, images = map(int, found.pop())
    expected = counts_of_the_usual_pipeline(model, folder / "val", 32)
    assert images == 500 and abs(top1 - expected[0]) <= 1 and abs(top5 - expected[1]) <= 1


@pytest.mark.parametrize("processes,batch", [
    (2, 34), pytest.param(3, 100, marks=pytest.mark.slow),
    pytest.param(8, 24, marks=pytest.mark.slow)])
def test_counts_do_not_depend_on_the_processes(five_hundred, run_here, processes, batch):
    folder = five_hundred[0]
    arguments = [folder, "-e", "--resume", folder / "model.pth"]
    result = run_main(*arguments, "-b", batch, *several(processes), cwd=folder)
    assert counts(result) == counts(run_here(*arguments, "-b", 50))


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "reference"])
def test_a_checkpoint_of_another_form_evaluates(images, trained, run_here, prefix):
    checkpoint = read_checkpoint(trained[0])
    state = {f"{prefix}{name}": value for name, value in checkpoint["state_dict"].items()}
    whole = {"epoch": 2, "state_dict": state, "amp": {}, "best_acc1": 1.0} if prefix else state
    torch.save(whole, "other.pth")
    loss = final_loss(run_here(images, "-e", "--resume", "other.pth"))
    assert loss == pytest.approx(checkpoint["history"][-1]["val_loss"], rel=1e-4)
