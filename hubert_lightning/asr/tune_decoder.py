"""The weights of a beam search, found on transcribed utterances: encoded once, decoded with many settings."""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import jiwer
import numpy as np
import optuna
import torch
from lhotse.cut import Cut
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hubert_lightning.asr.causal_lm import CausalLM
from hubert_lightning.asr.ctc_model import load_ctc, log_probabilities
from hubert_lightning.asr.decoder_settings import DecoderSettings, settings_json
from hubert_lightning.asr.decoding import BeamSearch, greedy
from hubert_lightning.data.manifest import check_audio, read_manifest, transcript
from hubert_lightning.errors import UserError
from hubert_lightning.files import replacing_all
from hubert_lightning.vocabulary import Vocabulary, comparable

WEIGHTS = {"lm_weight": (0.0, 8.0), "word_score": (-5.0, 5.0), "silence_score": (-10.0, 0.0)}
"""Where to look; the ranges of the reference's sweep for n-grams (fairseq examples/hubert/config/decode/ax_sweep)."""
RESCORER_WEIGHT = (0.0, 4.0)
STARTS = [
    *((3.23, -0.26), (2.90, -1.62), (2.46, -0.59), (2.15, -0.52), (1.74, 0.52)),  # 10 min to 960 h, of LibriSpeech
    *((3.86, -1.18), (3.09, -2.33), (2.12, -0.90), (1.57, -0.64)),  # of Libri-light, whose 100 h are as above
]
"""Where the search begins, lm_weight and word_score: those of wav2vec 2.0 with LibriSpeech's 4-gram (its tables 7 and
8). HuBERT prints none."""


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
    """Search the weights of language model, words and silence that make the fewest word errors.

    Args:
        model: a fine-tuned checkpoint, or a transformers directory of a HubertForCTC with its tokenizer
        manifests: transcribed utterances, none of which the model was trained on; some minutes are enough
        out: where the settings go, a .json file; beside it goes a figure
        lm: n-gram language model (`hubert ngram`), ARPA or KenLM's binary form
        lexicon: the words that can be said (`hubert ngram` and `hubert lexicon` write one)
        trials: settings to try; with a language model of words the first ten are usual ones
        beam_size: hypotheses that are kept at each frame
        beam_threshold: hypotheses whose score is further below the best one are dropped
        rescorer: directory of a causal language model of transformers, whose weight is searched afterwards
        nbest: hypotheses that it chooses from
        seed: of the search
        batch_duration: seconds of audio that are encoded at once; as fits the device if not given
    """
    if trials < 1:
        raise UserError(f"trials is {trials}; try one at least")
    if Path(out).suffix == ".png":
        raise UserError(f"{out}: the name of the figure; name the .json file that the settings go to")
    if Path(out).is_dir():
        raise UserError(f"{out}: a folder; name the .json file that the settings go to")
    recogniser = load_ctc(model).to("cuda" if torch.cuda.is_available() else "cpu")
    first = DecoderSettings(
        lm=str(lm) if lm else None,
        lexicon=str(lexicon) if lexicon else None,
        beam_size=beam_size,
        beam_threshold=beam_threshold,
    )
    search = BeamSearch(first, recogniser.vocabulary)
    neural = CausalLM(rescorer, device=recogniser.head.weight.device) if rescorer else None
    cuts, references = _transcribed(manifests, recogniser.vocabulary)
    [log_probs] = log_probabilities(recogniser, [cuts], batch_duration=batch_duration, progress="encoding")
    plain = [greedy(rows[None], torch.tensor([len(rows)]), recogniser.vocabulary)[0] for rows in log_probs]
    study, search = tune(search, log_probs, references, trials, seed)
    settings, best = search.settings, study.best_value
    if neural is not None:
        settings, best = _tune_rescorer(search, neural, log_probs, references, nbest)
    without = _wer(references, plain)
    figure = Path(out).with_suffix(".png")
    with replacing_all(figure, Path(out)) as (figure_file, settings_file):
        figure_file.write(_drawn(study, without))
        settings_file.write(settings_json(settings, Path(out)))
    names = [*study.best_params, *(["rescorer_weight"] if neural else [])]
    tuned = {name: getattr(settings, name) for name in names}
    print(
        f"WER {100 * without:.2f} % with each frame's best letter, {100 * study.trials[0].values[0]:.2f} % with the "
        f"usual weights, {100 * best:.2f} % with {', '.join(f'{name} {value:.2f}' for name, value in tuned.items())}: "
        f"{out}, {figure}"
    )


