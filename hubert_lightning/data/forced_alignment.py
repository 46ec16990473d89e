"""Forced alignment of English words and phones by pocketsphinx, in processes of its own.

pocketsphinx holds Python's lock while it searches, so each aligner is a process. Its processes import neither torch nor
lhotse.
"""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from hubert_lightning.interrupts import ignore_interrupts

RATE = 16_000
FRAME = 0.01
"""Seconds from one frame of pocketsphinx to the next."""
BEAMS: Sequence[Mapping[str, float]] = ({}, {"beam": 1e-100, "pbeam": 1e-100, "wbeam": 1e-80})
"""Settings of the search: pocketsphinx's own, and wider ones for the utterances that fail with these."""
LONGEST = 60.0
"""Seconds that are aligned at once; longer audio is cut between words, since memory grows with the square of it."""
SHORTEST_PIECE = 20.0
"""Seconds from one cut of long audio to the next, at least."""
PAUSE = 0.15
"""Seconds of silence at which long audio is cut, if it has some."""
SILENCE_PHONES = ("SIL", "+NSN+")
SPOKEN_NOISE = "+SPN+"
TASKS_PER_PROCESS = 3
"""Utterances that wait for a process, so that none is idle and few are in memory."""

Key = TypeVar("Key")


class Speech(NamedTuple):
    """An utterance to align.

    Attributes:
        samples: 16 kHz mono samples of 16 bits.
        entries: Words as they are in the dictionary.
        phones: Phones of the words that the dictionary lacks, with spaces between them.
    """

    samples: bytes
    entries: Sequence[str]
    phones: Mapping[str, str]


class Aligned(NamedTuple):
    """Words and phones of an utterance, in order and without gaps.

    Attributes:
        words: Start and end in seconds, and index of each word; -1 for silence.
        phones: Start and end in seconds, and symbol of each phone; "sil" for silence, "spn" for spoken noise.
    """

    words: list[tuple[float, float, int]]
    phones: list[tuple[float, float, str]]


class Failure(NamedTuple):
    """The reason why an utterance has no alignment.

    Attributes:
        reason: A sentence without the name of the utterance.
    """

    reason: str


UNALIGNED = Failure(
    "the words do not fit the audio; correct the transcript, or leave the recording out if it is noise or music"
)
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
"""Signals that end a process by its own fault."""


