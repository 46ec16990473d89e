"""Every script is decoded, timed, aligned and scored as transformers and jiwer do, with any table of tokens.

The truth is known: each model is a random encoder with a head that is solved so that given tokens come out at given
frames of a recording.
"""

import json
import unicodedata
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import pytest
import transformers
from foreign_models import path_of, save_solved_model, vocabulary_and_log_probs
from helpers import Encoder
from lhotse import Recording, SupervisionSegment
from lightning import Trainer

from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch
from hubert_lightning.asr.lexicon import lexicon_of
from hubert_lightning.asr.recognition import words_in
from hubert_lightning.asr.scoring import Result, read_results, score
from hubert_lightning.asr.transcribe import align, transcribe
from hubert_lightning.asr.transcript_formats import FORMATS, SUFFIXES_OF_FORMATS, Transcript, TranscriptFormat
from hubert_lightning.asr.tune_decoder import tune_decoder
from hubert_lightning.asr.word_times import word_times
from hubert_lightning.data.manifest import write_manifest
from hubert_lightning.training.finetuning import CTCFinetuning
from hubert_lightning.training.finetuning_data import TranscribedData

SENTENCES = {
    "latin": "où est l'œuvre déjà señor",
    "turkish": "ısırgan iğne değil ışık",
    "german": "größe straße süß äöü",
    "vietnamese": "người việt ở huế",
    "greek": "ο σοφός λόγος καϊκι",
    "cyrillic": "ёлка чай їжак йод",
    "arabic": "كَتَبَ الوَلَدُ رِسالَةً",
    "hebrew": "שָׁלוֹם עֲלֵיכֶם",
    "persian": "می\u200cخواهم کتاب\u200cها",
    "devanagari": "हिन्दी क़लम ज़रा क्\u200dष",
    "bengali": "হয় বাড়ি গাঢ় নয়",
    "tamil": "தமிழ் கொடு யோகம்",
    "thai": "ภาษาไทย น้ำ",
    "korean": "한국어 값을 읽다",
    "japanese": "がぎぐ パピプ 日本",
    "chinese": "今天天气 很好",
    "french ’": "c’est l’été",
}
SPECIAL = ["<s>", "</s>", "[UNK]", "[PAD]"]


class TrueWord(NamedTuple):
    """A word, its first frame, and the frame after its last one."""

    word: str
    start: int
    end: int


