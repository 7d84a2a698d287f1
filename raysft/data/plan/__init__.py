"""The plan: which examples are in which (step, lane). Pure functions of index, config and seed."""
