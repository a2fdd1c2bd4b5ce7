"""Recipes: a task and the configuration that it trains well with."""
