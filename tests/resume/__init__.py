"""Interrupt it anywhere: killed and continued is uninterrupted, to the bit, and no file is lost or another's."""
