"""--device npu on the stand-in for torch_npu (npu_double), and what is said where there is no card."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import main
from conftest import ROOT, SMALL, UNIT, checkpoint, refused, run_main, the_error
from test_scripts import TINY, clone  # noqa: F401 (a fixture)

RUN = SMALL[2:] + ["-b", "16", "--device", "npu"]
EIGHT = "0,1,2,3,4,5,6,7"
# Fewer operators than one training step of mnasnet0_5 has, forward and backward. Copies are not counted.
STEP = 350


def drive(npu, code, cwd, **variables):
    """Python code that ends by printing JSON, in a process of its own: what it printed last, and all the rest."""
    variables = dict(os.environ, **dict(npu, **variables))
    code = "import json, sys; sys.path.insert(0, {!r})\n".format(str(ROOT)) + code
    done = subprocess.run([sys.executable, "-c", code], cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, timeout=200, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


# Where there is no card


@pytest.fixture
def no_cann(tmp_path):
    """torch_npu as it is on a machine without CANN: installed, registered with torch, and not to be imported."""
    folder = tmp_path / "site"
    (folder / "torch_npu-2.0.dist-info").mkdir(parents=True)
    (folder / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    (folder / "torch_npu-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\n")
    (folder / "torch_npu-2.0.dist-info" / "entry_points.txt").write_text("[torch.backends]\nnpu = torch_npu:load\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.skipif(hasattr(torch, "npu"), reason="this torch has npu built in")
@pytest.mark.parametrize("several", [[], ["--multiprocessing-distributed", "--device-list", EIGHT]], ids=["1", "8"])
def test_npu_without_cann_is_one_line(no_cann, tmp_path, several):
    error = the_error(run_main("--synthetic", 16, *RUN, *several, cwd=tmp_path, small=False, **no_cann))
    assert "--device npu is not there" in error and "libhccl.so" in error


@pytest.mark.skipif(hasattr(torch, "npu"), reason="this torch has npu built in")
def test_a_torch_npu_that_exits_is_one_line(no_cann, tmp_path):
    (tmp_path / "site" / "torch_npu.py").write_text("raise SystemExit\n")  # with status 0, as its older versions do
    assert "--device npu is not there" in the_error(
        run_main("--synthetic", 16, *RUN, cwd=tmp_path, small=False, **no_cann))


@pytest.mark.skipif(hasattr(torch, "npu"), reason="this torch has npu built in")
def test_the_cpu_works_without_cann(no_cann, tmp_path):
    variables = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    alone = subprocess.run([sys.executable, "-c", "import torch"], env=dict(variables, **no_cann),
                           stderr=subprocess.PIPE, universal_newlines=True)
    # Where torch loads its backends by itself, only main.py's setting helps.
    assert (alone.returncode != 0) == hasattr(torch, "_import_device_backends"), alone.stderr
    result = run_main("--synthetic", 8, "--epochs", 1, cwd=tmp_path, **no_cann)
    assert result.returncode == 0 and "Result:" in result.stdout, result.stderr


# One card


ONE_CARD = """
import main, torch, torch_npu
arguments, kernels = {arguments!r}, []
resume = ["--resume", "checkpoint-1.pth.tar", "--output-dir", "resumed"]
for more in ([], resume, ["-e", "--resume", "checkpoint.pth.tar"]):
    assert main.main(arguments + more) == 0
    kernels.append(torch.npu.kernels_run())
