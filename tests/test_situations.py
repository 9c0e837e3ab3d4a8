"""The table of docs/situations.md, as far as this package is concerned: every row, with the real libraries."""

import pytest

pytest.importorskip("peft")
situations = pytest.importorskip("situations")


@pytest.mark.parametrize("title", situations.SITUATIONS)
def test_it_works(title):
    result = situations.outcome(situations.SITUATIONS[title], situations.Ours())
    if result.startswith("not tried"):
        pytest.skip(result)
    assert result == "yes"


def test_what_is_wrong_is_told():
    """A row that cannot be right says so."""

    def untrained(rival):
        situations.learns(
            rival.adapt(situations.llama(), situations.ATTENTION), lambda m: m(situations.ids()).logits.sum() * 0
        )

    def broken(rival):
        raise RuntimeError("a | b " + "c" * 99)

    assert situations.outcome(untrained, situations.Ours()) == "wrong: no gradient"
    assert situations.outcome(broken, situations.Ours()) == "RuntimeError: a / b " + "c" * 54 + "..."
