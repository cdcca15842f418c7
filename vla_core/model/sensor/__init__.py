"""Sensor encoders; importing any of them registers all of them."""

from vla_core.model.sensor.base import SENSOR_REGISTRY as SENSOR_REGISTRY
from vla_core.model.sensor.base import SensorEncoder as SensorEncoder
from vla_core.model.sensor.base import build_sensor as build_sensor
from vla_core.model.sensor.imu_encoder import IMUConfig as IMUConfig
from vla_core.model.sensor.imu_encoder import IMUEncoder as IMUEncoder
from vla_core.model.sensor.lidar_encoder import PointCloudConfig as PointCloudConfig
from vla_core.model.sensor.lidar_encoder import PointCloudEncoder as PointCloudEncoder
from vla_core.model.sensor.path_encoder import PathConfig as PathConfig
from vla_core.model.sensor.path_encoder import PathEncoder as PathEncoder
from vla_core.model.sensor.radar_encoder import RadarConfig as RadarConfig
from vla_core.model.sensor.radar_encoder import RadarEncoder as RadarEncoder
from vla_core.model.sensor.state_encoder import StateConfig as StateConfig
from vla_core.model.sensor.state_encoder import StateEncoder as StateEncoder
