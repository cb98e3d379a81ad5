"""What devices, aggregators and helpers say to each other: messages, codec, sealing, chunking, topics, manifests.

Pure: nothing in this package opens a file or a socket, reads a clock, or draws a random number that was not
handed to it (the exceptions are ``cryptography``'s own key generation and HPKE encapsulation).
"""

PROTOCOL_VERSION = 1
"""Version carried by every message; a peer refuses any other."""
