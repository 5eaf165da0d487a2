"""From results to one HTML page, tables and JSON."""
