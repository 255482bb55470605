"""`gkd plan`: what a run will need, take and wait for."""
