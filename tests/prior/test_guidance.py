"""Guidance against its formulas, and what it costs."""

import math
from collections.abc import Callable

import pytest
import torch

from smalti.errors import SmaltiError
from smalti.prior.flow.guidance import Classifier, ClassifierFree, classifier_free, with_classifier
from smalti.prior.flow.path import LinearPath, VPLinearPath
from smalti.prior.flow.prediction import PREDICTIONS, Dynamics
from smalti.prior.flow.solvers.runge_kutta import Heun

LABELS = torch.tensor([0, 1, 2])
NULL = torch.full_like(LABELS, 3)


class Network:
    """A function of x, t and the label that records the batch size of every call."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        shift = (labels + 1.0).view(-1, 1, 1, 1) * torch.arange(1.0, 1 + x.shape[1]).view(-1, 1, 1)
        return x * t.view(-1, 1, 1, 1) + shift


def run(options: ClassifierFree, time: float = 0.5) -> tuple[torch.Tensor, list[int]]:
    network, x = Network(), torch.ones(3, 4, 2, 2)
    output = classifier_free(network, LABELS, NULL, options)(x, torch.full((3,), time))
    return output, network.rows


def test_guidance_is_its_formula() -> None:
    network, x, t = Network(), torch.ones(3, 4, 2, 2), torch.full((3,), 0.5)
    cond, uncond = network(x, t, LABELS), network(x, t, NULL)
    for scale in (-1.0, 0.0, 2.5):
        guided, rows = run(ClassifierFree(scale))
        torch.testing.assert_close(guided, uncond + scale * (cond - uncond))
        assert rows == [6]


def test_guidance_one_makes_one_forward_pass_of_the_batch() -> None:
    output, rows = run(ClassifierFree(1.0))
    assert rows == [3]
    torch.testing.assert_close(
        output, Network()(torch.ones(3, 4, 2, 2), torch.full((3,), 0.5), LABELS)
    )


def test_outside_the_interval_there_is_no_guidance_and_no_second_pass() -> None:
    options = ClassifierFree(4.0, (0.2, 0.6))
    assert [run(options, t)[1] for t in (0.1, 0.2, 0.4, 0.6, 0.7)] == [[3], [6], [6], [6], [3]]
    torch.testing.assert_close(run(options, 0.1)[0], run(ClassifierFree(1.0), 0.1)[0])


def test_samples_at_different_times_are_guided_independently() -> None:
    """As an adaptive solver needs: each sample is inside or outside the interval."""
    options, x = ClassifierFree(4.0, (0.2, 0.6)), torch.ones(3, 4, 2, 2)
    t = torch.tensor([0.1, 0.3, 0.7])
    output = classifier_free(Network(), LABELS, NULL, options)(x, t)
    for i in range(3):
        field = classifier_free(Network(), LABELS[i : i + 1], NULL[i : i + 1], options)
        torch.testing.assert_close(output[i : i + 1], field(x[i : i + 1], t[i : i + 1]))


def test_only_chosen_channels_are_guided() -> None:
    all_channels, conditional = run(ClassifierFree(3.0))[0], run(ClassifierFree(1.0))[0]
    some = run(ClassifierFree(3.0, channels=3))[0]
    torch.testing.assert_close(some[:, :3], all_channels[:, :3])
    torch.testing.assert_close(some[:, 3:], conditional[:, 3:])


def test_the_variance_output_is_never_guided() -> None:
    def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.cat([Network()(x, t, labels)] * 2, 1)

    x, t = torch.ones(3, 4, 2, 2), torch.full((3,), 0.5)
    output = classifier_free(network, LABELS, NULL, ClassifierFree(3.0))(x, t)
    torch.testing.assert_close(output[:, :4], run(ClassifierFree(3.0))[0])
    torch.testing.assert_close(output[:, 4:], Network()(x, t, LABELS))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath()], ids=lambda path: path.kind)
def test_guided_predictions_convert_into_each_other(mixtures, path, prediction) -> None:
    """Which of the four the network predicts makes no difference to classifier-free guidance."""
    conditional, unconditional = mixtures.gaussian([2.0, 1.0], [0.5, 0.2]), mixtures.two()

    def field(prediction):
        def network(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            parts = (conditional.predict(prediction, path, x, t), unconditional)
            other = parts[1].predict(prediction, path, x, t)
            return torch.where((labels == 3)[:, None], other, parts[0])

        return classifier_free(network, LABELS, NULL, ClassifierFree(3.0))

    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.3, 0.5, 0.8]).double()
    velocity = Dynamics(path, "velocity", field("velocity")).velocity(x, t)
    torch.testing.assert_close(
        Dynamics(path, prediction, field(prediction)).velocity(x, t), velocity
    )


def components(both, path) -> tuple[list, Callable[..., torch.Tensor]]:
    """The components of a mixture, and log p(component | x_t)."""
    single = [
        type(both)(both.means[k : k + 1], both.stds[k : k + 1], torch.ones(1).double())
        for k in range(len(both.weights))
    ]

    def log_probability(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        joint = torch.stack([s.log_density(path, x, t) for s in single], 1) + both.weights.log()
        return joint.log_softmax(1).gather(1, labels[:, None])[:, 0]

    return single, log_probability


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath()], ids=lambda path: path.kind)
def test_a_perfect_classifier_turns_the_unconditional_score_into_the_conditional(
    mixtures, path, prediction
) -> None:
    """Bayes: score of p(x | k) = score of p(x) + grad log p(k | x), here for the components."""
    both = mixtures.two()
    single, log_probability = components(both, path)

    labels = torch.tensor([0, 1, 0, 1])
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0.2, 0.4, 0.6, 0.9]).double()
    field = with_classifier(
        both.dynamics(path, prediction).output,
        labels,
        Classifier(log_probability),
        path,
        prediction,
    )
    with torch.no_grad():
        guided = Dynamics(path, prediction, field).estimate(x, t)
    for i, label in enumerate(labels.tolist()):
        expected = single[label].predict("velocity", path, x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(guided.velocity[i : i + 1], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [LinearPath(), VPLinearPath()], ids=lambda path: path.kind)
def test_guided_samples_are_those_of_the_class(mixtures, path) -> None:
    """The unconditional flow of a mixture, guided by its exact classifier, ends at the component;
    with a larger scale it ends further from the other one."""
    both, label = mixtures.two(), 0
    _, log_probability = components(both, path)

    noise = torch.randn(2000, 2, dtype=torch.float64)
    times = torch.linspace(1e-3, 1 - 1e-3, 65, dtype=torch.float64)

    def sampled(scale: float) -> torch.Tensor:
        labels = torch.full((len(noise),), label)
        classifier = Classifier(log_probability, scale)
        field = with_classifier(both.dynamics(path).output, labels, classifier, path, "velocity")
        *_, end = Heun().integrate(Dynamics(path, "velocity", field).velocity, noise, times)
        return end

    plain, guided, more = (sampled(scale) for scale in (0.0, 1.0, 4.0))
    near = [((end - both.means[label]).norm(dim=1) < 2).double().mean() for end in (plain, guided)]
    assert near[0] == pytest.approx(both.weights[label].item(), abs=0.05) and near[1] > 0.99
    torch.testing.assert_close(guided.mean(0), both.means[label], rtol=0, atol=0.05)
    torch.testing.assert_close(guided.std(0), both.stds[label], rtol=0, atol=0.05)
    towards_other = both.means[1] - both.means[0]
    assert ((more - guided) @ towards_other).mean() < 0


def test_the_gradient_of_a_classifier_is_scaled() -> None:
    classifier = Classifier(lambda x, t, labels: -x.square().flatten(1).sum(1) / 2, scale=3.0)
    x = torch.randn(2, 4)
    torch.testing.assert_close(classifier.gradient(x, torch.zeros(2), LABELS[:2]), -3 * x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFree(math.nan), "guidance_scale is nan"),
        (lambda: ClassifierFree(2.0, (0.5, 0.2)), r"guidance_interval is \(0.5, 0.2\)"),
        (lambda: ClassifierFree(2.0, (0.5, 1.2)), "give two times"),
    ],
)
def test_errors_are_explained(make, message: str) -> None:
    with pytest.raises(SmaltiError, match=message):
        make()
