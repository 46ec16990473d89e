"""Tuning of a beam search: each utterance is encoded once and decoded with many settings."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jiwer
import numpy as np
import optuna
import torch
from lhotse.cut import Cut
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.ctc_model import load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import DecoderSettings, settings_json
from hubert_lightning.asr.decoding import BeamSearch, greedy
from hubert_lightning.characters import comparable
from hubert_lightning.data.manifest import check_audio, read_manifest, transcript
from hubert_lightning.errors import UserError
from hubert_lightning.figure_style import BLUE, COLUMN, FIGURE_SUFFIXES, GREY, ORANGE, figure_files, figure_style
from hubert_lightning.files import write_all
from hubert_lightning.model.devices import choose_device
from hubert_lightning.progress_bar import progress
from hubert_lightning.vocabulary import Vocabulary

WEIGHT_RANGES = {"lm_weight": (0.0, 8.0), "word_score": (-5.0, 5.0), "silence_score": (-10.0, 0.0)}
"""Ranges of the reference's sweep for n-grams (fairseq examples/hubert/config/decode/ax_sweep)."""
RESCORER_WEIGHT_RANGE = (0.0, 4.0)
TRIALS = ".trials.json"
"""Suffix of the file with the numbers of all trials, which `hubert report` draws."""
PUBLISHED_WEIGHTS = [
    *((3.23, -0.26), (2.90, -1.62), (2.46, -0.59), (2.15, -0.52), (1.74, 0.52)),  # 10 min to 960 h, of LibriSpeech
    *((3.86, -1.18), (3.09, -2.33), (2.12, -0.90), (1.57, -0.64)),  # of Libri-light, whose 100 h are as above
]
"""First trials, lm_weight and word_score: those of wav2vec 2.0 with LibriSpeech's 4-gram (its tables 7 and 8). HuBERT
publishes none."""


def tune_decoder(
    model: Path,
    manifests: list[Path],
    out: Path,
    lm: Path | None = None,
    lexicon: Path | None = None,
    trials: int = 60,
    beam_size: int = 500,
    beam_threshold: float = 100.0,
    rescorer: Path | None = None,
    nbest: int = 20,
    seed: int = 0,
    batch_duration: float | None = None,
) -> None:
    """Find the weights of language model, words and word boundaries that make the fewest word errors.

    Args:
        model: Fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer.
        manifests: Manifests of transcribed utterances that are not in the training data; a few minutes are enough.
        out: Settings to write, a .json file; a figure of the trials is written beside it, as .png, .svg and .pdf, and
            their numbers as .trials.json.
        lm: n-gram language model (`hubert ngram`), in ARPA or KenLM's binary form.
        lexicon: Words that a hypothesis may contain (`hubert ngram` and `hubert lexicon` write lexicons).
        trials: Number of settings to try; with a language model of words, the default and the published settings come
            first.
        beam_size: Number of hypotheses kept at each frame.
        beam_threshold: Distance below the best score at which hypotheses are dropped.
        rescorer: Directory of a causal language model of transformers; its weight is tuned last.
        nbest: Number of hypotheses that the rescorer chooses from.
        seed: Seed of the proposed settings.
        batch_duration: Seconds of audio that are encoded at once; chosen for the device if not given.
    """
    if trials < 1:
        raise UserError(f"trials is {trials}; give 1 or more")
    if Path(out).suffix in FIGURE_SUFFIXES:
        raise UserError(f"{out}: this is the name of the figure; give a .json file for the settings")
    if Path(out).is_dir():
        raise UserError(f"{out}: a folder; give a .json file for the settings")
    recogniser = load_ctc(model).to(choose_device())
    initial = DecoderSettings(
        lm=str(lm) if lm else None,
        lexicon=str(lexicon) if lexicon else None,
        beam_size=beam_size,
        beam_threshold=beam_threshold,
    )
    search = BeamSearch(initial, recogniser.vocabulary, clock=recogniser.clock)
    neural_lm = CausalLM(rescorer, device=recogniser.head.weight.device) if rescorer else None
    cuts, references = _transcribed(manifests, recogniser.vocabulary)
    [log_probs] = log_probabilities(recogniser, [cuts], batch_duration=batch_duration, progress="encoding")
    greedy_texts = [greedy(rows[None], torch.tensor([len(rows)]), recogniser.vocabulary)[0] for rows in log_probs]
    greedy_rate = _word_error_rate(references, greedy_texts)
    study, search = tune(search, log_probs, references, trials, seed)
    settings, best_rate = search.settings, study.best_value
    if neural_lm is not None:
        settings, best_rate = _tune_rescorer(search, neural_lm, log_probs, references, nbest)
    figures = figure_files(_figure_of(study, greedy_rate), Path(out))
    numbers = {Path(out).with_suffix(TRIALS): _numbers_of(study, greedy_rate, best_rate)}
    write_all(figures | numbers | {Path(out): settings_json(settings, Path(out))})
    names = [*study.best_params, *(["rescorer_weight"] if neural_lm else [])]
    weights = ", ".join(f"{name} {getattr(settings, name):.2f}" for name in names)
    print(
        f"WER {100 * greedy_rate:.2f} % with greedy decoding, {100 * study.trials[0].values[0]:.2f} % with the default "
        f"weights, {100 * best_rate:.2f} % with {weights}: {out}, {', '.join(map(str, figures))}"
    )


