"""Two-stage evaluation: a journal of predictions, then metrics as pure functions."""
