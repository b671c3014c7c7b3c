"""The optimizers besides AdamW: what they update, and that a checkpoint holds all their state."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy_run import toy_config

from smalti.errors import ConfigurationError
from smalti.training.checkpoint import OptimizerState
from smalti.training.optim import adamw, make_optimizer, set_learning_rate


class Model(nn.Module):
    """An embedding, two blocks, and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(64, 8)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        x = self.table(codes)
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x), codes)


def new_model() -> Model:
    torch.manual_seed(0)
    return Model()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.zero_grad()
        model(torch.arange(8).roll(step)).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw8bit"])
def test_a_resumed_optimizer_takes_the_same_steps(name: str, tmp_path: Path) -> None:
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch is older than 2.9")
    if name == "adamw8bit":
        pytest.importorskip("torchao")
    config = toy_config(tmp_path, optimizer=name, weight_decay=0.1)
    model = new_model()
    optimizer = make_optimizer(model, config)
    with torch.compiler.set_stance("force_eager"):  # that of 8 bits compiles its steps
        take_steps(model, optimizer, range(3))
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        save_file(OptimizerState(optimizer).state_dict(), tmp_path / "optimizer.safetensors")
        take_steps(model, optimizer, range(3, 6))

        resumed = new_model()
        again = make_optimizer(resumed, config)
        resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
        OptimizerState(again).load_state_dict(load_file(tmp_path / "optimizer.safetensors"))
        take_steps(resumed, again, range(3, 6))
    before, after = model.state_dict(), resumed.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_moments_in_8_bits_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("torchao")

    def stored(name: str) -> int:
        model = new_model()
        optimizer = make_optimizer(model, toy_config(tmp_path, optimizer=name))
        take_steps(model, optimizer, range(1))
        state = OptimizerState(optimizer).state_dict()
        return sum(v.nbytes for k, v in state.items() if v.numel() >= 16 and "qmap" not in k)

    with torch.compiler.set_stance("force_eager"):
        assert stored("adamw8bit") < 0.5 * stored("adamw")  # small tensors stay in fp32


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch is older than 2.9")
def test_muon_trains_the_matrices_of_blocks_and_adamw_the_rest(tmp_path: Path) -> None:
    config = toy_config(tmp_path, weight_decay=0.1)
    ours, theirs, reference = new_model(), new_model(), new_model()
    take_steps(ours, make_optimizer(ours, replace(config, optimizer="muon")), range(2))
    matrices = [block[0].weight for block in theirs.blocks]
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    chosen = {id(weight) for weight in matrices}
    rest = adamw(theirs, config)
    for group in rest.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in chosen]
    for step in range(2):
        set_learning_rate(muon, 1e-2 / (step + 1))
        take_steps(theirs, rest, range(step, step + 1))
        muon.step()
        muon.zero_grad()
    take_steps(reference, adamw(reference, config), range(2))
    expected, other = theirs.state_dict(), reference.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        assert not torch.equal(value, other[name]), name


def test_optimizers_that_cannot_work_are_refused_with_a_remedy(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigurationError, match="choose one of adamw, muon, adamw8bit"):
        toy_config(tmp_path, optimizer="sgd")
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(ConfigurationError, match="no linear layers in repeated blocks"):
            make_optimizer(nn.Conv2d(2, 2, 1), toy_config(tmp_path, optimizer="muon"))
        monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigurationError, match=r"lacks: pip install 'torch>=2\.9'"):
        toy_config(tmp_path, optimizer="muon")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'smalti\[lowbit\]'"):
        toy_config(tmp_path, optimizer="adamw8bit")
