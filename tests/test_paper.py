"""The numbers of the paper, transcribed once more, and where they stand: in configs, their first lines and the docs.

HuBERT: Hsu et al. 2021 (arXiv 2106.07447). wav2vec 2.0: Baevski et al. 2020 (arXiv 2006.11477).
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT

from hubert_lightning.features.mfcc import MFCC_PARTS
from hubert_lightning.training.iterations import Iteration

SPLITS = {"10min": "10 min", "1h": "1 h", "10h": "10 h", "100h": "100 h", "960h": "960 h"}
# Tables II and III: WER in % of dev-clean/dev-other/test-clean/test-other
BASE_4_GRAM = {
    "10min": "9.1/15.0/9.7/15.3",
    "1h": "5.6/10.9/6.1/11.3",
    "10h": "3.9/9.0/4.3/9.4",
    "100h": "2.7/7.8/3.4/8.1",
}
LARGE_4_GRAM = {"10min": "6.1/9.4/6.6/10.1"}
LARGE_TRANSFORMER = {
    "10min": "4.3/7.0/4.7/7.6",
    "1h": "2.6/4.9/2.9/5.4",
    "10h": "2.2/4.3/2.4/4.6",
    "100h": "1.8/3.7/2.1/3.9",
    "960h": "1.5/3.0/1.9/3.3",
}
XLARGE_TRANSFORMER = {
    "10min": "4.4/6.1/4.6/6.8",
    "1h": "2.6/4.2/2.8/4.8",
    "10h": "2.1/3.6/2.3/4.0",
    "100h": "1.7/3.0/1.9/3.5",
    "960h": "1.5/2.5/1.8/2.9",
}
COLUMNS = (BASE_4_GRAM, LARGE_4_GRAM, LARGE_TRANSFORMER, XLARGE_TRANSFORMER)
FOLDERS = {"": (BASE_4_GRAM,), "large": (LARGE_TRANSFORMER, LARGE_4_GRAM), "xlarge": (XLARGE_TRANSFORMER,)}
FOUR_NUMBERS = re.compile(r"\d+\.\d(?:/\d+\.\d){3}")

# WER in % on dev-other, 10 h, n-gram, after 100 k steps at a mask probability of 6.5 %
TABLE_V = {  # α 1.0/0.5/0.0
    "mfcc-50": "18.68/31.07/94.60",
    "mfcc-100": "17.86/29.57/96.37",
    "mfcc-500": "18.40/33.42/97.66",
    "iteration1-layer6-500": "11.91/13.47/23.29",
    "iteration2-layer9-500": "10.75/11.59/13.79",
}
TABLE_VI = {
    "ensemble-50-100": "17.81",
    "ensemble-50-100-500": "17.56",
    "product-0": "19.26",
    "product-1": "17.64",
    "product-2": "18.46",
    "product-0-1-2": "16.73",
}
TABLE_VII = {"mfcc-50": "18.68/13.65/12.40/11.82", "mfcc-100": "17.86/12.97/12.32/11.68"}  # 100/250/400/800 k steps

ABLATIONS: dict[str, dict[str, Any]] = {
    "mfcc-50": {"features": "mfcc", "clusters": 50},
    "mfcc-100": {"features": "mfcc", "clusters": 100},
    "mfcc-500": {"features": "mfcc", "clusters": 500},
    "iteration1-layer6-500": {"features": "checkpoints/base/iteration1/last.ckpt", "layer": 6, "clusters": 500},
    "iteration2-layer9-500": {"features": "checkpoints/base/iteration2/last.ckpt", "layer": 9, "clusters": 500},
    "ensemble-50-100": {"features": "mfcc", "clusters": [50, 100]},
    "ensemble-50-100-500": {"features": "mfcc", "clusters": [50, 100, 500]},
    "product-0": {"features": "mfcc", "parts": ["cepstra"], "clusters": 100},
    "product-1": {"features": "mfcc", "parts": ["delta"], "clusters": 100},
    "product-2": {"features": "mfcc", "parts": ["delta_delta"], "clusters": 100},
    "product-0-1-2": {"features": "mfcc", "parts": ["cepstra", "delta", "delta_delta"], "clusters": 100},
}


def header(path: Path) -> str:
    """The comment that a config opens with, as one line."""
    lines = path.read_text("utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:end])


def rows_of(document: str, heading: str) -> dict[str, list[str]]:
    """The cells of a table in Markdown by its first cell; the table is the first under a line that begins so."""
    lines = document.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(heading))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_first_lines_of_a_fine_tuning_config_have_the_papers_error_rates(folder: str, split: str) -> None:
    expected = [column[split] for column in FOLDERS[folder] if split in column]
    head = header(ROOT / "configs/finetune" / folder / f"{split}.yaml")
    of_hubert = re.split(r"torchaudio's reproduction|wav2vec 2\.0 Base has", head)[0]
    assert FOUR_NUMBERS.findall(of_hubert) == expected
    table = "III" if split == "960h" else "II"
    assert not expected or f"(HuBERT table {table})" in head


def test_the_docs_have_the_papers_tables_of_error_rates() -> None:
    rows = rows_of((ROOT / "docs/librispeech.md").read_text("utf-8"), "| labels | Base, 4-gram")
    assert rows == {name: [column.get(split, "–") for column in COLUMNS] for split, name in SPLITS.items()}


@pytest.mark.parametrize("size", ["large", "xlarge"])
def test_the_first_lines_of_a_pre_training_config_have_the_papers_error_rates(size: str) -> None:
    wer = {"large": LARGE_TRANSFORMER, "xlarge": XLARGE_TRANSFORMER}[size]["10h"]
    assert f"WER on test-clean/test-other {'/'.join(wer.split('/')[2:])} % (table II)" in header(
        ROOT / "configs/pretrain" / f"{size}.yaml"
    )


def test_every_row_of_the_ablation_tables_has_a_config() -> None:
    assert {path.stem for path in (ROOT / "configs/pretrain/ablations").glob("*.yaml")} == ABLATIONS.keys()
    assert ABLATIONS.keys() == {*TABLE_V, *TABLE_VI, *TABLE_VII}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_has_the_labels_masks_and_steps_of_the_paper_and_its_error_rates(name: str) -> None:
    path = ROOT / "configs/pretrain/ablations" / f"{name}.yaml"
    config, head = yaml.safe_load(path.read_text("utf-8")), header(path)
    assert config["iterations"] == [ABLATIONS[name] | {"max_steps": 100_000}]
    assert config["data"] == {"init_args": {"mask_prob": 0.65}}  # 6.5 % of frames start a span of 10
    assert config["output"] == f"checkpoints/base-{name}"
    assert config.keys() == {"output", "iterations", "data", "trainer"}  # α and warm-up are Base's: 1 and 8 %
    for table, rates in (("V", TABLE_V), ("VI", TABLE_VI), ("VII", TABLE_VII)):
        if name in rates:
            assert re.search(rf"\btables? (\w+ and )?{table}\b", head)
            assert f" {rates[name]} " in head
    assert f"configs/pretrain/ablations/{name}.yaml" in head
    assert f"checkpoints/base-{name}/iteration1/last.ckpt" in head


def test_the_docs_have_the_papers_tables_of_ablations() -> None:
    document = (ROOT / "docs/librispeech.md").read_text("utf-8")
    five, six, seven = (rows_of(document, f"| table {number}, ") for number in ("V", "VI", "VII"))
    of_five = {cells[0]: "/".join(cells[1:]) for cells in five.values()}
    assert of_five.pop("none: its alignments are not public") == "10.38/9.16/9.79"  # chenones
    assert of_five == {f"`{name}.yaml`": rates for name, rates in TABLE_V.items()}
    assert {cells[0]: cells[1] for cells in six.values()} == {f"`{of}.yaml`": rate for of, rate in TABLE_VI.items()}
    assert {of: "/".join(cells) for of, cells in seven.items()} == {
        f"`{of}.yaml`": wer for of, wer in TABLE_VII.items()
    }


def test_product_k_means_has_three_parts_of_39_of_117_dimensions() -> None:
    columns = [column for part in MFCC_PARTS.values() for column in range(117)[part]]
    assert [*MFCC_PARTS] == ["cepstra", "delta", "delta_delta"]
    assert columns == [*range(117)]
    assert {part.stop - part.start for part in MFCC_PARTS.values()} == {39}


# §IV-B, §IV-C and table I: steps, GPUs, seconds of audio on each, labels
PRETRAINING: dict[str, tuple[int, float, list[dict[str, Any]]]] = {
    "base": (
        32,
        87.5,
        [
            {"features": "mfcc", "clusters": 100, "max_steps": 250_000},
            {"features": "previous", "layer": 6, "clusters": 500, "max_steps": 400_000},
        ],
    ),
    "large": (
        128,
        56.25,
        [{"features": "checkpoints/base/iteration2/last.ckpt", "layer": 9, "clusters": 500, "max_steps": 400_000}],
    ),
    "xlarge": (
        256,
        22.5,
        [{"features": "checkpoints/base/iteration2/last.ckpt", "layer": 9, "clusters": 500, "max_steps": 400_000}],
    ),
}


@pytest.mark.parametrize("size", PRETRAINING)
def test_a_pre_training_config_has_the_papers_iterations_warm_up_and_audio_of_a_step(size: str) -> None:
    gpus, seconds, iterations = PRETRAINING[size]
    config = yaml.safe_load((ROOT / "configs/pretrain" / f"{size}.yaml").read_text("utf-8"))
    assert config["iterations"] == iterations
    assert config["model"]["init_args"]["warmup"] == 0.08
    assert config["data"]["init_args"]["max_duration"] == seconds
    assert 8 * config["trainer"]["accumulate_grad_batches"] == gpus  # on eight
    default = Iteration()
    assert (default.features, default.clusters, default.max_steps) == ("mfcc", 100, 250_000)
    assert default.max_frames == 960 * 3600 * 50 // 10  # §IV-B: a tenth of the data in iteration 2


TABLE_IV = {  # PNMI, K-means of 1/10/100 h
    "MFCC, 100": ["0.251", "0.253", "0.253"],
    "MFCC, 500": ["0.283", "0.285", "0.287"],
    "iteration 1, layer 6, 100": ["0.563", "0.561", "0.575"],
    "iteration 1, layer 6, 500": ["0.680", "0.684", "0.686"],
}


def test_the_docs_have_the_papers_table_of_clusters() -> None:
    assert rows_of((ROOT / "docs/librispeech.md").read_text("utf-8"), "| features, clusters |") == TABLE_IV


# wav2vec 2.0 tables 7 and 8, lm_weight/word_score: of LibriSpeech, of Libri-light, 4-gram and Transformer each
WEIGHTS = {
    "10 min": ["3.23/-0.26", "1.20/-1.39", "3.86/-1.18", "1.47/-2.82"],
    "1 h": ["2.90/-1.62", "1.15/-2.08", "3.09/-2.33", "1.33/-0.69"],
    "10 h": ["2.46/-0.59", "1.06/-2.32", "2.12/-0.90", "0.94/-1.05"],
    "100 h": ["2.15/-0.52", "0.87/-1.00", "2.15/-0.52", "0.87/-1.00"],
    "960 h": ["1.74/0.52", "0.92/-0.86", "1.57/-0.64", "0.90/-0.31"],
}


def test_the_docs_have_the_decoder_weights_of_wav2vec_2() -> None:
    document = (ROOT / "docs/librispeech.md").read_text("utf-8")
    assert rows_of(document, "| labels | pre-trained on LibriSpeech, 4-gram") == WEIGHTS
