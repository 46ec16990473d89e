"""The table of the verbs of `hubert`."""

from hubert_lightning.verbs import Verbs

VERBS: Verbs = {
    "data": {
        "prepare": {
            "librispeech": "data.prepare:prepare_librispeech",
            "librilight": "data.prepare:prepare_librilight",
            "folder": "data.prepare:prepare_folder",
            "csv": "data.prepare_csv:prepare_csv",
            "kaldi": "data.prepare_kaldi:prepare_kaldi",
            "nemo": "data.prepare_nemo:prepare_nemo",
            "huggingface": "data.prepare_huggingface:prepare_huggingface",
            "lhotse": "data.prepare_lhotse:prepare_lhotse",
            "split": "data.prepare_split:prepare_split",
            "shar": "data.shar:prepare_shar",
            "alignments": "data.alignments:prepare_alignments",
        },
        "phones": "data.phones:phones",
        "vocabulary": "asr.lexicon:vocabulary",
    },
    "training": {
        "demo": "demo.demo:demo",
        "configs": {
            "": "packaged_configs:list_configs",
            "copy": "packaged_configs:copy_config",
        },
        "pretrain": "recipes.commands:pretrain",
        "finetune": "recipes.commands:finetune",
        "plan": "planning.plan_commands:plan",
        "fit": "training.commands:fit",
        "validate": "training.commands:validate",
        "test": "training.commands:test",
        "predict": "training.commands:predict",
        "average": "training.averaging:average",
        "report": "report.commands:report",
        "dashboard": "training.dashboard:dashboard",
    },
    "units": {
        "quality": "units.quality_command:quality",
        "kmeans": {
            "fit": "units.kmeans_commands:fit_kmeans",
            "import": "units.kmeans_commands:import_kmeans",
            "export": "units.kmeans_commands:export_kmeans",
        },
        "labels": {
            "check": "units.label_text:check_labels",
            "export": "units.label_text:export_labels",
            "import": "units.label_text:import_labels",
        },
        "units": "units.unit_commands:units",
    },
    "recognition": {
        "transcribe": "asr.transcribe:transcribe",
        "align": "asr.transcribe:align",
        "score": "report.commands:score_file",
        "ngram": "asr.ngram:ngram",
        "lexicon": "asr.lexicon:lexicon",
        "tune-decoder": "asr.tune_decoder:tune_decoder",
    },
    "models": {
        "import": "interchange.import_export:import_model",
        "export": "interchange.import_export:export_model",
        "serve": "serving.serve:serve",
    },
    "shell": {
        "completion": "completion:completion",
    },
}
"""Group → verb → "room.module:function", or the verbs of a verb."""
