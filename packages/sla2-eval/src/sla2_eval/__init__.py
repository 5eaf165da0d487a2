"""Generation, scoring and reports for attention variants of video diffusion transformers, and the
`sla2` command.
"""
