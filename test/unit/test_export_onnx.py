"""tools/export_onnx.py, as a user runs it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, cpu_runtime, main, parse, read_checkpoint, run_program, the_error

mnasnet = main.mnasnet
TOOL = ROOT / "tools" / "export_onnx.py"
METADATA = {
    "arch": "mnasnet0_5", "classes": [f"class {number}" for number in range(4)], "resize_size": 32,
    "crop_size": 32, "interpolation": "bilinear", "mean": list(main.MEAN), "std": list(main.STD)}
# Starts the tool after some other code.
AFTER = f"""
import runpy
import sys

sys.path.insert(0, {str(ROOT)!r})
{{}}
runpy.run_path({str(TOOL)!r}, run_name="__main__")
"""
WITHOUT_ONNXRUNTIME = "sys.modules['onnxruntime'] = None"
OTHER_WEIGHTS = """
import mnasnet
mnasnet.fold_batchnorm = lambda model: mnasnet.mnasnet0_5(num_classes=4).eval()
"""
# How a TorchScript file is used where this repository is not installed.
RUN_TORCHSCRIPT = """
import sys
import torch

images, names = torch.load(sys.argv[2])
extra_files = torch._C.ExtraFilesMap() if hasattr(torch._C, "ExtraFilesMap") else {}
for name in names:
    extra_files[name] = ""
model = torch.jit.load(sys.argv[1], _extra_files=extra_files)
logits = [torch.cat([model(batch) for batch in images.split(size)]).detach() for size in (1, 7)]
texts = [extra_files[name] for name in names]  # str before torch 1.8, then bytes
torch.save((logits, [text if isinstance(text, str) else text.decode() for text in texts]),
           sys.argv[3])
