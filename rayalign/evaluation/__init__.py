"""How good a policy is: win rates with intervals, and the names of what is measured."""
