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


def videomae_v2(layers: int, width: int, inner: int, patch: int, classes: int) -> dict:
    """Names and shapes in VideoMAE V2's fine-tuned files."""
    found = {"patch_embed.proj.weight": (width, 3, 2, patch, patch)}
    found |= {"patch_embed.proj.bias": (width,), **norm("fc_norm", width)}
    for layer in range(layers):
        block = f"blocks.{layer}"
        found |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        found |= {f"{block}.attn.qkv.weight": (3 * width, width)}
        found |= {f"{block}.attn.{name}_bias": (width,) for name in "qv"}
        found |= linear(f"{block}.attn.proj", width, width)
        found |= linear(f"{block}.mlp.fc1", width, inner) | linear(f"{block}.mlp.fc2", inner, width)
    return found | linear("head", width, classes)


def test_videomae_has_the_published_sizes():
    from sla2_eval.scoring.metrics.videomae_model import GIANT, as_transformers
    from transformers import VideoMAEConfig, VideoMAEModel

    with torch.device("meta"):
        # Few positions, which are computed one by one and are no weights.
        model = VideoMAEModel(VideoMAEConfig(image_size=14, num_frames=2, **GIANT))
        published = videomae_v2(40, 1408, 6144, 14, 174)
        tensors = {name: torch.empty(shape) for name, shape in published.items()}
        tensors = {n: t for n, t in tensors.items() if not n.startswith("fc_norm")}
        found = as_transformers(tensors, model.state_dict())
        assert {n: tuple(t.shape) for n, t in found.items()} == shapes(model)


