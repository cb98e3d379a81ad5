"""A scenario: the TOML file that says which fleet is simulated, for how long, and what happens to it."""
