"""From an example to token ids, crops and pooling indices. The same code serves training, evaluation and `pipelines.generate`."""
