"""World models: an RSSM that is trained on sequences, and imagines what actions would lead to."""

from vla_core.model.world_model.distributions import CategoricalLatentConfig as CategoricalLatentConfig
from vla_core.model.world_model.distributions import GaussianLatentConfig as GaussianLatentConfig
from vla_core.model.world_model.distributions import KLBalance as KLBalance
from vla_core.model.world_model.distributions import TwoHotConfig as TwoHotConfig
from vla_core.model.world_model.model import WORLD_MODEL_REGISTRY as WORLD_MODEL_REGISTRY
from vla_core.model.world_model.model import Decoded as Decoded
from vla_core.model.world_model.model import WorldBatch as WorldBatch
from vla_core.model.world_model.model import WorldModel as WorldModel
from vla_core.model.world_model.model import WorldModelConfig as WorldModelConfig
from vla_core.model.world_model.model import WorldModelRecipe as WorldModelRecipe
from vla_core.model.world_model.model import build_world_model as build_world_model
from vla_core.model.world_model.rssm import RSSM as RSSM
from vla_core.model.world_model.rssm import Observed as Observed
from vla_core.model.world_model.rssm import RSSMConfig as RSSMConfig
from vla_core.model.world_model.rssm import State as State
