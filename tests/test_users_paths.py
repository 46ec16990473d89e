"""From data to a result with the commands of the documentation, as they are written there.

What the commands name (RECORDINGS, table.csv, a model of the hub) is made small, in a file of that name; options of a
small, short run are added.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from documented import code_blocks, commands
from helpers import ROOT, save_ctc
from lhotse import CutSet

from hubert_lightning import HubertEncoder, Transcriber, load_encoder
from hubert_lightning.cli import main
from hubert_lightning.data.audio import read_waveform
from hubert_lightning.data.manifest import read_manifest
from hubert_lightning.frames import SAMPLE_RATE

README, OWN_DATA, TRANSCRIBING, INSTALL = (
    ROOT / name for name in ("README.md", "docs/own-data.md", "docs/transcribing.md", "docs/install.md")
)
SHORT = ["--steps", "2", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
SIZES = {"conv_channels": 16, "dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64}
ADDED = {
    "pretrain": [
        *SHORT,
        *(f"--model.init_args.encoder.{name}={size}" for name, size in SIZES.items()),
        *("--iterations.1.clusters=8", "--iterations.2.clusters=8", "--data.min_duration=0.5"),
    ],
    "finetune": SHORT,
    "test": ["--trainer.accelerator", "cpu", "--data.num_workers", "0"],
}
"""Options by verb."""


def block_with(page: Path, command: str) -> list[list[str]]:
    """The commands of the first block of a page that has a command, each as its arguments."""
    return list(commands(next(block for block in code_blocks(page) if f"hubert {command}" in block)))


def run(args: list[str]) -> None:
    main([*args, *ADDED.get(args[0], [])])


def write_m4a(path: Path, waveform: np.ndarray) -> None:
    """waveform: (samples,) int16."""
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(waveform[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])


@pytest.fixture
def spoken(train_cuts: CutSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: RECORDINGS in three formats, table.csv of their sentences, and recording.mp3 and .m4a."""
    folder = tmp_path / "RECORDINGS"
    folder.mkdir()
    rows = ["path,text"]
    for number, cut in enumerate(train_cuts):
        waveform = read_waveform(cut).numpy()
        suffix = ("wav", "flac", "m4a")[number % 3]
        path = folder / f"{number}.{suffix}"
        if suffix == "m4a":
            write_m4a(path, (waveform * 2**15).astype(np.int16))
        else:
            soundfile.write(path, waveform, SAMPLE_RATE)
        rows.append(f"RECORDINGS/{path.name},{cut.supervisions[0].text}")
    (tmp_path / "table.csv").write_text("\n".join(rows), "utf-8")
    soundfile.write(tmp_path / "recording.mp3", read_waveform(train_cuts[0]).numpy(), SAMPLE_RATE)
    shutil.copy(folder / "2.m4a", tmp_path / "recording.m4a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_folder_becomes_an_encoder_and_with_a_table_a_model_that_transcribes(
    spoken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [pretrain] = block_with(README, "pretrain RECORDINGS")
    assert [pretrain] == block_with(OWN_DATA, "pretrain RECORDINGS")
    run(pretrain)
    encoder = load_encoder("checkpoints/mine/iteration2/last.ckpt")
    assert isinstance(encoder, HubertEncoder)
    assert encoder.config.dim == SIZES["dim"]
    prepared = [len(read_manifest(path)) for path in Path("checkpoints/mine/manifests").glob("*.jsonl.gz")]
    assert sum(prepared) == len(list(Path("RECORDINGS").iterdir()))

    finetune, test, transcribe = block_with(OWN_DATA, "finetune table.csv")
    for command in (finetune, test):
        run(command)
    assert "word" in capsys.readouterr().out
    run(transcribe)
    [text] = [line for line in capsys.readouterr().out.splitlines() if line]
    assert Transcriber.from_pretrained("checkpoints/own/best.ckpt")("recording.mp3").text in text


@pytest.mark.slow
def test_a_table_and_a_released_model_become_subtitles(spoken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finetune, transcribe = block_with(README, "finetune table.csv")
    released = Path(finetune[finetune.index("--init") + 1])
    assert str(released) == "facebook/hubert-base-ls960"
    released.parent.mkdir()
    save_ctc(released)
    run(finetune)
    capsys.readouterr()
    run(transcribe)
    assert capsys.readouterr().out == Transcriber.from_pretrained("checkpoints/own/best.ckpt")("recording.mp3").to_srt()


@pytest.mark.slow
def test_an_m4a_is_transcribed_by_one_verb_and_by_five_lines_of_python(
    spoken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = re.findall(r"```python\n(.*?)```", INSTALL.read_text("utf-8"), re.DOTALL)[0]
    assert len(python.splitlines()) <= 5
    [released] = re.findall(r'from_pretrained\("(.*?)"', python)
    Path(released).parent.mkdir()
    save_ctc(Path(released), spread=3.0)
    names: dict[str, Any] = {}
    exec(python, names)
    printed = capsys.readouterr().out
    assert len(printed.split()) > 1

    shutil.copy(released, "MODEL")
    transcribe = block_with(TRANSCRIBING, "transcribe MODEL recording.m4a")[0]
    assert transcribe == ["transcribe", "MODEL", "recording.m4a"]
    run(transcribe)
    assert printed in capsys.readouterr().out
