import pytest

from fastcpt.planning.measured import check_rows, check_text

ROWS = check_rows()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.what}, {row.rate:.0f}" for row in ROWS])
def test_rate_within_15_and_memory_within_10_percent(row):
    assert abs(row.rate_error) <= 0.15
    assert abs(row.memory_error or 0) <= 0.10


def test_the_table_shows_each_row_and_the_count():
    lines = check_text(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) + 1
    assert (
        lines[-1] == f"{len(ROWS)} of {len(ROWS)} rows within 15% of the rate and 10% of the memory"
    )
