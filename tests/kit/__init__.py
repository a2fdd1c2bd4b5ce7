"""What tests share: nothing else is imported by one test from another."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
