"""LPIPS against the package `lpips` with the same trunk, and what is refused."""

import hashlib
from importlib.resources import as_file, files
from types import SimpleNamespace

import lpips
import pytest
import torch
from safetensors.torch import load_file, save_file

from smalti.data.dataset import ImageDataset
from smalti.data.sources.base import open_source
from smalti.errors import SmaltiError
from smalti.tokenizer.losses.perceptual import LPIPS


@pytest.fixture(scope="module")
def model() -> LPIPS:
    return LPIPS.from_embedded()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    images = next(ImageDataset(open_source("emoji"), 64, split="heldout").batches(16)).images
    return images


def oracle(model: LPIPS) -> torch.nn.Module:
    """The package's LPIPS with its own heads and our trunk."""
    reference = lpips.LPIPS(net="alex", pretrained=True, pnet_rand=True, verbose=False).eval()
    reference.net.load_state_dict(model.model.net.state_dict())
    return reference


def test_oracle_lpips(model: LPIPS, pictures: torch.Tensor) -> None:
    noisy = (pictures + 0.2 * torch.randn_like(pictures)).clamp(-1, 1)
    reference = oracle(model)
    with torch.no_grad():
        for other in (noisy, pictures.flip(0)):
            torch.testing.assert_close(
                model(pictures, other),
                reference(pictures, other).flatten(),
                rtol=1e-3,  # the embedded heads are in half precision
                atol=1e-4,
            )


def test_heads_that_a_file_lacks_are_those_of_the_package(
    model: LPIPS, pictures: torch.Tensor, tmp_path
) -> None:
    trunk = {k: v for k, v in embedded_weights().items() if not k.startswith("lins")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    ours, reference = LPIPS.from_file(tmp_path / "trunk.safetensors", "alex"), oracle(model)
    other = pictures.flip(0)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pictures, other), reference(pictures, other).flatten(), rtol=1e-5, atol=1e-6
        )


def test_it_is_a_distance_that_grows_with_noise(model: LPIPS, pictures: torch.Tensor) -> None:
    assert model(pictures, pictures).abs().max() == 0
    noise = torch.randn_like(pictures)
    scores = [model(pictures + s * noise, pictures).mean() for s in (0.05, 0.2, 0.8)]
    assert 0 < scores[0] < scores[1] < scores[2]
    a, b = model(pictures, noise), model(noise, pictures)
    torch.testing.assert_close(a, b)


