"""The fine-tuning task: CTC over letters on a pre-trained encoder (HuBERT §II-F, §IV-D)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT
from torchmetrics.text import CharErrorRate, WordErrorRate

from hubert_lightning.asr.ctc_model import load_ctc, weights_fingerprint
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, greedy, search_with
from hubert_lightning.asr.language_scores import is_metric_by_name, metrics_by_name
from hubert_lightning.asr.results import SCORES, Origin, joined_paths, results_folder, write_rows
from hubert_lightning.asr.scoring import Result, score
from hubert_lightning.characters import comparable
from hubert_lightning.data.manifest import fingerprint, place_of, transcript
from hubert_lightning.default_optimizers import TEN_HOURS_ADAM
from hubert_lightning.errors import UserError, within
from hubert_lightning.frames import num_frames
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.ctc import ctc_loss
from hubert_lightning.model.flops import encoder_operations
from hubert_lightning.pretrained.load import load_hubert
from hubert_lightning.training.batches import TranscribedBatch
from hubert_lightning.training.lightning_internals import finds_unused_parameters, tries_learning_rates
from hubert_lightning.training.schedules import Schedule, tri_stage
from hubert_lightning.training.task import CHANGEABLE_ON_RESUME, Task, encoder_config
from hubert_lightning.vocabulary import BLANK, Vocabulary, read_vocabulary

Search = Callable[..., list[str]]
"""Log-probabilities, numbers of frames and vocabulary → the words of each utterance."""


class CTCFinetuning(Task):
    """Train an encoder with a linear CTC head on transcripts. Defaults: HuBERT Base on 10 hours.

    Args:
        pretrained: Checkpoint of pre-training or a transformers directory; train from scratch if not given.
        vocabulary: Vocabulary file of `hubert vocabulary`; the 28 letters of LibriSpeech if not given.
        keep_head: Keep the CTC head of `pretrained`, a fine-tuned model, and its vocabulary as well.
        encoder: Size of the encoder to train from scratch; otherwise it is read from `pretrained`.
        dropout: Dropout probability in the Transformer.
        attention_dropout: Dropout probability of the attention weights.
        activation_dropout: Dropout probability after the activation of the feed-forward layers.
        input_dropout: Dropout probability of the projected convolution output.
        layer_drop: Probability that a training step skips a layer.
        freeze_steps: Number of first steps in which only the CTC head learns.
        freeze_convolutions: Keep the pre-trained weights of the convolutions.
        optimizer: Any torch optimizer; its learning rate is the peak of the schedule. AdamW for 10 hours of transcripts
            if not given.
        warmup: Fraction of the steps over which the learning rate rises to its peak.
        decay: Fraction of the steps over which it falls to a twentieth of the peak.
        decoder: Decoder settings file of `hubert tune-decoder`, for `hubert test` and `hubert predict`; the most likely
            letter of each frame if not given, as in validation.
        max_skipped: Maximum number of consecutive skipped steps. All ranks skip a step if a loss or gradient is not
            finite.
        compile: Compile the encoder with torch.compile: slow to start, then faster.
        activation_checkpointing: Recompute the activations of each layer in the backward pass: slower, with much less
            memory.
    """

    def __init__(
        self,
        pretrained: Path | None = None,
        vocabulary: Path | Vocabulary | None = None,
        keep_head: bool = False,
        encoder: EncoderConfig = EncoderConfig(),
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.1,
        input_dropout: float = 0.0,
        layer_drop: float = 0.05,
        freeze_steps: int = 10_000,
        freeze_convolutions: bool = True,
        optimizer: OptimizerCallable | None = None,
        warmup: float = 0.1,
        decay: float = 0.5,
        decoder: Path | DecoderSettings | None = None,
        max_skipped: int = 10,
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        within(0, 1, warmup=warmup, decay=decay)
        within(0, freeze_steps=freeze_steps)
        if warmup + decay > 1:
            raise UserError(
                f"warmup {warmup} and decay {decay} are fractions of one run; lower them to a sum of at most 1"
            )
        weights = head = None
        encoder = encoder_config(encoder)
        if isinstance(vocabulary, Mapping):  # from a checkpoint
            vocabulary = Vocabulary(**vocabulary)
        elif isinstance(vocabulary, (str, Path)):
            vocabulary = read_vocabulary(Path(vocabulary))
        if pretrained is not None:
            loaded = load_hubert(pretrained)
            encoder, weights = loaded.config, loaded.state_dict()
        if keep_head:
            head, vocabulary = _load_head(pretrained, vocabulary)
        vocabulary = vocabulary or Vocabulary()
        encoder = replace(
            encoder,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            input_dropout=input_dropout,
            layer_drop=layer_drop,
            feature_grad_mult=0.0 if freeze_convolutions else 1.0,
        )
        super().__init__(encoder, optimizer or ten_hour_optimizer, max_skipped, compile, activation_checkpointing)
        # RunRecord logs the settings as they were built
        self.save_hyperparameters(ignore=["optimizer", *CHANGEABLE_ON_RESUME], logger=False)
        # A checkpoint can be rebuilt without the one that it was trained from
        settings = vocabulary.settings()
        self.hparams.update(encoder=asdict(encoder), pretrained=None, vocabulary=settings, keep_head=False)
        self.vocabulary = vocabulary
        if weights is not None:
            self.encoder.load_state_dict(weights)
        self.head = nn.Linear(encoder.dim, len(vocabulary))
        if head is not None:
            self.head.load_state_dict(head)
        self.freeze_steps, self.warmup, self.decay = freeze_steps, warmup, decay
        self.pretrained, self.keep_head, self.decoder = pretrained, keep_head, decoder
        self.results: tuple[Path, Origin, bool] | None = None
        """Folder of the last test or prediction, the origin of its hypotheses, and whether it covers the whole set."""
        self.search: Search = greedy
        self.wer, self.cer = WordErrorRate(), CharErrorRate()
        self.rows: list[dict[str, str]] = []
        """id, speaker, reference and hypothesis of each utterance of the last validation or test."""

    @property
    def heads(self) -> list[nn.Module]:
        return [self.head]

    def forward(
        self,
        waveform: Tensor,
        length: Tensor,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
    ) -> Tensor:
        """Compute the log-probabilities of the tokens.

        Args:
            waveform: (batch, samples), 16 kHz audio.
            length: (batch,), samples before padding.
            mask: (batch, frames) bool, True where a frame is masked.
            channel_mask: (batch, dim) bool, True where a channel is masked.
            kept: (layers,), whether each layer is computed; drawn in training if not given.

        Returns:
            (batch, frames, tokens) float32.
        """
        return self._log_probs(self.encoder(waveform, length, mask, channel_mask, kept))

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if stage in ("test", "predict") and self.decoder:
            self.search = search_with(
                self.decoder,
                self.vocabulary,
                self.trainer.num_devices,
                strategy.root_device,
                clock=self.encoder.config.clock,
            )
        if stage != "fit" or not self.freeze_steps or not isinstance(strategy, DDPStrategy):
            return
        if not finds_unused_parameters(strategy):  # also of one rank
            raise UserError(
                f"freeze_steps {self.freeze_steps}: the encoder has no gradients at first, which DDP waits for; "
                "set trainer.strategy to ddp_find_unused_parameters_true, or freeze_steps to 0"
            )

    def teardown(self, stage: str) -> None:
        if isinstance(self.search, BeamSearch):
            self.search.close()
        self.search = greedy

    def on_fit_start(self) -> None:
        self._check_monitors()
        rank_zero_info(self._trainable_parameters())

    def _check_monitors(self) -> None:
        """Refuse callbacks that monitor a language or corpus which the validation set lacks."""
        monitors = {callback: getattr(callback, "monitor", None) or "" for callback in self.trainer.callbacks}  # type: ignore[attr-defined]  # undeclared
        for callback, monitor in monitors.items():
            if not is_metric_by_name(monitor, "val"):
                continue
            spoken, data = self._spoken_in_validation(), self.trainer.datamodule  # type: ignore[attr-defined]
            results = [
                Result(cut.id, transcript(cut, self.vocabulary), "", **spoken.get(cut.id, {}))
                for cut in (data.cuts["validation"] if spoken else ())
            ]
            known = metrics_by_name(score(results, intervals=False), "val") if results else {}
            if monitor not in known:
                raise UserError(
                    f"trainer.callbacks: {type(callback).__name__} monitors {monitor}, which the utterances of "
                    f"data.validation do not give; use one of {', '.join(['val/loss', 'val/wer', 'val/cer', *known])}"
                )

    def _spoken_in_validation(self) -> dict[str, dict[str, str]]:
        """Language and corpus of each validation utterance; empty if all have the same."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        spoken: dict[str, dict[str, str]] = data.spoken("validation") if hasattr(data, "spoken") else {}
        several = (len({named.get(kind) for named in spoken.values()}) > 1 for kind in ("language", "corpus"))
        return spoken if any(several) else {}

    def _trainable_parameters(self) -> str:
        """Describe which parameters are trained, and from which step."""
        convolutions, head = _num_parameters(self.encoder.convolutions), _num_parameters(self.head)
        transformer = _num_parameters(self.encoder) - convolutions
        start = f"trained from step {self.freeze_steps} on" if self.freeze_steps else "trained from the start"
        frozen = not any(parameter.requires_grad for parameter in self.encoder.convolutions.parameters())
        return (
            f"{_num_parameters(self) / 1e6:.2f} M parameters: {convolutions / 1e6:.2f} M of the convolutions "
            f"({'frozen' if frozen else start}), {transformer / 1e6:.2f} M of the Transformer ({start}), "
            f"{head / 1e3:.1f} k of the CTC head (trained from the start)"
        )

    def training_step(self, batch: TranscribedBatch) -> Tensor:
        kept = self.seed_step(batch)
        # PeakRateFinder trains the whole model: a rate for the head alone would be far too high for the encoder
        frozen = self.global_step < self.freeze_steps and not tries_learning_rates(self.trainer)
        with torch.set_grad_enabled(not frozen):
            frames = self.encoder(batch.waveform, batch.length, batch.mask, batch.channel_mask, kept)
        loss = self._loss(self._log_probs(frames), batch)
        if self.logs_this_step:
            self.log("train/loss", loss.detach(), batch_size=len(batch.waveform))
        return self.global_batch.add(loss, len(batch.waveform), batch.id)

    def operations(self, batch: TranscribedBatch) -> int:
        """Count the operations of a step on one batch with its padding, once the encoder is trained."""
        rows, samples = batch.waveform.shape
        head = (
            3
            * 2
            * num_frames(samples, self.encoder.config.clock)
            * self.encoder.config.dim
            * len(self.vocabulary.tokens)
        )
        return rows * (encoder_operations(self.encoder.config, samples) + head)

    def on_validation_epoch_start(self) -> None:
        self.rows = []

    def validation_step(self, batch: TranscribedBatch) -> None:
        self._score("val", batch, greedy)

    def on_validation_epoch_end(self) -> None:
        """Log the error rates of each language and corpus of the validation set, if there are several."""
        if not (spoken := self._spoken_in_validation()):
            return
        results = [Result(**row, **spoken.get(row["id"], {})) for row in self._rows_of_all_ranks()]
        self.log_dict(metrics_by_name(score(results, intervals=False), "val"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.rows = []

    def test_step(self, batch: TranscribedBatch) -> None:
        self._score("test", batch, self.search)

    def on_test_epoch_end(self) -> None:
        self._write("test")

    def on_predict_epoch_start(self) -> None:
        self.rows = []

    def predict_step(self, batch: TranscribedBatch) -> list[str]:
        """Decode a batch; the hypotheses are also written to predict.jsonl in the run folder."""
        hypotheses = self.search(self(batch.waveform, batch.length), torch.tensor(batch.num_frames), self.vocabulary)
        self.rows += [
            {"id": cut_id, "hypothesis": hypothesis} for cut_id, hypothesis in zip(batch.id, hypotheses, strict=True)
        ]
        return hypotheses

    def on_predict_epoch_end(self) -> None:
        self._write("predict")

    def _log_probs(self, frames: Tensor) -> Tensor:
        logits: Tensor = self.head(frames)
        return logits.float().log_softmax(dim=-1)

    def _loss(self, log_probs: Tensor, batch: TranscribedBatch) -> Tensor:
        loss = ctc_loss(log_probs, batch.token, batch.num_frames, batch.num_tokens, BLANK)
        return loss / len(batch.waveform)  # over utterances, not tokens: fairseq criterion ctc with sentence_avg

    def _score(self, part: str, batch: TranscribedBatch, search: Search) -> None:
        log_probs = self(batch.waveform, batch.length)
        hypotheses = search(log_probs, torch.tensor(batch.num_frames), self.vocabulary)
        self.log(f"{part}/loss", self._loss(log_probs, batch), batch_size=len(batch.waveform), sync_dist=True)
        references = [self.vocabulary.printed(text) for text in batch.text]
        for error in (self.wer, self.cer):
            error.update([*map(comparable, hypotheses)], [*map(comparable, references)])
        errors = {f"{part}/wer": self.wer, f"{part}/cer": self.cer}
        self.log_dict(errors, on_epoch=True, prog_bar=True, batch_size=len(batch.waveform))
        self.rows += [
            {"id": cut_id, "speaker": speaker, "reference": reference, "hypothesis": hypothesis}
            for cut_id, speaker, reference, hypothesis in zip(
                batch.id, batch.speaker, references, hypotheses, strict=True
            )
        ]

    def _rows_of_all_ranks(self) -> list[dict[str, str]]:
        if self.trainer.world_size == 1:
            return self.rows
        rows_of_ranks: list[list[dict[str, str]]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(rows_of_ranks, self.rows)
        # The last step repeats some utterances
        return list({row["id"]: row for rows in rows_of_ranks for row in rows}.values())

    def _search_settings(self) -> str | dict[str, Any]:
        if not isinstance(self.search, BeamSearch):
            return "greedy"
        file = str(self.decoder) if isinstance(self.decoder, (str, Path)) else None
        return {"file": file, **asdict(self.search.settings)}

    def _write(self, kind: str) -> None:
        """Write the rows of all ranks and what made them to the run folder, or to the set's own folder in it."""
        rows: list[dict[str, Any]] = [*self._rows_of_all_ranks()]
        weights = self.trainer.strategy.lightning_module_state_dict()  # a collective operation
        if not self.trainer.is_global_zero:
            return
        run, checkpoint = Path(self.trainer.default_root_dir), self.trainer.ckpt_path
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it without declaring it
        manifests = getattr(data, "manifests", {}).get("test") or []
        tested = {row["id"] for row in rows}
        origin = Origin(
            checkpoint=None if checkpoint is None else str(checkpoint),
            step=self.trained_steps,
            weights=weights_fingerprint(weights),
            manifest=joined_paths(manifests),
            utterances=fingerprint(cut for cut in data.cuts["test"] if cut.id in tested) if manifests else "",
            decoder=self._search_settings(),
        )
        whole = not manifests or len(tested) == len(data.cuts["test"])
        if kind == "test" and manifests:  # so that a report finds the recordings
            places = {cut.id: place_of(cut) for cut in data.cuts["test"] if cut.id in tested}
            spoken = data.spoken("test")
            rows = [{**row, **spoken.get(row["id"], {}), **places.get(row["id"], {})} for row in rows]
        folder = results_folder(run, kind, manifests, self.decoder, checkpoint, whole) if manifests else run
        write_rows(folder / f"{kind}.jsonl", rows, origin)
        if folder != run and whole:
            if kind == "test":
                (run / SCORES).unlink(missing_ok=True)  # scores of the previous test
            write_rows(run / f"{kind}.jsonl", rows, origin)
        self.results = folder, origin, whole

    def schedule(self, total_steps: int) -> Schedule:
        warmup, decay = self.warmup_steps, round(self.decay * total_steps)
        return tri_stage(warmup, total_steps - warmup - decay, decay)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _load_head(pretrained: Path | None, vocabulary: Vocabulary | None) -> tuple[dict[str, Tensor], Vocabulary]:
    """Return the weights of a fine-tuned model's CTC head and its vocabulary."""
    if pretrained is None:
        raise UserError("keep_head, but pretrained is not given; name a fine-tuned model in model.init_args.pretrained")
    model = load_ctc(pretrained)
    if vocabulary is not None and vocabulary != model.vocabulary:
        raise UserError(
            f"{pretrained}: its CTC head has another vocabulary than the given one; leave out "
            "model.init_args.vocabulary, or keep_head to train a new head"
        )
    return model.head.state_dict(), model.vocabulary


def ten_hour_optimizer(parameters: ParamsT) -> AdamW:
    """Build the optimizer for 10 hours of transcripts."""
    return AdamW(parameters, **TEN_HOURS_ADAM)
