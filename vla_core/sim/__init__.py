"""Simulated robots without ROS: they speak serialized messages, so that nodes and evaluators see the same bytes."""
