"""Drawings: everything is on them, nothing lies on anything else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tinynn import nn
from tinynn.errors import ConfigError, OutputError
from tinynn.graph import Graph, trace
from tinynn.graph.layout import layout
from tinynn.models import thesis


def inception(rng: np.random.Generator) -> Graph:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, rng=rng),
        nn.InceptionBlock(8, (4, 8, 4, 4), rng=rng),
        nn.BottleneckBlock(20, 20, rng=rng),
        nn.Flatten(),
        nn.Linear(320, 2, rng=rng),
    )
    return trace(net, np.zeros((1, 8, 8, 3), np.float32))


def small_cifar(rng: np.random.Generator) -> Graph:
    return trace(thesis.small_cifar(rng=rng), np.zeros((1, 32, 32, 3), np.float32))


GRAPHS = {"inception": inception, "small_cifar": small_cifar}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("rows", [3, 8, 22, 500])
def test_boxes_have_places_of_their_own_below_what_they_read(name: str, rows: int) -> None:
    graph = GRAPHS[name](np.random.default_rng(0))
    places = layout(graph.nodes, graph.input, rows)
    assert len(set(places.values())) == len(places) == len(graph.nodes) + 1
    assert max(p.row for p in places.values()) <= rows
    for node in graph.nodes:
        for v in node.inputs:
            if v.is_data:
                above, below = places[v.index], places[node.output.index]
                assert (above.column, above.row) < (below.column, below.row)
    trunk = places[graph.output.index].lane
    assert trunk == places[graph.input.index].lane == 0


def test_a_svg_says_ops_shapes_multiply_adds_and_bytes(tmp_path: Path) -> None:
    small_cifar(np.random.default_rng(0)).draw(tmp_path / "net.svg")
    svg = (tmp_path / "net.svg").read_text()
    assert svg.count("depthwise conv2d 3×3") == 12
    assert svg.count("avg pool2d /2") == 2 and "conv2d 1×1" in svg
    assert "885 k MAC   3.58 kB" in svg  # the stem
    assert "1×32×32×32  131 kB" in svg and "1×10  40 B" in svg
    inception(np.random.default_rng(0)).draw(tmp_path / "net.svg")
    assert "concat" in (tmp_path / "net.svg").read_text()


def test_the_same_graph_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        inception(np.random.default_rng(0)).draw(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_a_png_and_other_endings_are_refused(tmp_path: Path) -> None:
    graph = inception(np.random.default_rng(0))
    graph.draw(str(tmp_path / "net.png"))
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        graph.draw(tmp_path / "net.pdf")
    graph.draw(tmp_path / "new" / "NET.SVG")
    assert b"<svg" in (tmp_path / "new" / "NET.SVG").read_bytes()


def test_a_drawing_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, path = inception(np.random.default_rng(0)), tmp_path / "net.svg"
    graph.draw(path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"net\.svg"):
        graph.draw(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
