"""Heatmaps: colors of values and positions of cells."""

from __future__ import annotations

import numpy as np

from mtrl_cli.training.heatmap import colours, heatmap

RED, WHITE, BLUE, GREY = [178, 24, 43], [255, 255, 255], [33, 102, 172], [160, 160, 160]


def test_colours_of_extreme_middle_and_missing_values() -> None:
    assert colours(np.array([-1.0, 0.0, 1.0, np.nan])).tolist() == [RED, WHITE, BLUE, GREY]
    assert colours(np.array([-1.5, 7.0, np.inf])).tolist() == [RED, BLUE, GREY]
    assert colours(np.array([[0.5]])).tolist() == [[[144, 178, 214]]]  # halfway from white to blue, rounded to even


def test_colour_scale_does_not_depend_on_the_table() -> None:
    single = colours(np.array([0.25]))
    assert (colours(np.array([0.25, -1.0, 1.0]))[0] == single[0]).all()


def test_cells_are_large_and_in_the_order_of_the_table() -> None:
    values = np.array([[1.0, -1.0], [np.nan, 1.0]])
    picture = heatmap(values, ["pong", "qbert"], ["0", "1"])
    assert picture.dtype == np.uint8
    height, width, channels = picture.shape
    assert channels == 3
    cell = 128
    corners = [[picture[height - (2 - row) * cell + 5, width - (2 - column) * cell + 5].tolist() for column in (0, 1)] for row in (0, 1)]
    assert corners == [[BLUE, RED], [GREY, BLUE]]


def test_names_are_drawn_next_to_the_rows() -> None:
    values = np.zeros((2, 2))
    named, other = heatmap(values, ["pong", "qbert"], ["a", "b"]), heatmap(values, ["qbert", "qbert"], ["a", "b"])
    assert (named != 255).any()  # all cells are white, so other pixels are names
    assert named.shape == other.shape
    middle = named.shape[0] // 2 + 7
    assert (named[:middle] != other[:middle]).any()
    assert (named[middle:] == other[middle:]).all()
