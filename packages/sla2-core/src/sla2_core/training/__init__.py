"""Training in two stages: capture of Q, K, V, the router and alpha on captures, then the model with
low bit on.
"""
