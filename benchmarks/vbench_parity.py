"""VBench's own functions against the metrics here, on the same frames and random weights of the
same architectures: the largest difference of a video in each dimension.

Example: python -m benchmarks.vbench_parity --out parity

Needs the environment of `sla2 vbench --setup` (detectron2 is not used), and pyiqa beside our own
packages; no GPU and no weights. docs/evaluation.md has the commands. A few minutes on a core. This
file is run twice: here, and with --theirs in that environment, whose code draws the weights and
computes VBench's side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FRAMES, SIZES = 6, ((128, 160), (136, 136))  # RAFT takes no side below 128
LARGE = 416, 608  # of a third video, for imaging quality, which shrinks beyond 512
PROMPTS = ("a red circle, zoom in", "Two foxes running over a snowy field at dawn, racking focus")
CLIP_B32 = {"embed_dim": 512, "image_resolution": 224, "vision_layers": 12, "vision_width": 768}
CLIP_B32 |= {"vision_patch_size": 32, "context_length": 77, "vocab_size": 49408}
CLIP_B32 |= {"transformer_width": 512, "transformer_heads": 8, "transformer_layers": 12}
LAYERS = 2  # of each tower of ViCLIP, whose widths are the published ones
AMT = {"corr_radius": 3, "corr_lvls": 4, "num_flows": 3}
PREPARED = "prepared.json"
# Names of the original RAFT's tensors, and torchvision's.
RAFT_NAMES = (
    (r"fnet\.", "feature_encoder."),
    (r"cnet\.", "context_encoder."),
    (r"(encoder\.layer\d\.\d)\.(?:conv|norm)(\d)(?=\.)", r"\1.convnormrelu\2.?"),
    (r"encoder\.(?:conv|norm)1(?=\.)", "encoder.convnormrelu.?"),
    (r"encoder\.conv2(?=\.)", "encoder.conv"),
    (r"update_block\.encoder\.conv([cf])(\d)", r"update_block.motion_encoder.conv_\1\2.0"),
    (r"update_block\.encoder\.conv(?=\.)", "update_block.motion_encoder.conv.0"),
    (r"conv_c", "convcorr"),
    (r"conv_f", "convflow"),
    (r"gru\.conv([zrq])(\d)", r"recurrent_block.convgru\2.conv\1"),
    (r"update_block\.mask\.0", "mask_predictor.convrelu.0"),
    (r"update_block\.mask\.2", "mask_predictor.conv"),
)


def as_torchvision(name: str) -> str:
    """torchvision's name of a tensor of the original RAFT."""
    part = "0" if re.search(r"conv\d\.\w+$", name) else "1"  # of a convolution or of its norm
    for pattern, renamed in RAFT_NAMES:
        name = re.sub(pattern, renamed, name)
    return name.replace("?", part)


def drawn(module: Any, spread: float = 0.02) -> Any:
    """The module with noise on every parameter: none is left at 0 or undefined."""
    import torch

    for parameter in module.parameters():
        kept = torch.nan_to_num(parameter.data).clamp(-1, 1)
        parameter.data = kept + spread * torch.randn_like(parameter)
    return module.eval()


