"""For every test: hypothesis measures no time, since machines that are shared are slow at random."""

from hypothesis import settings

settings.register_profile("vla_ros", deadline=None)
settings.load_profile("vla_ros")
