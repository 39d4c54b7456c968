"""Steps that are launched as a whole, in pieces over memory that stays where it is."""
