"""What the machine and the cluster are: nodes, caches, hubs, shares of a test machine, the version of the code."""
