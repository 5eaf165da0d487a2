"""Pipelines with SLA2 as their users run them: Wan's text to video, image to video, first and last
frame, each with Wan2.2's two experts too; every other family's, and their image to video, LTX-2's
with first and last frame. Each is offloaded, compiled, has a LoRA, is saved and loaded, and equals
the pipeline itself where every block is selected.
"""

from __future__ import annotations

import pytest
import torch
from helpers import families, image_pipelines, pipelines
from PIL import Image
from sla2_core import SLA2Config
from sla2_core.integrations.card import NAME as CARD
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter, from_pretrained, save_pretrained

slow = pytest.mark.slow
KINDS = {
    "t2v": lambda: pipelines.wan(),
    "t2v two experts": lambda: pipelines.wan(two=True),
    "i2v": lambda: pipelines.wan_image("2.1"),
    "flf2v": lambda: pipelines.wan_image("2.1 both frames"),
    "i2v two experts": lambda: pipelines.wan_image("2.2"),
    "flf2v two experts": lambda: pipelines.wan_image("2.2"),
}
OTHERS = [name for name in families.PIPELINES if name != "wan"]
QUICK = ("t2v", "i2v two experts")
QUICK_OF_OTHERS = "lora after"
WAYS = (
    "offload",
    "offload first",
    "model offload",
    "model offload first",
    "compile",
    "lora before",
    "lora after",
    "save and load",
)
CASES = [
    pytest.param(kind, way, marks=[] if kind in QUICK and way != "compile" else [slow])
    for kind in KINDS
    for way in WAYS
] + [
    pytest.param(kind, way, marks=[] if kind in OTHERS and way == QUICK_OF_OTHERS else [slow])
    for kind in (*OTHERS, *image_pipelines.NAMES)
    for way in WAYS
]


def build(kind):
    if kind in KINDS:
        return KINDS[kind]()
    if kind in OTHERS:
        return families.pipeline(kind, families.build(kind)[0])
    return image_pipelines.build(kind)


def config(transformer=None, **changes) -> SLA2Config:
    settings = dict(topk=1.0, block_q=4, block_k=3, alpha_knots=2)
    if transformer is not None:
        return families.config(transformer, **settings | changes)
    return SLA2Config(head_dim=12, num_heads=2, **settings | changes)


def transformers(pipe):
    return [x for x in (pipe.transformer, getattr(pipe, "transformer_2", None)) if x is not None]


@torch.no_grad()
def run(pipe, kind):
    """Latents of one video after two steps, or of Wan after three, which both experts see."""
    if kind in OTHERS:
        return families.generate(kind, pipe)
    if kind in image_pipelines.NAMES:
        return image_pipelines.generate(kind, pipe)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    size = dict(height=32, width=48, num_frames=5)
    given = dict(num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    if "t2v" not in kind:
        image = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(4))
        first, last = (Image.fromarray(x.mul(255).byte().numpy()) for x in image)
        given |= {"image": first} | ({"last_image": last} if "flf2v" in kind else {})
    return pipe(prompt="a red circle", generator=rng, return_dict=False, **size, **given)[0]


def put(pipe, **changes):
    return [apply_sla2(own, config(own, **changes)) for own in transformers(pipe)]


def offload(pipe, folder):
    """Every layer's weights on disk but while it runs; what is not fetched is memory of no
    value.
    """
    for number, transformer in enumerate(transformers(pipe)):
        transformer.enable_group_offload(
            onload_device=torch.device("cpu"),
            offload_type="leaf_level",
            offload_to_disk_path=str(folder / str(number)),
        )
        for name, parameter in transformer.named_parameters():
            if ".processor." in name:
                parameter.data.fill_(torch.nan)


def add_lora(pipe):
    from peft import LoraConfig

    for transformer in transformers(pipe):
        torch.manual_seed(5)
        targets = ["to_q", "to_v", "ffn.net.2", "ff.net.2"]
        transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_every_block_is_the_pipeline_itself(kind, way, tmp_path):
    plain, pipe = build(kind), build(kind)
    if "lora" in way:
        add_lora(plain)
    expected = run(plain, kind)
    if way == "lora before":
        add_lora(pipe)
    if way == "offload first":
        offload(pipe, tmp_path)
    if way == "model offload first":
        pipe.enable_model_cpu_offload(device="cpu")  # whose hooks are those for a GPU
    handles = put(pipe)
    if way == "lora after":
        add_lora(pipe)
    if way == "offload":
        offload(pipe, tmp_path)
    if way == "model offload":
        pipe.enable_model_cpu_offload(device="cpu")
    if way == "compile":
        torch.compiler.reset()  # one process may compile only so many models of a class
        for name in ("transformer", "transformer_2"):
            if getattr(pipe, name, None) is not None:
                if "hunyuan_video15" in kind:  # branches on its image embeddings
                    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
                    continue
                whole = torch.compile(getattr(pipe, name), backend="eager", fullgraph=True)
                setattr(pipe, name, whole)
    if way == "save and load":
        for number, handle in enumerate(handles):
            name = "transformer_2" if number else "transformer"
            save_pretrained(handle, tmp_path / name)
            setattr(pipe, name, from_pretrained(tmp_path, subfolder=name).transformer)
    torch.testing.assert_close(run(pipe, kind), expected, atol=1e-4, rtol=1e-3)


def test_offloaded_parameters_of_router_and_mixing_are_fetched(tmp_path):
    outputs = []
    for offloaded in (False, True):
        pipe = pipelines.wan()
        (handle,) = put(pipe, topk=0.3)
        torch.manual_seed(6)
        with torch.no_grad():
            for value in handle.adapter_tensors().values():
                value.add_(torch.randn_like(value))
        if offloaded:
            offload(pipe, tmp_path)
        outputs.append(run(pipe, "t2v"))
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)


def test_an_adapter_has_a_model_card_that_is_generated_until_it_is_edited(tmp_path):
    pipe = pipelines.wan()
    handle = apply_sla2(pipe.transformer, config(topk=0.05), base_model="owner/model")
    handle.save(tmp_path)
    text = (tmp_path / CARD).read_text()
    head = text.split("---\n")[1]
    assert "library_name: diffusers\nbase_model: owner/model\n" in head
    assert "| topk | 0.05 |" in text
    assert "| layers | 0 to 1 |" in text
    assert "exactly to 5 % of the key blocks" in text
    handle.configure(topk=0.25)
    handle.save(tmp_path, include_model=True)
    text = (tmp_path / CARD).read_text()
    assert "| topk | 0.25 |" in text
    assert "fine-tuned weights" in text
    (tmp_path / CARD).write_text("mine")
    handle.save(tmp_path)
    assert (tmp_path / CARD).read_text() == "mine"
    apply_adapter(pipelines.wan().transformer, tmp_path)
    handle.base_model = "/home" + "/me/model"
    handle.save(tmp_path / "other")
    assert "/me/" not in (tmp_path / "other" / CARD).read_text()
