"""Code that both stages share: the run, checkpoints, EMA, optimization, signals, logs."""
