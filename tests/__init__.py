"""A folder a promise; kit/ is what they share, faults/ what they must catch, benchmarks/ what is measured."""
