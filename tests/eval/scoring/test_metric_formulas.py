"""Metrics without weights against hand-computed values: still, translating and noisy videos,
Gaussians, normalisation.
"""

import subprocess
import sys
from fractions import Fraction

import av
import av.filter
import numpy as np
import pytest
from sla2_eval.scoring import metrics
from sla2_eval.scoring.metrics.base import Sample
from sla2_eval.scoring.metrics.consistency import consistency
from sla2_eval.scoring.metrics.dynamic_degree import moves
from sla2_eval.scoring.metrics.fvd import frechet, reduce
from sla2_eval.scoring.metrics.jedi import discrepancy
from sla2_eval.scoring.metrics.overall_consistency import middles
from sla2_eval.scoring.metrics.raft import strongest
from sla2_eval.scoring.metrics.temporal_flickering import is_static


def video(frames, fps=8.0, reference=None, prompt=None):
    return Sample(np.asarray(frames, dtype=np.uint8), fps, reference, prompt)


def bar(frames=9, step=1, width=24):
    """A white bar of one column on black, moving `step` columns a frame."""
    found = np.zeros((frames, 8, width, 3), dtype=np.uint8)
    for t in range(frames):
        found[t, :, 2 + t * step] = 255
    return found


def test_still_video_neither_flickers_nor_moves():
    still = np.full((7, 8, 8, 3), 93)
    assert metrics.load("temporal_flickering", {})(video(still)) == 1.0
    assert metrics.load("motion_smoothness_linear", {})(video(still)) == 1.0


def test_translating_bar_by_hand():
    moving = bar()
    # Two columns of 24 change by 255 in every pair.
    assert metrics.load("temporal_flickering", {})(video(moving)) == pytest.approx(1 - 2 / 24)
    # The odd frame has a column of 255 where the mean of its neighbours has two of 127.5: 255 + 2 *
    # 127.5 over 24 columns.
    assert metrics.load("motion_smoothness_linear", {})(video(moving)) == pytest.approx(1 - 2 / 24)


def test_linear_ramp_is_smooth_but_flickers():
    ramp = np.arange(0, 90, 10)[:, None, None, None] * np.ones((1, 8, 8, 3))
    assert metrics.load("motion_smoothness_linear", {})(video(ramp)) == 1.0
    assert metrics.load("temporal_flickering", {})(video(ramp)) == pytest.approx(1 - 10 / 255)


def test_uniform_noise_by_expectation():
    noise = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3))
    # E|x - y| = n / 3 of n = 256 levels; E|x - (y + z) / 2| = 7 n / 24.
    assert metrics.load("temporal_flickering", {})(video(noise)) == pytest.approx(
        1 - 256 / 3 / 255, abs=2e-3
    )
    assert metrics.load("motion_smoothness_linear", {})(video(noise)) == pytest.approx(
        1 - 256 * 7 / 24 / 255, abs=2e-3
    )


@pytest.mark.parametrize(
    ("name", "frames"), [("temporal_flickering", 1), ("motion_smoothness_linear", 2)]
)
def test_too_short_videos_are_refused(name, frames):
    with pytest.raises(ValueError, match=f"got {frames}"):
        metrics.load(name, {})(video(np.zeros((frames, 4, 4, 3))))


def test_an_even_number_of_frames_leaves_the_last_out():
    frames = bar(8)
    frames[7] = 200
    assert metrics.load("motion_smoothness_linear", {})(video(frames)) == pytest.approx(1 - 2 / 24)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("subject_consistency", 0.1462, 1.0),
        ("background_consistency", 0.2615, 1.0),
        ("temporal_flickering", 0.6293, 1.0),
        ("temporal_flickering_static", 0.6293, 1.0),
        ("motion_smoothness", 0.706, 0.9975),
        ("dynamic_degree", 0.0, 1.0),
        ("aesthetic_quality", 0.0, 1.0),
        ("imaging_quality", 0.0, 1.0),
        ("overall_consistency", 0.0, 0.364),
    ],
)
def test_normalisation_is_vbenchs_table(name, low, high):
    spec = metrics.specs()[name]
    assert spec.vbench == name.removesuffix("_static")
    assert spec.normalised(low) == 0.0
    assert spec.normalised(high) == 1.0
    assert spec.normalised(high + (high - low)) == pytest.approx(2.0)
    assert [n for n, s in metrics.specs().items() if s.normalised(0.5) is None and s.vbench] == []


