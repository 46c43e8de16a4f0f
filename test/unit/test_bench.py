"""The benchmarks run to their end and print their tables; the figures themselves are not tested."""

import re
import subprocess
import sys

import pytest
import torch

import main
from helpers import ROOT, TORCH, run_program

BENCH = ROOT / "test" / "bench"
SMALL = ["-a", "mnasnet0_5", "-b", "4", "--size", "32", "--rounds", "1", "--device", "cpu"]
COMPARED = SMALL + ["--levels", "O0", "--baseline-workers", "1"]


def run_bench(script, *arguments):
    """What a benchmark prints; it must end with status 0."""
    done = run_program(BENCH / script, *arguments, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("script,arguments,rows", [
    ("bench_train.py", ["--steps", "3", "--images", "10"] + COMPARED, ["baseline", "main.py O0"]),
    ("bench_eval.py", ["--images", "20", "--photos", "10"] + COMPARED, ["baseline", "main.py O0"]),
    ("bench_data.py", ["--images", "10", "--rounds", "1"], ["main.py, evaluation"]),
    ("bench_data.py", ["--loader", "--batches", "3", "-b", "10", "--rounds", "1"],
     ["main.py, 4 worker"]),
    pytest.param("bench_scaling.py", ["--steps", "3"] + SMALL,
                 ["1 process, 2 cores", "2 processes, 1 core each"],
                 marks=pytest.mark.skipif(main.cores_per_process() < 2, reason="one core"))])
def test_a_benchmark_ends_with_its_table(script, arguments, rows):
    output = run_bench(script, *arguments)
    table = output[output.rindex("lowest to highest"):]
    for row in rows:
        assert re.search(rf"^{re.escape(row)}\b.* \d+\.\d ", table, re.M), output


@pytest.mark.slow
def test_fine_tuning_ends_with_its_table(images):
    output = run_bench("bench_finetune.py", images, "--epochs", 1, "--pretrain-epochs", 1,
                       "--lr", 0.001, *SMALL)
    assert len(re.findall(r"^(?:from scratch|fine-tuned.*): mean \d+\.\d$", output, re.M)) == 3


@pytest.mark.slow
def test_recipes_end_with_their_table(images):
    output = run_bench("bench_recipes.py", images, "--epochs", 1, "--rows", "rmsprop/small", *SMALL)
    assert len(re.findall(r"^(?:rmsprop|small): mean \d+\.\d$", output, re.M)) == 2


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
    output = run_bench("bench_trainers.py", "--example", tmp_path, "--levels", "O0", "--steps", 6,
                       "--val-images", 20, *SMALL)
    for title in ("training", "evaluation in a training run"):
        table = output[output.index(f"\n{title}\n"):]
        for row in ("PyTorch's example", "main.py O0"):
            assert re.search(rf"^{row} .* \d+\.\d ", table, re.M), output


def cells(table):
    """The rows of gpu_report.py's table, each a list of section, measurement and result."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [line[2:-2].split(" | ") for line in lines]


@pytest.mark.slow
def test_the_report_of_a_card_fills_every_row(tmp_path):
    report = tmp_path / "report.md"
    command = [sys.executable, str(BENCH / "gpu_report.py"), "--device", "cpu", "--limit", "5",
               "--output", str(report)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=900,
                          universal_newlines=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "report.md.log").read_text()
    rows = cells(report.read_text())
    assert rows == cells(done.stdout) and all(len(row) == 3 and all(row) for row in rows)
    assert [row[0] for index, row in enumerate(rows) if row[0] != rows[index - 1][0]] == [
        "section", "machine", "steps", "loader", "compile", "decode", "whole", "correct", "all"]
    assert not re.search("FAILED|CUT|DIFFERS|skipped", report.read_text())
    compiled = [result for section, _, result in rows if section == "compile"]
    assert TORCH < (2, 0) or all(result.startswith("first step") for result in compiled), compiled
    assert len([row for row in rows if "agrees" in row[2]]) >= (3 if TORCH < (2, 0) else 6)


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu_report

    return gpu_report


def test_a_section_that_is_cut_leaves_a_row_and_the_others_run(gpu_report, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_report.SECTIONS, "steps", (None, 0.1))
    report = tmp_path / "report.md"
    assert gpu_report.main(
        ["--device", "cpu", "--sections", "steps,machine", "--output", str(report)]) == 1
    rows = cells(report.read_text())
    assert rows[1] == ["steps", "the rest", "CUT after 0.1 s"]
    assert {row[0] for row in rows[2:-1]} == {"machine"} and len(rows) > 4
    assert not re.search("FAILED|CUT", str(rows[2:]))


def test_a_section_that_fails_leaves_a_row(gpu_report, tmp_path):
    code = "print('text'); print('| one | 1 |', flush=True); raise ValueError('no | luck')"
    with (tmp_path / "log").open("a+") as log:
        rows = list(gpu_report.common.read_rows(["-c", code], 60, log))
    assert rows == ["| one | 1 |", "| the rest | FAILED: ValueError: no / luck |"]
    assert "text\n" in (tmp_path / "log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_machine_without_a_card_is_told_so(gpu_report, tmp_path, capsys):
    assert gpu_report.main(["--output", str(tmp_path / "report.md")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("gpu_report.py: error: --device gpu is not available")
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())
