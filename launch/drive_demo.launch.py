"""A policy drives the simulated vehicle: `ros2 launch vla_ros drive_demo.launch.py`."""

from launch import LaunchDescription

from vla_ros.launching import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description("drive_demo")