def videomae_by_hand(clip: torch.Tensor, t: dict, heads: int) -> torch.Tensor:
    """VideoMAE V2's encoder on a (T, 3, H, W) clip as its paper has it: patches of two frames,
    sines for positions, blocks that normalise first, the mean of the tokens normalised.
    """
    gelu, softmax = torch.nn.functional.gelu, torch.softmax

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred / scale * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    kernel = t["patch_embed.proj.weight"]
    width, patch = len(kernel), kernel.shape[-1]
    cut = clip.transpose(0, 1).unfold(1, 2, 2).unfold(2, patch, patch).unfold(3, patch, patch)
    cut = cut.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2)  # (tokens, 3 * 2 * p * p)
    x = cut @ kernel.flatten(1).T + t["patch_embed.proj.bias"]
    angles = np.arange(len(x))[:, None] / 10000 ** (2 * (np.arange(width) // 2) / width)
    angles[:, 0::2], angles[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    x = x + torch.from_numpy(angles)
    layers = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    for block in (f"blocks.{layer}" for layer in range(layers)):
        h = normed(x, f"{block}.norm1")
        q, k, v = (h @ rows.T for rows in t[f"{block}.attn.qkv.weight"].chunk(3))
        q, v = q + t[f"{block}.attn.q_bias"], v + t[f"{block}.attn.v_bias"]
        q, k, v = (z.unflatten(1, (heads, -1)).transpose(0, 1) for z in (q, k, v))
        mixed = softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        x = x + dense(mixed.transpose(0, 1).flatten(1), f"{block}.attn.proj")
        h = gelu(dense(normed(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + dense(h, f"{block}.mlp.fc2")
    return normed(x.mean(0), "fc_norm")


@pytest.mark.parametrize("wrap", ["model", "module"])
def test_content_debiased_fvd_reads_videomaes_own_file(tmp_path, wrap):
    """Its features by hand, of the frames as cd-fvd prepares them: centre square, no normalisation
    by ImageNet's mean.
    """
    model = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    model |= {"intermediate_size": 20, "patch_size": 14}
    generator = torch.Generator().manual_seed(0)
    published = {
        name: torch.randn(shape, generator=generator) / 3
        for name, shape in videomae_v2(2, 12, 20, 14, 5).items()
    }
    settings = given(tmp_path / "videomae.pth", {wrap: published, "epoch": 3})
    settings |= {"size": 28, "resolution": 33, "clip_frames": 4, "model": model}
    video = np.random.default_rng(0).integers(0, 256, (7, 44, 61, 3), dtype=np.uint8)
    (found,) = metrics.load("fvd_videomae", settings)(Sample(video, 8))

    x = torch.from_numpy(video[:4]).permute(0, 3, 1, 2).float() / 255
    resize = torch.nn.functional.interpolate
    x = resize(x, (33, 46), mode="bilinear", antialias=True)[..., 6:39]  # 61 * 33 / 44 = 45.75
    x = resize((x * 255).byte().float() / 255, (28, 28), mode="bilinear")
    by_hand = videomae_by_hand(x.double(), {n: t.double() for n, t in published.items()}, heads=3)
    np.testing.assert_allclose(found, by_hand.numpy(), atol=2e-5)
    del published["blocks.1.attn.q_bias"]
    wrong = given(tmp_path / "videomae.pth", {wrap: published})
    with pytest.raises(metrics.MetricUnavailable, match=r"Missing key.*1\.attention"):
        metrics.load("fvd_videomae", {**settings, **wrong})


def vjepa(layers: int, width: int, patch: int, tokens: int) -> tuple[dict, dict]:
    """Names and shapes in V-JEPA's own files: of its encoder and of its probe."""
    encoder = {"pos_embed": (1, tokens, width), **norm("norm", width)}
    encoder |= {"patch_embed.proj.weight": (width, 3, 2, patch, patch)}
    encoder |= {"patch_embed.proj.bias": (width,)}
    for block in (f"blocks.{layer}" for layer in range(layers)):
        encoder |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
        encoder |= linear(f"{block}.attn.qkv", width, 3 * width)
        encoder |= linear(f"{block}.attn.proj", width, width)
        encoder |= linear(f"{block}.mlp.fc1", width, 4 * width)
        encoder |= linear(f"{block}.mlp.fc2", 4 * width, width)
    block = "pooler.cross_attention_block"
    probe = {"pooler.query_tokens": (1, 1, width), **linear("linear", width, 174)}
    probe |= norm(f"{block}.norm1", width) | norm(f"{block}.norm2", width)
    probe |= linear(f"{block}.xattn.q", width, width) | linear(
        f"{block}.xattn.kv", width, 2 * width
    )
    probe |= linear(f"{block}.xattn.proj", width, width)
    probe |= linear(f"{block}.mlp.fc1", width, 4 * width)
    return encoder, probe | linear(f"{block}.mlp.fc2", 4 * width, width)


def test_vjepa_has_the_published_sizes():
    from sla2_eval.scoring.metrics.vjepa_model import HUGE, encoder, pooler

    published, probe = vjepa(layers=32, width=1280, patch=16, tokens=8 * 14 * 14)
    with torch.device("meta"):
        assert shapes(encoder(**HUGE, tokens=1568)) == published
        assert {f"pooler.{n}": s for n, s in shapes(pooler(HUGE["width"])).items()} == {
            name: shape for name, shape in probe.items() if not name.startswith("linear")
        }


def vjepa_by_hand(clip: torch.Tensor, t: dict, heads: int) -> torch.Tensor:
    """V-JEPA's encoder on a normalised (T, 3, H, W) clip, then its probe's query over all tokens:
    layer norms of epsilon 1e-6 in the one and 1e-5 in the other, GELU by the error function.
    """

    def normed(x, name, epsilon):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
        return centred / scale * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + torch.erf(x / 2**0.5))

    def attended(q, k, v):
        q, k, v = (z.unflatten(1, (heads, -1)).transpose(0, 1) for z in (q, k, v))
        mixed = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v
        return mixed.transpose(0, 1).flatten(1)

    kernel = t["patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    cut = clip.transpose(0, 1).unfold(1, 2, 2).unfold(2, patch, patch).unfold(3, patch, patch)
    cut = cut.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2)
    x = cut @ kernel.flatten(1).T + t["patch_embed.proj.bias"] + t["pos_embed"][0]
    layers = 1 + max(int(name.split(".")[1]) for name in t if name.startswith("blocks."))
    for block in (f"blocks.{layer}" for layer in range(layers)):
        q, k, v = dense(normed(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, 1)
        x = x + dense(attended(q, k, v), f"{block}.attn.proj")
        h = gelu(dense(normed(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + dense(h, f"{block}.mlp.fc2")
    x = normed(x, "norm", 1e-6)
    block, query = "pooler.cross_attention_block", t["pooler.query_tokens"][0]
    k, v = dense(normed(x, f"{block}.norm1", 1e-5), f"{block}.xattn.kv").chunk(2, 1)
    mixed = attended(dense(query, f"{block}.xattn.q"), k, v)
    query = query + dense(mixed, f"{block}.xattn.proj")
    h = gelu(dense(normed(query, f"{block}.norm2", 1e-5), f"{block}.mlp.fc1"))
    return (query + dense(h, f"{block}.mlp.fc2"))[0]


def test_jedi_reads_vjepas_own_files(tmp_path):
    """Its features by hand, from files as V-JEPA's trainer writes them: the encoder's average among
    other things, and a probe with classes that are not used.
    """
    generator = torch.Generator().manual_seed(0)
    encoder, probe = (
        {name: torch.randn(shape, generator=generator) / 4 for name, shape in published.items()}
        for published in vjepa(layers=2, width=12, patch=14, tokens=2 * 2 * 2)
    )
    wrapped = {f"module.backbone.{name}": tensor for name, tensor in encoder.items()}
    other = {name: 0 * tensor for name, tensor in wrapped.items()}
    files = [
        given(tmp_path / "vjepa.pt", {"encoder": other, "target_encoder": wrapped, "epoch": 300}),
        given(
            tmp_path / "vjepa_probe.pt",
            {"classifier": {f"module.{name}": t for name, t in probe.items()}, "epoch": 20},
        ),
    ]
    settings = {key: {**files[0][key], **files[1][key]} for key in ("files", "digests")}
    settings |= {"size": 28, "crop": "none", "clip_frames": 4}
    settings |= {"model": {"width": 12, "layers": 2, "heads": 3, "patch": 14}}
    video = np.random.default_rng(0).integers(0, 256, (7, 44, 61, 3), dtype=np.uint8)
    (found,) = metrics.load("jedi", settings)(Sample(video, 8))

    x = torch.from_numpy(video[:4]).permute(0, 3, 1, 2).double() / 255
    x = torch.nn.functional.interpolate(x, (28, 28), mode="bilinear")
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    tensors = {name: tensor.double() for name, tensor in {**encoder, **probe}.items()}
    by_hand = vjepa_by_hand((x - mean) / std, tensors, heads=3)
    np.testing.assert_allclose(found, by_hand.numpy(), atol=2e-5)
    del wrapped["module.backbone.pos_embed"]
    wrong = given(tmp_path / "vjepa.pt", {"target_encoder": wrapped})
    for key in ("files", "digests"):
        settings[key] |= wrong[key]
    with pytest.raises(metrics.MetricUnavailable, match=r"vjepa: .*Missing key.*pos_embed"):
        metrics.load("jedi", settings)


def viclip(vision: dict, text: dict, features: int, frames: int) -> dict:
    """Names and shapes in ViCLIP's file, as VBench's copy loads it."""
    width, words = vision["width"], text["width"]
    patch, see = vision["patch"], "vision_encoder"
    found = {"temp": (), f"{see}.conv1.weight": (width, 3, 1, patch, patch)}
    found |= {f"{see}.class_embedding": (width,), f"{see}.proj": (width, features)}
    found |= {f"{see}.positional_embedding": (vision["patches"] + 1, width)}
    found |= {f"{see}.temporal_positional_embedding": (1, frames, width)}
    found |= norm(f"{see}.ln_pre", width) | norm(f"{see}.ln_post", width)
    found |= openai_tower(f"{see}.transformer.", vision["layers"], width)
    found |= {"text_encoder.token_embedding.weight": (49408, words)}
    found |= {"text_encoder.positional_embedding": (text["context_length"], words)}
    found |= {"text_encoder.text_projection": (words, features)}
    found |= norm("text_encoder.ln_final", words)
    return found | openai_tower("text_encoder.transformer.", text["layers"], words)


def test_viclip_has_the_published_sizes():
    from sla2_eval.scoring.metrics.viclip_model import LARGE, towers

    with torch.device("meta"):
        published = viclip(**LARGE, frames=8)
        del published["temp"]
        assert shapes(towers(**LARGE, frames=8)) == published


def test_viclip_reads_its_own_file(tmp_path):
    """Both features by hand: one class token and the patches of all frames attend to one another,
    words to those before them; the text's feature is that of its end.
    """
    import open_clip

    sizes = {
        "vision": {"width": 12, "layers": 2, "heads": 3, "patch": 8, "patches": 9},
        "text": {"width": 8, "layers": 1, "heads": 2, "context_length": 6},
        "features": 5,
    }
    generator = torch.Generator().manual_seed(0)
    t = {
        name: torch.randn(shape, generator=generator) / 3
        for name, shape in viclip(**sizes, frames=3).items()
    }
    settings = given(tmp_path / "viclip.pth", {"model": t})
    settings |= {"frames": 3, "size": 24, "model": sizes}
    video = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    prompt = "a red fox runs over the snowy field"  # longer than the tower
    found = metrics.load("temporal_style", settings)(Sample(video, 8, None, prompt))
    t = {name: tensor.double() for name, tensor in t.items()}

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale * t[f"{name}.weight"] + t[f"{name}.bias"]

    def tower(x, prefix, layers, heads, mask):
        for block in (f"{prefix}.transformer.resblocks.{layer}" for layer in range(layers)):
            rows, bias = t[f"{block}.attn.in_proj_weight"], t[f"{block}.attn.in_proj_bias"]
            q, k, v = (normed(x, f"{block}.ln_1") @ rows.T + bias).chunk(3, 1)
            q, k, v = (z.unflatten(1, (heads, -1)).transpose(0, 1) for z in (q, k, v))
            weights = torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask, -1)
            mixed = (weights @ v).transpose(0, 1).flatten(1)
            out = f"{block}.attn.out_proj"
            x = x + mixed @ t[f"{out}.weight"].T + t[f"{out}.bias"]
            h = normed(x, f"{block}.ln_2") @ t[f"{block}.mlp.c_fc.weight"].T
            h = h + t[f"{block}.mlp.c_fc.bias"]
            h = h * torch.sigmoid(1.702 * h)
            x = x + h @ t[f"{block}.mlp.c_proj.weight"].T + t[f"{block}.mlp.c_proj.bias"]
        return x

    mean, std = (
        torch.tensor(v, dtype=torch.float64).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    see = "vision_encoder"
    clip = (torch.from_numpy(video).permute(0, 3, 1, 2).double() / 255 - mean) / std
    cut = clip.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3)
    x = cut.flatten(1, 2) @ t[f"{see}.conv1.weight"].flatten(1).T
    where = t[f"{see}.positional_embedding"]
    x = x + where[1:] + t[f"{see}.temporal_positional_embedding"][0][:, None]
    x = torch.cat((t[f"{see}.class_embedding"][None] + where[:1], x.flatten(0, 1)))
    x = tower(normed(x, f"{see}.ln_pre"), see, 2, 3, 0.0)
    seen = normed(x, f"{see}.ln_post")[0] @ t[f"{see}.proj"]

    words = open_clip.SimpleTokenizer().encode(prompt)[:4]
    words = [49406, *words, 49407]
    x = t["text_encoder.token_embedding.weight"][words] + t["text_encoder.positional_embedding"]
    before = torch.full((6, 6), float("-inf"), dtype=torch.float64).triu(1)
    x = tower(x, "text_encoder", 1, 2, before)
    read = normed(x, "text_encoder.ln_final")[-1] @ t["text_encoder.text_projection"]
    expected = seen @ read / (seen.norm() * read.norm())
    assert found == pytest.approx(float(expected), abs=1e-5)


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
