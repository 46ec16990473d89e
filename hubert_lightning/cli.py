"""The command `hubert`: LightningCLI's fit, validate, test and predict, and the verbs around them.

Heavy packages are imported by the verb that needs them, so that help and mistakes answer at once.
"""

import errno
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import CLI, ArgumentParser, set_loader

from hubert_lightning import console
from hubert_lightning.console import prints, show_messages
from hubert_lightning.errors import user_error
from hubert_lightning.files import ACCESS_ERRNOS, WRITE_ERRNOS
from hubert_lightning.interrupts import listening
from hubert_lightning.untrusted.yaml_file import check_configs, load_value

USAGE = """usage: hubert VERB ...

HuBERT: pre-train speech encoders on untranscribed audio, re-cluster, fine-tune with CTC.

  demo          see the whole job on synthetic speech, on any machine
  prepare       make manifests: prepare librispeech | librilight | folder | csv | shar | alignments
  vocabulary    the letters of transcripts, in any language, for a model to spell with
  fit           pre-train or fine-tune:  hubert fit --config configs/pretrain/base.yaml
  validate      losses, accuracies or error rates on the validation manifests
  test          word and character error rate on the test manifests, hypotheses to test.jsonl
  predict       transcribe the test manifests, hypotheses to predict.jsonl
  score         error rates of test.jsonl with confidence intervals, by speaker; the worst utterances; two systems
  average       one checkpoint whose weights are the mean of several
  ngram         a language model, and a lexicon, of your own text
  lexicon       the letters of every word of a list or a language model, for a beam search
  tune-decoder  the weights of a beam search, on transcribed utterances
  transcribe    recordings of any format and length, as text, JSON, subtitles or CTM
  align         when each word of a known text was said
  units         of recordings of any format and length, or of a microphone, as JSON lines, Kaldi or npz
  labels        of frames, checked, or as text: labels check | export | import (.km, Kaldi, JSON lines)
  kmeans        of files: kmeans fit | import | export (scikit-learn, fairseq's .bin, .npy)
  quality       PNMI and purities of every layer's clusters; which layer to cluster next
  import        a checkpoint of ours from one of fairseq, transformers, torchaudio or s3prl, heads and all
  export        a model for transformers, torchaudio, fairseq and s3prl, or ONNX

Each has its own help: hubert fit --help
"""


KEPT = {
    "fit": "what was finished before is kept; the same command resumes",
    "demo": "what was finished before is kept; the same command resumes",
    "test": "its results are not written; the same command starts it again",
    "predict": "its results are not written; the same command starts it again",
    "validate": "nothing is changed; the same command starts it again",
}
"""What remains when a signal ends the verb."""

OF_RANKS = ("fit", "validate", "test", "predict")
"""Verbs whose processes are ranks of one run, where a launcher starts several."""

PATIENCE = 3
"""Seconds that ranks other than the first wait before they print why they end."""

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}
"""Characters that a terminal obeys, but for line feeds, and what is printed for them."""


OUTSIDE = (*ACCESS_ERRNOS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP)
"""Errors of files that no mistake of this package causes: permissions, a folder for a file, a failing disk."""


set_loader("yaml", load_value, (yaml.YAMLError,))


