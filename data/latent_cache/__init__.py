"""Latents on disk between the stages: encoded once, read many times."""
