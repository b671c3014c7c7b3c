"""The published weights that smalti reads: one line each, resolved only when asked for.

A model is exported in the first layout that holds it; into a file, in the first that is a file.
"""

from smalti.hub import Registry

SOURCES = Registry(
    "source",
    {
        "llamagen-tokenizer": "smalti.pipelines.from_llamagen:LlamaGenTokenizer",
        "var-tokenizer": "smalti.pipelines.from_var:VARTokenizer",
        "taming-vqgan": "smalti.pipelines.from_taming:TamingVQGAN",
        "ldm-vq": "smalti.pipelines.from_latent_diffusion:LatentDiffusionVQ",
        "diffusers-kl": "smalti.pipelines.from_diffusers:DiffusersKL",
        "diffusers-vq": "smalti.pipelines.from_diffusers:DiffusersVQ",
        "ldm-kl": "smalti.pipelines.from_latent_diffusion:LatentDiffusionKL",
        "llamagen-prior": "smalti.pipelines.from_llamagen_prior:LlamaGenPrior",
        "var-prior": "smalti.pipelines.from_var_prior:VARPrior",
        "sit": "smalti.pipelines.from_sit:SiT",
        "diffusers-dit": "smalti.pipelines.from_diffusers_dit:DiffusersDiT",
        "dit": "smalti.pipelines.from_dit:DiT",
    },
)
