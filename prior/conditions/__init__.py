"""What a prior may be conditioned on: one file per condition."""
