"""What a driver tells rank 0 of a run, obeyed after the step at hand."""

SAVE = 1  # once: a node will be taken away
LEAVE = 2  # save and leave, now and whenever started again