class Aligner:
    """pocketsphinx's English model with its dictionary, in this process."""

    def __init__(self) -> None:
        self._decoders: list[Any] = []

    def __call__(self, speech: Speech) -> Aligned | Failure:
        """Align an utterance."""
        for number in range(len(BEAMS)):
            pieces = self._pieces(number, speech)
            aligned = [self._align(number, piece, speech) for piece in pieces]
            if aligned and all(piece is not None for piece in aligned):
                return _joined([piece for piece in aligned if piece is not None])
        return UNALIGNED

    def _decoder(self, number: int) -> Any:
        """The decoder with the beams of this number, which is loaded when it is first used."""
        from pocketsphinx import Config, Decoder

        while len(self._decoders) <= number:
            beams = BEAMS[len(self._decoders)]
            # bestpath adds an end of one frame, which the second pass then cannot reach (pocketsphinx issue 339)
            config = Config(lm=None, samprate=RATE, bestpath=False, loglevel="FATAL", **beams)
            self._decoders.append(Decoder(config))
        return self._decoders[number]

    def _pieces(self, number: int, speech: Speech) -> list["_Piece"]:
        """Cut long audio between words; nothing if its words cannot be found."""
        num_frames = _num_frames(speech.samples)
        whole = _Piece(0, num_frames, 0, len(speech.entries))
        if num_frames * FRAME <= LONGEST:
            return [whole]
        words = self._words(number, whole, speech)
        if words is None:
            return []
        pieces: list[_Piece] = []
        first_frame, first_word = 0, 0
        for frame, word in _cuts(words):
            pieces.append(_Piece(first_frame, frame, first_word, word))
            first_frame, first_word = frame, word
        return [*pieces, _Piece(first_frame, num_frames, first_word, len(speech.entries))]

    def _words(self, number: int, piece: "_Piece", speech: Speech) -> list[tuple[int, int, int]] | None:
        """First frame, frame behind the last, and index of each word in a piece; -1 for silence, None if they fail."""
        decoder = self._decoder(number)
        entries = speech.entries[piece.first_word : piece.last_word]
        for entry in dict.fromkeys(entries):
            if entry in speech.phones and decoder.lookup_word(entry) is None:
                decoder.add_word(entry, speech.phones[entry], False)
        decoder.set_align_text(" ".join(entries))
        try:
            self._process(decoder, piece, speech)
        except RuntimeError:
            return None
        segments = [(segment.start_frame, segment.end_frame + 1, segment.word) for segment in decoder.seg() or []]
        indexed = list(_indexed(segments, piece.first_word))
        return indexed if sum(index >= 0 for _, _, index in indexed) == len(entries) else None

    def _align(self, number: int, piece: "_Piece", speech: Speech) -> Aligned | None:
        """Align the words of a piece, then the phones of these words."""
        if piece.first_word == piece.last_word:
            times = (piece.first_frame * FRAME, piece.last_frame * FRAME)
            return Aligned([(*times, -1)], [(*times, "sil")])
        if self._words(number, piece, speech) is None:
            return None
        decoder = self._decoder(number)
        offset = piece.first_frame
        segments: list[tuple[int, int, str]] = []
        phones: list[tuple[float, float, str]] = []
        try:
            decoder.set_alignment()
            self._process(decoder, piece, speech)
            for word in decoder.get_alignment() or []:  # pocketsphinx frees a word when it yields the next one
                segments.append((word.start + offset, word.start + word.duration + offset, word.name))
                for phone in word:
                    start = phone.start + offset
                    phones.append((start * FRAME, (start + phone.duration) * FRAME, _symbol(phone.name)))
        except RuntimeError:
            return None
        if not phones:
            return None
        words = [(start * FRAME, end * FRAME, index) for start, end, index in _indexed(segments, piece.first_word)]
        # the last frames of a piece have no window of their own
        end = piece.last_frame * FRAME
        words[-1], phones[-1] = (words[-1][0], end, words[-1][2]), (phones[-1][0], end, phones[-1][2])
        return Aligned(words, phones)

    def _process(self, decoder: Any, piece: "_Piece", speech: Speech) -> None:
        step = 2 * round(FRAME * RATE)
        last = len(speech.samples) if piece.last_word == len(speech.entries) else piece.last_frame * step
        decoder.start_utt()
        decoder.process_raw(speech.samples[piece.first_frame * step : last], full_utt=True)
        decoder.end_utt()


class _Piece(NamedTuple):
    """A part of an utterance: its first frame and word, and those behind its last."""

    first_frame: int
    last_frame: int
    first_word: int
    last_word: int


def _num_frames(samples: bytes) -> int:
    return int(len(samples) / 2 / RATE / FRAME)


def _indexed(segments: Iterable[tuple[int, int, str]], first_word: int) -> Iterator[tuple[int, int, int]]:
    """Number the words among segments; fillers such as <sil> and [NOISE] get -1."""
    index = first_word
    for start, end, name in segments:
        if name.startswith(("<", "[", "++")):
            yield start, end, -1
        else:
            yield start, end, index
            index += 1


