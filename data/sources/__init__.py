"""Image sources: one file for each kind; `base.SOURCES` is the registry."""
