"""Weight wires: one file per wire, both ends in it."""