def their_text(folder: Path, path: Sequence[str]) -> str:
    """Text that transformers decodes from a path, in canonical composition."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    [text] = tokenizer.batch_decode([[tokenizer.get_vocab()[token] for token in path]])
    return unicodedata.normalize("NFC", " ".join(text.split()))


def words_on(path: Sequence[str], blank: str, delimiter: str | None) -> list[TrueWord]:
    """Find the words on a path, with their frames."""
    words: list[TrueWord] = []
    frame, word = 0, TrueWord("", 0, 0)
    for token, run in groupby(path):
        start, frame = frame, frame + len(list(run))
        if token == delimiter:
            words += [word] if word.word else []
            word = TrueWord("", 0, 0)
        elif token != blank:
            word = TrueWord(word.word + token, word.start if word.word else start, frame)
    words += [word] if word.word else []
    return [one._replace(word=unicodedata.normalize("NFC", one.word)) for one in words]


def seconds_of(truth: Sequence[TrueWord]) -> list[float]:
    return [0.02 * frame for word in truth for frame in (word.start, word.end)]


def check_formats(truth: Sequence[TrueWord], text: str, written: Callable[[TranscriptFormat], str]) -> None:
    """Check that text, json, srt and ctm have the true words, at their true times."""
    words, seconds = [word.word for word in truth], seconds_of(truth)
    assert written("text") == text + "\n"
    content = json.loads(written("json"))
    assert content["text"] == text
    assert [word["word"] for word in content["words"]] == words
    assert [word[end] for word in content["words"] for end in ("start", "end")] == pytest.approx(seconds)
    assert all(word["confidence"] > 0.95 for word in content["words"])
    rows = [line.split(" ") for line in written("ctm").splitlines()]
    assert [row[4] for row in rows] == words
    assert [time for row in rows for time in (float(row[2]), float(row[2]) + float(row[3]))] == pytest.approx(seconds)
    captions = [block.split("\n") for block in written("srt").strip().split("\n\n")]
    assert [word for caption in captions for line in caption[2:] for word in line.split()] == words
    assert captions[0][1].startswith(f"00:00:0{seconds[0]:.3f}".replace(".", ","))


class Case(NamedTuple):
    """The words and the path of a model, and its table of tokens."""

    words: list[str]  # as the table has them
    table: list[str]
    path: list[str]
    delimiter: str | None

    @property
    def truth(self) -> list[TrueWord]:
        return words_on(self.path, "[PAD]", self.delimiter)


def case_of(script: str, form: Any, delimiter: str | None, size: int) -> Case:
    """A sentence in tokens of `size` characters of a normal form."""
    words = [unicodedata.normalize(form, word) for word in SENTENCES[script].split()]
    if form == "NFC":  # as tables have them, although their NFC has two characters
        words = [word.replace("য়", "\u09df").replace("ড়", "\u09dc").replace("ঢ়", "\u09dd") for word in words]
    pieces = [[word[first : first + size] for first in range(0, len(word), size)] for word in words]
    between = [delimiter] if delimiter else []
    tokens = [token for number, word in enumerate(pieces) for token in [*(between if number else []), *word]]
    return Case(words, [*sorted(set(tokens)), *SPECIAL], path_of(tokens, "[PAD]"), delimiter)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("delimiter", ["|", " ", None])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("script", SENTENCES)
def test_a_script_is_decoded_timed_aligned_and_scored_as_by_transformers_and_jiwer(
    tmp_path: Path, encoder: Encoder, script: str, form: Any, delimiter: str | None, size: int
) -> None:
    case = case_of(script, form, delimiter, size)
    save_solved_model(tmp_path, encoder, case.table, case.path, word_delimiter_token=delimiter)
    text = their_text(tmp_path, case.path)
    assert text == " ".join(one.word for one in case.truth)
    vocabulary, log_probs = vocabulary_and_log_probs(tmp_path, encoder)
    assert [vocabulary.tokens[token] for token in log_probs.argmax(dim=-1)] == case.path
    check_formats(
        case.truth, text, lambda format: FORMATS[format](Transcript("a.wav", 3.0, *words_in(log_probs, vocabulary)))
    )

    other = unicodedata.normalize("NFD" if form == "NFC" else "NFC", text)
    assert vocabulary.normalise(other) == text
    words = word_times(log_probs, vocabulary.normalise(other), vocabulary)
    check_formats(case.truth, text, lambda format: FORMATS[format](Transcript("a.wav", 3.0, text, words)))
    assert vocabulary.encode(text) == [token for token, _ in groupby(log_probs.argmax(dim=-1).tolist()) if token]

    wrong = " ".join([case.words[0] * 2, *case.words[1:]])
    scored = score([Result("a", other, text), Result("b", other, wrong)])
    pairs = [[unicodedata.normalize("NFC", one) for one in texts] for texts in ([other, other], [text, wrong])]
    assert scored.words.rate == pytest.approx(jiwer.wer(*pairs))
    assert scored.letters.rate == pytest.approx(jiwer.cer(*pairs))
    assert scored.utterances[0].letters.errors == 0


@pytest.mark.parametrize(
    ("script", "form", "delimiter", "size"),
    [("bengali", "NFC", "|", 1), ("korean", "NFD", "|", 1), ("vietnamese", "NFD", " ", 2), ("chinese", "NFC", None, 1)],
)
def test_transcribe_and_align_give_the_true_words_and_times(
    tmp_path: Path, encoder: Encoder, script: str, form: Any, delimiter: str | None, size: int
) -> None:
    case = case_of(script, form, delimiter, size)
    save_solved_model(tmp_path / "model", encoder, case.table, case.path, word_delimiter_token=delimiter)
    text = their_text(tmp_path / "model", case.path)

    def written(verb: Any, format: Any, **options: Any) -> str:
        assert not verb(tmp_path / "model", [encoder.recording], format=format, output=tmp_path / "out", **options)
        return (tmp_path / "out" / f"said{SUFFIXES_OF_FORMATS[format]}").read_text("utf-8")

    check_formats(case.truth, text, lambda format: written(transcribe, format))
    other = unicodedata.normalize("NFD", text)
    check_formats(
        case.truth, text, lambda format: text + "\n" if format == "text" else written(align, format, text=other)
    )


@pytest.mark.parametrize(
    ("script", "form", "size"), [("bengali", "NFC", 1), ("greek", "NFD", 2), ("french ’", "NFC", 1)]
)
def test_a_perfect_model_is_tested_without_errors(
    tmp_path: Path, encoder: Encoder, script: str, form: Any, size: int
) -> None:
    case = case_of(script, form, "|", size)
    save_solved_model(tmp_path / "model", encoder, case.table, case.path)
    model = CTCFinetuning(pretrained=tmp_path / "model", keep_head=True)
    cut = Recording.from_file(encoder.recording).to_cut()
    text = unicodedata.normalize("NFD", " ".join(case.words)).replace("’", "'")
    cut.supervisions = [SupervisionSegment("a", cut.recording_id, 0, cut.duration, text=text)]
    write_manifest([cut], tmp_path / "test.jsonl.gz")
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    data = TranscribedData(test=[tmp_path / "test.jsonl.gz"], num_workers=0)
    [errors] = trainer.test(model, data, verbose=False)
    assert errors["test/wer"] == errors["test/cer"] == 0
    assert score(read_results(tmp_path / "test.jsonl")).letters.errors == 0
    row = json.loads((tmp_path / "test.jsonl").read_text("utf-8"))
    assert row["reference"] == row["hypothesis"] == their_text(tmp_path / "model", case.path)


CHINESE = ("今天天气很好", "今天，天气 很好。", "今天天气很好", {"word_delimiter_token": None})
FRENCH = ("qui|?|moi|!|", "qui ? moi !", "qui? moi!", {"clean_up_tokenization_spaces": True})


def save_punctuated(folder: Path, encoder: Encoder, tokens: str, text: str, printed: str, tokenizer: Any) -> list[Path]:
    """A model with given tokens, and a manifest whose transcript has characters that it cannot print."""
    path = path_of(list(tokens), "[PAD]")
    save_solved_model(folder / "model", encoder, [*sorted(set(tokens)), *SPECIAL], path, **tokenizer)
    assert their_text(folder / "model", path) == printed
    cut = Recording.from_file(encoder.recording).to_cut()
    cut.supervisions = [SupervisionSegment("a", cut.recording_id, 0, cut.duration, text=text)]
    write_manifest([cut], folder / "test.jsonl.gz")
    return [folder / "test.jsonl.gz"]


@pytest.mark.parametrize(
    ("tokens", "text", "printed", "tokenizer"),
    [
        CHINESE,
        ("私は学生です", "「私は」学生 です！", "私は学生です", {"word_delimiter_token": None}),
        ("ภาษาไทยดี", "ภาษาไทย ดี", "ภาษาไทยดี", {"word_delimiter_token": None}),
        ("you|and|me", "you, and me", "you_and_me", {"replace_word_delimiter_char": "_"}),
        ("you|and|me", "you, and me", "youandme", {"replace_word_delimiter_char": ""}),
        FRENCH,
        ("ME|AND", "me - and", "me and", {"do_lower_case": True}),
    ],
)
def test_a_perfect_model_has_no_errors_in_a_punctuated_sentence(
    tmp_path: Path, encoder: Encoder, tokens: str, text: str, printed: str, tokenizer: dict[str, Any]
) -> None:
    manifests = save_punctuated(tmp_path, encoder, tokens, text, printed, tokenizer)
    model = CTCFinetuning(pretrained=tmp_path / "model", keep_head=True)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    data = TranscribedData(validation=manifests, test=manifests, num_workers=0)
    for errors in (*trainer.validate(model, data, verbose=False), *trainer.test(model, data, verbose=False)):
        assert {error for name, error in errors.items() if not name.endswith("loss")} == {0.0}
    row = json.loads((tmp_path / "test.jsonl").read_text("utf-8"))
    assert row["reference"] == row["hypothesis"] == printed


@pytest.mark.parametrize(("tokens", "text", "printed", "tokenizer"), [CHINESE, FRENCH])
def test_a_decoder_of_a_perfect_model_has_no_errors_in_a_punctuated_sentence(
    tmp_path: Path,
    encoder: Encoder,
    tokens: str,
    text: str,
    printed: str,
    tokenizer: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifests = save_punctuated(tmp_path, encoder, tokens, text, printed, tokenizer)
    vocabulary, _ = vocabulary_and_log_probs(tmp_path / "model", encoder)
    words, decoder = tmp_path / "words.lexicon", tmp_path / "decoder.json"
    words.write_text(lexicon_of(vocabulary.normalise(text).split(), words, vocabulary, "words")[0])
    tune_decoder(tmp_path / "model", manifests, decoder, lexicon=words, trials=1, beam_size=20)
    printed_text = " ".join(capsys.readouterr().out.split())
    assert "WER 0.00 % with greedy decoding, 0.00 % with the default weights" in printed_text
    assert not transcribe(tmp_path / "model", [encoder.recording], output=tmp_path / "out", decoder=decoder)
    assert (tmp_path / "out" / "said.txt").read_text("utf-8") == printed + "\n"


def test_words_with_spaces_in_the_given_text_are_aligned_separately(tmp_path: Path, encoder: Encoder) -> None:
    case = case_of("chinese", "NFC", None, 1)
    save_solved_model(tmp_path / "model", encoder, case.table, case.path, word_delimiter_token=None)
    given = {"text": "今天，天气 很好", "format": "json", "output": tmp_path / "out"}
    assert not align(tmp_path / "model", [encoder.recording], **given)  # type: ignore[arg-type]
    content = json.loads((tmp_path / "out" / "said.json").read_text("utf-8"))
    assert [word["word"] for word in content["words"]] == ["今天", "天气", "很好"]


@pytest.mark.parametrize("delimiter", ["|", " ", None])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("script", ["vietnamese", "bengali", "chinese"])
def test_a_search_has_the_times_of_its_tokens(
    tmp_path: Path, encoder: Encoder, script: str, delimiter: str | None, size: int
) -> None:
    case = case_of(script, "NFC", delimiter, size)
    save_solved_model(tmp_path, encoder, case.table, case.path, word_delimiter_token=delimiter)
    vocabulary, log_probs = vocabulary_and_log_probs(tmp_path, encoder)
    text = their_text(tmp_path, case.path)
    if delimiter:
        path = tmp_path / "words.lexicon"
        path.write_text(lexicon_of([*text.split(), "ab"], path, vocabulary, "words")[0])
    for lexicon in (None, str(tmp_path / "words.lexicon")) if delimiter else (None,):
        search = BeamSearch(DecoderSettings(lexicon=lexicon, beam_size=20, word_score=0.0, num_workers=0), vocabulary)
        transcript = Transcript("a.wav", 3.0, *words_in(log_probs, vocabulary, search))
        assert transcript.text == text
        check_formats(case.truth, text, lambda format, transcript=transcript: FORMATS[format](transcript))  # type: ignore[misc]
