"""What a run is going to cost, before it is started."""
