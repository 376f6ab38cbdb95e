"""Pictures: what their pixels and their files say."""

import math

import numpy as np
import pytest

from farspan.eval.needle.cells import Cell, read_csv
from farspan.eval.needle.heatmap import DPI, curve, difference, heatmap, short_length, write_figure, write_heatmap

LENGTHS, DEPTHS = (1024, 2048, 4096), (0.0, 25.0, 50.0, 100.0)
# Depth 0 finds everything, depth 100 nothing; the longest length was not measured at depth 25.
GROUP = [
    Cell("needle_s2", "gen", length, depth, n=0 if (length, depth) == (4096, 25.0) else 5, mean=mean)
    for length in LENGTHS
    for depth, mean in zip(DEPTHS, (1.0, math.nan if length == 4096 else 0.75, 0.5, 0.0), strict=True)
]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def color(image, figure, column, row):
    """Near the corner of a cell, where no number is printed."""
    axes = figure.axes[0]
    x, y = axes.transData.transform((column - 0.42, row - 0.4)) * DPI / figure.dpi
    return image[round(image.shape[0] - y), round(x)]


def expected(mean, cmap="RdYlGn", limits=(0, 1)):
    from matplotlib import colormaps

    return colormaps[cmap]((mean - limits[0]) / (limits[1] - limits[0]))[:3]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heatmap")
    figure = heatmap(GROUP, model="toy", trained=2048, window=1024)
    write_figure(folder / "s2.png", figure)
    return folder, figure


def test_the_png_has_its_size_and_colors(written):
    folder, figure = written
    image = pixels(folder / "s2.png")
    assert image.shape[:2] == (4 * DPI, 6 * DPI)
    assert (folder / "s2.png").stat().st_size < 300_000
    for column in range(3):
        assert color(image, figure, column, 0) == pytest.approx(expected(1.0), abs=0.01)
        assert color(image, figure, column, 2) == pytest.approx(expected(0.5), abs=0.01)
        assert color(image, figure, column, 3) == pytest.approx(expected(0.0), abs=0.01)
    red, green, blue = color(image, figure, 2, 1)
    assert red == green == blue and 0.5 < red < 0.9, "what was not measured is grey"
    assert color(image, figure, 0, 1) == pytest.approx(expected(0.75), abs=0.01)


def test_words_and_lines(written):
    axes = written[1].axes[0]
    assert axes.get_title(loc="left").split("\n") == [
        "toy · needle_s2 · gen",
        "5 samples per cell · mean 0.545 · effective length none",
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K", "4K"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "25", "50", "100"]
    assert axes.yaxis_inverted()  # depth 0 at the top
    assert {(line.get_xdata()[0], line.get_linestyle()) for line in axes.lines} == {(1.5, "--"), (0.5, ":")}
    texts = [text.get_text() for text in axes.texts]
    assert {"trained 2K", "window 1K", "n/a", "1.00", "0.75"} <= set(texts) and texts.count("0.00") == 3
    assert axes.images[0].get_clim() == (0, 1)


def test_files_come_back_and_repeat(tmp_path):
    paths = write_heatmap(tmp_path, "s2", GROUP)
    assert [path.name for path in paths] == ["s2.png", "s2.svg", "s2.csv"]
    assert repr(read_csv(paths[2])) == repr(GROUP)
    first = [path.read_bytes() for path in paths]
    assert first == [path.read_bytes() for path in write_heatmap(tmp_path, "s2", read_csv(paths[2]))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s2.csv", "s2.png", "s2.svg"]
    assert b"<svg" in first[1] and "needle_s2 · gen".encode() in first[1]


def test_a_large_grid_has_no_numbers():
    group = [Cell("needle_s2", "tf", 1024 * i, float(d), n=1, mean=0.5) for i in range(1, 14) for d in (0, 100)]
    figure = heatmap(group, cmap="viridis", trained=4096, extended=8192)
    assert [text.get_text() for text in figure.axes[0].texts] == ["trained 4K", "extended 8K"]
    assert tuple(figure.get_size_inches()) == (pytest.approx(0.8 * 13), 4)
    assert figure.axes[0].images[0].cmap.name == "viridis"


def test_numbers_are_readable_on_their_color():
    group = [Cell("needle_s2", "gen", 1024 * (i + 1), 0.0, n=1, mean=m) for i, m in enumerate((0.0, 0.5, 1.0))]
    assert [text.get_color() for text in heatmap(group).axes[0].texts] == ["white", "black", "white"]


def test_a_task_without_depth():
    axes = heatmap([Cell("needle_cwe", "gen", 4096, None, n=2, mean=1.0)], trained=4096).axes[0]
    assert axes.get_ylabel() == "" and [label.get_text() for label in axes.get_yticklabels()] == [""]


def test_nothing_measured():
    axes = heatmap([Cell("needle_s1", "gen", 512, 0.0)]).axes[0]
    assert axes.get_title(loc="left").endswith("0 samples per cell · mean n/a · effective length none")
    assert np.isnan(axes.images[0].get_array().filled(np.nan)).all()


def test_the_difference_of_two(tmp_path):
    new = [Cell("needle_s2", "gen", length, 0.0, n=2, mean=1.0) for length in (1024, 2048)]
    old = [Cell("needle_s2", "gen", length, 0.0, n=2, mean=0.25) for length in (1024, 4096)]
    figure = difference(new, old, ("rat", "full"))
    axes = figure.axes[0]
    assert axes.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in axes.texts] == ["+0.75", "n/a", "n/a"]
    assert axes.get_title(loc="left") == "rat minus full · needle_s2 · gen\ndifference of the means +0.750"
    write_figure(tmp_path / "difference.png", figure)
    image = pixels(tmp_path / "difference.png")
    assert color(image, figure, 0, 0) == pytest.approx(expected(0.75, "PuOr", (-1, 1)), abs=0.01)


def test_errors():
    with pytest.raises(ValueError, match="one task by one protocol; these cells are of: needle_s1 gen, needle_s2 gen"):
        heatmap([Cell("needle_s1", "gen", 512, 0.0), Cell("needle_s2", "gen", 512, 0.0)])
    with pytest.raises(ValueError, match="these cells are of: none"):
        heatmap([])
    with pytest.raises(ValueError, match="there is no colour map 'rainbows'"):
        heatmap(GROUP, cmap="rainbows")


def test_lengths_in_words():
    assert [short_length(n) for n in (512, 1000, 4096, 131072, 1048576)] == ["512", "1000", "4K", "128K", "1M"]


def test_a_curve_per_task():
    group = [Cell(t, "gen", n, 0.0, n=1, mean=m) for t, m in (("a", 1.0), ("b", 0.5)) for n in (1024, 4096)]
    axes = curve([*group, Cell("b", "gen", 8192, 0.0)], trained=2048).axes[0]
    assert [(line.get_label(), list(line.get_ydata())) for line in axes.lines[:2]] == [("a", [1, 1]), ("b", [0.5, 0.5])]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "4K", "8K"]
    with pytest.raises(ValueError, match="a curve shows one protocol; these cells are of: gen, tf"):
        curve([*group, Cell("a", "tf", 1024, 0.0)])
