"""The benchmarks run to their end and print their tables; what they measure is nobody's business here."""

import re
import subprocess
import sys

import pytest

import main
from conftest import ROOT

TINY = ["-a", "mnasnet0_5", "-b", "4", "--size", "32", "--rounds", "1", "--device", "cpu"]
COMPARED = TINY + ["--levels", "O0", "--usual-workers", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("script,arguments,rows", [
    ("bench_train.py", ["--steps", "3", "--images", "10"] + COMPARED, ["usual", "main.py O0"]),
    ("bench_eval.py", ["--images", "20", "--photos", "10"] + COMPARED, ["usual", "main.py -e O0"]),
    ("bench_data.py", ["--images", "10", "--rounds", "1"], ["main.py, evaluation"]),
    pytest.param("bench_scaling.py", ["--steps", "3"] + TINY, ["1 process, 2 cores", "2 processes, 1 core each"],
                 marks=pytest.mark.skipif(main.usable_cores() < 2, reason="one core"))])
def test_a_benchmark_ends_with_its_table(script, arguments, rows):
    done = subprocess.run([sys.executable, str(ROOT / "test" / "bench" / script)] + arguments, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout[done.stdout.rindex("lowest to highest"):]
    for row in rows:
        assert re.search(r"^{}\b.* \d+\.\d ".format(re.escape(row)), table, re.M), done.stdout