def _transcribed(manifests: Sequence[Path], vocabulary: Vocabulary) -> tuple[list[Cut], list[str]]:
    """The utterances that have transcripts, and these."""
    cuts = read_manifest(manifests)
    check_audio(cuts)
    said = [(cut, text) for cut in cuts if (text := transcript(cut, vocabulary))]
    if not said:
        raise UserError(f"{', '.join(map(str, manifests))}: no transcripts to compare with; prepare them with theirs")
    return [cut for cut, _ in said], [vocabulary.printed(text) for _, text in said]


def tune(
    search: BeamSearch, log_probs: Sequence[Tensor], references: Sequence[str], trials: int, seed: int = 0
) -> tuple[optuna.Study, BeamSearch]:
    """Try settings of a search: its own, those of wav2vec 2.0 if words are searched, then what TPE proposes (optuna).

    Args:
        search: Beam search whose weights are tuned.
        log_probs: (frames, tokens) of each utterance, float32, on the CPU.
        references: Transcript of each utterance.
        trials: Number of settings to try.
        seed: Seed of TPE.

    Returns:
        The study, whose values are word error rates, and the search with the best weights; where several are as good,
        it is the first.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [name for name in WEIGHTS if search.settings.lm or name != "lm_weight"]
    names = [name for name in names if search.settings.lexicon or name != "word_score"]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    first = {name: getattr(search.settings, name) for name in names}
    starts = STARTS if {"lm_weight", "word_score"} <= first.keys() else []
    for start in (first, *({**first, "lm_weight": weight, "word_score": score} for weight, score in starts)):
        study.enqueue_trial(start)
    columns = [TextColumn("tuning"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}")]
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, redirect_stdout=False, transient=True) as progress:
        task = progress.add_task("tuning", total=trials, best="")

        def errors(trial: optuna.Trial) -> float:
            weights = {name: trial.suggest_float(name, *WEIGHTS[name]) for name in names}
            tried = search.with_settings(**weights)
            texts = [few[0].text if few else "" for few in tried.search(log_probs)]
            tried.close()
            return _wer(references, texts)

        def tell(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            progress.update(task, advance=1, best=f"best WER {100 * study.best_value:.2f} %")

        study.optimize(errors, n_trials=trials, callbacks=[tell])
    return study, search.with_settings(**study.best_params)


def _tune_rescorer(
    search: BeamSearch,
    rescorer: CausalLM,
    log_probs: Sequence[Tensor],
    references: Sequence[str],
    nbest: int,
) -> tuple[DecoderSettings, float]:
    """The weight of the neural model's scores, which are computed once for all hypotheses, and its word error rate."""
    several = search.with_settings(nbest=nbest)
    found = list(several.search(log_probs))
    several.close()
    scores = [rescorer([several.rescorer_text(one.text) for one in few]) for few in found]

    def wer(weight: float) -> float:
        chosen = [
            max(zip(few, of, strict=True), key=lambda pair: pair[0].score + weight * pair[1])[0].text
            for few, of in zip(found, scores, strict=True)
        ]
        return _wer(references, chosen)

    weights = np.linspace(*RESCORER_WEIGHT, 81)
    rates = [wer(float(weight)) for weight in weights]
    best = int(np.argmin(rates))
    settings = replace(several.settings, rescorer=rescorer.path, rescorer_weight=float(weights[best]))
    return settings, rates[best]


def _wer(references: Sequence[str], texts: Sequence[str]) -> float:
    return jiwer.wer([*map(comparable, references)], [*map(comparable, texts)])


def _drawn(study: optuna.Study, without: float) -> bytes:
    """WER of every trial over each weight, and the best so far."""
    names = list(study.best_params)
    figure = Figure(figsize=(3.4 * (len(names) + 1), 3.4), layout="constrained")
    history, *panels = figure.subplots(1, len(names) + 1, sharey=True)
    blue, orange, grey = "#2a6f97", "#e07a3f", "#9aa5ad"
    rates = np.array([100 * trial.values[0] for trial in study.trials])
    history.plot(rates, ".", color=blue, label="trial")
    history.plot(np.minimum.accumulate(rates), color=orange, label="best so far")
    history.axhline(100 * without, color=grey, lw=1, ls="--", label="best letters")
    history.set(xlabel="trial", ylabel="WER, %", title="Trials")
    history.legend(frameon=False)
    for axes, name in zip(panels, names, strict=True):
        axes.plot([trial.params[name] for trial in study.trials], rates, ".", color=blue)
        axes.plot(study.best_params[name], 100 * study.best_value, "o", color=orange)
        axes.set(xlabel=name.replace("_", " "), title=f"best {study.best_params[name]:.2f}")
    for axes in (history, *panels):
        axes.spines[["top", "right"]].set_visible(False)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=160)
    return content.getvalue()
