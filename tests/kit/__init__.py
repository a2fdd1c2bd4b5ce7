"""Shared parts of the tests: the only thing that one test file may import of another."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
