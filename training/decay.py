"""Which parameters weight decay acts on."""

from torch import nn

LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
)


def split_by_decay(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters that decay, and those that do not.

    Weights of layers decay. Biases, norms and bare parameters (positions, codebooks, attention
    scales) do not, nor do those that the module names in `undecayed`.
    """
    spared = set(getattr(module, "undecayed", ()))
    matrices = {
        id(layer.weight)
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS) and f"{name}.weight" not in spared
    }
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if id(parameter) in matrices]
    return decayed, [parameter for parameter in trained if id(parameter) not in matrices]
