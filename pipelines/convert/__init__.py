"""The sources of published weights by name; each is imported when it is first used.

The order matters for export: a model is written in the first layout that fits it; into a file, in
the first that is a single file.
"""

from smalti.hub import Registry

PUBLISHED_SOURCES = Registry(
    "source",
    {
        "llamagen-tokenizer": "smalti.pipelines.convert.llamagen:LlamaGenTokenizer",
        "var-tokenizer": "smalti.pipelines.convert.var:VARTokenizer",
        "taming-vqgan": "smalti.pipelines.convert.taming:TamingVQGAN",
        "ldm-vq": "smalti.pipelines.convert.latent_diffusion:LatentDiffusionVQ",
        "diffusers-kl": "smalti.pipelines.convert.diffusers_autoencoder:DiffusersKL",
        "diffusers-vq": "smalti.pipelines.convert.diffusers_autoencoder:DiffusersVQ",
        "ldm-kl": "smalti.pipelines.convert.latent_diffusion:LatentDiffusionKL",
        "llamagen-prior": "smalti.pipelines.convert.llamagen:LlamaGenPrior",
        "var-prior": "smalti.pipelines.convert.var:VARPrior",
        "sit": "smalti.pipelines.convert.dit:SiTSource",
        "diffusers-dit": "smalti.pipelines.convert.diffusers_dit:DiffusersDiT",
        "dit": "smalti.pipelines.convert.dit:DiTSource",
    },
)
