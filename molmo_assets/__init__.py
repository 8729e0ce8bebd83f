"""Dagster: when a stage runs and whether its result may be used, never how it is computed.

The assets are the artefacts of `pipelines/`; their partitions come from `params.yaml`; a data version is the digest of
an artefact's manifest. Start reading at `definitions.py`.
"""
