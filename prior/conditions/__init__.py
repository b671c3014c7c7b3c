"""The conditions that a prior accepts, one file each."""
