"""Commands and Python of the documentation's pages."""

import re
import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

LAUNCHERS = ("slurm.sh", "torchrun.sh")
"""Scripts that pass their arguments to `hubert fit`."""
SEPARATORS = ";|&<>\n"


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(block: str) -> Iterator[list[str]]:
    """The arguments of each `hubert` in lines of a shell."""
    if not re.search(r"\bhubert |\.sh ", block):
        return
    lines = re.sub(r"(^|\s)#[^\n]*", "", block.replace("\\\n", " "))
    lexer = shlex.shlex(lines, posix=True, punctuation_chars=SEPARATORS)
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for separates, group in groupby(lexer, key=lambda word: set(word) <= set(SEPARATORS)):
        words = [] if separates else list(group)
        while words and (re.fullmatch(r"\w+=.*", words[0], re.DOTALL) or words[0] in ("do", "uv", "run")):
            words.pop(0)
        script = next((index for index, word in enumerate(words) if word.endswith(LAUNCHERS)), None)
        if script is not None:
            yield ["fit", *words[script + 1 :]]
        elif words[:1] == ["hubert"]:
            yield words[1:]
