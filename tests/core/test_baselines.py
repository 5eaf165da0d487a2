"""The baselines of the paper's table, each against its plain formula, and through adapters,
training and torch.compile.
"""

import dataclasses
import math

import pytest
import torch
from helpers import tiny_wan
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.cost import sla2_cost
from sla2_core.integrations.diffusers import apply_sla2
from sla2_core.integrations.loading import apply_adapter
from sla2_core.training.capture import Captured, capture
from sla2_core.training.stage1 import Stage1Config, train_stage1
from sla2_core.training.stage1.soft import Call
from sla2_core.training.stage2 import Stage2Config, train_stage2
from sla2_core.variants import VARIANTS

N, HEADS, DIM, BLOCK_Q, BLOCK_K = 61, 2, 12, 8, 5
BASE = SLA2Config(head_dim=DIM, num_heads=HEADS, topk=0.2, block_q=BLOCK_Q, block_k=BLOCK_K)
CASES = {  # valid keys of each item, text tokens
    "plain": (None, 0),
    "kv_lengths": ((61, 38), 0),
    "text": (None, 11),
    "text and kv_lengths": ((61, 55), 11),
}


def qkv(dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    return [3 * torch.randn(2, HEADS, N, DIM, generator=generator).to(dtype) for _ in range(3)]


def blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def means(x, parts):
    return torch.stack([x[part].mean(0) for part in parts])


def with_text(chosen, valid: int, video: int):
    """`chosen` (rows, video blocks) beside the blocks with text, which every row selects."""
    total = math.ceil(valid / BLOCK_K)
    mask = torch.zeros(len(chosen), math.ceil(N / BLOCK_K), dtype=torch.bool)
    mask[:, : chosen.shape[1]] = chosen
    if video < N:
        mask[:, chosen.shape[1] : total] = True
    return mask


def scores_of(q, k, video: int, valid: int):
    """Scaled products of the block means of one head, over the key blocks that are chosen from."""
    last = valid if video == N else video // BLOCK_K * BLOCK_K
    pooled_q, pooled_k = means(q, blocks(video, BLOCK_Q)), means(k, blocks(last, BLOCK_K))
    return (pooled_q @ pooled_k.T / math.sqrt(DIM)).detach()


def sparge_mask(scores, topk=0.2, top_p=0.5):
    """Top-k united with top-p, row by row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for row, chosen in zip(scores, mask):
        order, share = row.argsort(descending=True).tolist(), torch.softmax(row, -1)
        chosen[order[: max(1, round(topk * len(row)))]] = True
        held = 0.0
        for block in order:
            if held >= top_p:
                break
            chosen[block], held = True, held + float(share[block])
    return mask


def masked_attention(q, k, v, mask, valid: int):
    """Softmax over the keys of the selected blocks, for the queries of one head."""
    tokens = mask.repeat_interleave(BLOCK_Q, 0)[: len(q)].repeat_interleave(BLOCK_K, 1)[:, : len(k)]
    tokens = tokens & (torch.arange(len(k)) < valid)
    scores = (q @ k.T / math.sqrt(DIM)).masked_fill(~tokens, -torch.inf)
    return torch.softmax(scores, -1) @ v


def vmoba(attention, q, k, v, valid, video, head):
    """The best pairs of the head until they hold the share tau of its similarity, its own blocks
    first; none for the rows that get nothing else but their best.
    """
    scores = scores_of(q, k, video, valid)
    (rows, columns), low = scores.shape, scores.min()
    similarity = (scores - low) / (scores.max() - low)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    own = [
        (i, j)
        for i in range(rows)
        for j in range(columns)
        if j * BLOCK_K < (i + 1) * BLOCK_Q and i * BLOCK_Q < (j + 1) * BLOCK_K
    ]
    own = own if attention.config.options["own_block"] else []
    for pair in own:
        mask[pair] = True
    wanted = max(1, round(attention.config.topk * columns)) / columns * similarity.sum()
    held = sum(similarity[pair] for pair in own)
    for index in similarity.flatten().argsort(descending=True).tolist():
        pair = divmod(index, columns)
        if held >= wanted:
            break
        if pair not in own:
            mask[pair], held = True, held + similarity[pair]
    for row, chosen in zip(scores, mask):
        chosen[row.argmax()] |= not chosen.any()
    mask = with_text(mask, valid, video)
    return masked_attention(q[:video], k, v, mask, valid), mask


def sparge_attention2(attention, q, k, v, valid, video, head):
    mask = with_text(sparge_mask(scores_of(q, k, video, valid)), valid, video)
    return masked_attention(q[:video], k, v, mask, valid), mask


def vsa(attention, q, k, v, valid, video, head):
    """O_f + G O_c, the gate a linear map of the head's q."""
    scores = scores_of(q, k, video, valid)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    best = scores.topk(max(1, round(0.2 * scores.shape[1])), -1).indices
    mask = with_text(chosen.scatter(-1, best, True), valid, video)
    pooled_q, pooled_k, pooled_v = (
        means(x, blocks(length, size))
        for x, length, size in ((q, video, BLOCK_Q), (k, valid, BLOCK_K), (v, valid, BLOCK_K))
    )
    coarse = torch.softmax(pooled_q @ pooled_k.T / math.sqrt(DIM), -1) @ pooled_v
    gate = q[:video] @ attention.complement.weight[head] + attention.complement.bias[head]
    fine = masked_attention(q[:video], k, v, mask, valid)
    return fine + gate * coarse.repeat_interleave(BLOCK_Q, 0)[:video], mask


FORMULAS = {
    "vsa": (vsa, {}),
    "vmoba": (vmoba, {"own_block": False}),
    "vmoba, own blocks": (vmoba, {"own_block": True}),
    "sparge_attention2": (sparge_attention2, {"top_p": 0.5}),
}


def make(name: str, **changes) -> SLA2Config:
    """The configuration of a baseline; its options are those of the formula."""
    config = VARIANTS[name.partition(",")[0]](BASE)
    options = {**config.options, **FORMULAS[name][1], **changes.pop("options", {})}
    return config.replaced(**changes, options=options)


def learned(attention):
    """Its parameters, moved away from where they start."""
    generator = torch.Generator().manual_seed(9)
    found = [p.requires_grad_() for p in attention.parameters()]
    with torch.no_grad():
        for p in found:
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_baseline_is_its_formula_with_every_gradient(name, case):
    lengths, text = CASES[case]
    formula, _ = FORMULAS[name]
    results = {}
    for backend in ("auto", "blocked", "reference", "formula"):
        config = make(name, backend="auto" if backend == "formula" else backend)
        attention = SLA2Attention(config).double()
        leaves = [x.requires_grad_() for x in qkv()]
        parameters = learned(attention)
        if backend == "formula":
            rows, maps = [], []
            for item in range(2):
                valid = N if lengths is None else lengths[item]
                heads = [
                    formula(attention, *(x[item, h] for x in leaves), valid, N - text, h)
                    for h in range(HEADS)
                ]
                rows.append(torch.stack([out for out, _ in heads]))
                maps.append(torch.stack([mask for _, mask in heads]))
            out, maps = torch.stack(rows), torch.stack(maps)
        else:
            out, info = attention(*leaves, kv_lengths=lengths, text_tokens=text, return_info=True)
            out, maps = out[:, :, : N - text], info.block_map.mask()
            assert info.sparsity == pytest.approx(1 - float(maps.double().mean()))
        wanted = [*leaves, *parameters]
        grads = torch.autograd.grad(out.sin().sum(), wanted)
        results[backend] = [maps, out, *grads]
    expected = results.pop("formula")
    for backend, found in results.items():
        assert torch.equal(found[0], expected[0]), backend
        for fast, plain in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-8, atol=1e-9, msg=backend)


