"""What winners go through after the search: fine-tuning with distillation, then quantisation (`nas.quantise`)."""

from nas.compress.distil import finetune

__all__ = ["finetune"]
