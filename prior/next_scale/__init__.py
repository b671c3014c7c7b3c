"""The next-scale prior (VAR, Tian et al., 2404.02905)."""
