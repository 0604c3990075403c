"""Pictures: every usable figure is drawn, values that are not numbers are left out."""

import json

from fastcpt.reporting.pictures import curves, curves_together, funnel, perplexities


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


def test_a_dark_page_can_give_pictures_its_own_colours():
    svg = perplexities({"base model": 2081.0}, 18.0)
    assert "var(--bad, #b3372f)" in svg
    assert "#000000" not in svg


def test_the_funnel_names_what_each_step_left_out():
    rows = [
        {"stage": "read", "reason": "", "tokens": 1000},
        {"stage": "duplicates", "reason": "exact", "tokens": 250},
        {"stage": "selection", "reason": "rank", "tokens": 0},
        {"stage": "kept", "reason": "train", "tokens": 750},
    ]
    svg = funnel(rows)
    for word in ("read", "duplicates: exact", "kept: train", "1,000", "250", "750"):
        assert f">{word}<" in svg, word
    assert "rank" not in svg
    assert funnel([{"stage": "read", "reason": "", "tokens": 0}]) is None


def test_curves_of_runs_share_a_picture(tmp_path):
    for name in ("one", "_two"):
        (tmp_path / name).write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    (tmp_path / "empty").write_text("")
    svg = curves_together({name: tmp_path / name for name in ("one", "_two", "empty")})
    assert "one" in svg
    assert "_two" in svg
    assert "empty" not in svg
