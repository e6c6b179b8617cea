"""The privileged process: devices, sockets, workers, status."""
