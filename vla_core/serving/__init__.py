"""A policy on another machine: openpi's websocket protocol, spoken by ``vla serve`` and by :class:`RemotePolicy`."""
