"""The axis of routers: which blocks each query block attends to exactly."""