print(json.dumps([kernels, torch.npu.current_device(), torch_npu.npu._options]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_one_card_trains_resumes_and_evaluates(npu, images, tmp_path, level):
    # The first gradients of so few classes overflow under a larger scale.
    arguments = [str(images)] + RUN + ["--opt-level", level, "--loss-scale", "1", "--lr", "0.001", "--epochs", "2",
                                       "--seed", "3", "--npu", "5"]
    if refused(npu, tmp_path):
        return
    (kernels, card, options), text = drive(npu, ONE_CARD.format(arguments=arguments), cwd=tmp_path)
    assert card == 5 and "npu:5, 1 process(es)" in text
    assert options["jitCompile"] == "disable" and options["ACL_OP_COMPILER_CACHE_MODE"] == "enable"
    # Four steps, two steps, and two batches of evaluation.
    assert kernels[0] > 4 * STEP and kernels[1] - kernels[0] > 2 * STEP and kernels[2] - kernels[1] > STEP / 4
    whole, resumed = checkpoint(tmp_path), checkpoint(tmp_path / "resumed")
    assert len(whole["rows"]) == len(resumed["rows"]) == 2 and whole["amp"] == resumed["amp"]
    assert whole["amp"].get("scale") == (None if level == "O0" else 1)
    before = checkpoint(tmp_path, "checkpoint-1.pth.tar")["state_dict"]
    assert not torch.equal(whole["state_dict"]["layers.0.weight"], before["layers.0.weight"])
    for name, tensor in whole["state_dict"].items():
        assert tensor.dtype in (torch.float32, torch.int64) and torch.equal(tensor, resumed["state_dict"][name]), name
    found = re.findall(r"\* Acc@1 (\S+) .*\((\d+) and (\d+) of 31 images", text)
    assert len(found) == 4 and found[3] == found[2] == found[1]  # both second epochs, and the evaluation


MISPLACED = """
import main, torch_npu
losses, counts, build = main.smoothed_cross_entropy, main.counts_correct, main.build_model
wrong = {{
    "labels": ("smoothed_cross_entropy", lambda logits, labels, share: losses(logits, labels.cpu(), share)),
    "logits": ("counts_correct", lambda logits, labels: counts(logits.cpu(), labels)),
    "model": ("build_model", lambda *arguments: build(*arguments).cpu()),
    "another card": ("smoothed_cross_entropy", lambda logits, labels, share: losses(logits, labels.npu(1), share)),
}}
said = {{}}
for what, (name, function) in wrong.items():
    right = getattr(main, name)
    setattr(main, name, function)
    try:
        said[what] = "status {{}}".format(main.main({arguments!r} + ["--output-dir", what]))
    except RuntimeError as error:
        said[what] = str(error)
    setattr(main, name, right)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_tensor_left_behind_ends_the_run(npu, tmp_path):
    if refused(npu, tmp_path):
        return
    arguments = ["--synthetic", "16"] + RUN + ["--epochs", "1"]
    said, _ = drive(npu, MISPLACED.format(arguments=arguments), cwd=tmp_path)
    assert len(said) == 4
    for what, words in said.items():
        assert "same device" in words or "device type" in words, (what, words)


OLD = """
import importlib.util, os
place = os.path.join({unit!r}, "npu_double", "torch_npu")
spec = importlib.util.spec_from_file_location("built_in", os.path.join(place, "__init__.py"),
                                              submodule_search_locations=[place])
sys.modules["built_in"] = built_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built_in)
sys.modules["torch_npu"] = None  # `import torch_npu` fails
import torch
del torch.autocast, built_in.npu.amp, built_in.npu.set_compile_mode
sys.path.insert(0, os.path.join({unit!r}, "apex_stub"))
import ascend_apex, main
from apex import amp
seen = set()
for name in ("smoothed_cross_entropy", "counts_correct"):
    def spy(logits, labels, *rest, right=getattr(main, name)):
        seen.add((str(labels.dtype), str(labels.device)))
        return right(logits, labels, *rest)
    setattr(main, name, spy)
made, build = [], main.build_optimizer
main.build_optimizer = lambda *arguments: made.append(build(*arguments)) or made[0]
status = main.main({arguments!r})
print(json.dumps([status, torch.npu.kernels_run(), sorted(seen), [type(o).__name__ for o in made], amp.calls]))
"""


@pytest.mark.slow
def test_the_shape_of_1_5(npu, images, tmp_path):
    """torch.npu built in, no torch_npu, no autocast; Ascend's apex does the mixed precision. Labels have 32 bits."""
    if refused(npu, tmp_path):
        return
    alone = dict(npu, PYTHONPATH="")
    arguments = [str(images)] + RUN + ["--epochs", "1"]
    (status, kernels, labels, optimizer, calls), text = drive(
        alone, OLD.format(unit=str(UNIT), arguments=arguments), cwd=tmp_path)
    assert status == 0 and kernels > 2 * STEP and "O1 (apex)" in text
    assert labels == [["torch.int32", "npu:0"]] and optimizer == ["NpuFusedSGD"]
    assert calls[0] == ["combine_grad", {"value": True}] and [name for name, _ in calls[1:]] == [
        "initialize", "scale_loss", "scale_loss"]
    native = drive(alone, OLD.format(unit=str(UNIT), arguments=arguments + ["--amp-backend", "native"]), cwd=tmp_path)
    assert native[0][0] == 1  # no autocast: nothing to run O1 with


# Eight cards, through the launch scripts


def script(clone, name, *arguments, cwd, **variables):  # noqa: F811
    command = ["bash", str(clone / "test" / name), "--python=" + sys.executable, "--batch_size=32", "--workers=1"]
    return subprocess.run(command + [str(a) for a in arguments], cwd=str(cwd), stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=400, stdin=subprocess.DEVNULL,
                          env=dict(os.environ, **dict({"OMP_NUM_THREADS": "1"}, **variables)))


TWO_STEPS = ["--epochs=2", "--lr=0.001", "--", "--opt-level", "O0", "--seed", "1"] + TINY


@pytest.fixture(scope="module")
def eight(npu, clone, images, tmp_path_factory):  # noqa: F811
    """train_full_8p.sh in fp32 on eight cards: its folder, its result, the operators that each process ran. None without npu."""
    folder = tmp_path_factory.mktemp("eight")
    if refused(npu, folder):
        return None
    result = script(clone, "train_full_8p.sh", "--data_path={}".format(images), "--device=npu", *TWO_STEPS, cwd=folder,
                    **dict(npu, KERNELS_LOG=str(folder / "kernels")))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result, [int(line) for line in (folder / "kernels").read_text().split()]


def losses(clone):  # noqa: F811
    name = "train_MnasNet_for_PyTorch_bs32_8p_acc_loss.txt"
    return [float(x) for x in (clone / "test" / "output" / "0" / name).read_text().split()]


def test_the_scripts_say_that_there_is_no_npu(clone, no_cann, images, tmp_path):  # noqa: F811
    if hasattr(torch, "npu"):
        pytest.skip("this torch has npu built in")
    result = script(clone, "train_full_8p.sh", "--data_path={}".format(images), "--device=npu", "--device_id=7",
                    cwd=tmp_path, **no_cann)
    assert result.returncode == 1 and "--device npu is not there" in result.stderr and "Final" not in result.stdout


@pytest.mark.slow
def test_eight_cards_train_as_eight_processes_on_the_cpu_do(eight, clone, images, tmp_path):  # noqa: F811
    if eight is None:
        return
    folder, result, kernels = eight
    assert "8 processes met" in result.stdout and "collectives over hccl" in result.stdout
    assert "Final Train Accuracy" in result.stdout
    assert len([count for count in kernels if count > 2 * STEP]) == 8
    # In npu's order of memory: a network that has just begun makes much of the least rounding.
    cpu = tmp_path / "cpu"
    shutil.copytree(str(clone), str(cpu))
    text, changed = re.subn(r"(Kind\(\"cpu\".*), True\)", r"\1, False)", (cpu / "main.py").read_text())
    assert changed == 1
    (cpu / "main.py").write_text(text)
    other = script(cpu, "train_full_8p.sh", "--data_path={}".format(images), "--device=cpu", *TWO_STEPS, cwd=tmp_path)
    assert other.returncode == 0 and "collectives over gloo" in other.stdout, other.stdout + other.stderr
    assert len(losses(clone)) == 2 and losses(clone) == pytest.approx(losses(cpu), rel=1e-5)
    ours, theirs = checkpoint(folder), checkpoint(tmp_path)
    for name in ("train_loss", "val_loss", "acc1"):
        assert [row[name] for row in ours["rows"]] == pytest.approx([row[name] for row in theirs["rows"]], rel=1e-5)
    for name, tensor in ours["state_dict"].items():
        assert torch.allclose(tensor.float(), theirs["state_dict"][name].float(), rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_eight_cards_count_every_image_once(eight, npu, clone, images):  # noqa: F811
    if eight is None:
        return
    folder = eight[0]
    result = script(clone, "train_eval_8p.sh", "--data_path={}".format(images), "--device=npu", "--device_id=2", "--",
                    "--opt-level", "O0", *TINY, cwd=folder, **npu)
    assert result.returncode == 0, result.stdout + result.stderr
    alone = run_main(images, "-e", "--resume", folder / "checkpoint.pth.tar", cwd=folder)
    found = [re.findall(r"\* Acc@1 .*\((\d+) and (\d+) of 31 images", run.stdout) for run in (result, alone)]
    assert len(found[0]) == 1 and found[0] == found[1]


@pytest.mark.slow
def test_eight_cards_resume_in_low_precision(eight, npu, clone, images, tmp_path):  # noqa: F811
    if eight is None:
        return
    shutil.copy(str(eight[0] / "checkpoint.pth.tar"), str(tmp_path))
    result = script(clone, "train_full_8p.sh", "--data_path={}".format(images), "--device=npu", "--epochs=3",
                    "--lr=0.001", "--resume=auto", "--device_id=3", "--", *TINY, cwd=tmp_path, **npu)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stdout and "O1 (native, float16)" in result.stdout
    last = checkpoint(tmp_path)
    assert [row["epoch"] for row in last["rows"]] == [0, 1, 2] and last["amp"]["scale"] in (2.0 ** 15, 2.0 ** 16)


# env_npu.sh


def source(cwd, **variables):
    """env_npu.sh in a strict shell without an environment: (its stderr, the variables after it)."""
    code = ". '{}'; false || env".format(ROOT / "test" / "env_npu.sh")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          universal_newlines=True, cwd=str(cwd),
                          env=dict({"PATH": os.environ["PATH"], "HOME": str(cwd)}, **variables))
    assert done.returncode == 0, done.stderr
    return done.stderr, dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.fixture
def cann(tmp_path):
    """A set_env.sh as CANN's are: it reads unset variables, and its last test fails."""
    folder = tmp_path / "Ascend toolkit"
    folder.mkdir()
    (folder / "set_env.sh").write_text('export CANN_PATH="here:$CANN_NOT_SET"\ntouch "$HOME/sourced"\n'
                                       'false\n[[ -n $CANN_NOT_SET ]]\n')
    return folder


def test_cann_is_sourced(cann, tmp_path):
    error, variables = source(tmp_path, ASCEND_TOOLKIT_HOME=str(cann), HCCL_CONNECT_TIMEOUT="77")
    assert error == "" and variables["CANN_PATH"] == "here:"
    assert variables["TASK_QUEUE_ENABLE"] == "1" and variables["HCCL_WHITELIST_DISABLE"] == "1"
    assert variables["HCCL_CONNECT_TIMEOUT"] == "77"  # the user's stays


@pytest.mark.skipif(os.path.exists("/usr/local/Ascend"), reason="CANN is there")
def test_no_cann_is_said(tmp_path):
    error, variables = source(tmp_path)
    assert error.count("\n") == 1 and "found no set_env.sh" in error and variables["TASK_QUEUE_ENABLE"] == "1"


def test_a_test_platform_has_set_all_of_it(cann, tmp_path):
    error, variables = source(tmp_path, ASCEND_TOOLKIT_HOME=str(cann), etp_running_flag="true")
    assert error == "" and "CANN_PATH" not in variables and "TASK_QUEUE_ENABLE" not in variables


@pytest.mark.parametrize("device", ["npu", "cpu", "gpu", ""])
def test_only_npu_runs_source_it(cann, clone, tmp_path, device):  # noqa: F811
    subprocess.run(["bash", str(clone / "test" / "train_full_1p.sh"), "--data_path=.", "--python=true"]
                   + (["--device=" + device] if device else []), cwd=str(tmp_path), stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, env=dict(os.environ, HOME=str(tmp_path), ASCEND_TOOLKIT_HOME=str(cann)))
    assert (tmp_path / "sourced").exists() == (device == "npu")
