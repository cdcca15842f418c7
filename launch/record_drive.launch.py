"""The expert drives the simulated vehicle, a recorder writes its bags: `ros2 launch vla_ros record_drive.launch.py`."""

from launch import LaunchDescription

from vla_ros.launching import launch_description


def generate_launch_description() -> LaunchDescription:
    return launch_description("record_drive")
