"""Environments in a browser."""
