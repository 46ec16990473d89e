"""Errors marked in a hypothesis."""

from hubert_lightning.asr.marked_errors import aligned_words, errors_as_html, errors_as_text, errors_page

TEXTS = "WHERE DID SHE BRING THE DRUM", "WHERE SHE BROUGHT THE THIN DRUM"


def test_every_error_has_its_mark() -> None:
    assert "".join(mark or "-" for *_, mark in aligned_words(*TEXTS)) == "-D-S-I-"
    assert errors_as_text(*TEXTS) == "WHERE [-DID-] SHE [-BRING-] {+BROUGHT+} THE {+THIN+} DRUM"


def test_html_strikes_out_what_is_missing_and_stresses_what_is_wrong() -> None:
    html = errors_as_html("A <B>", "A C")
    assert "<del" in html
    assert ">&lt;B&gt;</del>" in html
    assert ">C</ins>" in html
    assert "<B>" not in html


def test_nothing_and_all_right_are_shown_too() -> None:
    assert errors_as_text("ONE TWO", "") == "[-ONE-] [-TWO-]"
    assert errors_as_text("ONE TWO", "ONE TWO") == "ONE TWO"
    assert "<del" not in errors_as_html("ONE", "ONE")


def test_a_page_has_a_row_for_each_utterance() -> None:
    page = errors_page([{"id": "a<b", "WER": 0.5, "reference": "ONE TWO", "hypothesis": "ONE"}])
    assert page.count("<tr>") == 2
    assert "a&lt;b" in page
    assert ">TWO</del>" in page
