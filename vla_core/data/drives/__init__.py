"""Recorded drives of other projects, nuScenes and KITTI, as bags: from there on they are like any robot's."""
