"""Spoken commands to a household assistant, from a small grammar, which `demo/synthesis` speaks."""

import re
from collections.abc import Iterator
from random import Random

GRAMMAR = """
sentence: {common} and {common} | {common} and {common} | {common} and {common} | {command} and {common}
sentence: {common} and {command} | {common}, and then {common} | {common} and {common} please | {question}, and {common}
sentence: {when}, {common} | {common} {when} | {command} {when} | {remind} | {remind} and {common}
common: turn {on_off} the {light} in the {room} | turn {on_off} the {light} in the {room} | turn {on_off} the {machine}
common: turn {on_off} the {machine} in the {room} | set a timer for {minutes} minutes | {open_close} the {opening}
common: set the {heater} in the {room} to {tens} {unit} degrees | play {music} in the {room}
common: {open_close} the {opening} in the {room}
command: wake me up at {hour} | set an alarm for {hour} | call {name} | call {name} at {hour} | send a message to {name}
command: add {food} and {food} to the list | add {number} {food} to the list | make the {room} {warmer}
command: turn the {machine} in the {room} {up_down} | set the lights in the {room} to {colour}
question: what is the weather {day} | what time is it | is the {opening} in the {room} open | is the {machine} on
question: when is {name} at home
remind: remind me to {chore} {day} | remind me to {chore} at {hour} | remind {name} to {chore} {day}
chore: call {name} | close the {opening} | turn off the {machine} | buy {food} and {food} | water the plants
light: light | lights | lamp
machine: heating | radio | television | oven
heater: heating | oven
on_off: on | off
open_close: open | close
opening: door | window
room: kitchen | kitchen | bedroom | bedroom | bathroom | garden | garage
minutes: {number} | {number} | {tens} | {tens} {unit}
hour: {number} o'clock | half past {number} | {number} thirty
tens: twenty | twenty | thirty | forty
unit: one | two | three | four | five | six | seven | eight | nine
number: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve
colour: red | orange | blue | white
music: some music | some music | the news | the next song | my favourite song
name: david | maria | peter | julia | tom | emily
food: milk | bread | rice | sugar | lemons
up_down: up | down
warmer: warmer | colder
day: today | tomorrow | tonight | on monday | on friday
when: at {hour} | tonight | tomorrow at {hour} | in {number} minutes
"""
"""Rules: a symbol becomes one of its choices, and {symbol} in a choice becomes a choice of that symbol. The past tense
agrees with any subject. Commas are pauses, which transcripts do not have."""


def sentences(seed: int = 0) -> Iterator[str]:
    """Generate English sentences without end and without repetition.

    Args:
        seed: Seed of the sentences.

    Yields:
        A sentence in lower case, with a comma where a speaker would pause.
    """
    lines: dict[str, list[str]] = {}
    for rule in GRAMMAR.strip().splitlines():
        symbol, _, choices = rule.partition(": ")
        lines.setdefault(symbol, []).extend(choices.split(" | "))
    random = Random(seed)
    generated = set()
    while True:
        text = "{sentence}"
        while "{" in text:
            text = re.sub(r"{(\w+)}", lambda symbol: random.choice(lines[symbol[1]]), text)
        text = re.sub(r"\ba (?=[aeiou])", "an ", text)
        text = re.sub(r"(?<=[^aeiou])ys\b", "ies", text)  # stories
        text = re.sub(r"xs\b", "xes", text)
        if text not in generated:
            generated.add(text)
            yield text


def librispeech_transcript(text: str) -> str:
    """Convert a sentence to upper-case words without punctuation, as in LibriSpeech."""
    return " ".join(re.findall(r"[a-z']+", text)).upper()
