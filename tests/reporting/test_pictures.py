"""Pictures: every task drawn once and apart, every edge from its task to its task."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fastcpt.reporting.pictures import curves, dag_picture, perplexities

SVG = "{http://www.w3.org/2000/svg}"
TASKS = ["plan", "score", "check", "build", "sync", "train", "gate", "stage2", "sft"]
EDGES = [
    ("plan", "score"), ("plan", "check"), ("score", "build"), ("plan", "build"),
    ("build", "sync"), ("check", "sync"), ("sync", "train"), ("train", "gate"),
    ("gate", "stage2"), ("stage2", "sft"), ("gate", "sft"),
]  # fmt: skip


def draw(path, **options):
    dag_picture(TASKS, EDGES, path, **options)
    return ElementTree.parse(path).getroot()


def boxes(root):
    found = root.findall(f"{SVG}rect")[1:]  # the first is the background
    return [tuple(float(box.get(key)) for key in ("x", "y", "width", "height")) for box in found]


def test_every_task_is_a_box_of_its_own(tmp_path):
    root = draw(tmp_path / "dag.svg")
    assert sorted(text.text for text in root.findall(f"{SVG}text")) == sorted(TASKS)
    every = boxes(root)
    assert len(every) == len(TASKS)
    for n, (x, y, width, height) in enumerate(every):
        assert x >= 0
        assert x + width <= float(root.get("width"))
        assert y + height <= float(root.get("height"))
        for other_x, other_y, *_ in every[:n]:
            assert abs(x - other_x) >= width or abs(y - other_y) >= height


def test_edges_lead_down_and_cross_no_box(tmp_path):
    root = draw(tmp_path / "dag.svg", labels={("gate", "sft"): "below 18"})
    paths = [path.get("d") for path in root.findall(f"{SVG}path")]
    # plan -> build is implied by plan -> score -> build; gate -> sft is kept for its label.
    assert len(paths) == len(EDGES) - 1
    for path in paths:
        numbers = [float(number) for number in re.findall(r"-?\d+", path)]
        heights = numbers[1::2]
        assert heights == sorted(heights)
    long_edge = max(paths, key=len)
    x, y = (float(number) for number in re.search(r"L(\d+) (\d+)", long_edge).groups())
    assert not any(
        left <= x <= left + width and top <= y <= top + height
        for left, top, width, height in boxes(root)
    )
    assert "below 18" in [text.text for text in root.findall(f"{SVG}text")]


def test_an_edge_to_nowhere_and_a_circle_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not in the list: shop"):
        dag_picture(["plan"], [("plan", "shop")], tmp_path / "dag.svg")
    with pytest.raises(ValueError, match="in a circle: a, b"):
        dag_picture(["a", "b"], [("a", "b"), ("b", "a")], tmp_path / "dag.svg")


def test_curves_leave_out_what_is_no_number(tmp_path):
    rows = [
        {"step": 1, "loss": 4.0, "learning_rate": 1e-5},
        {"step": 2, "loss": float("nan"), "learning_rate": 1e-5},
        {"step": 3, "loss": 2.0, "learning_rate": 2e-5},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    svg = curves({"train_cpt": metrics})
    assert "train_cpt" in svg
    assert "nan" not in svg.lower()
    metrics.write_text("")
    assert curves({"train_cpt": metrics}) is None


def test_a_long_curve_stays_small_and_keeps_its_end(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("w") as lines:
        for step in range(1, 40_001):
            row = {"step": step, "loss": 3 + 1 / step, "learning_rate": 1e-5}
            lines.write(json.dumps(row) + "\n")
    assert len(curves({"train_cpt": metrics})) < 100_000


def test_perplexities_show_the_gate_and_every_usable_figure():
    svg = perplexities({"base model": 2081.0, "after stage 1": 9.5, "lost": float("nan")}, 18.0)
    assert "2,081.00" in svg
    assert "9.50" in svg
    assert "the gate is at 18" in svg
    assert "lost" not in svg
    assert perplexities({"lost": float("inf")}, 18.0) is None
