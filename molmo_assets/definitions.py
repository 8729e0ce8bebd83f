"""Everything that Dagster loads, in one object; `workspace.yaml` and `[tool.dg]` name this module."""

import dagster as dg

from molmo_assets.assets import ASSETS
from molmo_assets.automation import SCHEDULES, SENSORS
from molmo_assets.checks import CHECKS
from molmo_assets.jobs import JOBS
from molmo_assets.resources import StageProcess

defs = dg.Definitions(
    assets=ASSETS,
    asset_checks=CHECKS,
    jobs=JOBS,
    schedules=SCHEDULES,
    sensors=SENSORS,
    resources={"stage_process": StageProcess()},
    executor=dg.in_process_executor,  # a step in a process of its own costs 4 to 6 s, and the long ones have one anyway
)