def theirs(out: Path) -> None:
    """In VBench's environment: draw the weights into `out`, and write VBench's numbers."""
    import clip
    import torch
    from easydict import EasyDict

    work = json.loads((out / PREPARED).read_text())
    videos, prompts = work["videos"], work["prompts"]
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    # Parameters that ViCLIP leaves undefined are then NaN, which drawn() knows, in every run.
    torch.use_deterministic_algorithms(True, warn_only=True)

    def noted(name: str, result: tuple) -> None:
        found[name] = [float(row["video_results"]) for row in result[1]]
        print(name, found[name], file=sys.stderr, flush=True)

    from vbench.temporal_flickering import temporal_flickering

    noted("temporal_flickering", temporal_flickering(videos))

    import timm
    from vbench.subject_consistency import subject_consistency

    dino = drawn(timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=0))
    torch.save(dino.state_dict(), out / "dino_b16.pth")
    noted("subject_consistency", subject_consistency(dino, videos[1:], "cpu", False))

    from vbench.background_consistency import background_consistency

    model = drawn(clip.model.CLIP(**CLIP_B32))
    clip.model.convert_weights(model)  # as clip.load leaves them: rounded to half precision
    model.float()
    torch.save(model.state_dict(), out / "clip_b32.pth")
    noted("background_consistency", background_consistency(model, None, videos, "cpu", False))

    from vbench.aesthetic_quality import laion_aesthetic

    head = drawn(torch.nn.Linear(512, 1), 1.0)
    torch.save(head.state_dict(), out / "aesthetic_head.pth")
    noted("aesthetic_quality", laion_aesthetic(head, model, videos, "cpu"))

    from pyiqa.archs.musiq_arch import MUSIQ
    from vbench.imaging_quality import technical_quality

    musiq = drawn(MUSIQ(pretrained=False))
    torch.save(musiq.state_dict(), out / "musiq.pth")
    noted("imaging_quality", technical_quality(musiq, [*videos, work["large"]], "cpu"))

    import vbench
    from vbench.motion_smoothness import MotionSmoothness, motion_smoothness
    from vbench.third_party.amt.utils.build_utils import build_from_cfg

    amt = Path(vbench.__file__).parent / "third_party" / "amt"
    network = EasyDict({"name": "networks.AMT-S.Model", "params": AMT})
    torch.save({"state_dict": drawn(build_from_cfg(network)).state_dict()}, out / "amt_s.pth")
    smooth = MotionSmoothness(str(amt / "cfgs" / "AMT-S.yaml"), str(out / "amt_s.pth"), "cpu")
    noted("motion_smoothness", motion_smoothness(smooth, videos))

    from vbench.dynamic_degree import RAFT, DynamicDegree, dynamic_degree

    args = EasyDict(small=False, mixed_precision=False, alternate_corr=False)
    raft = drawn(RAFT(args)).state_dict()
    torch.save(raft, out / "raft-original.pth")
    renamed = {
        as_torchvision(name): tensor for name, tensor in raft.items() if ".norm3." not in name
    }
    torch.save(renamed, out / "raft.pth")
    moving = DynamicDegree(EasyDict(args, model=str(out / "raft-original.pth")), "cpu")
    strengths, check = [], moving.check_move
    moving.check_move = lambda scores: strengths.append(scores) or check(scores)
    noted("dynamic_degree", dynamic_degree(moving, videos))
    found["flow"] = strengths

    # The text's vocabulary is that of CLIP, which is installed; VBench would fetch the same file.
    from vbench.third_party.ViCLIP import simple_tokenizer

    vocabulary = str(Path(clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz")
    simple_tokenizer.SimpleTokenizer.__init__.__defaults__ = (vocabulary,)
    from vbench.overall_consistency import overall_consistency
    from vbench.temporal_style import temporal_style
    from vbench.third_party.ViCLIP.viclip import ViCLIP

    net = ViCLIP(tokenizer=simple_tokenizer.SimpleTokenizer(vocabulary), pretrain=None)
    for tower in (net.vision_encoder, net.text_encoder):
        del tower.transformer.resblocks[LAYERS:]
    torch.save({"model": drawn(net).state_dict()}, out / "viclip.pth")
    rows = [{"prompt": p, "video_list": [v]} for p, v in zip(prompts, videos)]
    for name, function in (
        ("overall_consistency", overall_consistency),
        ("temporal_style", temporal_style),
    ):
        noted(name, function(net, rows, None, "cpu"))
    (out / "theirs.json").write_text(json.dumps(found))


def ours(out: Path, python: Path, frames: list, large: Any) -> dict[str, Any]:
    """The same numbers of the metrics here."""
    from sla2_eval.runs.store import file_digest
    from sla2_eval.scoring import metrics
    from sla2_eval.scoring.metrics import raft
    from sla2_eval.scoring.metrics.base import Sample
    from sla2_eval.scoring.metrics.viclip_model import LARGE

    def given(**names: str) -> dict:
        files = {name: str(out / f"{file}.pth") for name, file in names.items()}
        digests = {name: file_digest(Path(path)) for name, path in files.items()}
        return {"files": files, "digests": digests}

    viclip = {**LARGE, "vision": {**LARGE["vision"], "layers": LAYERS}}
    viclip["text"] = {**LARGE["text"], "layers": LAYERS}
    head = given(clip_l14="clip_b32", aesthetic_head="aesthetic_head")
    settings: dict[str, dict] = {
        "temporal_flickering": {},
        "background_consistency": given(clip_b32="clip_b32"),
        "overall_consistency": {**given(viclip="viclip"), "model": viclip},
        "temporal_style": {**given(viclip="viclip"), "model": viclip},
        "motion_smoothness": given(amt_s="amt_s"),
        "aesthetic_quality": {**head, "model": "ViT-B-32-quickgelu"},
        "subject_consistency": given(dino_b16="dino_b16"),
        "imaging_quality": given(musiq="musiq"),
        "dynamic_degree": given(raft="raft"),
    }
    # VBench's AMT, which needs nothing but torch, after our packages.
    sys.path.append(str(next(python.parent.parent.glob("lib/python*/site-packages"))))
    found: dict[str, Any] = {}
    samples = [Sample(x, 8.0, None, prompt) for x, prompt in zip(frames, PROMPTS, strict=True)]
    strengths: list[float] = []
    strongest = raft.strongest
    raft.strongest = lambda flow, share: strengths.append(strongest(flow, share)) or strengths[-1]
    for name, chosen in settings.items():
        scorer = metrics.load(name, chosen)
        of = samples[1:] if name == "subject_consistency" else list(samples)
        of += [Sample(large, 8.0, None, None)] if name == "imaging_quality" else []
        found[name] = [scorer(sample) for sample in of]
        print(name, found[name], file=sys.stderr, flush=True)
    return found | {"flow": [strengths[: FRAMES - 1], strengths[FRAMES - 1 :]]}


def compare(out: Path, python: Path) -> list[dict[str, Any]]:
    """Rows {"dimension", "vbench", "ours", "difference"} of means and of the largest difference."""
    if find_spec("pyiqa") is None:
        raise SystemExit("pyiqa: expected it (uv sync --all-packages --extra musiq), got none")
    import numpy as np
    from sla2_eval.scoring import metrics
    from sla2_eval.videos.video import read_video, write_video

    out.mkdir(parents=True, exist_ok=True)
    frames, videos = [], []
    for number, (height, width) in enumerate((*SIZES, LARGE)):
        y, x = np.mgrid[:height, :width]
        noise = np.random.default_rng(number).normal(0, 12, (FRAMES, height, width, 3))
        waves = [np.sin((x + 5 * t) / 11) * np.cos((y - 3 * t) / 9) for t in range(FRAMES)]
        clip = 127 + 80 * np.stack(waves)[..., None] * np.array([1.0, 0.6, -0.8]) + noise
        frames.append(clip.clip(0, 255).astype(np.uint8))
        videos.append(str(out.resolve() / f"video-{number}.mp4"))
        write_video(videos[-1], frames[-1], 8, lossless=True)
        assert (read_video(videos[-1]).frames == frames[-1]).all()
    work = {"videos": videos[:-1], "large": videos[-1], "prompts": PROMPTS}
    (out / PREPARED).write_text(json.dumps(work))
    if not (out / "theirs.json").is_file():
        command = [str(python), str(Path(__file__).resolve()), "--theirs", "--out", str(out)]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        subprocess.run(command, check=True, env=kept)
    first = json.loads((out / "theirs.json").read_text())
    second = ours(out, python, frames[:-1], frames[-1])
    rows = []
    for name, values in second.items():
        spec = metrics.specs().get(name)
        a, b = (np.asarray(v, dtype=np.float64) for v in (first[name], values))
        a = a / (spec.vbench_scale if spec else 1.0)
        rows.append(
            {
                "dimension": "its flow, pixels" if spec is None else name,
                "vbench": float(a.mean()),
                "ours": float(b.mean()),
                "difference": float(np.abs(a - b).max()),
            }
        )
    return rows


def main() -> None:
    """Print the table, and write it where it is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for videos, weights, VBench's side"
    )
    parser.add_argument("--python", type=Path, help="of an environment with VBench")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        theirs(args.out)
        return
    from sla2_eval.scoring.vbench_environment import ready_for

    rows = compare(args.out, args.python or ready_for([]))
    for row in rows:
        values = f"{row['vbench']:.6f} | {row['ours']:.6f} | {row['difference']:.1e}"
        print(f"| {row['dimension']} | {values} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
