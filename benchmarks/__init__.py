"""Each headline number as one command, beside the peer it is compared with."""
