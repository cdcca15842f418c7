"""Action heads; importing any of them registers all of them."""

from vla_core.model.action_head.action_chunker import ActionChunker as ActionChunker
from vla_core.model.action_head.action_chunker import ActionChunkerConfig as ActionChunkerConfig
from vla_core.model.action_head.base import ACTION_HEAD_REGISTRY as ACTION_HEAD_REGISTRY
from vla_core.model.action_head.base import ActionHeadBase as ActionHeadBase
from vla_core.model.action_head.base import build_action_head as build_action_head
from vla_core.model.action_head.diffusion_action_head import DiffusionActionHead as DiffusionActionHead
from vla_core.model.action_head.diffusion_action_head import DiffusionHeadConfig as DiffusionHeadConfig
from vla_core.model.action_head.discrete_action_head import DiscreteActionHead as DiscreteActionHead
from vla_core.model.action_head.discrete_action_head import DiscreteHeadConfig as DiscreteHeadConfig
from vla_core.model.action_head.flow_action_head import FlowActionHead as FlowActionHead
from vla_core.model.action_head.flow_action_head import FlowHeadConfig as FlowHeadConfig
from vla_core.model.action_head.gaussian_action_head import GaussianHeadConfig as GaussianHeadConfig
from vla_core.model.action_head.gaussian_action_head import GaussianMLPActionHead as GaussianMLPActionHead
from vla_core.model.action_head.mlp_action_head import MLPActionHead as MLPActionHead
from vla_core.model.action_head.mlp_action_head import MLPHeadConfig as MLPHeadConfig
from vla_core.model.action_head.transformer_action_head import TransformerActionHead as TransformerActionHead
from vla_core.model.action_head.transformer_action_head import TransformerHeadConfig as TransformerHeadConfig
