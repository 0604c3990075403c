"""A plan as tables: each figure with its limit and its source."""

import html

from fastcpt.planning.plan import plan
from fastcpt.recipe import load_recipe
from fastcpt.reporting import plan_table


def planned(tokens, cluster, **overrides):
    return plan(load_recipe("cpt_config_fast", overrides), tokens, cluster).to_json()


def test_every_figure_has_its_limit_and_where_it_is_from():
    found = planned(2_000_000_000, "4xH100")
    rows = {row[0]: row[1:] for row in plan_table.figures(found, "a guess")}
    assert rows["hours"][1] == "6 h: DOES NOT FIT"
    assert rows["money"][1] == "$180: DOES NOT FIT"
    assert rows["memory per GPU"][1].endswith("GB: DOES NOT FIT")
    # 12,000 steps of 3,072 x 128 tokens, over 2 B
    assert rows["tokens trained on"][0] == "4,718,592,000 in 12,000 steps"
    assert rows["passes over the corpus"][:2] == ("2.4", "4: fits")
    assert rows["tokens of the corpus"][2] == "a guess"
    counted = {row[0]: row[1:] for row in plan_table.figures(found, plan_table.COUNTED)}
    assert counted["tokens of the corpus"][2] == "counted in the corpus"
    assert plan_table.verdict(found) == "The plan does not fit."
    assert len(plan_table.alternative_rows(found)) == len(found["alternatives"]) > 0


def test_unknown_figures_are_called_unknown():
    found = planned(None, "8xH100", **{"training.max_steps": 10, "training.warmup_steps": 1})
    found |= {"hours": None, "cost": None, "tokens_per_s": None, "price_source": None}
    rows = {row[0]: row[1:] for row in plan_table.figures(found, "a guess")}
    assert rows["hours"][0] == rows["money"][0] == rows["tokens per second"][0] == "unknown"
    assert rows["money"][2] == "no price is known"


def test_the_approvals_tables_take_words_as_they_are():
    found = planned(2_000_000_000, "8xH100") | {"recipe": "a|b\n# [x](http://e) <b>"}
    shown = plan_table.markdown(found, plan_table.COUNTED)
    assert "[x](" not in shown
    assert "<b>" not in shown
    assert "**a|b # [x](http://e) <b>**" in html.unescape(shown)
    tables = [line for line in shown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4}  # three columns, none torn
    one = found["alternatives"][0]
    listed = f"- **{one['what']}, on {one['cluster']}**: tokens {one['tokens']:,}, hours "
    assert listed in html.unescape(shown)
