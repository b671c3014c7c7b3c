"""Metrics of images and features, each recorded with the protocol that produced it."""
