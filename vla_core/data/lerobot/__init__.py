"""LeRobotDataset v3.0 and v2.1 on disk: written, and read whoever wrote them.

The formats are LeRobot's (https://github.com/huggingface/lerobot); this project's own files stand beside them in the
folder ``vla_ros``, which LeRobot does not look at.
"""
