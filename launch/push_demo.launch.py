"""A policy in closed loop with the simulator: `ros2 launch vla_ros push_demo.launch.py`."""

from launch import LaunchDescription

from vla_ros.launching import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description("push_demo")
