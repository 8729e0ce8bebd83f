"""Distributed training: FSDP2, optimizers per component, exact resume, checkpoints."""
