"""Message definitions of common ROS packages that not every environment has: vehicles' commands and transforms.

Field for field those of the packages of these names, so that what is written with one is read with the other. The type
store knows them without any installation; ``vla_ros.wheels`` builds those that an environment of Python wheels lacks.
"""

from __future__ import annotations

ACKERMANN_DRIVE = """\
float32 steering_angle           # rad, of a virtual front wheel in the middle; positive is left
float32 steering_angle_velocity  # rad/s; 0 means as fast as possible
float32 speed                    # m/s, of the rear axle's middle; negative is backwards
float32 acceleration             # m/s^2; 0 means as fast as possible
float32 jerk                     # m/s^3; 0 means as fast as possible
"""
ACKERMANN_DRIVE_STAMPED = """\
std_msgs/Header header
AckermannDrive drive
"""
TF_MESSAGE = """\
geometry_msgs/TransformStamped[] transforms
"""

# Package, to message name, to text.
DEFINITIONS: dict[str, dict[str, str]] = {
    "ackermann_msgs": {"AckermannDrive": ACKERMANN_DRIVE, "AckermannDriveStamped": ACKERMANN_DRIVE_STAMPED},
    "tf2_msgs": {"TFMessage": TF_MESSAGE},
}
