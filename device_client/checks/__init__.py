"""What ``covey-device doctor`` looks at: small functions over explicit inputs, one module per kind of thing."""
