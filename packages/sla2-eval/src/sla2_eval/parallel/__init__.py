"""Tasks side by side: processes on this machine, Ray beyond."""
