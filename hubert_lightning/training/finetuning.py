"""A pre-trained encoder learns to spell: CTC over letters (HuBERT §II-F, §IV-D)."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer, ParamsT
from torchmetrics.text import CharErrorRate, WordErrorRate

from hubert_lightning.asr.ctc_model import load_ctc, weights_fingerprint
from hubert_lightning.asr.decoder_settings import DecoderSettings
from hubert_lightning.asr.decoding import BeamSearch, greedy, search_with
from hubert_lightning.asr.results import SCORES, Origin, joined_paths, results_folder, write_rows
from hubert_lightning.data.manifest import fingerprint
from hubert_lightning.errors import UserError, within
from hubert_lightning.frames import num_frames
from hubert_lightning.model.config import EncoderConfig
from hubert_lightning.model.flops import encoder_operations
from hubert_lightning.model.hubert import HubertEncoder
from hubert_lightning.pretrained.load import load_encoder
from hubert_lightning.training.batches import TranscribedBatch
from hubert_lightning.training.distributed import shard
from hubert_lightning.training.global_batch import HOW_NOT_WHAT, GlobalBatch, total_steps
from hubert_lightning.training.lightning_internals import finds_unused_parameters, tries_learning_rates
from hubert_lightning.training.restoring import load_task
from hubert_lightning.training.schedules import tri_stage
from hubert_lightning.vocabulary import BLANK, Vocabulary, comparable, read_vocabulary


class CTCFinetuning(LightningModule):
    """An encoder and a linear layer that spells what it hears. Defaults: HuBERT Base on 10 hours.

    Args:
        pretrained: Checkpoint of a pre-training run, or a transformers directory; none to learn from scratch.
        vocabulary: The letters to spell with, a file of `hubert vocabulary`; LibriSpeech's 28 if not given.
        keep_head: Go on from the letters' head of `pretrained`, too, which somebody fine-tuned; its vocabulary is kept.
        encoder: Size of the encoder when nothing is pre-trained; otherwise read from the checkpoint.
        dropout: Of the Transformer while fine-tuning.
        attention_dropout: Of the attention weights.
        activation_dropout: After the activation of the feed-forward layers.
        input_dropout: Of the projected convolution output.
        layer_drop: Chance of a layer to be left out of a step.
        freeze_steps: Steps in which only the linear layer learns.
        freeze_convolutions: Keep the convolutions as they were pre-trained.
        optimizer: Any torch optimizer; its learning rate is the peak. AdamW for 10 hours if none is named.
        warmup: Share of all steps in which the learning rate rises.
        decay: Share of all steps in which it falls, to a twentieth.
        decoder: How `hubert test` and `predict` search for words, a file of `hubert tune-decoder`; each frame's best
            letter if not given, as in validation.
        max_skipped: Steps in a row that may be left out, on all ranks, because a loss or gradient is not finite.
        compile: Let torch compile the encoder: slow to start, then faster.
        activation_checkpointing: Compute each layer again in the backward pass: slower, in much less memory.
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
        super().__init__()
        within(0, 1, warmup=warmup, decay=decay)
        within(0, freeze_steps=freeze_steps)
        if warmup + decay > 1:
            raise UserError(f"warmup {warmup} and decay {decay} are shares of one run; together they are at most 1")
        weights = head = None
        if isinstance(encoder, dict):  # from a checkpoint
            encoder = EncoderConfig(**encoder)
        given = Vocabulary(**vocabulary) if isinstance(vocabulary, dict) else vocabulary
        spelling = read_vocabulary(Path(given)) if isinstance(given, (str, Path)) else given
        if pretrained is not None:
            loaded = load_encoder(pretrained)
            encoder, weights = loaded.config, loaded.state_dict()
        if keep_head:
            head, spelling = _kept_head(pretrained, spelling)
        spelling = spelling or Vocabulary()
        encoder = replace(
            encoder,
            dropout=dropout,
            attention_dropout=attention_dropout,
            activation_dropout=activation_dropout,
            input_dropout=input_dropout,
            layer_drop=layer_drop,
            feature_grad_mult=0.0 if freeze_convolutions else 1.0,
        )
        self.save_hyperparameters(ignore=["optimizer", *HOW_NOT_WHAT], logger=False)  # RunRecord logs what was built
        # What a checkpoint needs to be rebuilt without the one it came from
        kept = spelling.settings()
        self.hparams.update(encoder=asdict(encoder), pretrained=None, vocabulary=kept, keep_head=False)
        self.vocabulary = spelling
        self.encoder = HubertEncoder(encoder)
        if weights is not None:
            self.encoder.load_state_dict(weights)
        self.head = nn.Linear(encoder.dim, len(spelling))
        if head is not None:
            self.head.load_state_dict(head)
        self.optimizer = optimizer or ten_hour_optimizer
        self.freeze_steps, self.warmup, self.decay = freeze_steps, warmup, decay
        self.global_batch = GlobalBatch(max_skipped)
        self.encoder.checkpointing = activation_checkpointing
        self.compiling = compile
        self.pretrained, self.keep_head, self.decoder = pretrained, keep_head, decoder
        self.trained_steps: int | None = None
        """Optimizer step of the checkpoint that was loaded."""
        self.results: tuple[Path, Origin, bool] | None = None
        """Folder of what was last tested or predicted, what made it, and whether it is the whole set."""
        self.search: Callable[..., list[str]] = greedy
        self.wer, self.cer = WordErrorRate(), CharErrorRate()
        self.rows: list[dict[str, str]] = []  # id, speaker, reference, hypothesis of what was last validated or tested

    load_from_checkpoint = classmethod(load_task)  # type: ignore[assignment, var-annotated]

    def forward(
        self,
        waveform: Tensor,
        length: Tensor,
        mask: Tensor | None = None,
        channel_mask: Tensor | None = None,
        kept: Sequence[bool] | None = None,
    ) -> Tensor:
        """Log-probabilities of the letters.

        waveform:     (batch, samples)
        length:       (batch,), samples before padding
        mask:         (batch, frames) bool, frames to hide
        channel_mask: (batch, dim) bool, channels to hide
        kept:         (layers,), whether each layer is computed; drawn anew in training if not given
        returns:      (batch, frames, tokens) float32
        """
        return self._spelled(self.encoder(waveform, length, mask, channel_mask, kept))

    def setup(self, stage: str) -> None:
        strategy = self.trainer.strategy
        if stage in ("test", "predict") and self.decoder:
            self.search = search_with(self.decoder, self.vocabulary, self.trainer.num_devices, strategy.root_device)
        if stage != "fit" or not self.freeze_steps or not isinstance(strategy, DDPStrategy):
            return
        if self.trainer.world_size > 1 and not finds_unused_parameters(strategy):
            raise UserError(
                f"freeze_steps {self.freeze_steps}: the encoder has no gradients at first, which DDP waits for; "
                "take trainer.strategy ddp_find_unused_parameters_true, or freeze_steps 0"
            )

    def teardown(self, stage: str) -> None:
        if isinstance(self.search, BeamSearch):
            self.search.close()
        self.search = greedy

    def on_fit_start(self) -> None:
        rank_zero_info(self._account())

    def _account(self) -> str:
        """Which parameters learn, and from when."""
        convolutions, head = (_count(part) for part in (self.encoder.convolutions, self.head))
        transformer = _count(self.encoder) - convolutions
        later = f"learn from step {self.freeze_steps} on" if self.freeze_steps else "learn from the start"
        kept = not any(parameter.requires_grad for parameter in self.encoder.convolutions.parameters())
        return (
            f"{_count(self) / 1e6:.2f} M parameters: {convolutions / 1e6:.2f} M of the convolutions "
            f"{'stay as they are' if kept else later}, {transformer / 1e6:.2f} M of the Transformer {later}, "
            f"{head / 1e3:.1f} k of the head that spells from the start"
        )

    def training_step(self, batch: TranscribedBatch) -> Tensor:
        torch.manual_seed(batch.seed)  # dropout's: the batch's own, whichever rank trains on it, also after a restart
        kept = self.encoder.draw_kept(torch.Generator().manual_seed(batch.step_seed))
        # Where rates are tried, it is not frozen: one that suits the head alone would be far too high for the encoder
        frozen = self.global_step < self.freeze_steps and not tries_learning_rates(self.trainer)
        with torch.set_grad_enabled(not frozen):
            frames = self.encoder(batch.waveform, batch.length, batch.mask, batch.channel_mask, kept)
        loss = self._loss(self._spelled(frames), batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch.waveform))
        return self.global_batch.add(loss, len(batch.waveform), batch.id)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = self.global_batch.finish(self, optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log("train/gradient_norm", norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        self.log("train/skipped_steps", self.global_batch.skipped)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch.refuse_unsound(self)
        checkpoint["skipped_steps"] = float(self.global_batch.skipped)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.global_batch.skipped = torch.tensor(checkpoint.get("skipped_steps", 0.0))
        self.trained_steps = checkpoint.get("global_step")

    def operations(self, batch: TranscribedBatch) -> int:
        """Floating-point operations of a training step on this batch, once the encoder learns, padding counted."""
        rows, samples = batch.waveform.shape
        spelling = 3 * 2 * num_frames(samples) * self.encoder.config.dim * len(self.vocabulary.tokens)
        return rows * (encoder_operations(self.encoder.config, samples) + spelling)

    def on_validation_epoch_start(self) -> None:
        self.rows = []

    def validation_step(self, batch: TranscribedBatch) -> None:
        self._score("val", batch, greedy)

    def on_validation_epoch_end(self) -> None:
        names = ["id", "reference", "hypothesis"]
        table = [[row[name] for name in names] for row in self.rows[:: len(self.rows) // 50 + 1]]  # of all lengths
        for logger in self.loggers:
            if hasattr(logger, "log_table") and not self.trainer.sanity_checking:  # W&B
                logger.log_table("val/transcripts", columns=names, data=table)

    def on_test_epoch_start(self) -> None:
        self.rows = []

    def test_step(self, batch: TranscribedBatch) -> None:
        self._score("test", batch, self.search)

    def on_test_epoch_end(self) -> None:
        self._write("test")

    def on_predict_epoch_start(self) -> None:
        self.rows = []

    def predict_step(self, batch: TranscribedBatch) -> list[str]:
        """The words of a batch; every hypothesis also goes to predict.jsonl in the run's folder."""
        hypotheses = self.search(self(batch.waveform, batch.length), num_frames(batch.length), self.vocabulary)
        self.rows += [{"id": i, "hypothesis": words} for i, words in zip(batch.id, hypotheses, strict=True)]
        return hypotheses

    def on_predict_epoch_end(self) -> None:
        self._write("predict")

    def _spelled(self, frames: Tensor) -> Tensor:
        return self.head(frames).float().log_softmax(dim=-1)

    def _loss(self, log_probs: Tensor, batch: TranscribedBatch) -> Tensor:
        # The mean over utterances, not over letters: fairseq criterion ctc with sentence_avg
        return F.ctc_loss(
            log_probs.transpose(0, 1),  # (frames, batch, tokens)
            batch.token,
            num_frames(batch.length),
            batch.num_tokens,
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,
        ) / len(batch.waveform)

    def _score(self, part: str, batch: TranscribedBatch, search: Callable[..., list[str]]) -> None:
        log_probs = self(batch.waveform, batch.length)
        hypotheses = search(log_probs, num_frames(batch.length), self.vocabulary)
        self.log(f"{part}/loss", self._loss(log_probs, batch), batch_size=len(batch.waveform), sync_dist=True)
        references = [self.vocabulary.printed(text) for text in batch.text]
        for error in (self.wer, self.cer):
            error.update([*map(comparable, hypotheses)], [*map(comparable, references)])
        errors = {f"{part}/wer": self.wer, f"{part}/cer": self.cer}
        self.log_dict(errors, on_epoch=True, prog_bar=True, batch_size=len(batch.waveform))
        self.rows += [
            {"id": i, "speaker": speaker, "reference": reference, "hypothesis": hypothesis}
            for i, speaker, reference, hypothesis in zip(batch.id, batch.speaker, references, hypotheses, strict=True)
        ]

    def _search_settings(self) -> str | dict[str, Any]:
        if not isinstance(self.search, BeamSearch):
            return "greedy"
        file = str(self.decoder) if isinstance(self.decoder, (str, Path)) else None
        return {"file": file, **asdict(self.search.settings)}

    def _write(self, kind: str) -> None:
        rows = self.rows
        if self.trainer.world_size > 1:
            parts: list[list[dict[str, str]]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(parts, rows)
            rows = list({row["id"]: row for part in parts for row in part}.values())  # the last step repeats some
        weights = self.trainer.strategy.lightning_module_state_dict()  # which all ranks gather
        if self.trainer.is_global_zero:
            run, checkpoint = Path(self.trainer.default_root_dir), self.trainer.ckpt_path
            data = self.trainer.datamodule  # type: ignore[attr-defined]
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
            folder = results_folder(run, kind, manifests, self.decoder, checkpoint, whole) if manifests else run
            write_rows(folder / f"{kind}.jsonl", rows, origin)
            if folder != run and whole:
                if kind == "test":
                    (run / SCORES).unlink(missing_ok=True)  # which are of the test before
                write_rows(run / f"{kind}.jsonl", rows, origin)
            self.results = folder, origin, whole

    def configure_model(self) -> None:
        if self.compiling:
            self.encoder.compile_parts()
        shard(self, self.encoder, [self.head])

    @property
    def warmup_steps(self) -> int:
        """Steps of this run up to the peak of the learning rate."""
        return round(self.warmup * total_steps(self.trainer))

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.global_batch.made(self, self.optimizer)
        steps = total_steps(self.trainer)
        warmup, decay = self.warmup_steps, round(self.decay * steps)
        rate = tri_stage(warmup, steps - warmup - decay, decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept_head(pretrained: Path | None, vocabulary: Vocabulary | None) -> tuple[dict[str, Tensor], Vocabulary]:
    """The weights of a fine-tuned model's head, and the letters that they spell."""
    if pretrained is None:
        raise UserError("keep_head, but nothing is pretrained; name a fine-tuned model in model.init_args.pretrained")
    model = load_ctc(pretrained)
    if vocabulary is not None and vocabulary != model.vocabulary:
        raise UserError(
            f"{pretrained}: its head spells with another vocabulary than the one given; leave out "
            "model.init_args.vocabulary, or keep_head to learn to spell anew"
        )
    return model.head.state_dict(), model.vocabulary


def ten_hour_optimizer(parameters: ParamsT) -> AdamW:
    """That of 10 hours of transcripts: fairseq wav2vec/config/finetuning/base_10h.yaml."""
    return AdamW(parameters, lr=5e-5, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, fused=True)
