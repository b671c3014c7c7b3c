"""Metrics of pictures and features, each with the protocol that made it."""
