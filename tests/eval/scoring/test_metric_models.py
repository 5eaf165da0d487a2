"""Metrics with models: tiny ones of the same interface, saved to disk and loaded by the path that
real weights take.
"""

import hashlib
import sys
import types

import numpy as np
import pytest
import torch
from sla2_eval.runs.store import file_digest
from sla2_eval.scoring import metrics, weights
from sla2_eval.scoring.metrics.base import MetricUnavailable, Sample
from sla2_eval.scoring.score import score
from sla2_eval.scoring.vbench import as_vbench
from sla2_eval.videos.video import write_video
from torch import nn

CLIP = {
    "embed_dim": 8,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


class I3D(nn.Module):
    """The call of StyleGAN-V's TorchScript I3D: (1, 3, T, H, W) in [-1, 1] -> 400 logits."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3 * 2 * 2, 400)

    def forward(
        self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool
    ) -> torch.Tensor:
        assert not rescale
        assert not resize
        assert return_features
        return self.project(nn.functional.adaptive_avg_pool3d(x, [1, 2, 2]).flatten(1))


def keep(path, content, **settings):
    """Save a state dict or module and return settings that name the file with its digest."""
    name = path.name.split(".")[0]
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in content.items()}, path)
    elif isinstance(content, torch.jit.ScriptModule):
        content.save(str(path))
    else:
        torch.save(content, path)
    files, digests = {name: str(path)}, {name: file_digest(path)}
    return {**settings, "files": files, "digests": digests}


def frames(seed, count=4, height=40, width=56):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def clip_settings(tmp_path):
    import open_clip

    return keep(tmp_path / "clip_b32.pt", open_clip.CLIP(**CLIP).state_dict(), model=CLIP)


@pytest.mark.parametrize(
    ("name", "net", "builder"),
    [("lpips", "alexnet", "alexnet"), ("lpips_squeeze", "squeezenet", "squeezenet1_1")],
)
def test_lpips_is_the_librarys(tmp_path, name, net, builder):
    import lpips
    import torchvision

    backbone = getattr(torchvision.models, builder)(weights=None)
    state = {k: v for k, v in backbone.state_dict().items() if k.startswith("features.")}
    scorer = metrics.load(name, keep(tmp_path / f"{net}.pth", state))
    video, reference = frames(0, 3, 64, 80), frames(1, 3, 64, 80)
    assert scorer(Sample(video, 8, video)) == 0.0

    theirs = lpips.LPIPS(
        net=metrics.specs()[name].settings["net"], pnet_rand=True, verbose=False
    ).eval()
    sliced = [module for key in sorted(theirs.net._modules) for module in getattr(theirs.net, key)]
    theirs_state = {
        k: v
        for m, b in zip(sliced, backbone.features)
        for k, v in zip(m.parameters(), b.parameters())
    }
    for mine, original in theirs_state.items():
        mine.data.copy_(original.data)
    x, y = (torch.from_numpy(v).permute(0, 3, 1, 2) / 127.5 - 1 for v in (video, reference))
    expected = theirs(x, y).mean().item()
    assert expected > 0.01
    assert scorer(Sample(video, 8, reference)) == pytest.approx(expected, rel=1e-4)


def test_clip_metrics_are_cosines_of_open_clips_features(clip_settings):
    import open_clip
    from torchvision import transforms

    model = open_clip.CLIP(**CLIP).eval()
    model.load_state_dict(torch.load(clip_settings["files"]["clip_b32"], weights_only=True))
    video, reference = frames(0, 3, 32, 32), frames(1, 3, 32, 32)
    normalise = transforms.Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    with torch.no_grad():
        a, b = (
            model.encode_image(
                normalise(torch.from_numpy(v).permute(0, 3, 1, 2) / 255), normalize=True
            )
            for v in (video, reference)
        )
        text = model.encode_text(
            open_clip.SimpleTokenizer(context_length=12)(["a red fox"]), normalize=True
        )
    similarity = metrics.load("clip_similarity", clip_settings)
    assert similarity(Sample(video, 8, reference)) == pytest.approx(
        (a * b).sum(-1).mean().item(), abs=1e-5
    )
    assert similarity(Sample(video, 8, video)) == pytest.approx(1.0, abs=1e-6)
    agreement = metrics.load("clip_score", clip_settings)
    assert agreement(Sample(video, 8, None, "a red fox")) == pytest.approx(
        (a @ text.T).mean().item(), abs=1e-5
    )


def test_the_consistencies_count_pairs_of_frames(make_folder, clip_settings, tmp_path):
    folder = make_folder("videos", 1, frames=3)
    write_video(folder / "pattern 000-1.mp4", frames(0, 6, 48, 64), 8)
    (folder / "manifest.jsonl").unlink()
    name = "background_consistency"
    found = score(folder, None, [name], tmp_path / "out", settings={name: clip_settings})
    short, long = (row["scores"][name] for row in found["videos"])
    assert found["metrics"][name]["vbench_mean"] == pytest.approx((2 * short + 5 * long) / 7)
    assert found["metrics"][name]["mean"] == pytest.approx((short + long) / 2)


def test_background_consistency_of_a_still_video_is_one(clip_settings):
    scorer = metrics.load("background_consistency", clip_settings)
    still = np.repeat(frames(0, 1), 4, axis=0)
    assert scorer(Sample(still, 8)) == pytest.approx(1.0, abs=1e-6)
    assert scorer(Sample(frames(0), 8)) < 1.0


def test_openais_torchscript_archives_are_read_for_their_tensors(tmp_path, clip_settings):
    class Archive(nn.Module):
        def __init__(self, state):
            super().__init__()
            for key, value in {**state, "input_resolution": torch.tensor(32)}.items():
                *path, leaf = key.split(".")
                owner = self
                for part in path:
                    if part not in owner._modules:
                        owner.add_module(part, nn.Module())
                    owner = owner._modules[part]
                owner.register_buffer(leaf, value.half() if value.is_floating_point() else value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    (tmp_path / "jit").mkdir()
    state = torch.load(clip_settings["files"]["clip_b32"], weights_only=True)
    archived = keep(tmp_path / "jit" / "clip_b32.pt", torch.jit.script(Archive(state)), model=CLIP)
    sample = Sample(frames(0), 8, frames(1))
    direct, through = (
        metrics.load("clip_similarity", s)(sample) for s in (clip_settings, archived)
    )
    assert through == pytest.approx(direct, abs=5e-3)


def test_subject_consistency_is_timms_class_token(tmp_path):
    import timm
    from sla2_eval.scoring.metrics.consistency import consistency

    options = {"num_classes": 0, "dynamic_img_size": True}
    model = timm.create_model("test_vit", **options).eval()
    settings = keep(tmp_path / "dino_b16.pth", model.state_dict(), model="test_vit", size=160)
    video = frames(
        2, 3, 160, 160
    )  # the size of its position embeddings; test_metric_weights.py has others
    scorer = metrics.load("subject_consistency", settings)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        features = model((torch.from_numpy(video).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert scorer(Sample(video, 8)) == pytest.approx(
        consistency(features.double().numpy()), abs=1e-6
    )
    wide = np.repeat(frames(3, 1, 160, 250), 3, axis=0)
    assert scorer(Sample(wide, 8)) == pytest.approx(1.0, abs=1e-6)


def test_aesthetic_quality_is_the_head_on_clips_features(tmp_path, clip_settings):
    from sla2_eval.scoring.metrics.clip_model import Clip

    head = nn.Linear(8, 1)
    settings = keep(tmp_path / "aesthetic_head.pth", head.state_dict(), model=CLIP)
    settings["files"]["clip_l14"] = clip_settings["files"]["clip_b32"]
    settings["digests"]["clip_l14"] = clip_settings["digests"]["clip_b32"]
    video = frames(0)
    expected = (
        head(Clip("clip_b32", clip_settings, "cpu").images(video, antialias=False)).mean().item()
        / 10
    )
    assert metrics.load("aesthetic_quality", settings)(Sample(video, 8)) == pytest.approx(
        expected, abs=1e-6
    )
    wrong = keep(tmp_path / "aesthetic_head.pth", nn.Linear(9, 1).state_dict())
    settings["digests"]["aesthetic_head"] = wrong["digests"]["aesthetic_head"]
    with pytest.raises(MetricUnavailable, match=r"expected weight \(1, 8\)"):
        metrics.load("aesthetic_quality", settings)


def test_dynamic_degree_runs_torchvisions_raft(tmp_path):
    from torchvision.models.optical_flow import raft_small

    model = raft_small(weights=None)
    settings = keep(tmp_path / "raft.pth", model.state_dict(), model="raft_small", iterations=1)
    scorer = metrics.load("dynamic_degree", settings)
    video = np.repeat(frames(0, 1, 130, 128), 3, axis=0)
    assert scorer(Sample(video, 16)) in (0.0, 1.0)
    # One frame is left of two at sixteen a second: no pair, so nothing moves, though round(4 / 16)
    # = 0 are needed.
    assert scorer(Sample(video[:2], 16)) == 0.0


def test_the_static_filter_leaves_moving_videos_out(make_folder, tmp_path):
    """Of the mean and of VBench's list, and it is no failure: with a RAFT that sees 1.7 pixels
    everywhere, a video of 128 pixels moves and one of 160 does not.
    """
    from torchvision.models.optical_flow import raft_small

    model = raft_small(weights=None)
    last = model.update_block.flow_head.conv2
    last.weight.data.zero_()
    last.bias.data.copy_(torch.tensor([1.7 / 8, 0.0]))
    settings = keep(tmp_path / "raft.pth", model.state_dict(), model="raft_small", iterations=1)
    folder = make_folder("videos", 2, frames=9, height=128, width=128)
    write_video(folder / "pattern 001-0.mp4", frames(0, 9, 160, 160), 8)
    names = ["temporal_flickering", "temporal_flickering_static"]
    found = score(folder, None, names, tmp_path / "out", settings={names[1]: settings})
    assert found["failed"] == []
    both, static = (found["metrics"][name] for name in names)
    assert (both["num_videos"], static["num_videos"], static["num_left_out"]) == (2, 1, 1)
    assert [list(row["scores"]) for row in found["videos"]] == [names[:1], names]
    (listed,) = as_vbench(found)["temporal_flickering"][1]
    assert listed["video_path"] == "pattern 001-0.mp4"
    assert score(folder, None, names, tmp_path / "out", settings={names[1]: settings}) == found


def test_fvd_cuts_videos_into_clips_and_reads_them_in_minus_one_to_one(tmp_path):
    detector = I3D()
    settings = keep(tmp_path / "i3d.pt", torch.jit.script(detector), size=24, crop="none")
    extract = metrics.load("fvd", {**settings, "clips": "all"})
    video = frames(0, 35, 24, 24)
    features = extract(Sample(video, 8))
    assert features.shape == (2, 400)
    clip = torch.from_numpy(video[16:32]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        expected = detector(clip, False, False, True)[0].numpy()
    np.testing.assert_allclose(features[1], expected, atol=1e-5)
    first = metrics.load("fvd", settings)(Sample(video, 8))
    np.testing.assert_array_equal(first, features[:1])
    with pytest.raises(ValueError, match="at least 16 frames, got 15"):
        extract(Sample(video[:15], 8))


@pytest.mark.parametrize("height", [37, 90])
def test_fvd_sees_the_centre_square_as_stylegan_v_prepares_it(tmp_path, height):
    from PIL import Image

    detector = I3D()
    settings = keep(tmp_path / "i3d.pt", torch.jit.script(detector), size=24, resolution=30)
    video = frames(0, 17, height, 60)
    wide = (48, 30) if height == 37 else (30, 45)  # 30 * 60 / 37 and 30 * 90 / 60 pixels
    left, top = (9, 0) if height == 37 else (0, 8)  # the half of 15, rounded to even
    squares = [
        Image.fromarray(frame).resize(wide, Image.Resampling.LANCZOS) for frame in video[:16]
    ]
    squares = [np.asarray(image.crop((left, top, left + 30, top + 30))) for image in squares]
    clip = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 255
    clip = nn.functional.interpolate(clip, (24, 24), mode="bilinear").permute(1, 0, 2, 3)[None]
    with torch.no_grad():
        expected = detector(clip * 2 - 1, False, False, True).numpy()
    found = metrics.load("fvd", settings)(Sample(video, 8))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_other_names_of_a_setting_are_refused(make_folder, tmp_path):
    folder = make_folder("a", 1)
    with pytest.raises(ValueError, match="expected crop of fvd to be 'centre' or 'none', got 'lef"):
        score(folder, folder, ["fvd"], tmp_path / "out", settings={"fvd": {"crop": "left"}})


def modules(monkeypatch, tree):
    """Install modules {dotted name: {attribute: value}} with their parents as packages."""
    for name, members in tree.items():
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            parent = ".".join(parts[:length])
            if parent not in sys.modules:
                module = types.ModuleType(parent)
                module.__path__, module.__spec__ = (
                    [],
                    types.SimpleNamespace(name=parent, submodule_search_locations=[]),
                )
                monkeypatch.setitem(sys.modules, parent, module)
        vars(sys.modules[name]).update(members)


@pytest.mark.parametrize("size", [(20, 180), (180, 20), (41, 67)])
def test_frames_are_resized_and_cut_as_by_torchvision(size):
    """The long side too: 180 * (224 / 20) is below 2016 in floating point."""
    from sla2_eval.scoring.metrics.loading import prepared
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    video = frames(0, 2, *size)
    x = torch.from_numpy(video).permute(0, 3, 1, 2) / 255
    resize = Resize(224, InterpolationMode.BICUBIC, antialias=False)
    plain = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "mode": "bicubic", "antialias": False}
    for crop, theirs in ((False, resize), (True, Compose([resize, CenterCrop(224)]))):
        found = prepared(video, "cpu", 224, **plain, crop=crop)
        torch.testing.assert_close(found, theirs(x))


def test_imaging_quality_runs_pyiqas_musiq(tmp_path, monkeypatch):
    class MUSIQ(nn.Module):
        def __init__(self, pretrained=True):
            super().__init__()
            assert not pretrained
            self.gain = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            assert x.shape[1:] == (3, 16, 32)
            assert 0 <= x.min() <= x.max() <= 1
            return self.gain * x.mean()

    modules(monkeypatch, {"pyiqa.archs.musiq_arch": {"MUSIQ": MUSIQ}})
    settings = keep(tmp_path / "musiq.pth", {"gain": torch.tensor(80.0)}, long_side=32)
    grey = np.full((2, 64, 128, 3), 51, dtype=np.uint8)
    assert metrics.load("imaging_quality", settings)(Sample(grey, 8)) == pytest.approx(
        80 * 0.2 / 100
    )


def test_motion_smoothness_runs_vbenchs_amt(tmp_path, monkeypatch):
    class Model(nn.Module):
        def __init__(self, corr_radius, corr_lvls, num_flows):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, before, after, time, scale_factor, eval):
            assert before.shape[-2:] == (48, 64)
            assert float(time) == 0.5
            return {"imgt_pred": (before + after) / 2 + self.bias}

    modules(monkeypatch, {"vbench.third_party.amt.networks.AMT-S": {"Model": Model}})
    settings = keep(tmp_path / "amt_s.pth", {"state_dict": {"bias": torch.zeros(1)}})
    video = frames(0, 5) // 2 * 2
    linear = metrics.load("motion_smoothness_linear", {})(Sample(video, 8))
    # The network's picture is cut to whole grey levels; means of even levels are whole.
    assert metrics.load("motion_smoothness", settings)(Sample(video, 8)) == pytest.approx(
        linear, abs=1 / 255
    )


def test_viclips_two_dimensions_see_eight_whole_grey_frames(tmp_path, monkeypatch):
    """As VBench's transform makes them of uint8: grey levels stay whole. Each dimension has the
    videos of its own prompts.
    """
    from sla2_eval.scoring.metrics import viclip_model
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize

    seen = []

    class ViCLIP:
        def __init__(self, settings, device):
            pass

        def video(self, frames):
            seen.append(frames)
            return torch.tensor([0.6, 0.8])

        def text(self, prompt):
            assert prompt == "a fox"
            return torch.tensor([1.0, 0.0])

    monkeypatch.setattr(viclip_model, "ViCLIP", ViCLIP)
    settings = keep(tmp_path / "viclip.pth", {})
    video = frames(0, 16)
    for name in ("overall_consistency", "temporal_style"):
        assert metrics.specs()[name].vbench == name
        scorer = metrics.load(name, settings)
        assert scorer(Sample(video, 8, None, "a fox")) == pytest.approx(0.6)
        with pytest.raises(ValueError, match="expected a prompt, got none"):
            scorer(Sample(video, 8))
    cut = Compose([Resize(224, InterpolationMode.BICUBIC, antialias=False), CenterCrop(224)])
    normalise = Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    expected = normalise(cut(torch.from_numpy(video[::2]).permute(0, 3, 1, 2)) / 255)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("case", ["digest", "no digest", "pickle", "other model", "missing"])
def test_weights_that_are_not_right_make_the_metric_unavailable(tmp_path, clip_settings, case):
    settings = dict(clip_settings)
    path = tmp_path / "clip_b32.pt"
    expected = "expected tensors, got"
    if case == "digest":
        settings["digests"] = {"clip_b32": "0" * 64}
        expected = "expected sha256 000"
    elif case == "no digest":
        settings["digests"] = {}
        expected = "expected a pinned sha256"
    elif case == "pickle":
        settings = keep(path, {"x": types.SimpleNamespace}, model=CLIP)
    elif case == "other model":
        settings = keep(path, nn.Linear(2, 2).state_dict(), model=CLIP)
        expected = "Missing key"
    else:
        path.unlink()
        expected = "unavailable: run sla2 weights fetch clip_b32"
    with pytest.raises(MetricUnavailable, match=expected):
        metrics.load("clip_similarity", settings)


def test_models_score_through_the_worker_from_the_weights_folder(
    make_folder, tmp_path, monkeypatch
):
    """The whole path: SLA2_WEIGHTS, digests pinned beside the file, a child process, features
    reduced by the driver.
    """
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("SLA2_WEIGHTS", str(folder))
    path = folder / weights.FILES["i3d"].file_name
    torch.jit.script(I3D()).save(str(path))
    videos, reference = make_folder("a", 3, noise=20.0, frames=17), make_folder("b", 3, frames=16)
    unpinned = score(videos, reference, ["fvd"], tmp_path / "out")
    assert "expected a pinned sha256" in unpinned["unavailable"]["fvd"]

    (folder / f"{path.name}.sha256").write_text(f"{file_digest(path)}  {path.name}\n")
    results = score(videos, reference, ["fvd"], tmp_path / "out", settings={"fvd": {"size": 16}})
    entry = results["metrics"]["fvd"]
    assert entry["mean"] > 0
    assert (entry["num_videos"], entry["num_references"]) == (3, 3)
    assert any("rank-deficient" in warning for warning in entry["warnings"])
    assert score(videos, videos, ["fvd"], tmp_path / "out")["metrics"]["fvd"]["mean"] <= 1e-9


def test_list_and_fetch_need_no_network_to_be_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLA2_WEIGHTS", str(tmp_path))
    rows = {row["name"]: row for row in weights.weights_list()}
    used = {name for spec in metrics.specs().values() for name in spec.weights}
    assert used == set(rows)
    for row in rows.values():
        assert all(row["name"] in metrics.specs()[user].weights for user in row["used_by"])
    assert not any(row["present"] for row in rows.values())
    with pytest.raises(ValueError, match="expected one of alexnet"):
        weights.weights_fetch("resnet")


def test_fetch_checks_pins_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    import io

    monkeypatch.setenv("SLA2_WEIGHTS", str(tmp_path))
    content = b"weights" * 1000

    class Response(io.BytesIO):
        headers: dict = {"Content-Length": str(len(content))}  # noqa: RUF012

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(content))
    with pytest.raises(weights.WeightsError, match="expected sha256 7be5be79, got"):
        weights.weights_fetch("alexnet")
    assert list(tmp_path.iterdir()) == []
    seen = []
    path = weights.weights_fetch("i3d", lambda got, expected: seen.append((got, expected)))
    assert seen == [(7000, 7000)]
    assert weights.verified("i3d") == path
    path.write_bytes(b"other")
    with pytest.raises(
        weights.WeightsError, match=r"expected sha256 .*; run sla2 weights fetch i3d again"
    ):
        weights.verified("i3d")
    assert weights.weights_fetch("i3d").read_bytes() == content
    path.write_bytes(b"other")
    right, content = content, b"moved by its owner"
    Response.headers = {"Content-Length": str(len(content))}
    with pytest.raises(
        weights.WeightsError, match=f"expected sha256 {hashlib.sha256(right).hexdigest()}, got"
    ):
        weights.weights_fetch("i3d")
    content = right

    Response.headers = {"Content-Length": "9999"}
    with pytest.raises(weights.WeightsError, match="expected 9999 bytes, got 7000"):
        weights.weights_fetch("viclip")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "i3d_torchscript.pt",
        "i3d_torchscript.pt.sha256",
    ]
