"""VBench's Quality, Semantic and Total scores."""

import dataclasses

import pytest
from sla2_eval.scoring import metrics
from sla2_eval.scoring.vbench_dimensions import DIMENSIONS, Scores, scores

# Any 16 numbers, and the scores that the formula of VBench's cal_final_score.py gives for them.
MEANS = {
    "subject_consistency": 0.9524,
    "background_consistency": 0.9730,
    "temporal_flickering": 0.9946,
    "motion_smoothness": 0.9830,
    "dynamic_degree": 0.6546,
    "aesthetic_quality": 0.6607,
    "imaging_quality": 0.6943,
    "object_class": 0.8628,
    "multiple_objects": 0.6958,
    "human_action": 0.9540,
    "color": 0.8859,
    "spatial_relationship": 0.7539,
    "scene": 0.4575,
    "appearance_style": 0.2264,
    "temporal_style": 0.2319,
    "overall_consistency": 0.2591,
}
QUALITY, SEMANTIC, TOTAL = 0.8501044457594874, 0.7611194647854393, 0.8323074495646778


def test_the_scores_are_vbenchs():
    found = scores(MEANS)
    assert found.missing == ()
    assert found.quality == pytest.approx(QUALITY, abs=1e-12)
    assert found.semantic == pytest.approx(SEMANTIC, abs=1e-12)
    assert found.total == pytest.approx(TOTAL, abs=1e-12)


def test_the_ends_of_the_ranges_are_0_and_1():
    for end, expected in (("low", 0.0), ("high", 1.0)):
        found = scores({name: getattr(about, end) for name, about in DIMENSIONS.items()})
        assert dataclasses.astuple(found)[:3] == pytest.approx((expected,) * 3)


def test_a_part_of_the_dimensions_has_no_total():
    quality = {name: MEANS[name] for name, about in DIMENSIONS.items() if about.quality}
    found = scores(quality)
    assert found.quality == pytest.approx(QUALITY)
    assert (found.semantic, found.total) == (None, None)
    assert found.missing == tuple(list(DIMENSIONS)[7:])
    assert scores({}) == Scores(quality=None, semantic=None, total=None, missing=tuple(DIMENSIONS))
    with pytest.raises(ValueError, match=r"expected names among subject_consistency, .* 'clarity'"):
        scores({"clarity": 0.5})
    with pytest.raises(ValueError, match="scene: expected a finite mean, got nan"):
        scores({"scene": float("nan")})


def test_metrics_are_normalised_by_the_same_ranges():
    spec = metrics.specs()["motion_smoothness"]
    assert spec.normalised(0.9975) == 1.0
    assert {s.vbench for s in metrics.specs().values() if s.vbench} <= DIMENSIONS.keys()
