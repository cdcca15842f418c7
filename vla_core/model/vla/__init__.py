"""Whole models; importing any of them registers all of them."""

from vla_core.model.vla.base import MODEL_REGISTRY as MODEL_REGISTRY
from vla_core.model.vla.base import PolicyModel as PolicyModel
from vla_core.model.vla.base import build_model as build_model
from vla_core.model.vla.mini_vla import MiniVLA as MiniVLA
from vla_core.model.vla.mini_vla import MiniVLAConfig as MiniVLAConfig
from vla_core.model.vla.mini_vla import MiniVLARecipe as MiniVLARecipe
from vla_core.model.vla.multi_sensor_vla import MultiSensorConfig as MultiSensorConfig
from vla_core.model.vla.multi_sensor_vla import MultiSensorRecipe as MultiSensorRecipe
from vla_core.model.vla.multi_sensor_vla import MultiSensorVLA as MultiSensorVLA
from vla_core.model.vla.openvla import OpenVLA as OpenVLA
from vla_core.model.vla.openvla import OpenVLAConfig as OpenVLAConfig
from vla_core.model.vla.openvla import OpenVLARecipe as OpenVLARecipe
from vla_core.model.vla.smolvla import SmolVLA as SmolVLA
from vla_core.model.vla.smolvla import SmolVLAConfig as SmolVLAConfig
from vla_core.model.vla.smolvla import SmolVLARecipe as SmolVLARecipe
from vla_core.model.vla.vla_model import VLAConfig as VLAConfig
from vla_core.model.vla.vla_model import VLAModel as VLAModel
from vla_core.model.vla.vla_model import VLARecipe as VLARecipe
