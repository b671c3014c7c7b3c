"""Tokenizer and prior as one object, saved and loaded like any Hugging Face model."""

from smalti.pipelines.generation import generate_folder
from smalti.pipelines.pipeline import Pipeline, PipelineOutput

__all__ = ["Pipeline", "PipelineOutput", "generate_folder"]
