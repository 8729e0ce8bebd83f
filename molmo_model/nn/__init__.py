"""The model: what is Molmo's own, composed with transformers' vision encoders and language models.

Molmo's own are layer selection, pooling, projection, feature insertion and the attention rule.
"""
