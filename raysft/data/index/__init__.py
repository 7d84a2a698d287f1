"""The index: the table of all examples with their lengths. Built once, cached, hashed."""
