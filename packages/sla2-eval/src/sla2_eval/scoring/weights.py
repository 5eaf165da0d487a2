"""The weight files that metrics need: what they are, where they lie, and fetching them with a
checksum. Never by itself.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sla2_eval.runs.store import file_digest, write_atomic


class WeightsError(RuntimeError):
    """A weight file that is missing, of another content than pinned, or cannot be fetched; the
    message is one line.
    """


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file of weights. `sha256` is the digest or its beginning; None: pinned on this machine when
    first fetched.
    """

    name: str
    file_name: str
    url: str
    megabytes: int
    licence: str
    sha256: str | None
    used_by: tuple[str, ...]


_SOURCES = {  # where files come from: the beginning of their addresses
    "torchvision": "https://download.pytorch.org/models/",
    "openai": "https://openaipublic.azureedge.net/clip/models/",
    "hub": "https://huggingface.co/",
    "laion": "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/",
    "dino": "https://dl.fbaipublicfiles.com/dino/",
    "pyiqa": "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/",
    "jepa": "https://dl.fbaipublicfiles.com/jepa/",
    "stylegan-v": "https://www.dropbox.com/s/ge9e5ujwgetktms/",
}
_IMAGENET = "BSD-3-Clause (torchvision); trained on data with terms of their own"
_CLIP = "MIT (OpenAI CLIP)"
_JEPA = "CC-BY-NC-4.0 (V-JEPA)"
_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
# name, megabytes, licence, sha256, metrics, source, address there; and the file's name here if it
# is another
_TABLE = (
    ("alexnet", 233, _IMAGENET, "7be5be79", "lpips", "torchvision", "alexnet-owt-7be5be79.pth"),
    ("vgg16", 528, _IMAGENET, "397923af", "lpips_vgg", "torchvision", "vgg16-397923af.pth"),
    (
        "squeezenet",
        5,
        _IMAGENET,
        "b8a52dc0",
        "lpips_squeeze",
        "torchvision",
        "squeezenet1_1-b8a52dc0.pth",
    ),
    (
        "raft",
        20,
        _IMAGENET,
        "22a6c225",
        "dynamic_degree temporal_flickering_static",
        "torchvision",
        "raft_large_C_T_V1-22a6c225.pth",
    ),
    (
        "clip_b32",
        338,
        _CLIP,
        _B32,
        "clip_score clip_similarity background_consistency",
        "openai",
        f"{_B32}/ViT-B-32.pt",
    ),
    ("clip_l14", 890, _CLIP, _L14, "aesthetic_quality", "openai", f"{_L14}/ViT-L-14.pt"),
    (
        "aesthetic_head",
        1,
        "MIT (LAION aesthetic-predictor)",
        None,
        "aesthetic_quality",
        "laion",
        "sa_0_4_vit_l_14_linear.pth",
    ),
    (
        "dino_b16",
        327,
        "Apache-2.0 (DINO)",
        None,
        "subject_consistency",
        "dino",
        "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    (
        "i3d",
        49,
        "Apache-2.0 (Kinetics-400 I3D)",
        None,
        "fvd",
        "stylegan-v",
        "i3d_torchscript.pt?dl=1",
    ),
    (
        "videomae",
        4050,  # of its parameters in fp32
        "MIT (VideoMAE V2)",
        None,
        "fvd_videomae",
        "hub",
        "OpenGVLab/InternVideoMAE_models/resolve/main/mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth",
    ),
    (
        "vjepa",
        10350,  # of encoder, its average, predictor and Adam's moments in fp32
        _JEPA,
        None,
        "jedi",
        "jepa",
        "vith16/vith16.pth.tar",
        "vjepa_vith16.pth.tar",
    ),
    (
        "vjepa_probe",
        239,  # of the probe and Adam's moments in fp32
        _JEPA,
        None,
        "jedi",
        "jepa",
        "vith16/ssv2-probe.pth.tar",
        "vjepa_vith16_ssv2_probe.pth.tar",
    ),
    (
        "musiq",
        104,
        "Apache-2.0 (MUSIQ)",
        "358bb6af",
        "imaging_quality",
        "pyiqa",
        "musiq_spaq_ckpt-358bb6af.pth",
    ),
    (
        "amt_s",
        12,
        "CC-BY-NC-4.0 (AMT)",
        None,
        "motion_smoothness",
        "hub",
        "lalala125/AMT/resolve/main/amt-s.pth",
    ),
    (
        "viclip",
        1710,
        "Apache-2.0 (InternVid)",
        None,
        "overall_consistency temporal_style",
        "hub",
        "OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth",
    ),
)


