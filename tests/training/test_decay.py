"""Weight decay acts on the matrices of layers, and on nothing else."""

import torch
from torch import nn

from smalti.prior.next_scale.model import NextScaleConfig, NextScalePrior
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.training.optim import split_by_decay


class Model(nn.Module):
    no_weight_decay = ("spared.weight",)

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 4, 8))
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(3, 8)
        self.spared = nn.Embedding(3, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def names(model: nn.Module) -> tuple[set[str], set[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = split_by_decay(model)
    return {known[id(p)] for p in decayed}, {known[id(p)] for p in others}


def test_layers_decay_and_bare_parameters_do_not() -> None:
    decayed, others = names(Model())
    assert decayed == {"layer.weight", "table.weight"}
    assert others == {"position", "layer.bias", "norm.weight", "norm.bias", "spared.weight"}


def test_a_next_scale_prior_spares_what_var_spares() -> None:
    _, others = names(NextScalePrior(NextScaleConfig(depth=1, width=16, num_heads=2)))
    spared = {name for name in others if not name.endswith("bias")}
    assert spared == {
        "pos_start",
        "pos_1LC",
        "lvl_embed.weight",
        "blocks.0.attn.scale_mul_1H11",
    }


def test_every_matrix_of_a_next_token_prior_decays_as_in_llamagen() -> None:
    model = NextTokenPrior(NextTokenConfig(depth=1, width=16, num_heads=2, hidden=32))
    decayed, _ = names(model)
    assert decayed == {name for name, p in model.named_parameters() if p.ndim >= 2}
