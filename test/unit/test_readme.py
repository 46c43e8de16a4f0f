"""What the README says of main.py, and the addresses that the repository names."""

import os
import re
import shlex
import shutil
import sys
import tarfile

import numpy as np
import pytest

import main
from helpers import ROOT, SMALL, TINY, TORCH, finish, free_port, own_files, start

README = (ROOT / "README.md").read_text(encoding="utf-8")
FLAG = r"(?<![\w-])--?[a-zA-Z][\w-]*"


def flags_of_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main.parse_args(["--help"])
    names = re.findall(r"^ {2}(-.*?)(?: {2}|$)", capsys.readouterr().out, re.M)
    return {flag for name in names for flag in re.findall(FLAG, name)} - {"-h", "--help"}


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_tables_have_every_flag_and_no_other(name, monkeypatch, capsys):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `-")]
    found = {flag for cell in cells for flag in re.findall(FLAG, cell)}
    assert found == flags_of_help(monkeypatch, capsys)


def test_every_public_address_is_listed():
    statement = (ROOT / "public_address_statement.md").read_text(encoding="utf-8")
    for path in own_files():
        if "unit" not in path.parts:
            for address in re.findall(r"https?://[\w./-]+\w", path.read_text(encoding="utf-8")):
                assert address in statement, f"{address} in {path}"


def commands():
    """The README's commands that train, evaluate or use a tool."""
    blocks = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
    return [line for block in blocks for line in block.splitlines()
            if re.match(r"bash test/train_|python main.py|torchrun|python tools/", line)]


@pytest.fixture(scope="module")
def folder(clone, tmp_path_factory):
    """A clone of the repository."""
    folder = tmp_path_factory.mktemp("as in the README") / "clone"
    shutil.copytree(str(clone), str(folder), ignore=shutil.ignore_patterns("output"))
    return folder


@pytest.fixture
def with_model(folder, trained):
    """The clone with a trained model in it, whatever commands have run there before."""
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        shutil.copy(str(trained[0] / name), str(folder))
    return folder


def for_this_machine(command, images):
    """The command's words, but for the data, the interpreter, and what makes the run small."""
    command = re.sub("/data/(imagenet|flowers)", shlex.quote(str(images)), command)
    command = command.replace("5120", "32")
    words = shlex.split(command)
    if words[0] == "bash":
        own, main_flags = words, []
        if "--" in words:
            own, main_flags = words[:words.index("--")], words[words.index("--") + 1:]
        training = [] if "eval" in command else ["--epochs=1", "--lr=0.001"]
        own += ["--device=cpu", "--batch_size=32", "--workers=1", f"--python={sys.executable}"]
        return own + training + ["--"] + main_flags + TINY
    if words[1].startswith("tools/"):
        return [sys.executable] + words[1:]
    small = SMALL + ["--epochs", "1", "--lr", "0.001", "-b", "32"]
    if words[0] == "torchrun":
        words = [word if word != "8" else "2" for word in words]
        return [sys.executable, "-m", "torch.distributed.run"] + words[1:] + small
    return [sys.executable] + words[1:] + small


def test_the_archives_of_imagenet_become_class_folders(images, tmp_path, monkeypatch):
    """The archives are small ones of the same layout, so their checksums are not compared."""
    scipy_io = pytest.importorskip("scipy.io")
    imagenet = pytest.importorskip("torchvision.datasets.imagenet")
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    synsets = np.zeros(2, [(name, object) for name in ("id", "wnid", "words", "gloss", "children")])
    synsets[:] = [(1, "n01440764", "tench", "", 0), (2, "n01443537", "goldfish", "", 0)]
    scipy_io.savemat(str(devkit / "meta.mat"), {"synsets": synsets})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n2\n")
    image = next((images / "val").glob("*/*"))
    root = tmp_path / "imagenet"
    root.mkdir()
    with tarfile.open(str(root / "ILSVRC2012_devkit_t12.tar.gz"), "w:gz") as archive:
        archive.add(str(devkit.parent), devkit.parent.name)
    with tarfile.open(str(root / "ILSVRC2012_img_val.tar"), "w") as archive:
        for number in (1, 2, 3):
            archive.add(str(image), f"ILSVRC2012_val_{number:08d}.JPEG")
    with tarfile.open(str(root / "ILSVRC2012_img_train.tar"), "w") as archive:
        for name in ("n01440764", "n01443537"):
            with tarfile.open(str(tmp_path / f"{name}.tar"), "w") as inner:
                inner.add(str(image), f"{name}_1.JPEG")
            archive.add(str(tmp_path / f"{name}.tar"), f"{name}.tar")
    monkeypatch.setattr(imagenet, "check_integrity", lambda path, md5=None: os.path.exists(path))
    code = re.search('^python -c "(.*ImageNet.*)"$', README, re.M).group(1)
    exec(code.replace("/data/imagenet", str(root)), {})
    train, val = main.open_images(main.parse_args([str(root)]))
    assert train.classes == ["n01440764", "n01443537"] and val.labels.tolist() == [0, 1, 1]


def test_the_lines_of_python_run(with_model):
    lines = re.search(r"^```python\n(.*?)^```", README, re.M | re.S).group(1)
    if TORCH < (1, 8):
        pytest.skip("the torchvision of torch 1.5 has no MnasNet")
    check = "with torch.no_grad(): assert model.eval()(torch.ones(2, 3, 32, 32)).any()"
    finish([start([sys.executable, "-c", lines + check], with_model)])


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_commands_run(command, images, with_model):
    if command.startswith("torchrun") and TORCH < (1, 9):
        pytest.skip("torchrun came with torch 1.9")
    if "--opt-level O" in command and TORCH < (1, 10):
        pytest.skip("low precision on the CPU came with torch 1.10")
    if "plot_metrics" in command:
        pytest.importorskip("matplotlib")
    words = for_this_machine(command, images)
    lines, environment = [words], {}
    if "--local_rank" in words:
        value = words.index("--local_rank") + 1
        lines = [words[:value] + [str(rank)] + words[value + 1:] for rank in range(8)]
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outputs = finish([start(line, with_model, **environment) for line in lines])
    expected = {"bash": "Final Performance", "tools/check_data.py": "0 bad image(s)",
                "tools/predict.py": "* Acc@1", "tools/export_onnx.py": "=> model.",
                "tools/plot_metrics.py": "metrics.png"}
    assert expected.get(words[0], expected.get(words[1], "Result: Acc@1")) in outputs[0], outputs
