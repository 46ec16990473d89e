"""What is common to the tokens of all systems: the one between words, and how those that stand for no text look."""

from collections.abc import Sequence

BOUNDARY = "|"  # between words


def is_mark(token: str) -> bool:
    """Whether a token is written as those that stand for no text, such as <s> and [UNK]."""
    return len(token) > 2 and (token[0], token[-1]) in (("<", ">"), ("[", "]"))


def with_boundary(tokens: Sequence[str], delimiter: str | None) -> list[str]:
    """The tokens as systems call them whose delimiter is always "|".

    Args:
        tokens: Tokens by their own names.
        delimiter: Token between words; none if no token parts words.

    Returns:
        The same tokens, in the same order; unchanged where "|" is one of them already.
    """
    if delimiter is None or BOUNDARY in tokens:
        return list(tokens)
    return [BOUNDARY if token == delimiter else token for token in tokens]
