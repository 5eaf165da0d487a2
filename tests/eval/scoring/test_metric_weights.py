"""The published weight files: their names and addresses as the libraries have them, and their
tensors' names and shapes.
"""

import types

import numpy as np
import pytest
import torch
from sla2_eval.runs.store import file_digest
from sla2_eval.scoring import metrics, weights
from sla2_eval.scoring.metrics.base import Sample
from sla2_eval.scoring.metrics.consistency import positions
from sla2_eval.scoring.metrics.loading import load_tensors


def given(path, content) -> dict:
    """Save `content` and return settings that name the file with its digest."""
    name = path.name.split(".")[0]
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(content, path)
    else:
        torch.save(content, path)
    return {"files": {name: str(path)}, "digests": {name: file_digest(path)}}


def test_torchvisions_files_are_torchvisions():
    from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights
    from torchvision.models.optical_flow import Raft_Large_Weights

    theirs = {
        "alexnet": AlexNet_Weights.IMAGENET1K_V1,
        "vgg16": VGG16_Weights.IMAGENET1K_V1,
        "squeezenet": SqueezeNet1_1_Weights.IMAGENET1K_V1,
        "raft": Raft_Large_Weights.C_T_V1,  # raft-things, as VBench has it
    }
    for name, enum in theirs.items():
        file = weights.FILES[name]
        assert file.url == enum.url
        # torch.hub's rule: what follows the last dash of the name is the beginning of the sha256
        assert file.file_name == enum.url.rpartition("/")[2]
        assert file.file_name.endswith(f"-{file.sha256}.pth")


@pytest.mark.parametrize(("name", "model"), [("clip_b32", "ViT-B-32"), ("clip_l14", "ViT-L-14")])
def test_clips_files_are_open_clips(name, model):
    import open_clip.pretrained as pretrained

    file = weights.FILES[name]
    assert pretrained.get_pretrained_url(f"{model}-quickgelu", "openai") == file.url
    assert f"/{file.sha256}/" in file.url
    users = {metric: metrics.specs()[metric].settings["model"] for metric in file.used_by}
    assert set(users.values()) == {f"{model}-quickgelu"}  # OpenAI's CLIP has no other activation


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, width_in: int, width_out: int) -> dict:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def openai_tower(prefix: str, layers: int, width: int) -> dict:
    found = {}
    for layer in range(layers):
        block = f"{prefix}resblocks.{layer}"
        found |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        found |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        found |= linear(f"{block}.attn.out_proj", width, width)
        found |= linear(f"{block}.mlp.c_fc", width, 4 * width) | linear(
            f"{block}.mlp.c_proj", 4 * width, width
        )
    return found


