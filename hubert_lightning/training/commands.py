"""The verbs of Lightning's command line. Help and simple mistakes are answered before Lightning is imported."""

import os
from typing import Literal

from hubert_lightning.errors import UserError
from hubert_lightning.packaged_configs import listing
from hubert_lightning.parsing import given_configs, typed_options
from hubert_lightning.short_options import ALIASES, long_options, named_configs

HELP = """usage: hubert {verb} --config CONFIG [--config CONFIG ...] [--KEY VALUE ...]

{summary}

Configs are YAML files, or names of those of this package, such as pretrain/base (`hubert configs` lists
them). A later config overrides an earlier one, and a key on the command line overrides both.

Keys that matter
  --output FOLDER             folder of the run: checkpoints, config, metrics, labels
  --iterations LIST           rounds of pre-training, such as
                              [{{features: mfcc, clusters: 100, max_steps: 250000}},
                              {{features: previous, layer: 6, clusters: 500, max_steps: 400000}}]
  --iterations.1.KEY VALUE    one key of one of them; they count from 1
  --model CLASS               hubert_lightning.HubertPretraining or hubert_lightning.CTCFinetuning
  --model.init_args.pretrained PATH                   checkpoint of any system to start from
  --model.init_args.optimizer.init_args.lr RATE       peak learning rate
  --data CLASS                hubert_lightning.PretrainingData or hubert_lightning.TranscribedData
  --data.init_args.train MANIFEST ...                 manifests to train on, made by `hubert prepare`
  --data.init_args.validation MANIFEST ...            manifests to validate on
  --data.init_args.test MANIFEST ...                  manifests that `hubert test` and `hubert predict` read
  --data.init_args.max_duration SECONDS               seconds of audio in a batch, on each GPU
  --trainer.max_steps STEPS   steps of the run, if there are no iterations
  --trainer.accumulate_grad_batches NUMBER            batches of a step
  --trainer.devices NUMBER    GPUs; --trainer.num_nodes NODES
  --trainer.precision NAME    numeric precision; by default bf16-mixed on GPUs that support it
  --checkpoint.every_n_train_steps STEPS              steps from one last.ckpt to the next
  --ckpt_path PATH            checkpoint to resume from or to evaluate; by default the run's own
  --seed_everything SEED

Short forms, for `hubert fit` and verbs that call it
  --lr RATE                   model.init_args.optimizer.init_args.lr
  --batch_seconds SECONDS     data.init_args.max_duration
  --steps STEPS, --max_steps  trainer.max_steps; with iterations, max_steps of each of them

All keys
  hubert {verb} --model.help hubert_lightning.HubertPretraining   arguments of a class (--data.help CLASS)
  hubert {verb} --config CONFIG --print_config                    every key with its value
  hubert {verb} --help all                                        every key with its type

Classes of this package, as hubert_lightning.CLASS; those of lightning and torch also work
  trainer.callbacks           Relabel, LayerQuality, BestCheckpoints, PeakRateFinder
  trainer.strategy            LayerwiseFSDP
  iterations, kmeans          KMeans, ScikitKMeans
"""

KEYS = {
    "accumulate": "trainer.accumulate_grad_batches",
    "accumulation": "trainer.accumulate_grad_batches",
    "batch": "data.init_args.max_duration (seconds of audio in a batch)",
    "batch_duration": "data.init_args.max_duration (seconds of audio in a batch)",
    "batch_size": "data.init_args.max_duration (seconds of audio in a batch)",
    "clusters": "clusters of an entry of iterations",
    "devices": "trainer.devices",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "grad_clip": "trainer.gradient_clip_val",
    "labels": "data.init_args.labels",
    "layer": "layer of an entry of iterations",
    "learning_rate": "model.init_args.optimizer.init_args.lr",
    "logger": "trainer.logger",
    "lr": "model.init_args.optimizer.init_args.lr",
    "max_epochs": "trainer.max_epochs",
    "max_steps": "trainer.max_steps (with iterations: max_steps of each entry)",
    "nodes": "trainer.num_nodes",
    "num_clusters": "clusters of an entry of iterations",
    "num_nodes": "trainer.num_nodes",
    "num_workers": "data.init_args.num_workers",
    "out": "output",
    "output_dir": "output",
    "precision": "trainer.precision",
    "pretrained": "model.init_args.pretrained",
    "resume": "output (the same command resumes its run), or ckpt_path",
    "save_every": "checkpoint.every_n_train_steps",
    "seed": "seed_everything",
    "steps": "trainer.max_steps (with iterations: max_steps of each entry)",
    "strategy": "trainer.strategy",
    "train": "data.init_args.train",
    "validation": "data.init_args.validation",
    "wandb": "trainer.logger",
    "warmup": "model.init_args.warmup",
    "warmup_steps": "model.init_args.warmup_steps",
    "weight_decay": "model.init_args.optimizer.init_args.weight_decay",
    "workers": "data.init_args.num_workers",
}
"""Names that other programs have for our keys."""

