"""Variants over seeds: trained, generated, scored and compared."""
