"""The benchmarks run to their end and print their tables; the figures themselves are not tested."""

import re
import subprocess
import sys

import pytest

import main
from helpers import ROOT

SMALL = ["-a", "mnasnet0_5", "-b", "4", "--size", "32", "--rounds", "1", "--device", "cpu"]
COMPARED = SMALL + ["--levels", "O0", "--baseline-workers", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("script,arguments,rows", [
    ("bench_train.py", ["--steps", "3", "--images", "10"] + COMPARED, ["baseline", "main.py O0"]),
    ("bench_eval.py", ["--images", "20", "--photos", "10"] + COMPARED, ["baseline", "main.py O0"]),
    ("bench_data.py", ["--images", "10", "--rounds", "1"], ["main.py, evaluation"]),
    pytest.param("bench_scaling.py", ["--steps", "3"] + SMALL,
                 ["1 process, 2 cores", "2 processes, 1 core each"],
                 marks=pytest.mark.skipif(main.cores_per_process() < 2, reason="one core"))])
def test_a_benchmark_ends_with_its_table(script, arguments, rows):
    command = [sys.executable, str(ROOT / "test" / "bench" / script)] + arguments
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("lowest to highest"):]
    for row in rows:
        assert re.search(rf"^{re.escape(row)}\b.* \d+\.\d ", table, re.M), done.stdout


@pytest.mark.slow
def test_fine_tuning_ends_with_its_table(images):
    command = [sys.executable, str(ROOT / "test" / "bench" / "bench_finetune.py"), str(images),
               "--epochs", "1", "--pretrain-epochs", "1", "--lr", "0.001"] + SMALL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:from scratch|fine-tuned.*): mean \d+\.\d$", done.stdout, re.M)) == 3


@pytest.mark.slow
def test_recipes_end_with_their_table(images):
    command = [sys.executable, str(ROOT / "test" / "bench" / "bench_recipes.py"), str(images),
               "--epochs", "1", "--rows", "rmsprop/small"] + SMALL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:rmsprop|small): mean \d+\.\d$", done.stdout, re.M)) == 2


EXAMPLE = """
import time

print("Using device: cpu")
for step in range(8):
    time.sleep(0.02)
    print(f"Epoch: [0][{step + 1}/8]\\tTime 0.02 ( 0.02)")
for step in range(2):
    time.sleep(0.02)
    print(f"Test: [{step + 1}/2]\\tTime 0.02 ( 0.02)")
"""


@pytest.mark.slow
def test_the_table_of_the_trainers(tmp_path):
    (tmp_path / "main.py").write_text(EXAMPLE)
    command = [sys.executable, str(ROOT / "test" / "bench" / "bench_trainers.py"), "--example",
               str(tmp_path), "--levels", "O0", "--steps", "6", "--val-images", "20"] + SMALL
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=600,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for title in ("training", "evaluation in a training run"):
        table = done.stdout[done.stdout.index(f"\n{title}\n"):]
        for row in ("PyTorch's example", "main.py O0"):
            assert re.search(rf"^{row} .* \d+\.\d ", table, re.M), done.stdout
