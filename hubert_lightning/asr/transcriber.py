"""Transcripts of recordings in Python. In a notebook:

transcriber = Transcriber.from_pretrained("checkpoints/own/best.ckpt")
transcript = transcriber("a.m4a")
transcript.text, transcript.words, transcript.to_srt()
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, overload

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor

from hubert_lightning.asr.ctc_model import CTCModel, load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, search_with
from hubert_lightning.asr.hot_words import DEFAULT_WEIGHT, HotWord, read_hot_words
from hubert_lightning.asr.live import LiveWords
from hubert_lightning.asr.pauses import allow_skipped_boundaries
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.asr.speakers import SpeakerTurn, turns_by_id, with_speakers
from hubert_lightning.asr.transcript_formats import Transcript
from hubert_lightning.asr.word_times import word_times
from hubert_lightning.data.audio import mono_samples
from hubert_lightning.data.examine import cut_in_memory, examine
from hubert_lightning.data.refusals import RefusedFile
from hubert_lightning.errors import UserError
from hubert_lightning.features.recordings import autocast, find_recordings, of_cuts
from hubert_lightning.hub import HubModel, ModelParts
from hubert_lightning.model.devices import find_device

Audio = Path | str | np.ndarray | Tensor
"""A file, or a waveform: (samples,) or (channels, samples), floats from -1 to 1."""
Audios = list[Audio] | list[Path] | list[str] | list[np.ndarray] | list[Tensor] | tuple[Audio, ...]
Precision = Literal["float32", "bfloat16"]
MAX_LOG_PROBS = 5_000_000
"""Log-probabilities of short files that are in memory together: an hour of 28 tokens."""


class Transcriber(HubModel):
    """A function from audio to transcripts.

    It prints nothing, and changes no setting of torch, no logger and no number of threads.

    Args:
        model: Fine-tuned model, on the device that computes.
        search: Beam search; greedy decoding if not given.
        precision: Numeric precision of the encoder.
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
        num_workers: Number of processes that read audio, besides this one.
    """

    def __init__(
        self,
        model: CTCModel,
        search: BeamSearch | None = None,
        precision: Precision = "float32",
        batch_duration: float | None = None,
        num_workers: int = 0,
    ) -> None:
        self.model, self.search, self.vocabulary = model, search, model.vocabulary
        self._batch_duration, self._num_workers = batch_duration, num_workers
        self._precision = autocast(model.head.weight.device, precision)

    @classmethod
    def from_pretrained(
        cls,
        model: Path | str,
        decoder: Path | str | DecoderSettings | None = None,
        device: torch.device | str = "auto",
        precision: Precision = "float32",
        batch_duration: float | None = None,
        num_workers: int = 0,
        hot_words: Path | str | Sequence[str] | None = None,
        hot_words_weight: float = DEFAULT_WEIGHT,
        on_refused_word: Callable[[str], None] | None = None,
    ) -> Self:
        """Load a fine-tuned model.

        Args:
            model: Fine-tuned checkpoint, or a transformers directory or Hub name of a HubertForCTC with its tokenizer.
            decoder: Settings of a beam search, or their file, of `hubert tune-decoder`; greedy decoding if not given.
            device: Device that computes: "cpu", "cuda", …; "auto" for the GPU if there is one.
            precision: Numeric precision of the encoder.
            batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
            num_workers: Number of processes that read audio, besides this one.
            hot_words: Names and terms that the beam search prefers and adds to its lexicon: a list of words or phrases,
                or a file as of `hubert transcribe --hot_words`.
            hot_words_weight: Score that is added for each time that a hot word occurs, in natural logarithms.
            on_refused_word: Function of a sentence on each hot word that is left out since it has characters that are
                no tokens; if not given, the first one raises `UserError`.

        Raises:
            UserError: A file cannot be opened, or holds no fine-tuned model or no settings; or hot words cannot be
                used, or lack a beam search.
        """
        if hot_words is not None and decoder is None:
            raise UserError(
                "hot words need a beam search: greedy decoding takes the best letter of every frame, whatever word "
                "they make; give the settings of a decoder, a file of `hubert tune-decoder`"
            )
        loaded = load_ctc(model)
        search = None
        if decoder is not None:
            words: list[HotWord] = []
            if hot_words is not None:
                words, refused = read_hot_words(hot_words, loaded.vocabulary, hot_words_weight)
                for sentence in refused:
                    if on_refused_word is None:
                        raise UserError(sentence)
                    on_refused_word(sentence)
            search = search_with(decoder, loaded.vocabulary, hot_words=words, clock=loaded.clock)
        return cls(loaded.to(find_device(device)), search, precision, batch_duration, num_workers)

    def model_parts(self) -> ModelParts:
        """Return what the folder of the model holds: encoder, head and tokens, without the beam search."""
        return ModelParts(self.model.encoder, self.model.head, self.vocabulary)

    @overload
    def __call__(
        self,
        audio: Audio,
        sample_rate: int | None = None,
        *,
        speakers: Path | str | Sequence[SpeakerTurn] | None = None,
        progress: bool = False,
    ) -> Transcript: ...

    @overload
    def __call__(
        self,
        audio: Audios,
        sample_rate: int | None = None,
        *,
        speakers: Path | str | Sequence[SpeakerTurn] | None = None,
        progress: bool = False,
    ) -> list[Transcript]: ...

    def __call__(
        self,
        audio: Audio | Audios,
        sample_rate: int | None = None,
        *,
        speakers: Path | str | Sequence[SpeakerTurn] | None = None,
        progress: bool = False,
    ) -> Transcript | list[Transcript]:
        """Transcribe one recording, or a list of them.

        Args:
            audio: File of any format, rate, number of channels and length; or a waveform: (samples,) or
                (channels, samples), floats from -1 to 1; or a list of files and waveforms.
            sample_rate: Samples per second of the waveforms.
            speakers: RTTM file with the speakers' turns of the files, or the turns of the only recording.
            progress: Whether progress is shown on standard error.

        Returns:
            The transcript; for a list, the transcripts in its order.

        Raises:
            UserError: A recording cannot be used, which is found before any is transcribed (`each` transcribes the
                others), or the speakers are those of other recordings.
        """
        recordings = _as_list(audio)
        transcripts = self._transcripts(recordings, sample_rate, speakers, progress)
        return transcripts if isinstance(audio, (list, tuple)) else transcripts[0]

    def each(
        self,
        files: Sequence[Path | str],
        *,
        speakers: Path | str | Sequence[SpeakerTurn] | None = None,
        progress: bool = False,
        on_remark: Callable[[str, str], None] | None = None,
        timed: bool = True,
    ) -> Iterator[Transcript | RefusedFile]:
        """Transcribe files and folders; a recording that cannot be used does not stop the others.

        Args:
            files: Files of audio, and folders of them.
            speakers: RTTM file with the speakers' turns of the recordings, or the turns of the only recording.
            progress: Whether progress is shown on standard error.
            on_remark: Function of a path and a remark on its audio or its speakers, called before the transcript is
                given.
            timed: Whether the words with their times are needed; without them, a beam search takes less time.

        Yields:
            Transcript of a recording, or its path and the reason why there is none, in the order in which they are
            ready.

        Raises:
            UserError: The speakers are those of other recordings.
        """
        recordings = find_recordings(files)
        yield from recordings.refused
        turns = turns_by_id(speakers, {str(path): path for path in recordings.paths})

        def remark(name: str, sentence: str) -> None:
            if on_remark is not None:
                on_remark(name, sentence)

        def transcript_of(cut: Cut, log_probs: Tensor) -> Transcript:
            text, words = words_in(
                log_probs, self.vocabulary, self.search, timed or turns is not None, self.model.clock
            )
            transcript = Transcript(cut.id, cut.duration, text, tuple(words))
            if turns is None:
                return transcript
            if not turns.get(cut.id):
                remark(cut.id, "no speakers: the file of the speakers has no turns of it")
            return with_speakers(transcript, turns.get(cut.id, ()))

        yield from self.of_files(recordings.paths, transcript_of, progress, remark)

    def of_files(
        self,
        paths: Sequence[Path],
        transcript_of: Callable[[Cut, Tensor], Transcript],
        progress: bool = False,
        on_remark: Callable[[str, str], None] | None = None,
    ) -> Iterator[Transcript | RefusedFile]:
        """Decode files to their ends, and encode those that can be used.

        Args:
            paths: Files of audio.
            transcript_of: Function from a recording and its log-probabilities (frames, tokens) to its transcript.
            progress: Whether progress is shown on standard error.
            on_remark: Function of a path and a remark on its audio, called before the first file is encoded.

        Yields:
            Transcript of a file, with the remarks on it, or the reason why there is none.
        """
        cuts, refused, sounds = examine(paths, progress)
        for cut in cuts:
            for sentence in sounds[cut.id].remarks:
                if on_remark is not None:
                    on_remark(cut.id, sentence)
        for result in self.of_cuts(cuts, transcript_of, progress):
            yield replace(result, remarks=sounds[result.file].remarks) if isinstance(result, Transcript) else result
        yield from refused

    def of_cuts(
        self, cuts: Sequence[Cut], transcript_of: Callable[[Cut, Tensor], Transcript], progress: bool = False
    ) -> Iterator[Transcript | RefusedFile]:
        """Encode recordings that have been examined.

        Args:
            cuts: Recordings.
            transcript_of: Function from a recording and its log-probabilities (frames, tokens) to its transcript.
            progress: Whether progress is shown on standard error.

        Yields:
            Transcript of a recording, or the reason why there is none, in the order in which they are ready.
        """
        encode = partial(
            log_probabilities,
            self.model,
            batch_duration=self._batch_duration,
            progress="encoding" if progress else None,
            num_workers=self._num_workers,
            precision=self._precision,
        )
        return of_cuts(cuts, encode, transcript_of, MAX_LOG_PROBS // len(self.vocabulary))

    @overload
    def align(
        self, audio: Audio, text: str, sample_rate: int | None = None, *, progress: bool = False
    ) -> Transcript: ...

    @overload
    def align(
        self,
        audio: Audios,
        text: Sequence[str],
        sample_rate: int | None = None,
        *,
        progress: bool = False,
    ) -> list[Transcript]: ...

    def align(
        self,
        audio: Audio | Audios,
        text: str | Sequence[str],
        sample_rate: int | None = None,
        *,
        progress: bool = False,
    ) -> Transcript | list[Transcript]:
        """Find the time of each word of a known text.

        Args:
            audio: Recording, or a list of them, as of a call.
            text: Text of the recording, or a list of texts.
            sample_rate: Samples per second of the waveforms.
            progress: Whether progress is shown on standard error.

        Returns:
            The text, normalised as the model's transcripts, with its words; for a list, in its order.

        Raises:
            UserError: A recording cannot be used, or a text has no words, characters that are no token, or more of them
                than its recording has frames.
        """
        recordings = _as_list(audio)
        texts = [text] if isinstance(text, str) else list(text)
        if len(texts) != len(recordings):
            raise UserError(f"{len(recordings)} recordings and {len(texts)} texts; give a text for each")
        transcripts = [
            self._of_audio([recording], sample_rate, partial(self.aligned, text=words), progress)[0]
            for recording, words in zip(recordings, texts, strict=True)
        ]
        return transcripts if isinstance(audio, (list, tuple)) else transcripts[0]

    def aligned(self, cut: Cut, log_probs: Tensor, text: str) -> Transcript:
        """Find the time of each word of a text in log-probabilities.

        Args:
            cut: Recording.
            log_probs: (frames, tokens), float32.
            text: Text of the recording.

        Raises:
            UserError: The text has no words, characters that are no token, or more of them than there are frames.
        """
        vocabulary = replace(self.vocabulary, punctuation="space")  # punctuation has no sound
        words = vocabulary.normalise(text)
        if not words:
            raise UserError("no words in its text; write them in letters")
        if unknown := vocabulary.unknown_characters(words):
            raise UserError(f"its text has {sorted(unknown)}, which are not tokens of the model: write them in letters")
        allowed = allow_skipped_boundaries(log_probs, vocabulary)
        times = word_times(allowed, words, vocabulary, clock=self.model.clock)
        return Transcript(cut.id, cut.duration, words, tuple(times))

    def live(self, step: float = 1.0, lookahead: float = 1.0, history: float = 5.0) -> LiveWords:
        """Start to transcribe live audio: words by greedy decoding, each as soon as it is stable.

        A call with the whole recording gives its final transcript, in which words may differ: there, the encoder sees
        more audio around each word, and a beam search may decode it.

        Args:
            step: Seconds from one output of words to the next; each argument is rounded to frames.
            lookahead: Seconds after a frame that the encoder sees before its letters are decided.
            history: Seconds before a step that the encoder sees.

        Raises:
            UserError: A duration is out of range.
        """
        return LiveWords(self.model, self._precision, step, lookahead, history)

    def close(self) -> None:
        """End the processes of the beam search; `with` does it at the end of its block."""
        if self.search is not None:
            self.search.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _transcripts(
        self,
        recordings: Sequence[Audio],
        sample_rate: int | None,
        speakers: Path | str | Sequence[SpeakerTurn] | None,
        progress: bool,
    ) -> list[Transcript]:
        paths = dict(zip(_names(recordings), map(_path, recordings), strict=True))
        turns = turns_by_id(speakers, paths)

        def transcript_of(cut: Cut, log_probs: Tensor) -> Transcript:
            text, words = words_in(log_probs, self.vocabulary, self.search, clock=self.model.clock)
            transcript = Transcript(cut.id, cut.duration, text, tuple(words))
            return transcript if turns is None else with_speakers(transcript, turns.get(cut.id, ()))

        return self._of_audio(recordings, sample_rate, transcript_of, progress)

    def _of_audio(
        self,
        recordings: Sequence[Audio],
        sample_rate: int | None,
        transcript_of: Callable[[Cut, Tensor], Transcript],
        progress: bool,
    ) -> list[Transcript]:
        """Encode files and waveforms; raises `UserError` for the first that cannot be used."""
        names = _names(recordings)
        in_memory = [
            cut_in_memory(name, _samples(audio, sample_rate))
            for name, audio in zip(names, recordings, strict=True)
            if isinstance(audio, (np.ndarray, Tensor))
        ]
        paths = sorted({path for path in map(_path, recordings) if path is not None})
        cuts, refused, sounds = examine(paths, progress) if paths else ([], [], {})
        if refused:
            raise UserError(f"{refused[0].path}: {refused[0].reason}")
        results: dict[str, Transcript] = {}
        for result in self.of_cuts([*in_memory, *cuts], transcript_of, progress):
            if isinstance(result, RefusedFile):
                raise UserError(f"{result.path}: {result.reason}")
            sound = sounds.get(result.file)
            remarks = sound.remarks if sound else ()
            results[result.file] = replace(result, file=result.file if sound else "", remarks=remarks)
        return [results[name] for name in names]


def _as_list(audio: Audio | Audios) -> list[Audio]:
    return list(audio) if isinstance(audio, (list, tuple)) else [audio]


def _names(recordings: Sequence[Audio]) -> list[str]:
    """Ids of the cuts of recordings: of a file its path, as pathlib writes it; of a waveform its place in the list."""
    paths = {str(Path(str(audio))) for audio in recordings if not isinstance(audio, (np.ndarray, Tensor))}
    names = []
    for index, audio in enumerate(recordings):
        if isinstance(audio, (np.ndarray, Tensor)):
            name = f"waveform {index}"
            while name in paths:  # a file may be called so
                name += " of the list"
        else:
            name = str(Path(str(audio)))
        names.append(name)
    return names


def _path(audio: Audio) -> Path | None:
    if isinstance(audio, (np.ndarray, Tensor)):
        return None
    if not isinstance(audio, (str, Path)):
        raise UserError(f"a recording is a {type(audio).__name__}; give a path, or a waveform of numpy or torch")
    path = Path(audio)
    if path.is_dir():
        raise UserError(f"{path}: a folder; give its files, or transcribe it with `each`")
    return path


def _samples(waveform: np.ndarray | Tensor, sample_rate: int | None) -> Tensor:
    if sample_rate is None:
        raise UserError("a waveform without its sample_rate; give the samples per second")
    return mono_samples(waveform, sample_rate)
