"""The nodes of the vla_ros package and their bridge to ROS 2.

The generated `vla_ros/msg` is installed apart from this source tree (into the environment's
site-packages); extending the path lets one `vla_ros` hold both.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
