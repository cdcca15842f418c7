"""Planning: actions that a model expects much of, found by trying many of them out in imagination."""

from vla_core.planning.deadline import Deadline as Deadline
from vla_core.planning.plan import CEMConfig as CEMConfig
from vla_core.planning.plan import MPPIConfig as MPPIConfig
from vla_core.planning.plan import Plan as Plan
from vla_core.planning.plan import Planner as Planner
from vla_core.planning.plan import PlannerConfig as PlannerConfig
from vla_core.planning.plan import ShootingConfig as ShootingConfig
from vla_core.planning.plan import plan as plan
