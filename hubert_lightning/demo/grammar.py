"""English sentences of a small grammar, which `demo/synthesis` speaks."""

import re
from collections.abc import Iterator
from random import Random

GRAMMAR = """
sentence: {clause} | {clause} | {clause} {time} | {clause}, {and} {clause} | {clause}, {and} {clause}
sentence: {clause} {because} {clause} | {clause} {because} {clause} | {when} {clause}, {clause} | {time}, {clause}
sentence: {people} {said} that {clause} | {they} {said} {clause}, {and} {clause} | {question} | {question}
sentence: there was {a_thing} {where}, {and} {clause} | it {was} {adjective}, {and} {clause}
sentence: {clause}, which {was} {very} {adjective} | if {clause}, {they} {would} {go} {to}
clause: {people} {did} {things} | {people} {did} {things} | {people} {did} {things} {where} | {they} {did} {things}
clause: {people} {went} {to} | {they} {went} {to} {how} | {people} {how} {went} {to} | {they} {would} {go} {to}
clause: {people} {would} {do} {things} | {they} {would} {do} {things} | {they} {would} {do} {things} {where}
clause: {people} had {ever} {done} {things} | {they} had {ever} been {adjective} | {they} {would} be {adjective}
clause: the {thing} {was} {very} {adjective} | the {thing} {was} {adjective} and {adjective}
clause: the {thing} {lay} {where} | {people} gave {things} to {people} | {they} took {things} from {people}
clause: {people} {felt} {adjective} | the {thing} {was} as {adjective} as the {thing}
clause: the {person}'s {thing} {lay} {where} | nobody {did} {things} | {they} {went} {number} {measures} {to}
clause: {people} {lived} {where} | {people} {lived} {where} {how}
question: why {didnt} {people} {do} {things} | where {didnt} {they} {do} {things} | {didnt} {people} {go} {to}
question: how {didnt} {they} {do} {things} {where} | when {didnt} {people} {go} {to} | who {did} {things} {where}
people: the {person} | {this} {person} | the {adjective} {person} | a {person} | {whose} {person} | the {person}s
people: the {person} and the {person} | {number} {person}s | {some} {adjective} {person}s | the {person}'s {person}
things: the {thing} | {this} {thing} | a {thing} | {whose} {thing} | the {adjective} {thing} | a {adjective} {thing}
things: {number} {thing}s | {some} {thing}s | the {person}'s {thing} | the {thing} of {people} | {whose} {thing}s
a_thing: a {thing} | a {adjective} {thing} | a {thing} and a {thing} | a {adjective} {adjective} {thing}
where: in the {place} | near the {place} | behind the {place} | under the {thing} | beside {people} | on the {place}
where: in {whose} {place} | between the {place} and the {place} | at the end of the {place}
where: in the {adjective} {place}
to: to the {place} | to the {place} | towards the {place} | across the {place} | through the {adjective} {place}
to: past the {place} | away from the {place} | into the {place} | with {people} to the {place} | back to {people}
they: i | you | he | she | we | they | it | she | he | they | everyone
whose: my | your | his | her | our | their | its
this: this | that | another | every | the
some: some | many | all the | most | few | these | those | both | no | several
number: two | three | four | five | six | seven | eight | nine | ten | eleven | twelve | twenty | thirty | a hundred
measures: miles | times | steps | days | weeks | nights
and: and | and | but | and then | so | or | yet
because: because | while | until | before | after | since | though | as | where
when: when | if | once | after | before | although | as soon as | because
said: said | knew | thought | believed | heard | told us | hoped | wrote | agreed | dreamed | was sure | remembered
was: was | was | wasn't | became | seemed | looked | would be | could be | must be
very: very | too | so | rather | quite | almost | never | still | always | not
ever: never | often | always | once | already | just | hardly | only
would: would | could | should | must | might | will | can | didn't | couldn't | wouldn't | won't | can't
didnt: did | didn't | could | would | should | couldn't | must | will
lay: lay | stood | fell | was lost | had been | was hidden | was found | burned | stayed
felt: felt | was | looked | seemed | grew | became | were never | slept until it was
lived: lived | worked | slept | waited | sat | danced | sang | played | rested | laughed | prayed | stopped | talked
how: slowly | quickly | quietly | alone | again | at last | with care | in silence | in haste | together | by chance
how: gladly | without a word | for a long time | once more | as usual
time: in the morning | at night | yesterday | last winter | every day | long ago | after dinner | at noon | one day
time: this evening | in the spring | all summer | on sunday | before dawn | next year | every autumn | that afternoon
go: go | walk | run | ride | travel | hurry | return | climb | sail | fly | march | creep | come | wander | jump
went: went | walked | ran | rode | travelled | hurried | returned | climbed | sailed | flew | marched | crept | came
went: wandered | jumped | turned | moved
do: find | see | take | bring | carry | break | build | buy | sell | lose | leave | keep | watch | follow | open
do: close | choose | draw | drop | hold | hide | love | hate | make | need | pull | push | read | share | show | steal
do: throw | touch | use | want | wash | paint | catch | cut | forget | join | move | shake | give | lift | burn
do: cover
did: found | saw | took | brought | carried | broke | built | bought | sold | lost | left | kept | watched | followed
did: opened | closed | chose | drew | dropped | held | hid | loved | hated | made | needed | pulled | pushed | shared
did: showed | stole | threw | touched | used | wanted | washed | painted | caught | cut | forgot | joined | moved
did: shook
done: found | seen | taken | brought | carried | broken | built | sold | lost | kept | followed | opened | chosen
done: held | drawn | hidden | loved | made | needed | shared | shown | stolen | touched | used | wanted | caught
done: forgotten
person: son | king | queen | friend | girl | boy | mother | father | sister | brother | doctor | teacher | farmer
person: soldier | captain | judge | lawyer | sailor | painter | poet | stranger | neighbour | uncle | cousin | hunter
person: baker | driver | singer | writer | student | merchant | servant | priest | prince | giant | aunt | dog | horse
person: bird | bear | lion | tiger | cat | cow | rabbit | eagle | lady | guest
thing: book | letter | table | chair | window | door | lamp | ring | coat | hat | shoe | cup | plate | bottle | basket
thing: boat | ship | wagon | wheel | rope | sail | net | sword | shield | coin | crown | jewel | key | box | clock
thing: bell | apple | orange | cake | egg | flower | tree | branch | root | seed | stone | cloud | star | song | story
thing: treasure | picture | name | word | question | answer | dream | secret | promise | plan | game | voice | machine
thing: engine | tool | hammer | needle | mirror | candle | pillow | blanket | drum | violin | garden | idea | thought
place: house | garden | street | village | city | river | forest | mountain | valley | island | harbour | bridge
place: church | school | market | kitchen | hall | tower | castle | field | farm | road | shore | beach | lake
place: desert | station | museum | library | square | hospital | cellar | camp | cave | ocean | north | south | east
place: west | world | hill
adjective: old | young | small | large | great | tall | short | long | dark | bright | black | white | red | green
adjective: blue | yellow | cold | warm | heavy | light | quiet | loud | strange | happy | sad | angry | clever
adjective: foolish | brave | poor | rich | kind | cruel | gentle | strong | weak | thin | thick | sharp | soft | hard
adjective: wet | dry | clean | fresh | sweet | bitter | broken | golden | silver | wooden | empty | full | open
adjective: hungry | thirsty | tired | useless | pleasant | ancient | modern | famous | beautiful | ordinary
adjective: dangerous | curious | careful | proud
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
