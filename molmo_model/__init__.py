"""The core: Molmo-style vision-language models, their data, training and evaluation. Knows no orchestrator."""
