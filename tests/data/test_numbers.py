"""Numbers in transcripts are spelled out where their reading is certain, told where it is not, and never vanish."""

from pathlib import Path

import pytest
import soundfile
import torch
from num2words import num2words

from hubert_lightning.asr.lexicon import vocabulary
from hubert_lightning.cli import main
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.data.numbers import spell_numbers, words_with_digits_or_symbols
from hubert_lightning.data.prepare import prepare_folder, prepare_librispeech
from hubert_lightning.data.prepare_csv import prepare_csv
from hubert_lightning.frames import SAMPLE_RATE
from hubert_lightning.training.data_checks import check_transcripts
from hubert_lightning.vocabulary import Vocabulary, vocabulary_of


@pytest.mark.parametrize(
    ("language", "written", "said"),
    [
        (
            "en",
            "In 1999 I paid $5 for 21 apples.",
            "In nineteen ninety nine I paid five dollars for twenty one apples.",
        ),
        ("en", "It costs $5.50 or 5 € (10%).", "It costs five dollars and fifty cents or five euros (ten percent)."),
        (
            "en",
            "−5 and -5 degrees, 1,234.50",
            "minus five and minus five degrees, one thousand two hundred and thirty four point five zero",
        ),
        ("en", "the 1st, 2nd and 21st of May", "the first, second and twenty first of May"),
        ("en", "you & me", "you and me"),
        (
            "de",
            "Es sind 1.234,5 und 5%, 2,50 €.",
            "Es sind eintausendzweihundertvierunddreißig Komma fünf und fünf Prozent, zwei Euro und fünfzig Cent.",
        ),
        ("de", "1 € und 1 %, 2024", "ein Euro und ein Prozent, zweitausendvierundzwanzig"),
        (
            "fr",
            "1 234 567 fois, 71 %, le 1er mai",
            "un million deux cent trente-quatre mille cinq cent soixante-sept "
            "fois, soixante et onze pour cent, le premier mai",
        ),
        ("es", "El 5% de 21, 5 €", "El cinco por ciento de veintiuno, cinco euros"),
        ("ru", "5 человек", "пять человек"),
        ("ar", "٤٢", "اثنان و أربعون"),
        (
            "en",
            "1,500 cases in May 2024, 2000 more",
            "one thousand five hundred cases in May twenty twenty four, two thousand more",
        ),
        (
            "en",
            "5, 6 and (7) or 1.5 million, $5 each",
            "five, six and (seven) or one point five million, five dollars each",
        ),
        ("de", "im Jahr 1999, 21 Tage", "im Jahr neunzehnhundertneunundneunzig, einundzwanzig Tage"),
        ("es", "115 personas, 200 €, 5 de mayo", "ciento quince personas, doscientos euros, cinco de mayo"),
        ("fr", "200 personnes et 1,5 million", "deux cents personnes et un virgule cinq million"),
        ("ru", "Да! 5 человек", "Да! пять человек"),
        ("bn", "১২ দিন", "বারো দিন"),
        ("ja", "2020年に３人、5%", "二千二十年に三人、五パーセント"),
        ("th", "มี 5 คน", "มี ห้า คน"),
        ("pt_BR", "5 %", "cinco por cento"),
    ],
)
def test_a_number_is_read_as_its_language_reads_it(language: str, written: str, said: str) -> None:
    spelled = spell_numbers(written, language)
    assert spelled.text == said
    assert not spelled.left
    assert len(spelled.numbers) >= 1


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "B2B 3D MP3 20s 2th"),
        ("en", "555-1234 or 0171 1234567 or +49 30 12"),
        ("en", "at 10:30 on 2020-01-02, 1/2, 3-2, 1.2.3, 10,5"),
        ("en", "no 12345678"),
        ("en", "5' and 6\""),
        ("en", "R&D 5+ 7= §12 5°"),
        ("de", "Am 3. Mai um 10.30 Uhr für 1 Tag"),
        ("es", "1 mujer y 21 mujeres"),
        ("ru", "5% и 1 книга"),
        ("tr", "%5"),
        ("es", "500 personas y 250 casas"),  # quinientas, doscientas cincuenta
        ("es", "200.000 personas y 21.000 mujeres y 1.001 noches"),
        ("pt", "200 casas e 2.000 mulheres e 1.900 casas"),
        ("ca", "300 dones i 22 dones"),
        ("ro", "12 case"),
        ("hu", "2 alma és 12 alma"),
        ("sv", "1 bil och 1 % och 1999"),
        ("sv", "den 5 maj"),
        ("sv", "1 234 bilar"),
        ("ko", "5 명과 20 살"),
        ("he", "5 אנשים"),
        ("ar", "٤٢ كتاب"),
        ("ru", "для 5 человек и 5 февраля и 1990 год"),
        ("ru", "5 февраля"),
        ("ru", "1990 год"),
        ("pl", "5 mężczyzn"),
        ("fi", "ilman 5 taloa"),
        ("is", "3 hús"),
        ("en", "$5 million or €5 bn or 5 € million"),
        ("en", "£2 thousand, US $5 and a $10 ticket"),
        ("de", "5 € Mio. und 5 € Milliarden"),
        ("fr", "5 € millions"),
        ("es", "$5 mil"),
        ("en", "10 000 people"),
        ("en", "2 1/2 and 2 ½"),
        ("en", "555 1234"),
        ("en", "5 - 6 and 5 – 6 and 5 x 6 and 3 : 2"),
        ("en", "it is - 5"),
        ("en", "May 5 and 5 May"),
        ("en", "1234 people, in 1500 cases, 2024 people"),
        ("en", "at 3.30 pm"),
        ("de", "1500 Leute in 1200 Häusern"),
        ("de", "Heute ist der 3."),
        ("de", "am 3 Mai"),
        ("ja", "090 1234 5678 5〜6人 5 - 6"),
        ("th", "081 234 5678"),
        ("vi", "-5"),  # num2words says fifteen
        ("bn", "-5"),  # and here five
    ],
)
def test_numbers_with_several_readings_stay_and_are_reported(language: str, text: str) -> None:
    spelled = spell_numbers(text, language)
    assert spelled.text == text
    assert not spelled.numbers
    assert spelled.left == words_with_digits_or_symbols(text)
    assert spelled.left


