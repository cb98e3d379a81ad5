"""Where a simulated wearer's recordings come from: replayed people, synthetic ones, and what is wrong with both."""
