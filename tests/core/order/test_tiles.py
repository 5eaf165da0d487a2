"""The token order "tiles": a permutation of any grid, compact blocks, and what is refused."""

import math

import pytest
import torch
from sla2_core import SLA2Attention, SLA2Config
from sla2_core.order.base import coordinates_of
from sla2_core.order.tiles import tile_of
from sla2_core.reference import full_attention
from sla2_core.registry import ORDERS
from sla2_core.sdpa import ScaledDotProductSLA2
from sla2_core.training.capture import record
from sla2_core.training.stage1 import Stage1Config, train_router

CPU = torch.device("cpu")
WAN = (21, 30, 52)  # 81 frames of 480 x 832


def config(**changes):
    known = dict(head_dim=8, num_heads=2, topk=0.3, block_q=8, block_k=5, token_order="tiles")
    return SLA2Config(**known | changes)


def order(grid, tile=None, **changes):
    changes = {"options": {"tile": tile}, **changes}
    return ORDERS.make(config(**changes)).permutation(grid)


def spread(places, grid, block=64):
    """Mean squared distance to the centre of the block, over all tokens."""
    points = coordinates_of(grid, CPU)[places].double()
    return sum(float((x - x.mean(0)).square().sum()) for x in points.split(block)) / len(points)


def test_blocks_of_64_on_wans_grid_are_as_compact_as_the_module_says():
    points = coordinates_of(WAN, CPU)
    raster = torch.arange(len(points))
    frame, row, column = (points // 4).unbind(1)
    tiles = torch.argsort((frame * 8 + row) * 13 + column, stable=True)
    assert spread(raster, WAN) == pytest.approx(226, abs=0.5)
    assert spread(tiles, WAN) == pytest.approx(30, abs=0.1)
    assert spread(order(WAN, block_k=64), WAN) == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((5, 3, 7), (4, 4, 4)),
        ((2, 2, 3), (4, 4, 4)),
        ((1, 1, 1), (4, 4, 4)),
        ((6, 1, 5), (1, 3, 2)),
        ((1, 9, 10), None),
        ((3, 5, 4), None),
    ],
)
def test_any_grid_is_permuted_and_each_tile_is_walked_without_a_jump(grid, tile):
    places = order(grid, tile)
    assert torch.equal(places.sort().values, torch.arange(math.prod(grid)))
    points = coordinates_of(grid, CPU)[places]
    sides = torch.tensor(tile or tile_of(5, image=grid[0] == 1))
    tiles = points // sides
    step, leaves = points.diff(dim=0).abs().sum(1), tiles.diff(dim=0).abs().sum(1)
    assert (step[leaves == 0] == 1).all()
    assert (leaves <= 1).all()  # into a neighbour
    _, visits = torch.unique_consecutive(tiles, dim=0, return_counts=True)
    assert len(visits) == len(torch.unique(tiles, dim=0))  # each once


def test_a_tile_holds_a_key_block_unless_it_is_given():
    assert [tile_of(n, False) for n in (16, 32, 64, 5)] == [
        (4, 2, 2),
        (4, 4, 2),
        (4, 4, 4),
        (2, 2, 2),
    ]
    assert [tile_of(n, True) for n in (16, 64)] == [(1, 4, 4), (1, 8, 8)]
    assert torch.equal(order((1, 6, 7), block_k=16), order((1, 6, 7), (1, 4, 4)))
    assert not torch.equal(order((5, 6, 7), block_k=16), order((5, 6, 7), block_k=64))


def test_the_places_follow_from_the_coordinates_alone():
    grid, shuffled = (5, 3, 7), torch.randperm(105, generator=torch.Generator().manual_seed(0))
    member = ORDERS.make(config())
    places = member.arrange(coordinates_of(grid, CPU)[shuffled], image=False)
    assert torch.equal(shuffled[places], member.permutation(grid))


@pytest.mark.parametrize("tile", [(4, 4), (4, 4, 0), (4, 4, 1.0), 4, True, "444"])
def test_tiles_of_another_form_are_refused(tile):
    with pytest.raises(ValueError, match=r"options.tile: expected None or \(frames, height, width"):
        config(options={"tile": tile})


def test_the_tile_is_part_of_the_geometry_and_of_the_files():
    for chosen in (config(), config(options={"tile": [4, 2, 2]})):
        assert SLA2Config.from_dict(chosen.to_dict()) == chosen
        assert chosen.geometry()["options.tile"] == chosen.options["tile"]
    with pytest.raises(ValueError, match=r"options.tile: expected an option that may change"):
        config().changed(options={"tile": (4, 4, 4)})


def qkv(tokens, grad=False):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 2, tokens, 8)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for _ in range(3)]


def test_a_module_orders_tokens_of_a_grid_and_takes_others_as_they_come():
    grid, text, tokens = (5, 3, 7), 4, 109
    places = torch.cat([order(grid), torch.arange(105, 109)])
    attention, plain = SLA2Attention(config()), SLA2Attention(config(token_order="raster"))
    q, k, v = qkv(tokens)
    expected = plain(*(x[:, :, places] for x in (q, k, v)), text_tokens=text)
    assert torch.equal(attention(q, k, v, text_tokens=text, grid=grid)[:, :, places], expected)
    assert torch.equal(attention(q, k, v, text_tokens=text), plain(q, k, v, text_tokens=text))
    drop_in = ScaledDotProductSLA2(config())
    assert torch.equal(drop_in(q, k, v, text_tokens=text, grid=grid)[:, :, places], expected)


def test_with_every_block_it_is_full_attention_with_its_gradients():
    leaves = qkv(105, grad=True)
    attention = SLA2Attention(config(topk=1.0))
    found, expected = (
        [out, *torch.autograd.grad(out.sin().sum(), leaves)]
        for out in (attention(*leaves, grid=(5, 3, 7)), full_attention(*leaves))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_captures_of_another_order_are_refused(tmp_path):
    def layers(**changes):
        return {0: SLA2Attention(config(**changes))}

    mine = layers()
    captures = record(mine, lambda i: mine[0](*qkv(105), grid=(5, 3, 7)), samples=2)
    settings = Stage1Config(topk=(0.3,), steps=1)
    for changes, expected in (
        ({"token_order": "raster"}, "token_order='raster', got 'tiles'"),
        ({"options": {"tile": (4, 2, 2)}}, r"options.tile=\[4, 2, 2\], got None"),
        ({"block_k": 6}, "block_k=6, got 5"),
    ):
        message = f"captures: expected tokens ordered with {expected}"
        with pytest.raises(ValueError, match=message):
            train_router(layers(**changes), captures, settings, tmp_path)
