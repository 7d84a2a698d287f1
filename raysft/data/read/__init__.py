"""Reading: planned rows become micro-batches, in process or through tasks of Ray."""
