"""`Pipeline.compile`: what sampling runs is compiled, and samples stay those of before."""

from functools import partial

import pytest
import torch
from chance import generators
from torch import nn

from smalti.data.latents import CodeSpec
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior

CLASSES = ("cat", "dog", "emu")
SMALL = {"width": 16, "num_heads": 2, "hidden": 32}
# Without code generation, which takes a minute: the traced graphs run as they are.
OPTIONS = {"backend": "eager"}


@pytest.fixture(params=["next-token", "next-scale", "flow"])
def pipe(request, tokenizer, prior) -> Pipeline:
    if request.param == "next-scale":
        return request.getfixturevalue("scale_pipe")
    if request.param == "flow":
        return request.getfixturevalue("quick_flow")
    return Pipeline(tokenizer, prior, CLASSES)


@pytest.fixture
def quick_flow(flow_pipe) -> Pipeline:
    flow_pipe.sampling = {"num_inference_steps": 2, "solver": "euler"}
    return flow_pipe


def compiled(model: nn.Module) -> int:
    """How many of its modules are compiled."""
    return sum(module._compiled_call_impl is not None for module in model.modules())


def test_a_compiled_pipeline_samples_the_same(pipe, tmp_path) -> None:
    def call() -> torch.Tensor:
        return pipe([0, 1], generator=generators(0, 1), output_type="pt").images

    fingerprints = pipe.tokenizer.fingerprint, pipe.prior.fingerprint
    before = call()
    torch.compiler.reset()
    assert pipe.compile(**OPTIONS) is pipe
    assert compiled(pipe.prior) and compiled(pipe.tokenizer) == 1
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)
    assert (pipe.tokenizer.fingerprint, pipe.prior.fingerprint) == fingerprints
    loaded = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "p"))
    assert loaded.prior.fingerprint == pipe.prior.fingerprint and not compiled(loaded.prior)
    torch.compiler.reset()


@pytest.mark.slow  # it generates code
def test_a_next_scale_prior_compiled_for_this_machine_samples_the_same(scale_pipe) -> None:
    def call() -> torch.Tensor:
        return scale_pipe([0, 1, 2], generator=generators(0, 1, 2), output_type="pt").images

    before = call()
    torch.compiler.reset()
    scale_pipe.prior.compile_parts()
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_other_image_sizes_of_a_compiled_pipeline_are_compiled(quick_flow) -> None:
    """Once: another call of the same size compiles nothing."""
    graphs = 0

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def call() -> torch.Tensor:
        made = generators(0, 1)
        return quick_flow([0, 1], generator=made, output_type="pt", image_size=(8, 16)).images

    before = call()
    torch.compiler.reset()
    quick_flow.compile(backend=counting)
    assert compiled(quick_flow.resized((8, 16)).prior)
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)
    compiled_once = graphs
    assert compiled_once > 0
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)
    assert graphs == compiled_once
    torch.compiler.reset()


def test_steps_and_blocks_of_a_compiled_prior_share_their_code() -> None:
    """Nothing is compiled after the third step, in which the position is a dynamic number, and
    blocks are not compiled each: dynamo would stop at its limit of 8."""
    config = NextTokenConfig(spec=CodeSpec(8, ((3, 3),)), num_classes=3, depth=10, **SMALL)
    prior, graphs, after = NextTokenPrior(config).eval(), 0, []

    def counting(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    prior.compile_parts(backend=counting)
    sample = partial(prior.sample, torch.tensor([0]), generator=generators(0))
    sample(on_step=lambda step, total, codes: after.append(graphs))
    assert after[0] > 0 and after[2] == after[-1] <= 3
    sample()
    assert graphs == after[-1]
    torch.compiler.reset()
