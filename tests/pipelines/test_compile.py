"""`Pipeline.compile`: what sampling runs is compiled, and samples stay those of before."""

from functools import partial

import pytest
import torch
from chance import generators
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from smalti.data.latents import CodeSpec
from smalti.errors import GenerationError
from smalti.pipelines.pipeline import Pipeline
from smalti.prior.next_token.model import NextTokenConfig, NextTokenPrior
from smalti.prior.packing import PackableLinear

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


def test_on_a_cpu_large_weights_are_packed_and_nothing_is_compiled(pipe, monkeypatch) -> None:
    for name in ("PACKED_FROM", "PACKED_FROM_OF_MANY_ROWS"):
        monkeypatch.setattr(f"smalti.prior.packing.{name}", 1)
    monkeypatch.setattr("smalti.prior.packing.cpu_has_wide_vectors", lambda: True)

    def call() -> torch.Tensor:
        return pipe([0, 1], generator=generators(0, 1), output_type="pt").images

    before = call()
    pipe.compile()
    packable = [m for m in pipe.prior.modules() if isinstance(m, PackableLinear)]
    assert packable and all(layer.has_packed_copy for layer in packable)
    assert not compiled(pipe.prior) and not compiled(pipe.tokenizer)
    torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_steps_can_be_recorded_as_cuda_graphs(scale: float) -> None:
    """One graph for all steps of a batch, with the same codes; addresses stay between calls."""
    config = NextTokenConfig(spec=CodeSpec(8, ((3, 3),)), num_classes=3, depth=2, **SMALL)
    torch.manual_seed(0)
    prior, labels, graphs, after = NextTokenPrior(config).eval(), torch.tensor([0, 1]), 0, []
    torch.nn.init.normal_(prior.output.weight)
    options = {"temperature": 0.0, "guidance_scale": scale}
    expected = prior.sample(labels, **options)

    def counting(graph, inputs, mode):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch.compiler.reset()
    prior.compile_parts(backend=counting, mode="reduce-overhead", fullgraph=True)
    found = prior.sample(labels, **options, on_step=lambda *_: after.append(graphs))
    assert torch.equal(found, expected)
    assert after[0] > 0 and after[1] == after[-1]  # the guided rows begin at the second step
    address = prior._graph_cache.keys.data_ptr()
    assert torch.equal(prior.sample(labels, **options), expected)
    assert prior._graph_cache.keys.data_ptr() == address and graphs == after[-1]
    torch.compiler.reset()


def test_the_host_waits_for_nothing_between_two_steps_on_a_gpu() -> None:
    config = NextTokenConfig(spec=CodeSpec(8, ((3, 3),)), num_classes=3, depth=2, **SMALL)
    prior, waits, aten = NextTokenPrior(config).eval(), [], torch.ops.aten
    prior.compiled_with = {"mode": "reduce-overhead"}

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (aten._local_scalar_dense.default, aten.nonzero.default):
                waits.append(function)
            return function(*args, **(kwargs or {}))

    options = {"guidance_scale": 2.0, "top_k": 4, "top_p": 0.9}
    with Counted():
        prior.sample(torch.tensor([0, 1]), generator=generators(0, 1), **options)
    assert len(waits) <= 3, waits  # labels are checked before the first step, logits after the last
    torch.nn.init.constant_(prior.output.weight, torch.nan)
    with pytest.raises(GenerationError, match="NaN"):
        prior.sample(torch.tensor([0, 1]))
