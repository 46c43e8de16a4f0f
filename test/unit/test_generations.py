"""One run over three generations of torch, in the environments that run_tests.sh made for them."""

import re

import pytest

from helpers import ROOT, STEADY, finish, read_checkpoint, read_until, start_main

PYTHONS = [ROOT / name / "bin" / "python" for name in (".venv-1.5", ".venv-1.8", ".venv")]
RESULT = r"^Result: Acc@1 (\S+) Acc@5 (\S+) images/sec \S+ loss (\S+)"


@pytest.mark.slow
@pytest.mark.skipif(not all(python.exists() for python in PYTHONS),
                    reason="run_tests.sh has not made the environments of all three generations")
def test_a_run_resumes_from_one_generation_to_the_next(images, tmp_path):
    for epoch, python in enumerate(PYTHONS):
        run = start_main(images, "--epochs", 3, "--seed", 1, "--resume", "auto",
                         *STEADY, python=python, cwd=tmp_path)
        last = epoch == len(PYTHONS) - 1
        output = "".join(read_until(run, "^Result:" if last else rf"^Epoch: \[{epoch}\]\[2/"))
        if not last:
            run.terminate()  # in the middle of an epoch
        output += run.communicate(timeout=300)[0]
        assert run.returncode == (0 if last else 143), output
        assert ("resumed from" in output) == (epoch > 0), output
    history = read_checkpoint(tmp_path)["history"]
    assert [row["epoch"] for row in history] == [0, 1, 2]

    found = []
    for python in PYTHONS:
        arguments = [images, "-e", "--resume", "checkpoint.pth.tar"]
        output, = finish([start_main(*arguments, python=python, cwd=tmp_path)])
        found.append([float(figure) for figure in re.search(RESULT, output, re.M).groups()])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-4)
