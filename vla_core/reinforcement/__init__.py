"""Reinforcement learning in the simulator: what a policy learns beyond its demonstrations."""
