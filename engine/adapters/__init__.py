"""Tasks made of what was written for other libraries; none of them is imported before it is used."""

from engine.adapters.lightning import Lightning
from engine.adapters.transformers import CausalLM, MaskedLM, MoECausalLM, Seq2SeqLM, SequenceClassification

__all__ = ["CausalLM", "Lightning", "MaskedLM", "MoECausalLM", "Seq2SeqLM", "SequenceClassification"]
