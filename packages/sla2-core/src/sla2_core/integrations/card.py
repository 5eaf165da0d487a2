"""The model card beside an adapter: what the Hugging Face Hub shows of it, generated from it."""

from __future__ import annotations

from pathlib import Path

from sla2_core.adapter import Adapter, write_atomically

NAME = "README.md"
_MARK = "<!-- Generated from sla2_config.json; edit the text and remove this line to keep it. -->"
_FIELDS = (
    *("topk", "block_q", "block_k", "token_order", "router", "complement", "alpha"),
    *("smooth_k", "precision", "qat_backward"),
)


def card(adapter: Adapter) -> str:
    """The text of the card: the Hub's metadata, what it is, its settings, and how to load it."""
    config, model = adapter.config, adapter.model.get("class", "transformer")
    whole = any(name.startswith("model.") for name in adapter.tensors)
    head, base = ["---", "library_name: diffusers"], adapter.base_model
    if base is not None and (base.count("/") != 1 or base.startswith((".", "/"))):
        base = None  # a path on someone's disk, which the Hub would refuse
    if base is not None:
        head += [f"base_model: {base}", "base_model_relation: adapter"]
    head += ["tags:", "- sla2", "- sparse-attention", "- video-generation", "---"]
    holds = "and the transformer's fine-tuned weights" if whole else "without the model's weights"
    layers = adapter.layers
    run = layers == tuple(range(layers[0], layers[-1] + 1))
    numbers = f"{layers[0]} to {layers[-1]}" if run else ", ".join(map(str, layers))
    rows = [f"| {name} | {getattr(config, name)} |" for name in _FIELDS]
    rows += [f"| {name} | {value} |" for name, value in config.options.items()]
    rows += [f"| layers | {numbers} |", f"| dense steps | {adapter.dense_steps} |"]
    return "\n".join(
        [
            *head,
            "",
            _MARK,
            "",
            f"# Sparse-linear attention for {base or model}",
            "",
            f"An adapter for diffusers' `{model}`: the trained parameters of its attention,"
            f" {holds}. Each query attends exactly to {100 * config.topk:.3g} % of the key blocks.",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
            "```python",
            "import torch",
            "from diffusers import DiffusionPipeline",
            "from sla2_core.integrations.loading import apply_adapter",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{base or "BASE_MODEL"}",'
            " torch_dtype=torch.bfloat16)",
            'handle = apply_adapter(pipe.transformer, "THIS_REPOSITORY")',
            "```",
            "",
        ]
    )


def write_card(adapter: Adapter, folder: Path) -> None:
    """Write the card into `folder`, unless a README.md that was written by hand is there.

    Raises OSError naming the file if it cannot be written.
    """
    path = folder / NAME
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return
    text = card(adapter)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