assert not {"main", "mnasnet"} & set(sys.modules)
"""


def run_python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable] + [str(word) for word in arguments], cwd=str(cwd or ROOT),
        env=dict(os.environ, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True, timeout=300)


def export_after(code, *arguments, **environment):
    """Runs the tool in a process that has run ``code`` before."""
    return run_python("-c", AFTER.replace("{}", code), *arguments, **environment)


def export(*arguments):
    """Runs the tool, which has to succeed; the lines that it printed."""
    result = run_program(TOOL, *arguments)
    assert result.returncode == 0 and "Warning" not in result.stderr, result.stderr
    return result.stdout.splitlines()


def best(trained):
    return trained[0] / "model_best.pth.tar"


def load_torchscript(path, images, folder):
    """Logits of the images in batches of 1 and of 7, and the metadata, from another process."""
    torch.save((images, list(METADATA)), str(folder / "images.pth"))
    result = run_python("-c", RUN_TORCHSCRIPT, path, folder / "images.pth", folder / "logits.pth",
                        cwd=folder)
    assert result.returncode == 0, result.stderr
    logits, texts = torch.load(str(folder / "logits.pth"))
    return logits, {name: json.loads(text) for name, text in zip(METADATA, texts)}


def assert_close(logits, expected):
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def val_images(images):
    """All validation images, normalized: [31, 3, 32, 32]."""
    folder = main.ImageFolder(str(images / "val"))
    loader = main.make_loader(folder, parse(), cpu_runtime(), batch_size=31, workers=0)
    return torch.cat([batch for batch, _, _ in main.prefetch(loader, cpu_runtime(), torch.float32)])


@pytest.fixture(scope="module")
def logits(trained, val_images):
    """What the model itself gives for the validation images."""
    model = mnasnet.mnasnet0_5(num_classes=4).eval()
    model.load_state_dict(read_checkpoint(trained[0], "model_best.pth.tar")["state_dict"])
    with torch.no_grad():
        return model(val_images)


def test_onnxruntime_gives_the_classes_of_the_model(trained, val_images, logits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    checked, done = export(best(trained), tmp_path / "model.onnx")
    assert float(checked.split()[2]) <= 1e-5 * max(1, logits.abs().max())
    assert str(tmp_path / "model.onnx") in done
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(node.name, node.shape, node.type) for node in session.get_inputs()] == [
        ("images", ["batch", 3, 32, 32], "tensor(float)")]
    assert [(node.name, node.shape) for node in session.get_outputs()] == [("logits", ["batch", 4])]
    for size in (1, 7):
        batches = [session.run(["logits"], {"images": batch.contiguous().numpy()})[0]
                   for batch in val_images.split(size)]
        found = torch.cat([torch.from_numpy(batch) for batch in batches])
        assert_close(found, logits)
        assert torch.equal(found.argmax(1), logits.argmax(1))
    metadata = session.get_modelmeta().custom_metadata_map
    assert {name: json.loads(text) for name, text in metadata.items()} == METADATA
    assert os.listdir(str(tmp_path)) == ["model.onnx"]  # no temporary file is left


@pytest.mark.slow
def test_class_names_of_any_length_and_script_are_kept(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    classes = ["1" * 127, "长" * 9000, 'a "quoted" name', "caf\udce9"]  # the last one is not UTF-8
    torch.save(dict(read_checkpoint(trained[0]), classes=classes), str(tmp_path / "names.pth"))
    export(tmp_path / "names.pth", tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == classes


@pytest.mark.slow
def test_torchscript_runs_where_there_is_only_torch(trained, val_images, logits, tmp_path):
    export(best(trained), tmp_path / "model.pt", "--torchscript")
    batches, metadata = load_torchscript(tmp_path / "model.pt", val_images, tmp_path)
    for found in batches:
        assert_close(found, logits)
        assert torch.equal(found.argmax(1), logits.argmax(1))
    assert metadata == METADATA


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "reference"])
def test_other_checkpoints(trained, val_images, logits, tmp_path, prefix):
    state = read_checkpoint(trained[0], "model_best.pth.tar")["state_dict"]
    state = {f"{prefix}{name}": value for name, value in state.items()}
    whole = {"epoch": 2, "arch": "mnasnet0_5", "state_dict": state} if prefix else state
    torch.save(whole, str(tmp_path / "other.pth"))
    arch = [] if prefix else ["-a", "mnasnet0_5"]
    export(tmp_path / "other.pth", tmp_path / "model.pt", "--torchscript", "--size", 32, *arch)
    batches, metadata = load_torchscript(tmp_path / "model.pt", val_images, tmp_path)
    assert_close(batches[0], logits)
    assert metadata == dict(METADATA, classes=None, resize_size=37)  # 32 x 256 / 224


@pytest.mark.slow
def test_size_wins_over_that_of_the_checkpoint(trained, tmp_path):
    *_, done = export(best(trained), tmp_path / "model.pt", "--torchscript", "--size", 64)
    assert json.loads(done[done.index("{"):]) == dict(
        METADATA, classes=4, crop_size=64, resize_size=64)


def test_a_plain_state_dict_gets_the_defaults_of_main(tmp_path):
    model = mnasnet.mnasnet1_0(num_classes=11)
    torch.save(model.state_dict(), str(tmp_path / "plain.pth"))
    *_, done = export(tmp_path / "plain.pth", tmp_path / "model.pt", "--torchscript")
    assert json.loads(done[done.index("{"):]) == dict(
        METADATA, arch="mnasnet1_0", classes=11, crop_size=224, resize_size=256)


@pytest.mark.slow
def test_weights_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("mnasnet_050", num_classes=5)
    torch.save({"arch": "mnasnet_050", "state_dict": model.state_dict()}, str(tmp_path / "t.pth"))
    *_, done = export(tmp_path / "t.pth", tmp_path / "model.pt", "--torchscript", "--size", 32,
                      "-a", "mnasnet0_5")
    assert '"classes": 5' in done


@pytest.mark.slow
def test_without_onnxruntime_it_says_so(trained, tmp_path):
    result = export_after(WITHOUT_ONNXRUNTIME, best(trained), tmp_path / "model.onnx")
    assert result.returncode == 0, result.stderr
    said, done = result.stdout.splitlines()
    assert said == "onnxruntime is not installed: the logits are not compared"
    assert str(tmp_path / "model.onnx") in done
    content = (tmp_path / "model.onnx").read_bytes()
    assert content.count(b"\x22\x04Conv") == 52 and b"BatchNormalization" not in content
    assert 3.7e6 < len(content) < 3.8e6  # 4 bytes for each parameter


@pytest.mark.slow
def test_without_onnxruntime_onnx_checks_the_file(trained, tmp_path):
    """With a stand-in for the package; its checker refuses every file."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text("from onnx import checker\n")
    (tmp_path / "onnx" / "checker.py").write_text(
        "def check_model(content):\n    raise ValueError(f'refused {len(content)} bytes')\n")
    result = export_after(WITHOUT_ONNXRUNTIME, best(trained), tmp_path / "model.onnx",
                          PYTHONPATH=str(tmp_path))
    assert result.returncode == 1 and "refused 37" in result.stderr
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--torchscript"]], ids=["onnx", "torchscript"])
def test_a_difference_is_an_error_and_leaves_the_old_file(trained, tmp_path, option):
    if not option:
        pytest.importorskip("onnxruntime")
    (tmp_path / "model").write_text("old")
    result = export_after(OTHER_WEIGHTS, best(trained), tmp_path / "model", *option)
    assert "model is not written" in the_error(result)
    assert os.listdir(str(tmp_path)) == ["model"]
    assert (tmp_path / "model").read_text() == "old"


@pytest.mark.slow
def test_a_name_that_stdout_can_not_show(trained, tmp_path):
    result = run_program(TOOL, best(trained), "ü", "--torchscript", cwd=tmp_path,
                         PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and r"=> \xfc: {" in result.stdout, result.stderr


@pytest.mark.slow
def test_it_says_what_is_wrong(trained, tmp_path):
    def error(*arguments):
        return the_error(run_program(TOOL, *arguments, cwd=tmp_path))

    (tmp_path / "page.html").write_text("<html>")
    torch.save({"weight": torch.zeros(3)}, str(tmp_path / "layer.pth"))
    torch.save({"state_dict": 1, "flags": 2}, str(tmp_path / "numbers.pth"))
    assert "page.html can't be read as a checkpoint" in error("page.html", "model.onnx")
    assert "no checkpoint 'none.pth'" in error("none.pth", "model.onnx")
    assert "not a MnasNet checkpoint" in error("layer.pth", "model.onnx", "--size", 32)
    assert "does not hold what a checkpoint" in error("numbers.pth", "model.onnx")
    assert "-a it was trained with" in error(best(trained), "model.onnx", "-a", "mnasnet1_0")
    message = error(best(trained), "nowhere/model.onnx")
    assert "can't write nowhere/model.onnx" in message and "--output-dir" not in message
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.slow
def test_an_invalid_command_line():
    assert "required: out" in the_error(run_program(TOOL, "one.pth"), status=2)
    assert "found 31" in the_error(run_program(TOOL, "one.pth", "out", "--size", 31), status=2)
