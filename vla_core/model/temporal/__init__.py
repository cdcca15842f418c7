"""Memory over time."""

from vla_core.model.temporal.history import HistoryConfig as HistoryConfig
from vla_core.model.temporal.history import HistoryEncoder as HistoryEncoder
from vla_core.model.temporal.history import HistoryMemory as HistoryMemory
