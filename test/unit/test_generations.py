"""One run over three generations of torch, in the environments that run_tests.sh has made for them."""

import re
import subprocess

import pytest

import main
from conftest import ROOT, SMALL

PYTHONS = [ROOT / name / "bin" / "python" for name in (".venv-1.5", ".venv-1.8", ".venv")]
needs_all = pytest.mark.skipif(not all(python.exists() for python in PYTHONS),
                               reason="run_tests.sh has not made the environments of all three generations here")


def start(python, images, *arguments, cwd):
    command = [str(python), str(ROOT / "main.py"), str(images)] + SMALL + [str(a) for a in arguments]
    return subprocess.Popen(command, cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            universal_newlines=True)


@pytest.mark.slow
@needs_all
def test_a_run_goes_from_one_generation_to_the_next(images, tmp_path):
    for epoch, (python, status) in enumerate(zip(PYTHONS, (143, 143, 0))):
        run = start(python, images, "--epochs", 3, "--seed", 1, "--resume", "auto", "--bn-momentum", 0.9,
                    cwd=tmp_path)
        said = ""
        for line in run.stdout:
            said += line
            if status and line.startswith("Epoch: [{}][2/".format(epoch)):
                run.terminate()  # in the middle of an epoch
        assert run.wait(timeout=300) == status, said
        assert ("resumed from" in said) == (epoch > 0), said
    last = main.read_checkpoint(str(tmp_path / "checkpoint.pth.tar"))
    assert [row["epoch"] for row in last["rows"]] == [0, 1, 2]

    found = []
    for python in PYTHONS:
        run = start(python, images, "-e", "--resume", "checkpoint.pth.tar", cwd=tmp_path)
        said = run.communicate(timeout=300)[0]
        assert run.returncode == 0, said
        found.append([float(figure) for figure in re.search(
            r"^Result: Acc@1 (\S+) Acc@5 (\S+) images/sec \S+ loss (\S+)", said, re.M).groups()])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4, abs=1e-4)
