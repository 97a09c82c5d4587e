"""Data: loading, decoding and streaming images, and the transforms on the device."""
