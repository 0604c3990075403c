import pytest

from fastcpt.planning.matrix import HEADER, matrix, matrix_markdown, matrix_picture, matrix_text


@pytest.fixture(scope="module")
def published():
    return matrix()


def test_all_eight_options_stand_beside_their_claims(published):
    assert [row.number for row in published] == list(range(8))
    lines = matrix_text(published).splitlines()
    assert lines[1].startswith("0  full")
    assert "20-24 h, $500, 100 %" in lines[1]
    assert "4-6 h, $180, 75-80 %" in lines[7]


def test_none_of_the_claims_holds_for_70b(published):
    for row in published:
        assert not row.plan.fits_time, row.name
        times = 3 if row.plan.gpus == 16 else 5  # over two hosts the range is wider
        assert row.plan.cost.low > times * float(row.plan.claim["cost"].strip("$+"))


def test_option_7_has_both_stages(published):
    assert ", then " in matrix_text(published).splitlines()[8]


def test_ones_own_model_corpus_and_cluster():
    rows = matrix(3_000_000_000, "8xH100", "meta-llama/Llama-3.2-1B")
    assert {row.plan.model for row in rows} == {"Llama-3.2-1B"}
    assert [row.plan.cluster for row in rows] == ["8xH100"] * 3 + ["16xH100"] + ["8xH100"] * 4
    # the hybrid takes 40 % of it, the filtered corpus 30 %, the full run all
    assert [rows[n].plan.corpus_tokens for n in (6, 2, 0)] == [
        1_200_000_000,
        900_000_000,
        3_000_000_000,
    ]
    assert any(row.plan.fits for row in rows)
    # a tenth of it would be trained on 39 times
    few = matrix(300_000_000, "8xH100", "meta-llama/Llama-3.2-1B")
    assert few[6].plan.passes == pytest.approx(39.3, abs=0.05)
    assert few[6].missing == "passes"


def test_markdown_has_a_row_an_option(published):
    lines = matrix_markdown(published).splitlines()
    assert lines[0] == "| " + " | ".join(HEADER) + " |"
    assert len([line for line in lines if line.startswith("|")]) == 2 + 8
    assert {line.count("|") for line in lines[:10]} == {len(HEADER) + 1}


def test_the_picture_names_every_option(published, tmp_path):
    path = tmp_path / "matrix.svg"
    matrix_picture(published, path)
    text = path.read_text()
    for row in published:
        assert f"<!-- {row.number} {row.name} -->" in text
