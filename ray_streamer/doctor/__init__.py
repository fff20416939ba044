"""What can this node do, what stands in the way of a load, and what should a load take here? Measured, with the load's own reader."""