class VerbParser(ArgumentParser):
    """Parses what is typed and configs alone, and reads no other file that an argument names.

    Refuses in one sentence, without the usage; one thing where several are wanted is to be put in brackets.
    """

    def add_function_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        return super().add_function_arguments(*args, **kwargs | {"sub_configs": False})

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        check_configs(list(args or []))
        return super().parse_args(args, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse only tries whether the input parses
            super().error(message, ex)
        listed = re.search(r'Parser key "(?P<key>[^"]+)"', message)
        if listed and ("codec can't decode" in message or "Expected a <class 'list'>" in message):
            _refuse(f"{listed['key']}: a list is wanted, in brackets: '[{listed['key']}]'")
        verb = self.prog.replace(" [options]", "")
        if unknown := re.match(r"unrecognized arguments: -*(?P<option>[^\s=]+)", message):
            _refuse(f"there is no option {unknown['option']}; `{verb} --help` lists what there is")
        if missing := re.match(r"the following arguments are required: (?P<names>.+)", message):
            names = missing["names"].split(", ")
            if len({name.rpartition(".")[0] for name in names}) == 1 and "." in names[0]:  # those of a verb of a verb
                verb = f"{verb} {names[0].rpartition('.')[0]}"
                names = [name.rpartition(".")[2] for name in names]
            _refuse(f"{', '.join(names)} missing; `{verb} --help` says what to give")
        _refuse(f"{' '.join(message.split()).rstrip('.')}; `{verb} --help` lists what there is")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command line; with `args` as if they had been typed after `hubert`.

    Raises:
        SystemExit: Help was asked for (0), some of several files failed (1), or the user gave something that cannot be
            used (2).
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        _refuse(f"{verb!r} is no verb of hubert; it is one of {', '.join(VERBS)}")
    show_messages(of_ranks=verb in OF_RANKS)
    try:
        with _signals_of(verb):
            VERBS[verb](rest)
    except KeyboardInterrupt:
        print("hubert: interrupted; what was written is whole, and the same command does the rest", file=sys.stderr)
        raise SystemExit(130) from None
    except ValueError as error:
        mistake = user_error(error)
        if mistake is None:
            raise
        _refuse(str(mistake))
    except RuntimeError as error:
        sentence = _of_other_processes(error)
        if sentence is None:
            raise
        print(f"hubert: {sentence}", file=sys.stderr)
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno in WRITE_ERRNOS:
            _refuse(
                f"{error.filename or 'a file'}: cannot be written ({error.strerror}); what was finished before is "
                "kept, so make room and run the same command again"
            )
        if error.errno not in OUTSIDE or error.filename is None:
            raise
        _refuse(
            f"{error.filename}: cannot be read or written ({error.strerror}); what was finished before is kept, so "
            "correct that and run the same command again"
        )
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        _refuse(f"W&B: {error}; or set WANDB_MODE=offline, or choose another trainer.logger")


def _signals_of(verb: str) -> AbstractContextManager[None]:
    """Verbs that train or judge a model end on SIGTERM as on Ctrl-C; others get the `KeyboardInterrupt` of Ctrl-C."""
    if verb not in KEPT:
        return listening([signal.SIGINT])
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    return listening(numbers, lambda name: f"{name} while {console.now.what}: {KEPT[verb]}")


def _refuse(sentence: str) -> NoReturn:
    if not prints():
        time.sleep(PATIENCE)  # if the first rank has failed alike, its launcher ends this process before it repeats it
    # a name in a file may hold what a terminal obeys
    print(f"hubert: {sentence.translate(CONTROLS)}", file=sys.stderr)
    raise SystemExit(2)


def _of_other_processes(error: RuntimeError) -> str | None:
    """The sentence of an error that the end of another process caused: a loader worker, or another rank."""
    workers, stalls = (
        sys.modules.get(f"hubert_lightning.{name}") for name in ("data.workers", "training.callbacks.stalls")
    )
    return (workers and workers.killed_worker(error)) or (stalls and stalls.ended_rank(error)) or None


def _lightning(verb: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        from hubert_lightning.training.experiment import HubertCLI

        HubertCLI(args=[verb, *args])

    return run


def _prepare(args: list[str]) -> None:
    from hubert_lightning.data import alignments, prepare, prepare_csv, shar

    CLI(
        {
            "librispeech": prepare.prepare_librispeech,
            "librilight": prepare.prepare_librilight,
            "folder": prepare.prepare_folder,
            "csv": prepare_csv.prepare_csv,
            "alignments": alignments.prepare_alignments,
            "shar": shar.prepare_shar,
        },
        args=args,
        prog="hubert prepare",
        parser_class=VerbParser,
    )


def _labels(args: list[str]) -> None:
    from hubert_lightning.units import label_text

    CLI(
        {
            "check": label_text.check_labels,
            "export": label_text.export_labels,
            "import": label_text.import_labels,
        },
        args=args,
        prog="hubert labels",
        parser_class=VerbParser,
    )


def _kmeans(args: list[str]) -> None:
    from hubert_lightning.units import kmeans_commands

    CLI(
        {
            "fit": kmeans_commands.fit_kmeans,
            "import": kmeans_commands.import_kmeans,
            "export": kmeans_commands.export_kmeans,
        },
        args=args,
        prog="hubert kmeans",
        parser_class=VerbParser,
    )


def _quality(args: list[str]) -> None:
    from hubert_lightning.units.layer_quality import quality

    CLI(quality, args=args, prog="hubert quality", parser_class=VerbParser)


def _spelling(verb: str) -> Callable[[list[str]], None]:
    def run(args: list[str]) -> None:
        from hubert_lightning.asr import lexicon

        CLI(getattr(lexicon, verb), args=args, prog=f"hubert {verb}", parser_class=VerbParser)

    return run


def _ngram(args: list[str]) -> None:
    from hubert_lightning.asr.ngram import ngram

    CLI(ngram, args=args, prog="hubert ngram", parser_class=VerbParser)


def _tune_decoder(args: list[str]) -> None:
    from hubert_lightning.asr.tune_decoder import tune_decoder

    CLI(tune_decoder, args=args, prog="hubert tune-decoder", parser_class=VerbParser)


def _of_files(
    verb: str, module: str, model: str, files: str = "audio files, or folders of them", **flags: str
) -> Callable[[list[str]], None]:
    """A verb that takes a model and any number of files, and says how many of them failed."""

    def run(args: list[str]) -> None:
        function = getattr(importlib.import_module(f"hubert_lightning.{module}"), verb)
        parser = VerbParser(prog=f"hubert {verb}", description=function.__doc__.split("\n")[0])
        parser.add_argument("model", type=Path, help=model)
        parser.add_argument("files", type=Path, nargs="+", help=files)
        for name, help in flags.items():
            parser.add_argument(f"--{name}", action="store_true", help=help)
        parser.add_function_arguments(function, skip={"model", "files", *flags})
        given = parser.parse_args(args).as_dict()
        try:
            failed = function(**given)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        if failed:
            raise SystemExit(1)

    return run


def _import(args: list[str]) -> None:
    from hubert_lightning.interchange.import_export import import_model

    CLI(import_model, args=args, prog="hubert import", parser_class=VerbParser)


def _export(args: list[str]) -> None:
    from hubert_lightning.interchange.import_export import export_model

    CLI(export_model, args=args, prog="hubert export", parser_class=VerbParser)


def _score(args: list[str]) -> None:
    from hubert_lightning.asr.score_report import score_file

    CLI(score_file, args=args, prog="hubert score", parser_class=VerbParser)


def _average(args: list[str]) -> None:
    from hubert_lightning.training.averaging import average

    CLI(average, args=args, prog="hubert average", parser_class=VerbParser)


def _demo(args: list[str]) -> None:
    from hubert_lightning.demo.demo import demo

    CLI(demo, args=args, prog="hubert demo", as_positional=False, parser_class=VerbParser)


FINE_TUNED = "a fine-tuned checkpoint, or a transformers directory"
VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "prepare": _prepare,
    "vocabulary": _spelling("vocabulary"),
    **{verb: _lightning(verb) for verb in ("fit", "validate", "test", "predict")},
    "score": _score,
    "average": _average,
    "ngram": _ngram,
    "lexicon": _spelling("lexicon"),
    "tune-decoder": _tune_decoder,
    "transcribe": _of_files("transcribe", "asr.transcribe", FINE_TUNED),
    "align": _of_files("align", "asr.transcribe", FINE_TUNED),
    "units": _of_files(
        "units",
        "units.unit_commands",
        "any checkpoint, a transformers directory, or mfcc",
        "audio files, or folders of them; - for raw 16 kHz mono 16-bit little-endian samples from standard input",
        deduplicate="give each run of equal units once, with its duration in frames of 20 ms",
    ),
    "labels": _labels,
    "kmeans": _kmeans,
    "quality": _quality,
    "import": _import,
    "export": _export,
}
