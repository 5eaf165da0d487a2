"""The axis of mixing: how the two branches become one output."""
