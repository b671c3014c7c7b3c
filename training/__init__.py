"""What both stages share: the run, checkpoints, EMA, schedules, logs."""
