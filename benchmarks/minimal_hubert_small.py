"""minimal-hubert's training loop, loader and settings, on a CPU, for a small model: the peer in time_to_quality.py.

It runs in the peer's own Python, 3.12 with spidr 0.1 (0.2 gives masks that it cannot read) and what else it requires,
and imports nothing of this package. Different from minimal_hubert/train.py (commit cb15996) are the sizes of the model,
one process on a CPU, torch.compile only where asked, and the numbers of steps and of seconds in a batch; the loss, its
divisor, AdamW, schedule, clipping, masks, crops, buckets, dropouts and layer drop are its own.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import soundfile
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW


class _SoundFile:
    """In the place of torchcodec's decoders, which need FFmpeg's libraries."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_all_samples(self) -> SimpleNamespace:
        samples, rate = soundfile.read(self.path, dtype="float32", always_2d=True)
        return SimpleNamespace(data=torch.from_numpy(samples.T.copy()), sample_rate=rate)


def small_model(sizes: dict[str, int], clusters: int) -> torch.nn.Module:
    """Its model, with the convolutions, the positional convolution and the layers of our small encoder."""
    from minimal_hubert import config, model
    from spidr.config import DEFAULT_CONV_LAYER_CONFIG

    channels = [(sizes["conv_channels"], kernel, stride) for _, kernel, stride in DEFAULT_CONV_LAYER_CONFIG]
    model.DEFAULT_CONV_LAYER_CONFIG = channels
    base, positions = config.HuBERTConfig.from_size("base"), model.ConvPositionalEmbedding
    changed = {
        "encoder_embed_dim": sizes["dim"],
        "encoder_num_layers": sizes["num_layers"],
        "encoder_num_heads": sizes["num_heads"],
        "encoder_ff_interm_features": sizes["ffn_dim"],
        "final_dim": sizes["final_dim"],
    }
    small = config.HuBERTConfig(**base.__dict__ | changed)
    model.HuBERTConfig = SimpleNamespace(from_size=lambda size: small)
    model.ConvPositionalEmbedding = lambda dim, kernel_size, groups, depth: positions(
        dim, kernel_size=sizes["pos_kernel"], groups=groups, depth=depth
    )
    return model.HuBERTPretrain(clusters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("manifest", type=Path, help="a .jsonl with path, num_samples and units")
    parser.add_argument("out", type=Path, help="folder of the snapshots")
    parser.add_argument("--sizes", type=json.loads, required=True)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100, help="steps from one snapshot to the next")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio in a batch")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="bf16")
    args = parser.parse_args()
    decoders = ModuleType("torchcodec.decoders")
    decoders.AudioDecoder = decoders.WavDecoder = _SoundFile  # type: ignore[attr-defined]
    sys.modules |= {"torchcodec": ModuleType("torchcodec"), "torchcodec.decoders": decoders}
    sys.path.insert(0, str(args.checkout / "src"))
    from minimal_hubert.config import hubert_data_config, hubert_optim_config
    from minimal_hubert.data import build_dataloader_with_labels
    from minimal_hubert.train import LinearDecayLRScheduler
    from spidr.config import MaskingConfig

    args.out.mkdir(parents=True)
    dist.init_process_group("gloo", init_method=f"file://{args.out.resolve()}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    data = hubert_data_config(str(args.manifest)).__dict__
    most = int(16_000 * args.seconds)
    data |= {"max_batch_length": most, "max_sample_size": min(data["max_sample_size"], most)}
    data |= {"num_workers": 1, "pin_memory": False}
    loader = build_dataloader_with_labels(SimpleNamespace(**data), MaskingConfig())
    settings = hubert_optim_config()
    model = small_model(args.sizes, args.clusters).train()
    if args.compile:
        model.compile(dynamic=True)
    optimizer = AdamW(
        model.parameters(),
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    warmup = round(args.steps * settings.warmup_steps / (settings.warmup_steps + settings.decay_steps))
    scheduler = LinearDecayLRScheduler(optimizer, warmup, args.steps)
    (args.out / "start").write_text(str(time.time()))
    step = epoch = 0
    while step < args.steps:
        epoch += 1
        loader.batch_sampler.set_epoch(epoch)
        for waveforms, labels, attention_mask, mask in loader:
            if step >= args.steps:
                break
            with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                loss, _ = model(waveforms, labels, mask=mask, attention_mask=attention_mask)
            (loss.sum() / mask.sum()).backward()
            clip_grad_norm_(model.parameters(), settings.max_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            step += 1
            if step % args.every == 0 or step == args.steps:
                part = args.out / "part"
                torch.save(model.state_dict(), part)
                part.rename(args.out / f"step={step}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