def openai_clip(patch: int, layers: int, width: int, text: int, embed: int) -> dict:
    """Names and shapes in OpenAI's archives, without the three integers that are no parameters."""
    return {
        "positional_embedding": (77, text),
        "text_projection": (text, embed),
        "logit_scale": (),
        "token_embedding.weight": (49408, text),
        **norm("ln_final", text),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((224 // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        **norm("visual.ln_pre", width),
        **norm("visual.ln_post", width),
        **openai_tower("transformer.", 12, text),
        **openai_tower("visual.transformer.", layers, width),
    }


def dino_vit(layers: int, width: int) -> dict:
    """Names and shapes in DINO's backbone file."""
    found = {"cls_token": (1, 1, width), "pos_embed": (1, 197, width), **norm("norm", width)}
    found |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    for layer in range(layers):
        block = f"blocks.{layer}"
        found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        found |= linear(f"{block}.attn.qkv", width, 3 * width) | linear(
            f"{block}.attn.proj", width, width
        )
        found |= linear(f"{block}.mlp.fc1", width, 4 * width) | linear(
            f"{block}.mlp.fc2", 4 * width, width
        )
    return found


def shapes(module) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_models_have_the_published_names_and_shapes():
    import open_clip
    import timm

    with torch.device("meta"):
        for metric, published in [
            ("clip_score", openai_clip(32, 12, 768, 512, 512)),
            ("aesthetic_quality", openai_clip(14, 24, 1024, 768, 768)),
        ]:
            config = open_clip.get_model_config(metrics.specs()[metric].settings["model"])
            assert shapes(open_clip.CLIP(**config)) == published
        name = metrics.specs()["subject_consistency"].settings["model"]
        assert shapes(timm.create_model(name, num_classes=0, dynamic_img_size=True)) == dino_vit(
            12, 768
        )


def test_videomaes_published_biases_find_their_place(tmp_path):
    """The published file has q_bias and v_bias, and the heads of a classifier."""
    from transformers import VideoMAEConfig, VideoMAEModel

    config = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 16,
    }
    torch.manual_seed(0)
    model = VideoMAEModel(VideoMAEConfig(image_size=32, num_frames=4, **config)).eval()
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("key.bias"):
            state[name].zero_()
    model.load_state_dict(state)
    published = {"classifier.weight": torch.zeros(400, 8), "classifier.bias": torch.zeros(400)}
    published |= {"fc_norm.weight": torch.ones(8), "fc_norm.bias": torch.zeros(8)}
    for name, tensor in state.items():
        if not name.endswith("key.bias"):
            name = name.replace(".query.bias", ".q_bias").replace(".value.bias", ".v_bias")
            published[f"videomae.{name}"] = tensor.contiguous()
    assert sum(name.endswith(("q_bias", "v_bias")) for name in published) == 4
    settings = given(tmp_path / "videomae.safetensors", published)
    video = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found = metrics.load(
        "fvd_videomae", {**settings, "size": 32, "clip_frames": 4, "model": config, "crop": "none"}
    )(Sample(video, 8))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        clip = (torch.from_numpy(video).permute(0, 3, 1, 2) / 255 - mean) / std
        expected = model(clip[None]).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


@pytest.mark.parametrize("wrap", ["plain", "params", "state_dict", "module"])
def test_the_wrappings_of_published_state_dicts(tmp_path, wrap):
    state = {"head.weight": torch.ones(2)}
    content = {
        "plain": state,
        "params": {"params": state},
        "state_dict": {"state_dict": state, "epoch": 3},
        "module": {"module.head.weight": torch.ones(2)},
    }[wrap]
    assert list(load_tensors("musiq", given(tmp_path / "musiq.pth", content))) == ["head.weight"]


def test_dinos_positions_for_frames_that_are_not_square():
    """By DINO's rule: cubic of a = -0.75 at (i + 0.5) / scale - 0.5, where scale = (new + 0.1) /
    old; borders repeated.
    """
    table = torch.randn(1, 16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert positions(table, (4, 4)) is table

    def cubic(x):
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def rows(length):
        matrix = np.zeros((length, 4))
        for i in range(length):
            at = (i + 0.5) * 4 / (length + 0.1) - 0.5
            for tap in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                matrix[i, min(max(tap, 0), 3)] += cubic(at - tap)
        return matrix

    grid = table.numpy().reshape(4, 4, 5)
    expected = np.einsum("ir,jc,rcd->ijd", rows(6), rows(9), grid).reshape(1, 54, 5)
    np.testing.assert_allclose(positions(table, (6, 9)).numpy(), expected, atol=1e-6)


@pytest.mark.slow
def test_lpips_of_vgg_takes_torchvisions_file(tmp_path):
    import torchvision

    features = torchvision.models.vgg16(weights=None).features.state_dict()
    settings = given(
        tmp_path / "vgg16.pth", {f"features.{name}": tensor for name, tensor in features.items()}
    )
    video = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    scorer = metrics.load("lpips_vgg", settings)
    assert scorer(Sample(video, 8, video)) == 0.0
    assert scorer(Sample(video, 8, 255 - video)) > 0.01


def test_pickles_of_anything_else_are_refused(tmp_path):
    from sla2_eval.scoring.metrics.base import MetricUnavailable

    for content in ({"params": {"x": types.SimpleNamespace()}}, {"state_dict": [1]}, [1, 2]):
        with pytest.raises(
            MetricUnavailable, match=r"unavailable: .*expected (tensors|a state dict), got"
        ):
            load_tensors("musiq", given(tmp_path / "musiq.pth", content))
