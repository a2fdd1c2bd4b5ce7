"""Windows of micro-batches, from a map-style dataset or a stream."""
