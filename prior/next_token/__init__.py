"""The next-token prior (LlamaGen, Sun et al., 2406.06525)."""
