"""A device's radio: links, transfers that queue and get lost, and the broker connection over them."""