def _transcribed(manifests: Sequence[Path], vocabulary: Vocabulary) -> tuple[list[Cut], list[str]]:
    """Read the utterances with transcripts, and the transcripts as the model prints them."""
    cuts = read_manifest(manifests)
    check_audio(cuts)
    pairs = [(cut, text) for cut in cuts if (text := transcript(cut, vocabulary))]
    if not pairs:
        raise UserError(
            f"{', '.join(map(str, manifests))}: no transcripts to compare with; prepare manifests with transcripts"
        )
    return [cut for cut, _ in pairs], [vocabulary.printed(text) for _, text in pairs]


def tune(
    search: BeamSearch, log_probs: Sequence[Tensor], references: Sequence[str], trials: int, seed: int = 0
) -> tuple[optuna.Study, BeamSearch]:
    """Try the settings of a search, those of wav2vec 2.0 if words are searched, then what TPE (optuna) proposes.

    Args:
        search: Beam search whose weights are tuned.
        log_probs: (frames, tokens) of each utterance, float32, on the CPU.
        references: Transcript of each utterance.
        trials: Number of settings to try.
        seed: Seed of TPE.

    Returns:
        The study, whose values are word error rates, and the search with the best weights: the first ones, if several
        are equally good.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [name for name in WEIGHT_RANGES if search.settings.lm or name != "lm_weight"]
    names = [name for name in names if search.settings.lexicon or name != "word_score"]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    initial = {name: getattr(search.settings, name) for name in names}
    study.enqueue_trial(initial)
    if {"lm_weight", "word_score"} <= initial.keys():
        for lm_weight, word_score in PUBLISHED_WEIGHTS:
            study.enqueue_trial({**initial, "lm_weight": lm_weight, "word_score": word_score})

    def errors(trial: optuna.Trial) -> float:
        trial_search = search.with_settings(**{name: trial.suggest_float(name, *WEIGHT_RANGES[name]) for name in names})
        texts = [nbest[0].text if nbest else "" for nbest in trial_search.search(log_probs)]
        trial_search.close()
        return _word_error_rate(references, texts)

    with progress("tuning", trials, "trials") as advance:

        def show(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            advance(note=f"best WER {100 * study.best_value:.2f} %")

        study.optimize(errors, n_trials=trials, callbacks=[show])
    return study, search.with_settings(**study.best_params)


def _tune_rescorer(
    search: BeamSearch, rescorer: CausalLM, log_probs: Sequence[Tensor], references: Sequence[str], nbest: int
) -> tuple[DecoderSettings, float]:
    """Tune the rescorer's weight on hypotheses that are searched and scored once.

    Returns:
        The settings with the best weight, and its word error rate.
    """
    nbest_search = search.with_settings(nbest=nbest)
    hypotheses = list(nbest_search.search(log_probs))
    nbest_search.close()
    scores = [rescorer([nbest_search.rescorer_text(best.text) for best in few]) for few in hypotheses]

    def errors(weight: float) -> float:
        rescored = [
            max(zip(few, few_scores, strict=True), key=lambda pair: pair[0].score + weight * pair[1])
            for few, few_scores in zip(hypotheses, scores, strict=True)
        ]
        return _word_error_rate(references, [best.text for best, _ in rescored])

    weights = np.linspace(*RESCORER_WEIGHT_RANGE, 81).tolist()
    rates = [errors(weight) for weight in weights]
    best = int(np.argmin(rates))
    settings = replace(nbest_search.settings, rescorer=rescorer.path, rescorer_weight=weights[best])
    return settings, rates[best]


def _word_error_rate(references: Sequence[str], texts: Sequence[str]) -> float:
    return jiwer.wer([*map(comparable, references)], [*map(comparable, texts)])


def _numbers_of(study: optuna.Study, greedy_rate: float, best_rate: float) -> bytes:
    """Serialise the word error rate and the weights of every trial as JSON."""
    content = {
        "greedy_wer": greedy_rate,
        "default_wer": study.trials[0].values[0],
        "best_wer": best_rate,
        "trials": [{"wer": trial.values[0], **trial.params} for trial in study.trials],
    }
    return (json.dumps(content, indent=1) + "\n").encode()


@figure_style()
def _figure_of(study: optuna.Study, greedy_rate: float) -> Figure:
    """Plot the WER of every trial over time and over each weight, two panels in a row."""
    names = list(study.best_params)
    rows = len(names) // 2 + 1
    figure = Figure(figsize=(COLUMN, 0.4 + 1.6 * rows))
    history, *panels = figure.subplots(rows, 2, sharey=True, squeeze=False).flat
    rates = np.array([100 * trial.values[0] for trial in study.trials])
    trials = np.arange(1, len(rates) + 1)
    history.plot(trials, rates, "o", ms=2, color=BLUE, label="trial")
    history.plot(trials, np.minimum.accumulate(rates), color=ORANGE, label="best so far")
    history.axhline(100 * greedy_rate, color=GREY, ls="--", label="greedy")
    history.set(xlabel="trial", ylabel="WER, %")
    history.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.legend(loc="outside upper center", ncols=3)
    for number, (axes, name) in enumerate(zip(panels, names, strict=False), start=1):
        axes.plot([trial.params[name] for trial in study.trials], rates, "o", ms=2, color=BLUE)
        axes.plot(study.best_params[name], 100 * study.best_value, "D", color=ORANGE)
        axes.set(xlabel=f"{name.replace('lm_', 'LM ').replace('_', ' ')} (best {study.best_params[name]:.2f})")
        if number % 2 == 0:
            axes.set(ylabel="WER, %")
    for axes in panels[len(names) :]:
        axes.remove()
    return figure
