"""The model: what is Molmo's own (layer selection, pooling, projection, feature insertion, the attention rule), composed with transformers' vision encoders and language models."""
