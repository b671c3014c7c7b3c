"""The flow-matching and diffusion prior (SiT, Ma et al., 2401.08740)."""
