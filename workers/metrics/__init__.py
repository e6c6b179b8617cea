"""Serves what the supervisor says of VNet as Prometheus metrics."""