@pytest.mark.parametrize("language", ["en", "de", "fr", "it", "nl", "ru", "pl", "fi", "tr", "id", "he"])
def test_integers_have_num2words_words(language: str) -> None:
    for number in (0, 7, 12, 80, 99, 345, 999):
        said = num2words(number, lang=language).replace(",", "")
        assert spell_numbers(f"{number}", language).text == (said.replace("-", " ") if language == "en" else said)


def clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * torch.randn(3 * SAMPLE_RATE).numpy(), SAMPLE_RATE)


def table_of(folder: Path, *sentences: str) -> Path:
    for number in range(len(sentences)):
        clip(folder / f"{number}.wav")
    rows = [f'{number}.wav,"{sentence}"' for number, sentence in enumerate(sentences)]
    (folder / "table.csv").write_text("\n".join(["path,text", *rows]))
    return folder / "table.csv"


def texts_of(manifest: Path) -> list[str]:
    return [cut.supervisions[0].text or "" for cut in read_manifest(manifest)]


def test_prepare_counts_numbers_and_writes_them_as_words_if_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = table_of(tmp_path, "five apples", "5 apples for 2 €", "a B2B deal of 5 people", "plain")
    main(["prepare", "csv", str(table), str(tmp_path / "as-it-is"), "--heldout=0"])
    assert texts_of(tmp_path / "as-it-is" / "train.jsonl.gz")[1] == "5 apples for 2 €"
    told = " ".join(capsys.readouterr().out.split())
    assert "numbers or symbols that are said as words in 2 of 4 transcripts (5 in all, such as 5, 2, €, B2B)" in told
    assert "--spell_numbers LANGUAGE spells numbers out" in told
    main(["prepare", "csv", str(table), str(tmp_path / "spelled"), "--heldout=0", "--spell_numbers=en"])
    assert texts_of(tmp_path / "spelled" / "train.jsonl.gz") == [
        "five apples",
        "five apples for two euros",
        "a B2B deal of five people",
        "plain",
    ]
    told = " ".join(capsys.readouterr().out.split())
    assert "3 spelled out in 2 transcripts, such as 5, 2€; 1 left in 1, such as B2B" in told
    with pytest.raises(ValueError, match="spell_numbers xx: no language that num2words knows; choose one of am, ar"):
        prepare_csv(table, tmp_path / "no", spell_numbers="xx")
    assert not (tmp_path / "no").exists()


def test_numbers_in_the_transcripts_of_a_folder_become_words_too(tmp_path: Path) -> None:
    clip(tmp_path / "audio" / "a.wav")
    (tmp_path / "audio" / "a.txt").write_text("Es sind 12.")
    [manifest] = prepare_folder(tmp_path / "audio", tmp_path / "out", spell_numbers="de", heldout=0)
    assert texts_of(manifest) == ["Es sind zwölf."]


