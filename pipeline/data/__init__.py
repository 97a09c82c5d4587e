"""Images in: loading, decoding, streaming, and the transforms on the device."""
