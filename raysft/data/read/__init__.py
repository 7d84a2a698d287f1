"""Reading: planned rows become micro-batches, in process or through Ray Data."""
