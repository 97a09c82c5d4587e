"""Publish a model with its card and results, and verify what is published."""
