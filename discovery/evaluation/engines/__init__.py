"""Engines that run replay jobs: this process, a pool of processes, or Ray. All give the same results.

Imported by evaluation, promotion, search and commands. Imports replay jobs, data, the pools of workers and errors.
"""

from discovery.evaluation.engines.engine import Engine, EngineName, RecordingBatch, make_engine, make_job_pool
from discovery.evaluation.engines.job_pools import JobPool, ProcessJobPool
from discovery.evaluation.engines.ray_jobs import RayJobPool, RaySubmit

__all__ = [
    "Engine",
    "EngineName",
    "JobPool",
    "ProcessJobPool",
    "RayJobPool",
    "RaySubmit",
    "RecordingBatch",
    "make_engine",
    "make_job_pool",
]
