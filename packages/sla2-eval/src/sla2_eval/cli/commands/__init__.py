"""One module a subcommand of `sla2`; each defines `command` and imports what it needs
when it runs.
"""
