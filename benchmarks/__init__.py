"""What measures this project, run from the checkout: the suites of `sla2 bench`, and scripts of
their own.
"""