MOVED = {
    "configs/clusters": "configs/pretrain/ablations",
    "configs/cluster": "configs/launch",
    "configs/size": "configs/pretrain/size",
    "configs/librispeech.sh": "configs/recipes/librispeech.sh",
}
"""Former paths of this package's configs, and the present ones."""

CLASSES = {
    "model": ("hubert_lightning.HubertPretraining", "hubert_lightning.CTCFinetuning"),
    "data": ("hubert_lightning.PretrainingData", "hubert_lightning.TranscribedData"),
}
"""Classes of this package that a config may have under each key."""


def fit(args: list[str]) -> None:
    """Pre-train an encoder on untranscribed audio, or fine-tune it with CTC: hubert fit --config CONFIG.

    Args:
        args: Command line after the verb.
    """
    args = named_configs(args)
    if _is_answered("fit", args):
        return
    args = long_options(args)
    from hubert_lightning.training import experiment

    experiment.fit(args)


def validate(args: list[str]) -> None:
    """Compute losses, accuracies or error rates on the validation manifests.

    Args:
        args: Command line after the verb.
    """
    _judge("validate", args)


def test(args: list[str]) -> None:
    """Compute word and character error rates on the test manifests; hypotheses go to test.jsonl.

    Args:
        args: Command line after the verb.
    """
    _judge("test", args)


def predict(args: list[str]) -> None:
    """Transcribe the test manifests; hypotheses go to predict.jsonl.

    Args:
        args: Command line after the verb.
    """
    _judge("predict", args)


def _judge(verb: Literal["validate", "test", "predict"], args: list[str]) -> None:
    args = named_configs(args)
    if _is_answered(verb, args):
        return
    args = long_options(args, of_fit=False)
    from hubert_lightning.training import experiment

    experiment.judge(verb, args)


def _is_answered(verb: str, args: list[str]) -> bool:
    """Print help if it was asked for.

    Raises:
        UserError: The command line names no config or a missing one, an option that another program has, or an unknown
            topic of help.
    """
    if args in (["--help"], ["-h"]):
        summary = str(globals()[verb].__doc__).split("\n")[0].partition(":")[0].rstrip(".")
        print(HELP.format(verb=verb, summary=f"{summary}."), end="")
        return True
    if args == ["--help", "all"]:
        args.pop()
        return False
    if args[:1] in (["--help"], ["-h"]) and args[1:] and not args[1].startswith("-"):
        raise UserError(
            f"--help {args[1]}: there is no help on that; write `hubert {verb} --help`, `hubert {verb} --help all` or "
            f"`hubert {verb} --model.help {CLASSES['model'][0]}`"
        )
    if args and not args[0].startswith("-") and args[0].endswith((".yaml", ".yml", ".sh")):
        _check_exists(verb, args[0])
        raise UserError(f"{args[0]} is given without --config; write --config {args[0]}")
    for name, value in typed_options(args):
        if name in ("model.help", "data.help"):
            _check_class(name, value)
        if (key := KEYS.get(name.replace("-", "_"))) and not (verb == "fit" and name.replace("-", "_") in ALIASES):
            raise UserError(f"there is no option {name}; the key is {key}; `hubert {verb} --help` lists the keys")
    for path in given_configs(args):
        if not set(str(path)) & set("{:\n"):  # not the text of a config
            _check_exists(verb, str(path))
    if not args:
        run = "" if verb == "fit" else "; give the config.yaml of a run"
        raise UserError(f"which config? `hubert {verb} --config CONFIG`{run}\n{listing()}".rstrip())
    return False


def _check_exists(verb: str, config: str) -> None:
    """Refuse a config that is missing, and name the new path of one that has moved."""
    if os.path.exists(config):
        return
    for former, present in MOVED.items():
        start, found, end = f"{config}/".partition(f"{former}/")
        if found:
            raise UserError(f"{config}: moved; write {start}{present}/{end}".rstrip("/"))
    way = "; `hubert configs` lists those of this package" if verb == "fit" else ", or give the config.yaml of a run"
    raise UserError(f"{config}: there is no such config; correct the path{way}")


def _check_class(option: str, typed: str) -> None:
    """Refuse a name without its package, and one of this package that is not a class of this kind."""
    known = CLASSES[option.removesuffix(".help")]
    if (
        typed
        and not typed.startswith("-")
        and typed.rpartition(".")[0] in ("", "hubert_lightning")
        and typed not in known
    ):
        raise UserError(f"--{option} {typed}: not the full name of a class; write {' or '.join(known)}")
