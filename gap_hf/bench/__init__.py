"""How fast a sparse model is on this machine, against the best that its dense form can be run with."""
