"""One thin entry per stage: `python -m pipelines.<stage>`, the only implementation that DVC and Dagster both run."""
