"""What the demo trains: a scale for each kind of machine, with a recipe for each kind of prior."""

from dataclasses import dataclass, field, replace
from typing import Any

from smalti.prior.presets import PRESETS as PRIORS
from smalti.scripts.options import Sampling
from smalti.scripts.train_prior import TrainPriorConfig
from smalti.scripts.train_tokenizer import TrainTokenizerConfig
from smalti.tokenizer.discriminators.patchgan import PatchGANConfig
from smalti.tokenizer.losses.objective import ObjectiveConfig
from smalti.tokenizer.presets import PRESETS as TOKENIZERS


@dataclass(frozen=True)
class Scale:
    """How much the demo does: for next-token priors, and what others do differently."""

    tokenizer: TrainTokenizerConfig
    prior: TrainPriorConfig
    others: dict[str, tuple[str, str, dict[str, Any]]]  # kind: tokenizer, prior, changes of recipe
    num_samples: int
    classifier_epochs: int
    num_references: int = 20_000  # training pictures that samples are held against
    sampling: Sampling = field(default_factory=Sampling)

    def of_kind(self, kind: str) -> "Scale":
        """The same for another kind of prior."""
        if kind not in self.others:
            return self
        tokenizer, prior, changes = self.others[kind]
        return replace(
            self,
            tokenizer=replace(self.tokenizer, tokenizer=TOKENIZERS[tokenizer]),
            prior=replace(self.prior, prior=PRIORS[prior], **changes),
            sampling=SAMPLING.get(kind, self.sampling),
        )


SAMPLING = {"flow": Sampling(num_inference_steps=12)}
TOKENIZER_CPU = TrainTokenizerConfig(
    tokenizer=TOKENIZERS["vq-32-tiny"],
    objective=ObjectiveConfig(
        perceptual_weight=0.3,
        adversarial_weight=0.05,
        adaptive=True,
        adversarial_start=250,
        adversarial_ramp=150,
        discriminator=PatchGANConfig(channels=32, num_layers=2),
    ),
    max_train_steps=550,
    train_batch_size=64,
    learning_rate=1e-3,
    lr_warmup_steps=50,
    lr_final_ratio=0.05,
    adam_beta2=0.99,
    ema_decay=0.995,
    validation_steps=275,
    checkpointing_steps=275,
)
PRIOR_CPU = TrainPriorConfig(
    prior=PRIORS["gpt-nano"],
    max_train_steps=850,
    train_batch_size=64,
    learning_rate=1e-3,
    lr_warmup_steps=40,
    lr_final_ratio=0.05,
    weight_decay=0.05,
    ema_decay=0.99,
    validation_steps=425,
    checkpointing_steps=425,
)
OTHERS_CPU: dict[str, tuple[str, str, dict[str, Any]]] = {
    "next-scale": ("var-32-tiny", "var-nano", {}),
    "flow": ("kl-32-tiny", "flow-nano", {}),
}
SCALES = {
    "quick": Scale(
        replace(TOKENIZER_CPU, max_train_steps=120, validation_steps=120),
        replace(
            PRIOR_CPU,
            prior=replace(PRIORS["gpt-nano"], depth=4, width=192, num_heads=3),
            learning_rate=2e-3,
            max_train_steps=260,
            validation_steps=260,
        ),
        others=OTHERS_CPU,
        num_samples=256,
        num_references=2000,
        classifier_epochs=6,
    ),
    "cpu": Scale(TOKENIZER_CPU, PRIOR_CPU, others=OTHERS_CPU, num_samples=768, classifier_epochs=8),
    "gpu": Scale(
        replace(
            TOKENIZER_CPU,
            tokenizer=TOKENIZERS["vq-64-small"],
            max_train_steps=6000,
            train_batch_size=128,
            learning_rate=4e-4,
            ema_decay=0.999,
            validation_steps=1000,
            checkpointing_steps=1000,
            objective=replace(
                TOKENIZER_CPU.objective,
                adversarial_start=2000,
                adversarial_ramp=500,
                discriminator=PatchGANConfig(channels=64, num_layers=3),
            ),
        ),
        replace(
            PRIOR_CPU,
            prior=PRIORS["gpt-micro"],
            max_train_steps=6000,
            train_batch_size=256,
            learning_rate=6e-4,
            ema_decay=0.999,
            validation_steps=1000,
            checkpointing_steps=1000,
        ),
        others={
            "next-scale": ("var-64-small", "var-micro", {}),
            "flow": ("kl-64-small", "flow-micro", {}),
        },
        num_samples=2048,
        classifier_epochs=20,
    ),
}