def test_it_never_trains_but_lets_gradients_through(model: LPIPS, pictures: torch.Tensor) -> None:
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    images = pictures.clone().requires_grad_()
    model(images, pictures.flip(0)).sum().backward()
    assert images.grad.isfinite().all() and images.grad.abs().sum() > 0
    blank = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(blank, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert blank.grad.isfinite().all()
    features = [torch.zeros_like(f) for f in model.features(pictures)]
    dark = [f.clone().requires_grad_() for f in features]  # all ReLUs are off
    model.distance(dark, features).sum().backward()
    assert all(f.grad.isfinite().all() for f in dark)


def test_autocast_changes_nothing(model: LPIPS, pictures: torch.Tensor) -> None:
    other = pictures.flip(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = model(pictures, other)
    assert torch.equal(inside, model(pictures, other))


def embedded_weights() -> dict[str, torch.Tensor]:
    with as_file(files("smalti.tokenizer") / "assets" / "lpips_alex.safetensors") as path:
        return load_file(path)


def test_building_uses_no_random_numbers_and_leaves_nothing_unset() -> None:
    before = torch.random.get_rng_state()
    model = LPIPS.from_embedded()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {v.device.type for v in model.state_dict().values()} == {"cpu"}
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_files_are_checked(model: LPIPS, tmp_path) -> None:
    weights = embedded_weights()
    save_file(weights, tmp_path / "alex.safetensors")
    again = LPIPS.from_file(tmp_path / "alex.safetensors", "alex")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    save_file({**weights, "lins.5": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(SmaltiError, match=r"for alex .*unknown tensors: lins\.5"):
        LPIPS.from_file(tmp_path / "more.safetensors", "alex")
    save_file({**weights, "lins.0": torch.ones(1, 3, 1, 1)}, tmp_path / "shape.safetensors")
    with pytest.raises(SmaltiError, match="does not hold LPIPS weights for alex"):
        LPIPS.from_file(tmp_path / "shape.safetensors", "alex")
    with pytest.raises(SmaltiError, match="does not hold LPIPS weights for vgg"):
        LPIPS.from_file(tmp_path / "alex.safetensors", "vgg")
    with pytest.raises(SmaltiError, match="do not exist"):
        LPIPS.from_file(tmp_path / "nowhere", "alex")
    (tmp_path / "cut").write_bytes((tmp_path / "alex.safetensors").read_bytes()[:100])
    with pytest.raises(SmaltiError, match="are damaged"):
        LPIPS.from_file(tmp_path / "cut", "alex")
    assert len(load_file(tmp_path / "alex.safetensors")) == 15


@pytest.fixture(scope="module")
def package_vgg() -> torch.nn.Module:
    """The package's VGG with its own heads and a random trunk."""
    torch.manual_seed(0)
    return lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False).eval()


def convolutions(module: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]


def test_vgg_is_the_network_of_the_package(package_vgg: torch.nn.Module, tmp_path) -> None:
    weights = {f"lins.{i}": head.model[1].weight for i, head in enumerate(package_vgg.lins)}
    for i, conv in enumerate(convolutions(package_vgg.net)):
        weights |= {f"convs.{i}.weight": conv.weight, f"convs.{i}.bias": conv.bias}
    save_file(weights, tmp_path / "vgg.safetensors")
    ours = LPIPS.from_file(tmp_path / "vgg.safetensors", "vgg")
    a, b = torch.randn(2, 2, 3, 48, 48).clamp(-1, 1)
    torch.testing.assert_close(ours(a, b), package_vgg(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_vgg_takes_its_trunk_from_torchvision_and_its_heads_from_the_package(
    package_vgg: torch.nn.Module, monkeypatch
) -> None:
    import torchvision.models
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"])  # in place of the download
    for theirs, conv in zip(convolutions(features), convolutions(package_vgg.net), strict=True):
        theirs.load_state_dict(conv.state_dict())
    trunk = SimpleNamespace(features=features)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda **kwargs: trunk)
    ours = LPIPS.from_torchvision()
    a, b = torch.randn(2, 2, 3, 48, 48).clamp(-1, 1)
    torch.testing.assert_close(ours(a, b), package_vgg(a, b).flatten(), rtol=1e-4, atol=1e-6)


def test_vgg_takes_its_trunk_from_a_file_of_torchvision(
    package_vgg: torch.nn.Module, tmp_path
) -> None:
    trunk = {}
    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    for layer, conv in zip(layers, convolutions(package_vgg.net), strict=True):
        trunk |= {f"features.{layer}.weight": conv.weight, f"features.{layer}.bias": conv.bias}
    save_file({**trunk, "classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg16.safetensors")
    ours = LPIPS.of("vgg", tmp_path / "vgg16.safetensors")
    a, b = torch.randn(2, 2, 3, 48, 48).clamp(-1, 1)
    torch.testing.assert_close(ours(a, b), package_vgg(a, b).flatten(), rtol=1e-4, atol=1e-6)
    del trunk["features.28.bias"]
    save_file(trunk, tmp_path / "cut.safetensors")
    with pytest.raises(SmaltiError, match=r"lack features\.28\.bias"):
        LPIPS.of("vgg", tmp_path / "cut.safetensors")


def test_the_network_is_a_choice(model: LPIPS, tmp_path) -> None:
    a, b = torch.randn(2, 2, 3, 48, 48).clamp(-1, 1)
    assert torch.equal(LPIPS.of("alex", None)(a, b), model(a, b))
    with pytest.raises(SmaltiError, match="do not exist"):
        LPIPS.of("vgg", tmp_path / "nowhere.safetensors")


def test_the_embedded_file_is_the_one_its_readme_names() -> None:
    assets = files("smalti.tokenizer") / "assets"
    content = (assets / "lpips_alex.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() in (assets / "README.md").read_text()


def test_unequal_shapes_are_refused(model: LPIPS) -> None:
    with pytest.raises(SmaltiError, match="give two equal shapes"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(1, 3, 32, 32))
    with pytest.raises(SmaltiError, match="give two equal shapes"):
        model(torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32))


def test_tiny_images_are_refused(model: LPIPS) -> None:
    with pytest.raises(SmaltiError, match="needs at least 32 x 32"):
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_a_missing_vgg_download_is_explained(monkeypatch) -> None:
    import torchvision.models

    def offline(**kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models, "vgg16", offline)
    with pytest.raises(SmaltiError, match=r"cannot be downloaded \(no route to host\)"):
        LPIPS.from_torchvision()


def test_grey_is_repeated_and_alpha_is_seen_on_two_backgrounds(model: LPIPS) -> None:
    grey, other = torch.rand(2, 2, 1, 32, 48) * 2 - 1
    three = [x.repeat(1, 3, 1, 1) for x in (grey, other)]
    assert torch.equal(model(grey, other), model(*three))
    opaque = torch.cat([three[0], torch.ones(2, 1, 32, 48)], 1)
    assert model(opaque, opaque).eq(0).all()
    white, holes = torch.ones(1, 4, 32, 32), torch.ones(1, 4, 32, 32)
    holes[:, 3, 8:24, 8:24] = -1  # invisible on white
    black_is_wrong = model(-torch.ones(1, 3, 32, 32).where(holes[:, 3:] < 0, -1), white[:, :3])
    assert model(holes, white) == pytest.approx(black_is_wrong.item() / 2, rel=1e-4)
