"""The axis of number formats of the sparse branch."""