def _cuts(words: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """Choose where to cut long audio: a frame, and the word that follows it.

    In each stretch from `SHORTEST_PIECE` to twice that, this is the middle of the first pause; without one, a word's
    start.
    """
    begin, index = 0, 0
    for start, end, word in words:
        since = (end - begin) * FRAME
        if word >= 0:
            if since > 2 * SHORTEST_PIECE and start > begin:
                yield start, word
                begin = start
            index = word + 1
        elif since > SHORTEST_PIECE and (end - start) * FRAME >= PAUSE and end < words[-1][1]:
            yield (start + end) // 2, index
            begin = (start + end) // 2


def _symbol(phone: str) -> str:
    return "sil" if phone in SILENCE_PHONES else "spn" if phone == SPOKEN_NOISE else phone


def _joined(pieces: Sequence[Aligned]) -> Aligned:
    """Join pieces, and merge neighbouring silences."""
    words: list[tuple[float, float, int]] = []
    phones: list[tuple[float, float, str]] = []
    for piece in pieces:
        for start, end, index in piece.words:
            if index < 0 and words and words[-1][2] < 0:
                words[-1] = (words[-1][0], end, -1)
            else:
                words.append((start, end, index))
        for start, end, symbol in piece.phones:
            if symbol == "sil" and phones and phones[-1][2] == "sil":
                phones[-1] = (phones[-1][0], end, symbol)
            else:
                phones.append((start, end, symbol))
    return Aligned(words, phones)


def align_each(speeches: Iterable[tuple[Key, Speech]], num_processes: int) -> Iterator[tuple[Key, Aligned | Failure]]:
    """Align utterances in several processes.

    Args:
        speeches: Utterances with the keys that their results get. Few of them are in memory at once.
        num_processes: Number of processes.

    Yields:
        Key and alignment of each utterance, or the reason why it has none, in their order. An utterance on which
        pocketsphinx crashes does not end the others.
    """
    items = iter(speeches)
    waiting: deque[tuple[Key, Speech]] = deque()
    while True:
        waiting.extend(islice(items, num_processes * TASKS_PER_PROCESS - len(waiting)))
        if not waiting:
            return
        yield from _until_crash(waiting, items, num_processes)
        if waiting:  # one of these ended its process; each of them gets a process of its own
            for key, speech in waiting:
                yield key, _alone(speech)
            waiting.clear()


def _until_crash(
    waiting: deque[tuple[Key, Speech]], items: Iterator[tuple[Key, Speech]], num_processes: int
) -> Iterator[tuple[Key, Aligned | Failure]]:
    """Align utterances until a process crashes; those without a result stay in `waiting`."""
    with _pool(num_processes) as pool:
        futures: deque[Future[Aligned | Failure]] = deque(pool.submit(_align_in_process, item[1]) for item in waiting)
        while futures:
            try:
                result = futures.popleft().result()
            except BrokenProcessPool:
                return
            key, _ = waiting.popleft()
            for item in islice(items, 1):
                waiting.append(item)
                try:
                    futures.append(pool.submit(_align_in_process, item[1]))
                except BrokenProcessPool:
                    yield key, result
                    return
            yield key, result


def _alone(speech: Speech) -> Aligned | Failure:
    """Align an utterance in a process whose end is known."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_alignment, args=(sender, speech), daemon=True)
    process.start()
    sender.close()
    try:
        result: Aligned | Failure | Exception = receiver.recv()
    except (EOFError, OSError):  # OSError: it ended while it sent
        process.join()
        return _ended(process.exitcode or 0)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        receiver.close()
    if isinstance(result, Exception):
        raise result
    return result


def _send_alignment(sender: Connection, speech: Speech) -> None:
    ignore_interrupts()
    try:
        sender.send(Aligner()(speech))
    except Exception as error:  # of our own, which ends the command
        sender.send(error)


def _ended(status: int) -> Failure:
    """Reason why a process ended before it had a result.

    Args:
        status: Exit status, or minus the number of a signal.
    """
    if status == -signal.SIGKILL:
        return Failure(
            "the process that aligned it was killed, as the system does when memory runs out; give the command more "
            "memory, or cut the recording into shorter ones"
        )
    name = signal.Signals(-status).name if status < 0 else f"status {status}"
    if status < 0 and -status not in CRASHES:
        return Failure(f"the process that aligned it was ended by {name}; start the command again")
    return Failure(f"pocketsphinx crashed on it ({name}); cut the recording into shorter ones, or leave it out")


def _pool(num_processes: int) -> ProcessPoolExecutor:
    # spawn: a forked process would have the memory of this one, and locks of its threads
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=_start)


_aligner: Aligner


def _start() -> None:
    global _aligner
    ignore_interrupts()
    _aligner = Aligner()


def _align_in_process(speech: Speech) -> Aligned | Failure:
    return _aligner(speech)
