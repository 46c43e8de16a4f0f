"""tools/plot_metrics.py, as a user runs it."""

import functools

import pytest

import main
from helpers import ROOT, run_program, the_error

TOOL = str(ROOT / "tools" / "plot_metrics.py")
WITHOUT_MATPLOTLIB = f"""
import runpy, sys
sys.modules["matplotlib"] = None
sys.path.insert(0, {str(ROOT / "tools")!r})
runpy.run_path({TOOL!r}, run_name="__main__")
"""


plot = functools.partial(run_program, TOOL)


def make_run(folder, epochs=3, columns=main.COLUMNS):
    """A folder with a metrics.csv of so many epochs."""
    folder.mkdir(parents=True)
    rows = [[epoch] + [1 / (epoch + column) for column in range(1, len(columns))]
            for epoch in range(epochs)]
    lines = [",".join(map(str, row)) for row in [columns] + rows]
    (folder / "metrics.csv").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_runs_are_drawn_in_one_image(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image
    runs = [make_run(tmp_path / name) for name in ("_first $ $x$", "second", "third")]
    results = [plot(*runs[:count], "--output", tmp_path / f"{count}.png") for count in (1, 3)]
    assert [result.returncode for result in results] == [0, 0], results
    one, three = [image.imread(str(tmp_path / f"{count}.png")) for count in (1, 3)]
    height, width = one.shape[:2]
    assert 600 <= height <= 1200 and 800 <= width <= 1600
    # Of each run there is a color, in every quarter of the image.
    for quarter in (three[:height // 2, :width // 2], three[height // 2:, :width // 2],
                    three[:height // 2, width // 2:], three[height // 2:, width // 2:]):
        pixels = {tuple((255 * pixel[:3]).round().astype(int)) for pixel in quarter.reshape(-1, 4)}
        assert (44, 160, 44) in pixels  # matplotlib's third color, drawn last
    assert one.shape == three.shape and (one != three).any()


def test_an_averaged_model_is_drawn_beside_the_trained_one(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / "a" / "run"),
            make_run(tmp_path / "b" / "run", columns=main.COLUMNS + main.EMA_COLUMNS)]
    for run in runs:
        assert plot(run, "--output", run.parent / "it.png").returncode == 0
    without, with_ema = [(run.parent / "it.png").read_bytes() for run in runs]
    assert without != with_ema


def test_a_trained_run_is_drawn(trained, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "without ending, but an ü"
    result = plot(trained[0], "--output", path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and r"but an \xfc" in result.stdout, result.stderr
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "start.py").write_text(WITHOUT_MATPLOTLIB)
    result = run_program(tmp_path / "start.py", run, "--output", tmp_path / "out.png")
    assert the_error(result).endswith("pip install matplotlib")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("content,message", [
    (b"epoch,lr\n0,0.1\n", "line 2"),
    (b"", "holds no epoch"),
    (",".join(main.COLUMNS).encode() + b"\n", "holds no epoch"),
    (",".join(main.COLUMNS).encode() + b"\n0,0.1,2", "line 2"),
    (b"epoch,lr\n\xff\xff\n", "damaged"),
], ids=["columns", "empty", "header", "cut off", "binary"])
def test_a_damaged_metrics_file(tmp_path, content, message):
    good, bad = make_run(tmp_path / "good"), make_run(tmp_path / "bad")
    (bad / "metrics.csv").write_bytes(content)
    line = the_error(plot(good, bad, "--output", tmp_path / "out.png"))
    assert line.startswith("plot_metrics.py: error:") and message in line
    assert str(bad / "metrics.csv") in line and not (tmp_path / "out.png").exists()


def test_other_errors(tmp_path):
    assert "metrics.csv" in the_error(plot(tmp_path, "--output", tmp_path / "out.png"))
    assert plot(tmp_path).returncode == 2
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run")
    assert "nowhere" in the_error(plot(run, "--output", tmp_path / "nowhere" / "out.png"))
    assert "jpgg" in the_error(plot(run, "--output", tmp_path / "out.jpgg"))
