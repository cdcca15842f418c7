"""For every test: hypothesis measures no time, since machines that are shared are slow at random."""

import signal

from hypothesis import settings

settings.register_profile("vla_ros", deadline=None)
settings.load_profile("vla_ros")

# A shell starts what runs in its background with SIGINT ignored, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
