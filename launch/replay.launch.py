"""Play a bag to a live policy: `ros2 launch vla_ros replay.launch.py`."""

from launch import LaunchDescription

from vla_ros.launching import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description("replay")