@pytest.mark.parametrize("name", ["vsa", "vmoba", "sparge_attention2"])
def test_a_baseline_goes_through_adapter_both_stages_and_torch_compile(name, tmp_path):
    torch._dynamo.reset()
    config = VARIANTS[name](tiny_wan.config())
    transformer = tiny_wan.model()
    handle = apply_sla2(transformer, config)
    captures = capture(
        handle, lambda i: transformer(**tiny_wan.inputs(seed=i)), tmp_path / "c", samples=3
    )
    stage1 = Stage1Config(topk=(0.3,), steps=2, eval_every=2, rows=None)
    assert train_stage1(handle, captures, stage1, tmp_path / "stage1").steps == 0
    before = {n: p.detach().clone() for n, p in handle.adapter_tensors().items()}
    stage2 = Stage2Config(
        steps=2, batch_size=2, learning_rate=1e-3, checkpoint_every=2, loss="distill"
    )
    report = train_stage2(handle, tiny_wan.pairs(), stage2, tmp_path / "stage2")
    for tensor, parameter in handle.adapter_tensors().items():
        assert not torch.equal(parameter, before[tensor]), tensor
    again = tiny_wan.model(seed=5)
    assert apply_adapter(again, report.adapter).config == config
    with torch.no_grad():
        expected = transformer.eval()(**tiny_wan.inputs())[0]
        assert torch.equal(again(**tiny_wan.inputs())[0], expected)
        compiled = torch.compile(again, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**tiny_wan.inputs())[0], expected)


