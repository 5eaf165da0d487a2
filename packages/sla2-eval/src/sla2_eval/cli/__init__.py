"""The sla2 command."""