def test_consistency_by_hand():
    east, north, west = [1.0, 0.0], [0.0, 3.0], [-2.0, 0.0]
    assert consistency(np.array([east, east, east])) == 1.0
    assert consistency(np.array([east, north])) == 0.0
    # west: 0 to its neighbour, and a negative cosine to the first counts as 0; then east again: 0
    # and 1.
    assert consistency(np.array([east, west, east])) == pytest.approx((0 + (0 + 1) / 2) / 2)
    assert consistency(np.array([east, [1.0, 1.0], north])) == pytest.approx(
        ((0.5**0.5) + (0.5**0.5 + 0) / 2) / 2
    )


def test_strongest_flow_is_the_mean_of_the_top_twentieth():
    flow = np.zeros((2, 10, 20))
    flow[0, 0, :10], flow[1, 0, :10] = 3.0, 4.0
    assert strongest(flow, 0.05) == 5.0
    flow[0, 0, 0] = 0.0
    assert strongest(flow, 0.05) == pytest.approx((9 * 5.0 + 4.0) / 10)


def test_dynamic_degree_counts_pairs_against_vbenchs_threshold():
    # min(H, W) = 256: six pixels; 16 frames: four pairs.
    assert moves([6.1] * 4 + [0.0] * 11, 16, (256, 300))
    assert not moves([6.1] * 3 + [6.0] * 12, 16, (256, 300))
    assert moves([3.1] * 4, 16, (128, 999))
    assert moves([0.0], 2, (256, 256))  # round(0.5) = 0 pairs are needed
    assert not moves([], 1, (256, 256))


