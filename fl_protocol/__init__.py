"""What devices, aggregators and helpers say to each other: messages, codec, sealing, chunking, topics.

Pure: nothing here outside ``fl_protocol.adapters`` opens a file or a socket, reads a clock, or draws a random number
that was not handed to it (the exceptions are ``cryptography``'s own key generation and HPKE encapsulation).
"""

PROTOCOL_VERSION = 1
"""Version carried by every message; a peer refuses any other."""
