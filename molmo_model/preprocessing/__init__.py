"""From an example to token ids, crops and pooling indices, the same for training, evaluation and generation."""
