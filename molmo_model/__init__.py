"""The core: torch and transformers, no orchestrator. Molmo-style vision-language models, their data, training and evaluation."""
