"""--device npu: on the stand-in for torch_npu (npu_double), and what is said without a card."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import main
from helpers import (ROOT, SMALL, TINY, UNIT, counts, finish, free_port, read_checkpoint, run_main,
                     several, start, the_error)
from test_scripts import run_script

ON_NPU = ["--device", "npu", "-b", "16"]
# Fewer operators than one training step of mnasnet0_5, forward and backward, without copies.
OPERATORS_PER_STEP = 350


def drive(code, arguments, cwd, variables):
    """Runs Python code whose last line of output is JSON; (its value, all that was printed)."""
    path = os.pathsep.join([str(ROOT), variables.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code] + [str(argument) for argument in arguments], cwd=str(cwd),
        env=dict(os.environ, **dict(variables, PYTHONPATH=path)), timeout=600,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


# Without a card


@pytest.fixture
def no_cann(tmp_path):
    """Variables under which torch_npu is installed, but can't be imported: CANN is missing."""
    if hasattr(torch, "npu"):
        pytest.skip("this torch has npu built in")
    folder = tmp_path / "site"
    info = folder / "torch_npu-2.0.dist-info"
    info.mkdir(parents=True)
    (folder / "torch_npu.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\n")
    (info / "entry_points.txt").write_text("[torch.backends]\nnpu = torch_npu:load\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("processes", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_npu_without_cann_is_one_line(no_cann, tmp_path, processes):
    ranks = several(processes) if processes > 1 else []
    error = the_error(run_main("--synthetic", 16, *ON_NPU, *ranks, cwd=tmp_path, **no_cann))
    assert "--device npu is not available: " in error and "libhccl.so" in error


@pytest.mark.slow
def test_a_torch_npu_that_exits_is_one_line(no_cann, tmp_path):
    # With status 0, as its older versions do.
    (tmp_path / "site" / "torch_npu.py").write_text("raise SystemExit\n")
    result = run_main("--synthetic", 16, *ON_NPU, cwd=tmp_path, **no_cann)
    assert "--device npu is not available: " in the_error(result)


@pytest.mark.slow
def test_the_cpu_works_without_cann(no_cann, tmp_path):
    variables = dict(os.environ, **no_cann)
    variables.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    alone = subprocess.run([sys.executable, "-c", "import torch"], env=variables,
                           stderr=subprocess.PIPE, universal_newlines=True)
    # Where torch loads its backends by itself, only main.py's setting helps.
    loads_backends = hasattr(torch, "_import_device_backends")
    assert (alone.returncode != 0) == loads_backends, alone.stderr
    result = run_main("--synthetic", 8, "--epochs", 1, cwd=tmp_path, **no_cann)
    assert result.returncode == 0 and "Result:" in result.stdout, result.stderr


# One card


ONE_CARD = """
import json, sys
import main
import torch_npu

operators = []
resume = ["--resume", "checkpoint-1.pth.tar", "--output-dir", "resumed"]
for more in ([], resume, ["-e", "--resume", "checkpoint.pth.tar"]):
    assert main.main(sys.argv[1:] + more) == 0
    operators.append(torch_npu.npu.kernels_run())
print(json.dumps([operators, torch_npu.npu.current_device(), torch_npu.npu._options]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_one_card_trains_resumes_and_evaluates(npu, images, tmp_path, level):
    # The first gradients of so few classes overflow under a larger scale.
    arguments = [images] + SMALL + ON_NPU + ["--opt-level", level, "--loss-scale", 1]
    arguments += ["--lr", 0.001, "--epochs", 2, "--seed", 3, "--npu", 5]
    (operators, card, options), text = drive(ONE_CARD, arguments, tmp_path, npu)
    assert card == 5 and "npu:5" in text
    assert options["ACL_OP_COMPILER_CACHE_MODE"] == "enable"
    trained, resumed, evaluated = operators
    assert trained > 4 * OPERATORS_PER_STEP and resumed - trained > 2 * OPERATORS_PER_STEP
    assert evaluated - resumed > OPERATORS_PER_STEP / 4
    whole, again = read_checkpoint(tmp_path), read_checkpoint(tmp_path / "resumed")
    assert len(whole["history"]) == len(again["history"]) == 2 and whole["amp"] == again["amp"]
    assert whole["amp"].get("scale") == (None if level == "O0" else 1)
    before = read_checkpoint(tmp_path, "checkpoint-1.pth.tar")["state_dict"]
    weights = whole["state_dict"]
    assert not torch.equal(weights["layers.0.weight"], before["layers.0.weight"])
    for name, tensor in weights.items():
        assert tensor.dtype in (torch.float32, torch.int64), name
        assert torch.equal(tensor, again["state_dict"][name]), name
    found = re.findall(r"\* Acc@1 (\S+) .*\((\d+) and (\d+) of 31 images", text)
    # Both second epochs, and the evaluation.
    assert len(found) == 4 and found[3] == found[2] == found[1]


MISPLACED = """
import contextlib, io, json, sys
import main
import torch_npu

cross_entropy, topk_correct = main.smoothed_cross_entropy, main.topk_correct
build_model = main.build_model
wrong = {
    "targets": ("smoothed_cross_entropy",
                lambda logits, targets, *rest: cross_entropy(logits, targets.cpu(), *rest)),
    "logits": ("topk_correct", lambda logits, targets: topk_correct(logits.cpu(), targets)),
    "model": ("build_model", lambda *arguments: build_model(*arguments).cpu()),
    "another card": ("smoothed_cross_entropy",
                     lambda logits, targets, *rest: cross_entropy(logits, targets.npu(1), *rest)),
}
said = {}
for what, (name, function) in wrong.items():
    right = getattr(main, name)
    setattr(main, name, function)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        status = main.main(sys.argv[1:] + ["--output-dir", what])
    said[what] = [status, stderr.getvalue()]
    setattr(main, name, right)
print(json.dumps(said))
"""


@pytest.mark.slow
def test_a_tensor_left_behind_ends_the_run(npu, tmp_path):
    arguments = ["--synthetic", 16] + SMALL + ON_NPU + ["--epochs", 1]
    said, _ = drive(MISPLACED, arguments, tmp_path, npu)
    assert len(said) == 4
    for what, (status, words) in said.items():
        assert status == 1, what
        assert "same device" in words or "device type" in words, (what, words)


OLD = """
import importlib.util, json, os, sys

folder = os.path.join(sys.argv[1], "npu_double", "torch_npu")
spec = importlib.util.spec_from_file_location(
    "built_in", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
sys.modules["built_in"] = built_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built_in)
sys.modules["torch_npu"] = None  # `import torch_npu` fails
import torch
del torch.autocast, built_in.npu.amp, built_in.npu.set_compile_mode
import ascend_apex, main, mnasnet
from apex import amp

main.TORCH = mnasnet.TORCH = (1, 5)
seen, optimizers = set(), []
build_optimizer = main.build_optimizer
for name in ("smoothed_cross_entropy", "topk_correct"):
    def spy(logits, targets, *rest, right=getattr(main, name)):
        seen.add((str(targets.dtype), str(targets.device)))
        return right(logits, targets, *rest)
    setattr(main, name, spy)

def spy_optimizer(*arguments):
    optimizers.append(build_optimizer(*arguments))
    return optimizers[-1]

main.build_optimizer = spy_optimizer
status = main.main(sys.argv[2:])
names = [type(optimizer).__name__ for optimizer in optimizers]
print(json.dumps([status, torch.npu.kernels_run(), sorted(seen), names, amp.calls]))
"""


@pytest.mark.slow
def test_npu_as_in_torch_1_5(npu, images, tmp_path):
    """torch.npu is built in, there is no torch_npu and no autocast; Ascend's apex does the mixed
    precision, and targets have 32 bits."""
    variables = dict(npu, PYTHONPATH=str(UNIT / "apex_stub"))
    arguments = [UNIT, images] + SMALL + ON_NPU + ["--epochs", 1]
    (status, operators, targets, optimizer, calls), text = drive(
        OLD, arguments, tmp_path, variables)
    assert status == 0 and operators > 2 * OPERATORS_PER_STEP and "O1 (apex)" in text
    assert targets == [["torch.int32", "npu:0"]] and optimizer == ["NpuFusedSGD"]
    assert calls[0] == ["combine_grad", {"value": True}]
    assert [name for name, _ in calls[1:]] == ["initialize", "scale_loss", "scale_loss"]
    native = drive(OLD, arguments + ["--amp-backend", "native"], tmp_path, variables)[0]
    assert native[0] == 1  # without autocast there is nothing to run O1 with


# Eight cards, through the launch scripts


FP32 = ["--opt-level", "O0", "--seed", "1", "--warmup", "0", "--wd", "1e-4"] + TINY
COMMON = ["--device=npu", "--batch_size=32", "--workers=1"]


@pytest.fixture(scope="module")
def eight(npu, clone, images, tmp_path_factory):
    """train_full_8p.sh in fp32: (its folder, its result, the operators that each process ran)."""
    folder = tmp_path_factory.mktemp("eight")
    variables = dict(npu, KERNELS_LOG=str(folder / "kernels"))
    result = run_script(clone, "train_full_8p.sh", f"--data_path={images}", *COMMON, "--epochs=2",
                        "--lr=0.001", "--", *FP32, cwd=folder, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result, [int(line) for line in (folder / "kernels").read_text().split()]


CPU_LIKE_NPU = """
import dataclasses, sys
import main

# In npu's order of memory, with torch's own gradients: a network that has just begun amplifies the
# least rounding.
main.BACKENDS["cpu"] = dataclasses.replace(main.BACKENDS["cpu"], channels_last=False)
main.mnasnet.optimize_for_cpu = lambda model, dtype: None
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_eight_cards_train_as_eight_processes_on_the_cpu_do(eight, images, tmp_path):
    folder, result, operators = eight
    assert re.search("=> 8 processes, rendezvous at .*, collectives over hccl", result.stdout)
    assert "Final Train Accuracy" in result.stdout
    assert len([count for count in operators if count > 2 * OPERATORS_PER_STEP]) == 8
    arguments = [images] + SMALL + FP32 + ["-b", 32, "--epochs", 2, "--lr", 0.001] + several(8)
    arguments += ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--local_rank"]
    command = [sys.executable, "-c", CPU_LIKE_NPU] + [str(argument) for argument in arguments]
    finish([start(command + [str(rank)], tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
            for rank in range(8)])
    ours, theirs = read_checkpoint(folder), read_checkpoint(tmp_path)
    for name in ("train_loss", "val_loss", "acc1"):
        values = [[row[name] for row in checkpoint["history"]] for checkpoint in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, tensor in ours["state_dict"].items():
        other = theirs["state_dict"][name].float()
        assert torch.allclose(tensor.float(), other, rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_eight_cards_count_every_image_once(eight, npu, clone, images):
    folder = eight[0]
    result = run_script(clone, "train_eval_8p.sh", f"--data_path={images}", *COMMON,
                        "--device_id=2", "--", "--opt-level", "O0", *TINY, cwd=folder, **npu)
    alone = run_main(images, "-e", "--resume", folder / "checkpoint.pth.tar", cwd=folder)
    assert counts(result) == counts(alone) and counts(result)[2] == "31"


@pytest.mark.slow
def test_two_cards_resume_a_run_of_eight_in_low_precision(eight, npu, clone, images, tmp_path):
    shutil.copy(str(eight[0] / "checkpoint.pth.tar"), str(tmp_path))
    result = run_script(clone, "train_full_8p.sh", f"--data_path={images}", *COMMON, "--epochs=3",
                        "--lr=0.001", "--resume=auto", "--device_list=0,1", "--", *TINY,
                        cwd=tmp_path, **npu)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resumed from" in result.stdout and "O1 (float16)" in result.stdout
    last = read_checkpoint(tmp_path)
    assert [row["epoch"] for row in last["history"]] == [0, 1, 2]
    assert last["amp"]["scale"] in (2.0 ** 15, 2.0 ** 16)


@pytest.mark.parametrize("value", [None, "0"])
def test_the_queue_of_operators_is_on_unless_the_user_says_otherwise(monkeypatch, value):
    monkeypatch.setenv("TASK_QUEUE_ENABLE", value or "")
    if value is None:
        monkeypatch.delenv("TASK_QUEUE_ENABLE")
    main.device_count(main.BACKENDS["npu"])
    assert os.environ["TASK_QUEUE_ENABLE"] == (value or ("2" if main.TORCH >= (2, 5) else "1"))


# env_npu.sh


def source(cwd, **variables):
    """env_npu.sh in a strict shell without an environment: (its stderr, the variables after it)."""
    code = f". '{ROOT / 'test' / 'env_npu.sh'}'; false || env"
    variables = dict({"PATH": os.environ["PATH"], "HOME": str(cwd)}, **variables)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=str(cwd), env=variables,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


@pytest.fixture
def cann(tmp_path):
    """A set_env.sh as CANN's are: it reads unset variables, and its last test fails."""
    folder = tmp_path / "Ascend toolkit"
    folder.mkdir()
    (folder / "set_env.sh").write_text(
        'export CANN_PATH="here:$CANN_NOT_SET"\ntouch "$HOME/sourced"\n'
        'false\n[[ -n $CANN_NOT_SET ]]\n')
    return folder


def test_cann_is_sourced(cann, tmp_path):
    error, variables = source(tmp_path, ASCEND_TOOLKIT_HOME=str(cann), HCCL_CONNECT_TIMEOUT="77")
    assert error == "" and variables["CANN_PATH"] == "here:"
    assert variables["COMBINED_ENABLE"] == "1" and variables["HCCL_WHITELIST_DISABLE"] == "1"
    assert variables["HCCL_CONNECT_TIMEOUT"] == "77"  # the user's value stays


@pytest.mark.skipif(os.path.exists("/usr/local/Ascend"), reason="CANN is installed")
def test_missing_cann_is_said(tmp_path):
    error, variables = source(tmp_path)
    assert error.count("\n") == 1 and "found no set_env.sh" in error
    assert variables["COMBINED_ENABLE"] == "1"


def test_a_test_platform_sets_all_of_it_itself(cann, tmp_path):
    error, variables = source(tmp_path, ASCEND_TOOLKIT_HOME=str(cann), etp_running_flag="true")
    assert error == "" and "CANN_PATH" not in variables and "COMBINED_ENABLE" not in variables


@pytest.mark.parametrize("device", ["npu", "cpu", "gpu", ""])
def test_only_npu_runs_source_it(cann, clone, tmp_path, device):
    run_script(clone, "train_full_1p.sh", "--data_path=.", "--python=true",
               *([f"--device={device}"] if device else []), cwd=tmp_path, HOME=str(tmp_path),
               ASCEND_TOOLKIT_HOME=str(cann))
    assert (tmp_path / "sourced").exists() == (device == "npu")