@pytest.mark.parametrize("text", ["...", "—", "👍 🎉", "?!", "  -- ", "€"])
def test_a_transcript_without_words_is_refused_where_it_is_prepared(tmp_path: Path, text: str) -> None:
    reason = f"a.*its transcript, {text.strip()!r}, has no words: write down what is said"

    def check(refused: Path, manifest: Path) -> None:
        assert reason.split("its")[1] in refused.read_text()
        assert len(read_manifest(manifest)) == 1

    folder = tmp_path / "audio"
    for name in ("a", "b"):
        clip(folder / f"{name}.wav")
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text("words")
    [manifest] = prepare_folder(folder, tmp_path / "out", heldout=0)
    check(tmp_path / "out" / "audio.refused.tsv", manifest)
    (folder / "table.csv").write_text(f'path,text\na.wav,"{text}"\nb.wav,words\n')
    [manifest] = prepare_csv(folder / "table.csv", tmp_path / "csv", heldout=0)
    assert len(read_manifest(manifest)) == 1
    chapter = tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2"
    chapter.mkdir(parents=True)
    for number in ("0", "1"):
        clip(chapter / f"1-2-{number}.flac")
    (chapter / "1-2.trans.txt").write_text(f"1-2-0 {text}\n1-2-1 WORDS\n")
    [manifest] = prepare_librispeech(tmp_path / "LibriSpeech", tmp_path / "librispeech")
    check(tmp_path / "librispeech" / "dev-clean.refused.tsv", manifest)


def test_fit_counts_the_characters_without_tokens(tmp_path: Path) -> None:
    [manifest] = prepare_csv(table_of(tmp_path, "ten € more", "5 % & 5 €", "plain words"), tmp_path / "out", heldout=0)
    spelled_with = vocabulary_of(["a plain text of many words", "brief jokes vex quartz gnome"])[0]
    sentence = (
        r"0\.wav: the transcript 'ten € more' has characters that are not .*vocabulary \(and 1 other\), in all '%' 1 "
        r"times, '&' 1 times, '5' 2 times, '€' 2 times; spell them out \(numbers: `hubert prepare`"
    )
    with pytest.raises(ValueError, match=sentence):
        check_transcripts(read_manifest(manifest), spelled_with)


def test_fit_distinguishes_an_empty_transcript_from_a_missing_one(tmp_path: Path) -> None:
    cuts = read_manifest(prepare_csv(table_of(tmp_path, "words", "more"), tmp_path / "out", heldout=0)[0])
    wordless = cuts.map(lambda cut: cut.map_supervisions(lambda segment: segment.with_alignment("word", [])))
    for cut in wordless:
        cut.supervisions[0].text = "..."
    with pytest.raises(
        ValueError, match=r"0\.wav: the transcript '\.\.\.' contains only punctuation or symbols \(and 1 other\); write"
    ):
        check_transcripts(wordless, Vocabulary(punctuation="space"))


def test_hubert_vocabulary_reports_what_fit_will_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [manifest] = prepare_csv(
        table_of(tmp_path, "ten € more", "5 % & 5 €!", "plain, words"), tmp_path / "out", heldout=0
    )
    capsys.readouterr()
    vocabulary([manifest], tmp_path / "v.json")
    told = capsys.readouterr().out
    assert "spaces replace '!' (1), ',' (1)" in told
    assert "'€' (2), '%' (1), '&' (1) are read as words, and are not tokens: `hubert fit` refuses 2" in told
    assert "5 are tokens, in 1 transcript;" in told
    vocabulary([manifest], tmp_path / "v.json", keep_punctuation="'€%&")
    assert "read as words" not in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_transcripts_beside_audio_may_be_utf_16(tmp_path: Path, encoding: str) -> None:
    for name in ("a", "b"):
        clip(tmp_path / "audio" / f"{name}.wav")
    (tmp_path / "audio" / "a.txt").write_bytes("Größe\r\nund mehr".encode(encoding))
    (tmp_path / "audio" / "of.trans.txt").write_bytes("b ein Satz\u2028in zwei Zeilen\r\n".encode(encoding))
    [manifest] = prepare_folder(tmp_path / "audio", tmp_path / "out", heldout=0)
    assert texts_of(manifest) == ["Größe und mehr", "ein Satz in zwei Zeilen"]
