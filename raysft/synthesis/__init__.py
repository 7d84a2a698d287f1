"""From a run to sound: what a model speaks, and what makes waves of it. Needs no Ray."""
