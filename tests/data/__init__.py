"""Any data is counted right: datasets and streams, uneven, empty or failing."""
