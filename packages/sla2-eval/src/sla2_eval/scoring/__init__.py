"""Metrics, and the workers that compute them."""