def _row(
    name: str,
    megabytes: int,
    licence: str,
    sha256: str | None,
    metrics: str,
    source: str,
    address: str,
    file_name: str | None = None,
) -> WeightFile:
    return WeightFile(
        name=name,
        file_name=file_name or address.rpartition("/")[2].partition("?")[0],
        url=_SOURCES[source] + address,
        megabytes=megabytes,
        licence=licence,
        sha256=sha256,
        used_by=tuple(metrics.split()),
    )


_FILES = tuple(_row(*row) for row in _TABLE)
FILES: dict[str, WeightFile] = {file.name: file for file in _FILES}


def folder() -> Path:
    """Where weight files lie: SLA2_WEIGHTS, else sla2/weights in the user's cache folder. Makes
    nothing.
    """
    if named := os.environ.get("SLA2_WEIGHTS"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sla2" / "weights"


def _known(name: str) -> WeightFile:
    if name not in FILES:
        raise ValueError(f"name: expected one of {', '.join(FILES)}, got {name!r}")
    return FILES[name]


def path_of(name: str, files: Mapping[str, str] | None = None) -> Path:
    """The path a weight file has, whether it is there or not; `files` names other places for some
    of them.
    """
    if files and name in files:
        return Path(files[name]).expanduser()
    return folder() / _known(name).file_name


def is_present(name: str, files: Mapping[str, str] | None = None) -> bool:
    """Whether the file is there; its content is checked by `verified`."""
    return path_of(name, files).is_file()


def how_to_get(name: str) -> str:
    """The command that fetches the file."""
    return f"sla2 weights fetch {_known(name).name}"


def _pinned(name: str, path: Path) -> str | None:
    note = path.with_name(path.name + ".sha256")
    if FILES[name].sha256:
        return FILES[name].sha256
    return next(iter(note.read_text().split()), None) if note.is_file() else None


def verified(
    name: str, files: Mapping[str, str] | None = None, digests: Mapping[str, str] | None = None
) -> Path:
    """The path of a weight file whose content has the pinned digest.

    A file of one's own, named in `files`, needs its digest in `digests`. Raises WeightsError if the
    file is missing, has no pinned digest, or has another content.
    """
    path = path_of(name, files)
    if not path.is_file():
        raise WeightsError(
            f"{path}: expected the weights {name}, got nothing there; run {how_to_get(name)}"
        )
    expected = (digests or {}).get(name) or (
        None if files and name in files else _pinned(name, path)
    )
    if not expected:
        raise WeightsError(
            f"{path}: expected a pinned sha256 in {path.name}.sha256 or `digests`, got none"
        )
    actual = file_digest(path)
    if not actual.startswith(expected):
        raise WeightsError(
            f"{path}: expected sha256 {expected}, got {actual}; run {how_to_get(name)} again"
        )
    return path


def weights_list() -> list[dict]:
    """Every weight file with its size, licence, metrics, where it goes and whether it is there."""
    return [
        {**asdict(file), "path": str(path_of(file.name)), "present": is_present(file.name)}
        for file in _FILES
    ]


def weights_fetch(name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download a weight file into `folder()` and check its digest; what is there and right is kept,
    what is wrong replaced.

    `progress` is called with the bytes got and expected (0 if unknown). A file without a published
    digest is pinned by NAME.sha256 beside it. Raises ValueError for an unknown name, WeightsError
    for a failed download or another content.
    """
    import urllib.request

    file, target = _known(name), path_of(name)
    pinned = _pinned(name, target)
    if target.is_file() and (not pinned or file_digest(target).startswith(pinned)):
        return verified(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with urllib.request.urlopen(file.url, timeout=60) as response, partial.open("wb") as out:
            expected, got = int(response.headers.get("Content-Length") or 0), 0
            while block := response.read(1 << 20):
                out.write(block)
                got += len(block)
                if progress:
                    progress(got, expected)
        if expected and got != expected:
            raise WeightsError(f"{file.url}: expected {expected} bytes, got {got}")
        actual = file_digest(partial)
        if pinned and not actual.startswith(pinned):
            raise WeightsError(f"{file.url}: expected sha256 {pinned}, got {actual}")
        if not pinned:
            write_atomic(target.with_name(target.name + ".sha256"), f"{actual}  {target.name}\n")
        os.replace(partial, target)
    except OSError as error:
        raise WeightsError(f"{file.url}: expected the weights {name}, got {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return target
