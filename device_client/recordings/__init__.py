"""The wearer's recordings: labelled windows, kept on the device only."""
