"""`Pipeline.compile`: what sampling runs is compiled, and samples stay those of before."""

import pytest
import torch
from chance import generators
from torch import nn

from smalti.pipelines.pipeline import Pipeline

CLASSES = ("cat", "dog", "emu")
# Without code generation, which takes a minute: the traced graphs run as they are.
OPTIONS = {"backend": "eager"}


@pytest.fixture(params=["next-token", "flow"])
def pipe(request, tokenizer, prior) -> Pipeline:
    if request.param == "flow":
        pipe = request.getfixturevalue("flow_pipe")
        pipe.sampling = {"num_inference_steps": 2, "solver": "euler"}
        return pipe
    return Pipeline(tokenizer, prior, CLASSES)


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