def test_topk_topp_selects_more_where_the_distribution_is_flat():
    attention = SLA2Attention(make("sparge_attention2", topk=0.1, options={"top_p": 0.6}))
    q, k, v = (x.float() for x in qkv())
    q[:, :, :BLOCK_Q] = 0  # the first row's distribution is flat: 0.6 of 13 blocks are 8
    counts = attention(q, k, v, return_info=True)[1].block_map.counts
    assert (counts[:, :, 0] == 8).all()
    assert counts[:, :, 1:].float().mean() < 4
    soft = attention.router.soft(torch.randn(2, 3, 13), torch.tensor(2))
    hard = attention.router.hard(torch.zeros(1, 13), torch.tensor(2))
    assert (hard == (torch.arange(13) < 8)).all()
    assert (soft.sum(-1) >= 2 - 1e-4).all()
    with pytest.raises(ValueError, match=r"options.top_p: expected a number in \[0, 1\), got 1.0"):
        SLA2Attention(dataclasses.replace(attention.config, options={"top_p": 1.0}))


def test_stage_1_selects_over_the_whole_head_as_the_module_does():
    attention = SLA2Attention(make("vmoba"))
    q, k, v = qkv(torch.float32)
    given = dict(text_tokens=11, kv_lengths=(61, 55))
    wanted = attention(q, k, v, **given, return_info=True)[1].block_map.mask()
    call = Call(Captured(0, 0, 1.0, (0, 1), q, k, v, **given), attention.config, slice(None))
    rows = torch.tensor([1, 4])
    scores = call.scores(attention.router, rows)
    assert torch.equal(call.hard_mask(attention.router, scores, 0.2, rows), wanted[:, :, rows])
    assert wanted.sum(-1).unique().numel() > 2


def test_vsa_starts_as_the_sparse_branch_and_a_head_has_its_own_gate():
    attention = SLA2Attention(make("vsa")).double()
    q, k, v = qkv()
    alone = VARIANTS["sparse_only"](dataclasses.replace(BASE, router="heuristic", smooth_k=False))
    torch.testing.assert_close(attention(q, k, v), SLA2Attention(alone)(q, k, v))
    learned(attention)
    whole, second = attention(q, k, v), slice(1, 2)
    some = attention.attend(q[:, second], k[:, second], v[:, second], heads=second).out
    torch.testing.assert_close(some, whole[:, second])
    assert not torch.allclose(whole, SLA2Attention(alone)(q, k, v))


def test_costs_count_the_coarse_branch_and_its_gate():
    sizes = dict(n_q=100, n_k=60, num_heads=3, head_dim=8, topk=0.5, block_q=32, block_k=16)
    gate, between_means = 2 * 100 * 8 * 8, 4 * 4 * 4 * 8
    assert sla2_cost(**sizes, complement="coarse").linear_flops == 3 * (gate + between_means)
