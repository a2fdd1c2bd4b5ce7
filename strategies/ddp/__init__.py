"""Distributed data parallelism."""