@pytest.mark.parametrize(("fps", "pairs"), [(4, 8), (8, 8), (16, 4), (24, 2)])
def test_dynamic_degree_of_a_steady_motion_at_any_frame_rate(monkeypatch, fps, pairs):
    """Seven pixels between neighbours of about eight a second; below that, of all there are."""
    from sla2_eval.scoring.metrics import raft

    seen = []

    def flow(first, second):
        seen.append(int(second[0, 0, 0]) - int(first[0, 0, 0]))
        return np.full((2, 256, 256), 7 / 2**0.5)

    monkeypatch.setattr(raft, "optical_flow", lambda settings, device: flow)
    frames = np.arange(9)[:, None, None, None] * np.ones((1, 256, 256, 3))
    score = metrics.module_of("dynamic_degree").load("dynamic_degree", {}, "cpu")
    assert score(video(frames, fps=fps)) == 1.0
    assert seen == [max(1, fps // 8)] * pairs


def test_the_static_filter_is_vbenchs():
    # min(H, W) = 128: 1.5 pixels; 17 frames: two pairs may move; the ends by six pixels.
    still, ends = [1.5] * 14, [6.0, 6.0]
    assert is_static([1.6] * 2 + still + ends, 17, (130, 128))
    assert not is_static([1.6] * 3 + still[1:] + ends, 17, (130, 128))
    assert not is_static([0.0] * 16 + [0.0, 6.1], 17, (130, 128))
    # round(2 * 3 / 16) = 0 pairs of three frames, so any motion between the ends is one.
    assert is_static([0.0] * 4, 3, (130, 128))
    assert not is_static([0.0, 0.0, 0.1, 0.0], 3, (130, 128))


def test_middle_frames_of_equal_parts():
    assert middles(16, 8) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert middles(49, 8) == [2, 8, 14, 20, 26, 32, 38, 45]
    assert middles(3, 5) == [0, 1, 2, 2, 2]


def ms_ssim_by_definition(video, reference) -> float:
    """Wang et al. 2003 for one frame in [0, 1]: contrast and structure at four scales, all three
    parts at the fifth.
    """
    taps = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    taps /= taps.sum()

    def blur(x):
        for axis in (0, 1):
            x = np.apply_along_axis(np.convolve, axis, x, taps, "valid")
        return x

    x, y, value = video, reference, 1.0
    for scale, beta in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        similar = (2 * vxy + 0.03**2) / (vx + vy + 0.03**2)
        if scale == 4:
            similar = similar * (2 * mx * my + 0.01**2) / (mx * mx + my * my + 0.01**2)
        value *= similar.mean() ** beta
        x, y = (z[: len(z) // 2 * 2, : z.shape[1] // 2 * 2] for z in (x, y))
        x, y = ((z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4 for z in (x, y))
    return value


def test_ms_ssim_by_its_definition():
    y, x = np.mgrid[:178, :190]
    waves = np.stack(
        [127 + 80 * np.sin((x + c) / 9) * np.cos(y / 7 + c) for c in range(3)], axis=-1
    )
    noisy = waves + np.random.default_rng(0).normal(0, 12, waves.shape)
    frames = [np.clip(v, 0, 255).astype(np.uint8) for v in (noisy, waves, waves)]
    score = metrics.load("ms_ssim", {})
    expected = ms_ssim_by_definition(frames[0] / 255.0, frames[1] / 255.0)
    assert 0.9 < expected < 0.98
    found = score(video(frames[:1], reference=np.stack(frames[1:2])))
    assert found == pytest.approx(expected, rel=1e-6)
    two = score(video(frames[:2], reference=np.stack(frames[1:])))
    assert two == pytest.approx((found + 1) / 2, rel=1e-6)
    with pytest.raises(
        ValueError, match=r"ms_ssim: expected frames of at least 176 x 176 pixels, got 175 x 190"
    ):
        score(video([frames[0][:175]], reference=frames[1][None, :175]))


def gaussian(count, dimension, seed, scale=1.0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, scale, (count, dimension))


def ffmpegs(name: str, video, reference) -> list[dict[str, str]]:
    """What ffmpeg's filter of two videos says of each frame, in RGB."""
    height, width = video.shape[1:3]
    graph = av.filter.Graph()
    about = f"video_size={width}x{height}:pix_fmt=rgb24:time_base=1/25:pixel_aspect=1/1"
    both, end = graph.add(name), graph.add("buffersink")
    sources = [graph.add("buffer", about, name=str(number)) for number in range(2)]
    for number, source in enumerate(sources):
        planes = graph.add("format", "pix_fmts=gbrp")
        source.link_to(planes)
        planes.link_to(both, 0, number)
    both.link_to(end)
    graph.configure()
    for number, pair in enumerate(zip(video, reference)):
        for source, pixels in zip(sources, pair):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            source.push(frame)
    for source in sources:
        source.push(None)
    return [dict(end.pull().metadata) for _ in video]


def test_psnr_is_ffmpegs_mean_over_frames():
    y, x = np.mgrid[:45, :63]
    still = np.stack([127 + 90 * np.sin((x + c) / 9) * np.cos(y / 7) for c in range(3)], axis=-1)
    reference = np.stack([still] * 3).astype(np.uint8)
    noise = np.random.default_rng(0).normal(size=reference.shape) * [[[[1]]], [[[4]]], [[[20]]]]
    frames = np.clip(reference + noise, 0, 255).astype(np.uint8)
    theirs = [float(said["lavfi.psnr.psnr_avg"]) for said in ffmpegs("psnr", frames, reference)]
    assert max(theirs) - min(theirs) > 10
    found = metrics.load("psnr", {})(video(frames, reference=reference))
    assert found == pytest.approx(np.mean(theirs), abs=1e-4)


@pytest.mark.parametrize("name", ["ssim", "ms_ssim"])
@pytest.mark.parametrize("what", ["flat", "bright", "black", "edge"])
def test_a_video_is_exactly_similar_to_itself(name, what):
    frames = np.zeros((2, 177, 181, 3), dtype=np.uint8)
    if what == "flat":
        frames[:] = 250
    elif what == "bright":
        frames[:] = np.random.default_rng(0).integers(240, 256, frames.shape)
    elif what == "edge":
        frames[:, 60:, 31:] = 255
    score = metrics.load(name, {})
    assert score(video(frames, reference=frames.copy())) == 1.0
    # One step of grey in a bright flat frame, by the formula: no variance, almost the same mean.
    if what == "flat":
        x, y = 250 / 255, 251 / 255
        luminance = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
        expected = luminance ** (0.1333 if name == "ms_ssim" else 1.0)
        assert score(video(frames, reference=frames + 1)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim"])
def test_pixels_are_compared_a_frame_at_a_time(monkeypatch, name):
    """What is held does not grow with the length of the video."""
    from sla2_eval.scoring.metrics import base

    module, sizes = metrics.module_of(name), []

    def recording(frames, device, size):
        for piece in base.chunks(frames, device, size):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(module, "chunks", recording)
    frames = np.random.default_rng(0).integers(0, 256, (5, 176, 176, 3), dtype=np.uint8)
    metrics.load(name, {})(video(frames, reference=frames[::-1].copy()))
    assert sizes == [1] * 10


def test_frechet_is_the_closed_form_of_commuting_gaussians():
    """Sets with exactly diagonal covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    # of variance 1 in each coordinate, over n as StyleGAN-V has it, or over n - 1
    for ddof, unit in ((0, corners), (1, corners * np.sqrt(7 / 8))):
        first, second = (
            unit * [1.0, 2.0, 3.0] + [1.0, 0.0, 0.0],
            unit * [2.0, 0.5, 3.0] + [0.0, 2.0, 0.0],
        )
        expected = 1 + 4 + (1 + 1.5**2 + 0)
        assert frechet(first, second, ddof=ddof) == pytest.approx(expected, rel=1e-12)
    named = {"covariance": "sample"}
    found = reduce("fvd", first, second, named)["value"]
    assert found == pytest.approx(expected)
    assert reduce("fvd", first, second, {"covariance": "population"})["value"] < found


def test_frechet_is_the_closed_form_in_general():
    """Against tr (S1 S2)^(1/2) from the eigenvalues of the product itself, full rank."""
    first, second = (
        gaussian(60, 5, 0),
        gaussian(50, 5, 1, 2.0, 0.3) @ np.random.default_rng(2).normal(size=(5, 5)),
    )
    s1, s2 = np.cov(first.T, ddof=0), np.cov(second.T, ddof=0)
    root = np.sqrt(np.linalg.eigvals(s1 @ s2).real).sum()
    expected = (
        ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
    )
    assert frechet(first, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count", "dimension"), [(2, 400), (7, 400), (40, 400), (90, 31)])
def test_frechet_of_identical_sets_is_zero_even_rank_deficient(count, dimension):
    features = gaussian(count, dimension, 3).astype(np.float32)
    assert frechet(features, features[::-1].copy()) <= 1e-9


def test_jedi_is_the_mean_of_its_kernel():
    """k(x, y) = (x y / d)^2, every pair with its own included, times 100; 0 for the same set in
    another order.
    """
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(7, 5)), generator.normal(0.3, 1.2, (9, 5))

    def kernel(a, b):
        return np.mean([(x @ y / 5) ** 2 for x in a for y in b])

    expected = kernel(first, first) + kernel(second, second) - 2 * kernel(first, second)
    assert discrepancy(first, second) == pytest.approx(expected, rel=1e-12)
    assert discrepancy(second[::-1], first) == pytest.approx(expected, rel=1e-12)
    assert discrepancy(first, first[::-1]) == 0.0
    found = metrics.module_of("jedi").reduce("jedi", first, second, {})
    assert found["value"] == pytest.approx(100 * expected, rel=1e-12)
    assert len(found["warnings"]) == 2
    with pytest.raises(ValueError, match="jedi: expected at least 2 clips a side, got"):
        discrepancy(first[:1], second)


def test_frechet_is_symmetric_finite_and_of_no_order():
    first, second = gaussian(30, 400, 0), gaussian(9, 400, 1, 1.5)
    value = frechet(first, second)
    assert np.isfinite(value)
    assert value > 0
    assert frechet(second, first) == pytest.approx(value, rel=1e-12)
    shuffled = first[np.random.default_rng(5).permutation(30)]
    assert frechet(shuffled, second[::-1]) == value


def test_frechet_of_constant_sets_is_the_distance_of_their_means():
    assert frechet(np.ones((4, 3)), np.zeros((5, 3))) == pytest.approx(3.0)


def test_fvd_refuses_one_clip_and_warns_of_few():
    with pytest.raises(ValueError, match="at least 2 clips"):
        reduce("fvd", gaussian(1, 4, 0), gaussian(9, 4, 0), {"covariance": "population"})
    settings = metrics.specs()["fvd"].settings
    few = reduce("fvd", gaussian(20, 70, 0), gaussian(60, 70, 1), settings)
    assert [w.split(":")[0] for w in few["warnings"]] == [
        "20 clips of the videos",
        "60 clips of the references",
        "20 clips of the videos for 70 dimensions",
        "60 clips of the references for 70 dimensions",
    ]
    assert reduce("fvd", gaussian(300, 4, 0), gaussian(300, 4, 1), settings)["warnings"] == []


def test_caption_accuracy_reads_shapes_and_refuses_other_captions():
    from sla2_eval.tiny.shapes import sample

    scene, caption = sample(11, 3)
    frames = (scene * 255).round().astype(np.uint8).repeat(4, 1).repeat(4, 2)
    score = metrics.load("caption_accuracy", {})
    assert score(video(frames, prompt=caption)) == 1.0
    assert score(video(frames.swapaxes(1, 2), prompt=caption)) == 0.0  # along the other axis
    assert score(video(np.zeros_like(frames), prompt=caption)) == 0.0
    with pytest.raises(ValueError, match="caption"):
        score(video(frames, prompt="a dog"))
    with pytest.raises(ValueError, match="square frames"):
        score(video(frames[:, :100], prompt=caption))


def printed(code: str) -> str:
    """What a new interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_registry_is_light_and_complete():
    code = (
        "import sys, sla2_eval.scoring.metrics as m, sla2_eval.scoring.score,"
        " sla2_eval.scoring.weights; m.specs();print([n for n in ('torch', 'ray', 'torchmetrics',"
        " 'lpips', 'open_clip', 'av', 'jinja2') if n in sys.modules])"
    )
    assert printed(code) == "[]"
    for name, spec in metrics.specs().items():
        assert spec.kind in ("paired", "unpaired", "set"), name
        assert spec.definition, name
        assert spec.source, name
        assert spec.licence, name
        assert hasattr(metrics.module_of(name), "load"), name
        assert not spec.weights or spec.licence != "none needed", name


def test_psnr_imports_no_model_and_nothing_heavy_beside_torch():
    code = (
        "import sys; from sla2_eval.scoring import metrics; metrics.load('psnr', {});"
        " metrics.load('ssim', {}); print([n for n in ('scipy', 'transformers', 'torchvision',"
        " 'torchmetrics', 'ray') if n in sys.modules])"
    )
    assert printed(code) == "[]"


@pytest.mark.slow
def test_torchmetrics_is_whole_when_imported_afterwards():
    code = (
        "from sla2_eval.scoring import metrics; metrics.load('psnr', {}); import torch;"
        " import torchmetrics;"
        "print(torchmetrics.MeanMetric()(torch.tensor([1.0, 3.0])).item())"
    )
    assert printed(code) == "2.0"
