"""Options of the commands, one class each; importable without torch."""

from ossia.config.base import Config
from ossia.config.bench import BenchConfig
from ossia.config.board import BoardConfig
from ossia.config.data import CheckConfig, PreviewConfig, StatsConfig
from ossia.config.demo import DemoConfig
from ossia.config.export import ExportConfig
from ossia.config.infer import InferConfig
from ossia.config.plan import PlanConfig
from ossia.config.serve import ServeConfig
from ossia.config.sft import SftConfig
from ossia.config.verify import VerifyConfig

__all__ = [
    "BenchConfig",
    "BoardConfig",
    "CheckConfig",
    "Config",
    "DemoConfig",
    "ExportConfig",
    "InferConfig",
    "PlanConfig",
    "PreviewConfig",
    "ServeConfig",
    "SftConfig",
    "StatsConfig",
    "VerifyConfig",
]
